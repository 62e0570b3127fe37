"""A transport between threads of one process: the reference for what a transport does, and what other parts test with.

Parts are copied when sent, as with real peers, so a sender may reuse its tensors at once. `fail(rank)` is the death of a rank.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

from torch import Tensor

from flexpert.workers.transport.base import StepMissed

_Key = tuple[int, int]


class LocalGroup:
    """All ranks of one epoch; `transport(rank)` is given to the thread that plays that rank."""

    def __init__(self, size: int, *, step_timeout_s: float = 10.0) -> None:
        self.size = size
        self.step_timeout_s = step_timeout_s
        self.changed = threading.Condition()
        self.sent: list[dict[_Key, list[Tensor]]] = [{} for _ in range(size)]  # by sender; parts by receiver
        self.gone: set[int] = set()
        self._transports = [LocalTransport(self, rank) for rank in range(size)]

    def transport(self, rank: int) -> LocalTransport:
        return self._transports[rank]

    def fail(self, rank: int) -> None:
        """As if the process of `rank` were killed."""
        self._transports[rank].close()


class LocalTransport:
    """One rank's end. See `base.Transport`."""

    def __init__(self, group: LocalGroup, rank: int) -> None:
        self.rank = rank
        self.size = group.size
        self._group = group
        self._peers = [peer for peer in range(group.size) if peer != rank]
        self._taken: list[_Key] = []
        self._woken = False

    def exchange(self, step: int, phase: int, parts: Sequence[Tensor]) -> list[Tensor]:
        if len(parts) != self.size:
            raise ValueError(f"{len(parts)} parts for {self.size} ranks: one for each rank is needed")
        group, key = self._group, (step, phase)
        with group.changed:
            group.sent[self.rank][key] = [part.clone() for part in parts]
            group.changed.notify_all()
            deadline = time.monotonic() + group.step_timeout_s
            while missing := [peer for peer in self._peers if key not in group.sent[peer]]:
                self._check_open(step, phase)
                if dead := [peer for peer in missing if peer in group.gone]:
                    raise StepMissed(f"step {step} phase {phase}: ranks {dead} are gone", dead)
                if not group.changed.wait(deadline - time.monotonic()):
                    raise StepMissed(f"step {step} phase {phase}: ranks {missing} took no part in time", missing)
            self._forget_old(key)
            return [parts[rank] if rank == self.rank else group.sent[rank][key][self.rank] for rank in range(self.size)]

    def started(self, step: int) -> bool:
        with self._group.changed:
            return self._started(step)

    def wait(self, step: int, timeout_s: float | None) -> bool:
        with self._group.changed:
            self._group.changed.wait_for(lambda: self._woken or self._started(step), timeout_s)
            self._woken = False
            return self._started(step)

    def wake(self) -> None:
        with self._group.changed:
            self._woken = True
            self._group.changed.notify_all()

    def close(self) -> None:
        with self._group.changed:
            self._group.gone.add(self.rank)
            self._group.changed.notify_all()

    def _started(self, step: int) -> bool:
        self._check_open(step, 0)
        if dead := [peer for peer in self._peers if peer in self._group.gone]:
            raise StepMissed(f"before step {step}: ranks {dead} are gone", dead)
        return any((step, 0) in self._group.sent[peer] for peer in self._peers)

    def _check_open(self, step: int, phase: int) -> None:
        if self.rank in self._group.gone:
            raise StepMissed(f"step {step} phase {phase}: closed by this rank", ())

    def _forget_old(self, key: _Key) -> None:
        """Called when all have sent `key`: all have taken what was sent before it, but not all have taken `key`."""
        self._taken.append(key)
        for old in self._taken[:-1]:
            self._group.sent[self.rank].pop(old, None)
        del self._taken[:-1]
