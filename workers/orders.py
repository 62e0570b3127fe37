"""Which epochs may still be prepared here, and how a prepare that runs is ended: orders come on threads of their own and overtake
each other.

Epoch numbers only grow and never return. So an abort counts also for a prepare that comes after it, a newer epoch ends the prepare of an
older one, and an abort that comes late does nothing to a newer epoch. Used by `workers.membership`.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence

from flexpert.workers.prepared import PrepareAborted

NONE = -1
AGAIN_S = 0.05


class Orders:
    """cancel_connect(number): whoever connects that epoch's ranks gives up. interrupt(names): a fetch of these fails."""

    def __init__(
        self, worker_id: str, *, cancel_connect: Callable[[int], None], interrupt: Callable[[Sequence[str]], None]
    ) -> None:
        self._worker_id = worker_id
        self._cancel_connect, self._interrupt = cancel_connect, interrupt
        self._newest = self._aborted = NONE
        self._preparing = NONE
        self._lock = threading.Lock()
        self._fetching: tuple[int, tuple[str, ...]] = (NONE, ())

    def came(self, number: int) -> None:
        """This epoch is to be prepared: those before it are not wanted any more."""
        with self._lock:
            self._newest = max(self._newest, number)

    def abort(self, number: int) -> None:
        with self._lock:
            self._aborted = max(self._aborted, number)

    def check(self, number: int, until_s: float) -> None:
        """Raises PrepareAborted where this epoch is not wanted any more, or its time is up."""
        if number <= self._aborted:
            raise PrepareAborted(f"epoch {number} was aborted before worker {self._worker_id} had prepared it")
        if number < self._newest:
            raise PrepareAborted(
                f"epoch {number} is not wanted any more on worker {self._worker_id}: epoch {self._newest} came after it"
            )
        if time.monotonic() > until_s:
            raise PrepareAborted(f"worker {self._worker_id} could not prepare epoch {number} in time")

    @contextlib.contextmanager
    def preparing(self, number: int) -> Iterator[None]:
        self._preparing = number
        try:
            yield
        finally:
            self._preparing = NONE

    @contextlib.contextmanager
    def fetching(self, number: int, names: Sequence[str], until_s: float) -> Iterator[None]:
        """Raises PrepareAborted. Whoever aborts afterwards interrupts this fetch, and none that comes after it."""
        with self._lock:
            self.check(number, until_s)
            self._fetching = (number, tuple(names))
        try:
            yield
        finally:
            with self._lock:
                self._fetching = (NONE, ())

    @contextlib.contextmanager
    def turn(self, lock: threading.RLock, *, ends: int) -> Iterator[None]:
        """Holds `lock`. A prepare of an epoch up to `ends` that holds it is ended: told so again and again, since it may not have begun
        to wait where it can be told."""
        self._end(ends)
        while not lock.acquire(timeout=AGAIN_S):
            self._end(ends)
        try:
            yield
        finally:
            lock.release()

    def _end(self, ends: int) -> None:
        preparing = self._preparing
        for number in {ends, preparing} if preparing <= ends else {ends}:
            if number != NONE:
                self._cancel_connect(number)
        with self._lock:
            number, names = self._fetching
            if number <= ends:
                self._interrupt(names)
