"""What a worker made for an epoch, and the errors of the steps that make, enter and leave it. Used by `workers.membership`."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from flexpert.workers.ep import EpochExperts
from flexpert.workers.epoch import Epoch
from flexpert.workers.fetch import Fetched, HeldExperts
from flexpert.workers.group import NextEpoch
from flexpert.workers.kv_move import KvSender
from flexpert.workers.transport import Transport


class MembershipError(RuntimeError):
    """This step of a transition is not possible now; the message says what is."""


class PrepareAborted(MembershipError):
    """The epoch was aborted, or its time was up, while it was being prepared."""


@dataclass
class PreparedEpoch:
    """An epoch that this worker can flip to, steps in, or stepped in. rank None: it leaves. epoch None: alone, by nobody's plan.
    taken_over: segments that were fetched for an epoch that this one replaced."""

    epoch: Epoch | None
    rank: int | None
    names: tuple[str, ...]
    fetched: Fetched = field(default_factory=Fetched)
    taken_over: tuple[str, ...] = ()
    held: HeldExperts | None = None
    experts: EpochExperts | None = None
    transport: Transport | None = None
    following: NextEpoch = field(default_factory=lambda: NextEpoch(number=0))
    answer: dict[str, Any] = field(default_factory=dict)
    sender: KvSender | None = None
    handed_over: Future[list[str]] = field(default_factory=Future)

    @property
    def number(self) -> int:
        return -1 if self.epoch is None else self.epoch.number

    @property
    def names_to_drop(self) -> tuple[str, ...]:
        """What is here for this epoch alone, should it not be."""
        return (*self.taken_over, *self.fetched.names)

    def close(self) -> None:
        """Leave the epoch for good and unmap its experts, which nobody may use any more."""
        if self.transport is not None:
            self.transport.close()
        if self.sender is not None:
            self.sender.close()
        self.experts = None
        self.following.experts = self.following.exchange = self.following.group = None
        if self.held is not None:
            self.held.close()
        self.held = self.transport = None
