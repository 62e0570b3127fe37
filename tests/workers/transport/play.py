"""What a rank does in the tests of the transports: runs in a thread or a process of its own, called by `worlds`."""

from __future__ import annotations

import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from flexpert.workers import epoch as epochs
from flexpert.workers import transport as transports

TOKEN = "cluster-token"
CAPACITY_BYTES = 1 << 16
SIZES = (0, 0, 1, 2, 63, 64, 65, 127, 1000, 4096, 16001)


@dataclass(frozen=True)
class Missed:
    """A StepMissed, as it is told to the test."""

    suspects: tuple[int, ...]
    message: str
    kind: str = "StepMissed"


@dataclass(frozen=True)
class NotConnected:
    ranks: tuple[int, ...]
    message: str


def share_device(rank: int) -> str:
    """The CUDA device of a rank. Where there are fewer than ranks, NCCL is made to believe that each rank is a host of its own."""
    num_devices = torch.cuda.device_count()
    if rank >= num_devices or num_devices == 1:
        os.environ.update(NCCL_HOSTID=f"rank-{rank}", NCCL_SOCKET_IFNAME="lo", NCCL_IB_DISABLE="1")
    return f"cuda:{rank % num_devices}"


class Player:
    """One rank: its listener, and a transport for each name it was given."""

    def __init__(self) -> None:
        self.listener: transports.ExchangeListener | None = None
        self.transports: dict[str, transports.Transport] = {}
        self.device = torch.device("cpu")
        self.is_held, self.released = threading.Event(), threading.Event()

    def listen(self, address: str, token: str = TOKEN) -> str:
        self.listener = transports.ExchangeListener(address, token=token)
        return self.listener.address

    def connect(
        self, name: str, kind: str, epoch: bytes, rank: int, *, token: str = TOKEN, step_timeout_s: float = 20.0,
        connect_timeout_s: float = 30.0, capacity_bytes: int = CAPACITY_BYTES,
    ) -> NotConnected | None:  # fmt: skip
        self.device = torch.device(share_device(rank) if kind == "nccl" else "cpu")
        limits = {"token": token, "step_timeout_s": step_timeout_s, "connect_timeout_s": connect_timeout_s}
        decoded = epochs.decode(epoch)
        try:
            if kind == "mapped":
                made = transports.connect_mapped(decoded, rank, self.listener, capacity_bytes=capacity_bytes, **limits)
            else:
                made = transports.connect_distributed(decoded, rank, self.listener, self.device, **limits)
        except transports.ConnectError as error:
            return NotConnected(tuple(error.ranks), str(error))
        self.transports[name] = made
        return None

    def cancel(self, epoch_number: int) -> None:
        self.listener.cancel(epoch_number)

    def play(self, name: str, *, seed: int, steps: int, phases: int, largest: int = 0) -> int | Missed:
        """Exchange parts of random sizes (up to `largest` where given) and check every byte; how many exchanges were right.

        What an exchange returned is checked when it returns and once more after the next one.
        """
        transport = self.transports[name]
        done, before = 0, []
        for step in range(steps):
            for phase in range(phases):
                received = self._exchange(transport, seed, step, phase, largest)
                if isinstance(received, Missed):
                    return received
                for got, expected in [*received, *before]:
                    if not np.array_equal(got.cpu().numpy(), expected):
                        raise AssertionError(f"step {step} phase {phase}: other bytes than were sent")
                before = received
                done += 1
        return done

    def _exchange(self, transport, seed, step, phase, largest):
        parts = [
            torch.from_numpy(content(seed, step, phase, transport.rank, to, largest)).to(self.device)
            for to in range(transport.size)
        ]
        try:
            received = transport.exchange(step, phase, parts)
        except transports.StepMissed as error:
            return Missed(error.suspects, str(error), type(error).__name__)
        for part in parts:
            if part is not received[transport.rank]:
                part.fill_(255)  # the sender may reuse what it sent
        return [
            (got, content(seed, step, phase, sender, transport.rank, largest)) for sender, got in enumerate(received)
        ]

    def exchange(self, name: str, step: int, phase: int, text: bytes = b"x") -> list[bytes] | Missed:
        transport = self.transports[name]
        parts = [torch.tensor(list(text), dtype=torch.uint8, device=self.device) for _ in range(transport.size)]
        try:
            received = transport.exchange(step, phase, parts)
        except transports.StepMissed as error:
            return Missed(error.suspects, str(error), type(error).__name__)
        return [each.cpu().numpy().tobytes() for each in received]

    def started(self, name: str, step: int) -> bool | Missed:
        try:
            return self.transports[name].started(step)
        except transports.StepMissed as error:
            return Missed(error.suspects, str(error), type(error).__name__)

    def wait(self, name: str, step: int, timeout_s: float | None) -> bool | Missed:
        try:
            return self.transports[name].wait(step, timeout_s)
        except transports.StepMissed as error:
            return Missed(error.suspects, str(error), type(error).__name__)

    def wake(self, name: str) -> None:
        self.transports[name].wake()

    def close(self, name: str) -> None:
        self.transports.pop(name).close()

    def close_all(self) -> None:
        for name in list(self.transports):
            self.close(name)
        if self.listener is not None:
            self.listener.close()

    def hold(self, name: str) -> None:
        """The next exchange stops between its doorbells and its collective, until `release`."""
        group = self.transports[name]._group
        collective = group.all_to_all

        def held(*arguments) -> None:
            self.is_held.set()
            self.released.wait()
            collective(*arguments)

        group.all_to_all = held

    def held(self) -> None:
        self.is_held.wait()

    def release(self) -> None:
        self.released.set()

    def processor_seconds(self) -> float:
        return time.process_time()

    def resources(self) -> tuple[int, int, int]:
        """(open descriptors, threads, mapped exchange buffers) of this process."""
        maps = Path("/proc/self/maps").read_text()
        return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task")), maps.count("memfd:exchange-")


def content(seed: int, step: int, phase: int, sender: int, receiver: int, largest: int) -> np.ndarray:
    """uint8: what `sender` sends `receiver`, the same in every process."""
    random = np.random.default_rng([seed, step, phase, sender, receiver])
    size = random.integers(largest + 1) if largest else SIZES[random.integers(len(SIZES))]
    return random.integers(256, size=size, dtype=np.uint8)
