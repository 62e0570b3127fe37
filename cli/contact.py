"""Whether the controller answers `flexpert up`: one that is silent is ended, one that took its place is told.

Ray restarts a controller that dies, and does not notice one that is stopped or hangs. Its pid is known from its
answers. Used by `up` only; knows no Ray.
"""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Callable

from flexpert.controller.processes import ProcessId

SILENT_S = 5.0
log = logging.getLogger(__name__)


class Contact:
    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._process: ProcessId | None = None
        self._last_answer_s = 0.0
        self._unanswered_s = 0.0
        self._ended: str = ""

    def answered(self, pid: int) -> tuple[str, float] | None:
        """A controller answered. Where it is another one than before: what became of that one, and the seconds since its last answer."""
        now_s, before = self._clock(), self._process
        away_s, self._last_answer_s, self._unanswered_s = now_s - self._last_answer_s, now_s, 0.0
        if before is not None and before.pid == pid:
            return None
        self._process = ProcessId.of(pid, "controller")
        reason, self._ended = self._ended or "the process ended unexpectedly (killed, or it crashed)", ""
        return None if before is None else (reason, away_s)

    def lost(self, reason: str) -> None:
        """The controller is gone, for that reason; another one will answer."""
        self._ended = reason

    def unanswered(self, waited_s: float) -> str | None:
        """Nobody answered for so long. A controller that was silent for SILENT_S is ended; returns what to tell then.

        Only time that was waited for an answer counts: `up` itself may have been stopped for a while.
        """
        self._unanswered_s += waited_s
        process = self._process
        if process is None or self._ended or self._unanswered_s < SILENT_S:
            return None
        if not process.signal(signal.SIGKILL):
            return None  # it has ended by itself: Ray restarts it
        self._ended = f"no answer for {self._unanswered_s:.0f} s"
        return f"the controller (pid {process.pid}) is ended: {self._ended}; Ray restarts it"
