"""A small event loop of the daemon: descriptors, timers, and work to be done when there is nothing else. One thread.

Callbacks must not block. `server` and `loads` register theirs here; `daemon` runs it.
"""

from __future__ import annotations

import heapq
import itertools
import selectors
import time
from collections.abc import Callable

READ, WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE
OnReady = Callable[[int], None]


class EventLoop:
    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._running = True
        self.idle: Callable[[], bool] = lambda: False  # does a small piece of work; whether there is more

    def watch(self, descriptor: int, events: int, on_ready: OnReady) -> None:
        self._selector.register(descriptor, events, on_ready)

    def change(self, descriptor: int, events: int) -> None:
        self._selector.modify(descriptor, events, self._selector.get_key(descriptor).data)

    def unwatch(self, descriptor: int) -> None:
        self._selector.unregister(descriptor)

    def call_later(self, delay_s: float, callback: Callable[[], None]) -> None:
        heapq.heappush(self._timers, (time.monotonic() + delay_s, next(self._order), callback))

    def stop(self) -> None:
        self._running = False

    def run(self) -> None:
        while self._running:
            more_to_do = self.idle()
            for key, events in self._selector.select(0 if more_to_do else self._until_next_timer()):
                current = self._selector.get_map().get(key.fd)
                if current is not None and current.data is key.data:  # not closed by a callback of this round
                    key.data(events)
            self._run_timers()

    def _until_next_timer(self) -> float | None:
        return max(0.0, self._timers[0][0] - time.monotonic()) if self._timers else None

    def _run_timers(self) -> None:
        while self._timers and self._timers[0][0] <= time.monotonic():
            heapq.heappop(self._timers)[2]()
