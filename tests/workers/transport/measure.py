"""What an exchange costs: ranks as processes, each with one part of the given size for every rank. Prints the median and the tail.

Run by hand: python tests/workers/transport/measure.py --ranks 4 --part-bytes 16384 [--transport gloo]
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from flexpert.workers import transport as transports
from flexpert.workers.epoch import Epoch, Member


def connect(kind: str, rank: int, epoch: Epoch) -> transports.Transport:
    listener = transports.ExchangeListener(epoch.members[rank].exchange_address, token="measure")
    limits = {"token": "measure", "step_timeout_s": 30.0, "connect_timeout_s": 30.0}
    if kind == "mapped":
        return transports.connect_mapped(epoch, rank, listener, capacity_bytes=64 << 20, **limits)
    return transports.connect_distributed(epoch, rank, listener, torch.device("cpu"), **limits)


def run_rank(kind: str, rank: int, epoch: Epoch, part_bytes: int, steps: int, phases: int) -> list[float]:
    torch.set_num_threads(1)
    transport = connect(kind, rank, epoch)
    parts = [torch.zeros(part_bytes, dtype=torch.uint8) for _ in range(epoch.size)]
    seconds = []
    for step in range(steps):
        begun = time.perf_counter()
        for phase in range(phases):
            transport.exchange(step, phase, parts)
        seconds.append((time.perf_counter() - begun) / phases)
    transport.close()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--transport", choices=("mapped", "gloo"), default="mapped")
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--part-bytes", type=int, default=16384)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--phases", type=int, default=13)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="flexpert-measure-") as folder:
        members = tuple(
            Member(
                worker_id=f"worker-{rank}", incarnation=1, manager_socket="",
                exchange_address=f"unix:{folder}/{rank}" if arguments.transport == "mapped" else f"tcp:127.0.0.1:{47310 + rank}",
            )
            for rank in range(arguments.ranks)
        )  # fmt: skip
        epoch = Epoch(number=1, members=members, holders=())
        children = []
        for rank in range(1, arguments.ranks):
            if (child := os.fork()) == 0:
                wait_for_listeners(members[:rank], folder)
                run_rank(arguments.transport, rank, epoch, arguments.part_bytes, arguments.steps, arguments.phases)
                sys.stdout.flush()
                os._exit(0)
            children.append(child)
        seconds = run_rank(arguments.transport, 0, epoch, arguments.part_bytes, arguments.steps, arguments.phases)
        for child in children:
            os.waitpid(child, 0)
    milliseconds = sorted(1000 * each for each in seconds[len(seconds) // 10 :])
    tail = milliseconds[int(len(milliseconds) * 0.99)]
    print(
        f"{arguments.transport}: {arguments.ranks} ranks on {len(os.sched_getaffinity(0))} cores, {arguments.part_bytes} bytes a part: "
        f"median {statistics.median(milliseconds):.3f} ms an exchange, 99% {tail:.3f} ms"
    )


def wait_for_listeners(members: tuple[Member, ...], folder: str) -> None:
    for member in members:
        if member.exchange_address.startswith("unix:"):
            while not Path(member.exchange_address.removeprefix("unix:")).exists():
                time.sleep(0.01)
        else:
            time.sleep(1)


if __name__ == "__main__":
    main()
