"""What the transports between processes have in common: they wait for a step's begin at their doorbells, and lay parts out aligned.

Base of `mapped` and `distributed`; how parts travel is theirs.
"""

from __future__ import annotations

from flexpert.workers.transport.doorbells import Doorbells

ALIGNMENT_BYTES = 64  # of a part, there and here: it can be viewed as any dtype


class DoorbellTransport:
    """The part of `base.Transport` that needs nothing but doorbells."""

    def __init__(self, rank: int, size: int, doorbells: Doorbells) -> None:
        self.rank = rank
        self.size = size
        self._doorbells = doorbells
        self._peers = [peer for peer in range(size) if peer != rank]

    def started(self, step: int) -> bool:
        with self._doorbells.busy:
            return self._doorbells.started(step)

    def wait(self, step: int, timeout_s: float | None) -> bool:
        with self._doorbells.busy:
            return self._doorbells.wait(step, timeout_s)

    def wake(self) -> None:
        self._doorbells.wake()


def round_up(nbytes: int, multiple_bytes: int = ALIGNMENT_BYTES) -> int:
    return -(-nbytes // multiple_bytes) * multiple_bytes
