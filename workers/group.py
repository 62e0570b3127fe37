"""One rank's part in an epoch: the lockstep of its group, and the values with which a worker moves from epoch to epoch.

All ranks of an epoch step together. A step begins with phase 0, an exchange of headers: how many tokens each rank brings, and to which
epoch it is ready to flip. A rank without tokens takes part when a peer has begun; when all are idle none steps. The ranks flip after the
first step whose headers all name the same next epoch. All read the same headers, so all decide alike.

Used by the engine, on its thread, except `wake` and `close`; made by `workers.membership`. Knows nothing of requests.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from flexpert.workers.ep import EpochExperts, ExpertExchange
from flexpert.workers.epoch import Epoch
from flexpert.workers.transport import StepMissed, Transport

_HEADER = struct.Struct("<qq")
NO_FLIP = -1


@dataclass(frozen=True, slots=True)
class Header:
    """What a rank says as it begins a step. flip_to: the epoch that it has prepared and was told to enter, or NO_FLIP."""

    num_tokens: int
    flip_to: int = NO_FLIP

    def encode(self) -> Tensor:
        return torch.frombuffer(bytearray(_HEADER.pack(self.num_tokens, self.flip_to)), dtype=torch.uint8)

    @classmethod
    def decode(cls, data: Tensor) -> Header:
        return cls(*_HEADER.unpack(data.cpu().numpy().tobytes()))


class Exchange(Protocol):
    """What the group needs of workers.ep.ExpertExchange."""

    def begin(self, step: int) -> None: ...


@dataclass(frozen=True, slots=True)
class Trouble:
    """Why a group can step no more. suspects: the workers that were waited for in vain, as far as is known."""

    epoch: int
    step: int
    suspects: tuple[str, ...]
    reason: str


class TroubleBell:
    """Who waits to be told of trouble. From any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: list[Future[Trouble | None]] = []
        self._closed = False

    def wait(self, now: Callable[[], Trouble | None]) -> Future[Trouble | None]:
        """Done at once where there is trouble `now`; None where there will be none any more."""
        waiter: Future[Trouble | None] = Future()
        with self._lock:
            trouble = now()
            if trouble is None and not self._closed:
                self._waiting.append(waiter)
                return waiter
        waiter.set_result(trouble)
        return waiter

    def ring(self, trouble: Trouble | None) -> None:
        with self._lock:
            waiting, self._waiting = self._waiting, []
        for waiter in waiting:
            if waiter.set_running_or_notify_cancel():
                waiter.set_result(trouble)

    def close(self) -> None:
        with self._lock:
            self._closed = True
        self.ring(None)


@dataclass(frozen=True, slots=True)
class Begun:
    """A step that all ranks have begun. num_tokens: of all ranks together; 0: nothing is computed."""

    num_tokens: int
    flips: bool


class Group:
    """Rank `rank` of `epoch`. `step` is the next one; it counts from 0."""

    def __init__(self, *, epoch: Epoch, rank: int, transport: Transport, exchange: Exchange) -> None:
        self.epoch = epoch
        self.rank = rank
        self.step = 0
        self._transport = transport
        self._exchange = exchange
        self._announced = NO_FLIP

    def must_begin(self, flip_to: int) -> bool:
        """Whether an idle rank has something to tell its peers: that it is ready to flip, once."""
        return flip_to not in (NO_FLIP, self._announced)

    def peers_began(self) -> bool:
        """Raises StepMissed."""
        return self._transport.started(self.step)

    def wait(self, timeout_s: float | None = None) -> bool:
        """Until a peer begins the next step (True) or `wake`. Raises StepMissed."""
        return self._transport.wait(self.step, timeout_s)

    def wake(self) -> None:
        self._transport.wake()

    def begin(self, header: Header) -> Begun:
        """Phase 0. Raises StepMissed."""
        received = self._transport.exchange(self.step, 0, [header.encode()] * self.epoch.size)
        headers = [Header.decode(part) for part in received]
        self._announced = header.flip_to
        num_tokens = sum(each.num_tokens for each in headers)
        if num_tokens:
            self._exchange.begin(self.step)
        flips = header.flip_to != NO_FLIP and all(each.flip_to == header.flip_to for each in headers)
        return Begun(num_tokens, flips)

    def end(self) -> None:
        self.step += 1

    def close(self) -> None:
        """Peers that still step in this epoch see this rank as gone."""
        self._transport.close()

    def trouble(self, error: Exception) -> Trouble:
        ranks = error.suspects if isinstance(error, StepMissed) else ()
        suspects = tuple(self.epoch.members[rank].worker_id for rank in ranks)
        reason = str(error) if isinstance(error, StepMissed) else f"{type(error).__name__}: {error}"
        return Trouble(self.epoch.number, self.step, suspects, reason)


@dataclass(frozen=True, slots=True)
class Flipped:
    """step: the last one of the former epoch, -1 where there was none. released: requests that a leaver gave back."""

    step: int
    pause_s: float
    released: tuple[str, ...] = ()


@dataclass(slots=True, kw_only=True)
class NextEpoch:
    """What an engine flips to. group: None alone, and for a leaver. experts and exchange are for `runner.use`; without experts the runner
    keeps what it uses."""

    number: int
    group: Group | None = None
    experts: EpochExperts | None = None
    exchange: ExpertExchange | None = None
    leaves: bool = False
    keeps: bool = False  # a leaver's requests stay until Engine.release
    done: Future[Flipped] = field(default_factory=Future)
