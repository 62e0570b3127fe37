"""What the group needs of a transport: an all-to-all of byte tensors whose every message names epoch, step and phase.

One transport object serves one epoch: that of the next epoch is made beside it, and the old one is closed after the flip. So membership
never changes within a transport, and a failed one is thrown away. Implementations: `mapped` (peer memory on one host), `distributed`
(torch.distributed: gloo, NCCL). Called by the engine's thread, except `wake`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor


class StepMissed(Exception):
    """A peer did not take part in an exchange in time, or is gone: the step is dropped by all. suspects: ranks that were waited for."""

    def __init__(self, message: str, suspects: Sequence[int]) -> None:
        super().__init__(message)
        self.suspects = tuple(suspects)


class Transport(Protocol):
    """rank, size: of this process in the epoch. Steps count from 0 in every epoch; phase 0 is the step's start, others follow in order."""

    rank: int
    size: int

    def exchange(self, step: int, phase: int, parts: Sequence[Tensor]) -> list[Tensor]:
        """Send parts[r] (uint8, one-dimensional, on the transport's device, any length up to the capacity) to rank r; return what each rank
        sent here, by rank, one's own part among them. The returned tensors are valid until the exchange after the next.

        Blocks without spinning until all peers' parts of exactly this (epoch, step, phase) are here. Raises StepMissed after the deadline,
        or at once where a peer's process is gone; then the transport is of no more use.
        """

    def started(self, step: int) -> bool:
        """Whether a peer has begun `step`: its part of phase 0 is here. Raises StepMissed where a peer is gone."""

    def wait(self, step: int, timeout_s: float | None) -> bool:
        """Block until `started(step)`, `wake` or the time is up; whether a peer has begun. Raises StepMissed where a peer is gone."""

    def wake(self) -> None:
        """End a `wait` that runs, or the next one at once. From any thread."""

    def close(self) -> None:
        """Peers see this rank as gone. From any thread; an exchange that runs raises StepMissed."""
