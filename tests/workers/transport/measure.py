"""What an exchange costs: ranks as processes, each with one part of the given size for every rank. Prints the median and the tail.

Run by hand: `python tests/workers/transport/measure.py --ranks 4 --part-bytes 16384 [--transport gloo|nccl]`.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from multiprocessing.connection import Connection

import torch

from flexpert.workers import transport as transports
from flexpert.workers.epoch import Epoch, Member


def run_rank(arguments: argparse.Namespace, rank: int, folder: str, parent: Connection) -> None:
    """Listen, learn where the others do, connect, exchange; answers with the seconds of an exchange, one number for each step."""
    torch.set_num_threads(1)
    device = (
        torch.device("cuda", rank % torch.cuda.device_count()) if arguments.transport == "nccl" else torch.device("cpu")
    )
    address = f"unix:{folder}/{rank}" if arguments.transport == "mapped" else "tcp:127.0.0.1:0"
    listener = transports.ExchangeListener(address, token="measure")
    parent.send(listener.address)
    members = tuple(
        Member(worker_id=f"worker-{peer}", incarnation=1, exchange_address=each, manager_socket="")
        for peer, each in enumerate(parent.recv())
    )
    epoch = Epoch(number=1, members=members, holders=())
    limits = {"token": "measure", "step_timeout_s": 30.0, "connect_timeout_s": 30.0}
    if arguments.transport == "mapped":
        transport = transports.connect_mapped(epoch, rank, listener, capacity_bytes=64 << 20, **limits)
    else:
        transport = transports.connect_distributed(epoch, rank, listener, device, **limits)
    parts = [torch.zeros(arguments.part_bytes, dtype=torch.uint8, device=device) for _ in members]
    seconds = []
    for step in range(arguments.steps):
        begun = time.perf_counter()
        for phase in range(arguments.phases):
            transport.exchange(step, phase, parts)
        seconds.append((time.perf_counter() - begun) / arguments.phases)
    parent.send((seconds[arguments.steps // 10 :], time.process_time()))
    parent.recv()
    transport.close()
    listener.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--transport", choices=("mapped", "gloo", "nccl"), default="mapped")
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--part-bytes", type=int, default=16384)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--phases", type=int, default=13, help="exchanges in a step: one, and two for each MoE layer")
    arguments = parser.parse_args()
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory(prefix="flexpert-measure-") as folder:
        ends = [context.Pipe() for _ in range(arguments.ranks)]
        ranks = [
            context.Process(target=run_rank, args=(arguments, rank, folder, theirs), daemon=True)
            for rank, (_, theirs) in enumerate(ends)
        ]
        for rank in ranks:
            rank.start()
        ours = [mine for mine, _ in ends]
        addresses = [each.recv() for each in ours]
        for each in ours:
            each.send(addresses)
        results = [each.recv() for each in ours]
        for each in ours:
            each.send("end")
        for rank in ranks:
            rank.join()
    milliseconds = sorted(1000 * each for seconds, _ in results for each in seconds)
    busy_ms = 1000 * sum(busy for _, busy in results) / (arguments.steps * arguments.phases)
    print(
        f"{arguments.transport}: {arguments.ranks} ranks on {len(os.sched_getaffinity(0))} cores, "
        f"{arguments.part_bytes} bytes a part: median {statistics.median(milliseconds):.3f} ms an exchange, "
        f"99% {milliseconds[int(len(milliseconds) * 0.99)]:.3f} ms; {busy_ms:.3f} ms of processor time, all ranks together"
    )


if __name__ == "__main__":
    main()
