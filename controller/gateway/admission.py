"""Who may come in: a bounded queue, and for the rest a 429 that says truthfully when to come back.

Counts choices from their arrival to their last byte. What the workers can run at once is not queue; everything beyond it is.
Keeps counts only: times are given to it.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Callable

from flexpert.controller.gateway.errors import ApiError

_FINISHES_KEPT = 256
_WINDOW_S = 60.0
_RETRY_UNKNOWN_S = 1
# OpenAI's clients ignore a Retry-After beyond this.
_RETRY_LONGEST_S = 120


class Admission:
    """`capacity` tells how many choices the workers run at once."""

    def __init__(self, *, max_queued: int, capacity: Callable[[], int]) -> None:
        self._max_queued = max_queued
        self._capacity = capacity
        self._finishes: deque[float] = deque(maxlen=_FINISHES_KEPT)
        self._idle = asyncio.Event()
        self._idle.set()
        self.in_flight = 0

    def admit(self, choices: int, *, now_s: float) -> None:
        """Count these in, or raise the 429. A request larger than the queue still enters one that is not full."""
        queued = self.in_flight - self._capacity()
        if queued >= self._max_queued:
            wait_s = retry_after_s(finishes_s=list(self._finishes), queued=queued, now_s=now_s)
            raise ApiError(
                429,
                f"The server is busy: {max(0, queued)} requests wait already, which is the limit. Try again in {wait_s} s.",
                code="rate_limit_exceeded",
                headers={"Retry-After": str(wait_s)},
            )
        self.in_flight += choices
        self._idle.clear()

    async def idle(self) -> None:
        """Until no request is left."""
        await self._idle.wait()

    def release(self, choices: int, *, now_s: float, served: bool) -> None:
        """These are over; `served` where a worker did the work, so that it tells how fast places become free."""
        self.in_flight -= choices
        if self.in_flight == 0:
            self._idle.set()
        if served:
            self._finishes.extend([now_s] * choices)


def retry_after_s(*, finishes_s: list[float], queued: int, now_s: float) -> int:
    """Seconds until an eighth of the queue is served, at the rate of the last minute: a returning crowd finds more than one place."""
    recent = [finish for finish in finishes_s if now_s - finish <= _WINDOW_S]
    if len(recent) < 2:
        return _RETRY_UNKNOWN_S
    per_second = (len(recent) - 1) / max(now_s - recent[0], 1e-3)
    places = max(1, math.ceil(queued / 8))
    return min(_RETRY_LONGEST_S, max(1, math.ceil(places / per_second)))
