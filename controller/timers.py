"""Events that come later, unless something overtakes them: deadlines of transitions, pauses before the next try.

What is overtaken goes at once: the deadline of a phase may be ten minutes away, and a cluster that scales often would hold thousands.
Used by `controller` only, in its loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Generic, TypeVar

Event = TypeVar("Event")


class Timers(Generic[Event]):
    """One for each `of`: a transition, a component. The next takes the place of the one before."""

    def __init__(self, send: Callable[[Event], None]) -> None:
        self._send = send
        self._handles: dict[str, asyncio.TimerHandle] = {}

    def __len__(self) -> int:
        return len(self._handles)

    def set(self, of: str, event: Event, *, after_s: float) -> None:
        """Send the event then, and none that was set before."""
        self.drop(of)
        self._handles[of] = asyncio.get_running_loop().call_later(after_s, self._ring, of, event)

    def drop(self, of: str) -> None:
        """It is not awaited any more; does nothing where none is."""
        handle = self._handles.pop(of, None)
        if handle is not None:
            handle.cancel()

    def _ring(self, of: str, event: Event) -> None:
        del self._handles[of]
        self._send(event)
