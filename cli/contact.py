"""Whether the controller answers `flexpert up`: one that hangs is ended, one that took its place is told.

Ray restarts a controller that dies, and does not notice one that is stopped or hangs. Silence alone proves nothing: the machine may be
busy, or an answer long. So a silent controller is ended soon where a signal stopped it, later where none of its threads does anything,
and only after a long time where one computes. Its process is known from the file that it writes as it begins, so also one that hangs
before its first answer is found. Used by `up` only; knows no Ray.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path

from flexpert.controller.processes import ProcessId
from flexpert.controller.runtime_dir import read_json

STOPPED_S = 1.0
IDLE_S = 5.0
BUSY_S = 30.0
BUSY_SHARE = 0.5  # of the silence, that one thread was active


class Contact:
    """pid_file: RuntimeDir.controller_pid."""

    def __init__(self, pid_file: Path, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._pid_file, self._clock = pid_file, clock
        self._answered: ProcessId | None = None
        self._last_answer_s = 0.0
        self._reason = ""  # why the one that answered last is gone, where that is known
        self._silent: ProcessId | None = None  # who is being waited for
        self._silent_s = self._stopped_s = 0.0
        self._active_s: dict[int, float] = {}  # as the silence began

    def answered(self, pid: int) -> tuple[str, float] | None:
        """A controller answered. Where it is another one than before: what became of that one, and the seconds since its last answer."""
        now_s, before = self._clock(), self._answered
        away_s, self._last_answer_s, self._silent = now_s - self._last_answer_s, now_s, None
        if before is not None and before.pid == pid:
            return None
        self._answered = ProcessId.of(pid, "controller")
        reason, self._reason = self._reason or "the process ended unexpectedly (killed, or it crashed)", ""
        return None if before is None else (reason, away_s)

    def heard(self) -> None:
        """A controller answered that does not know yet where the cluster stands."""
        self._silent = None

    def lost(self, reason: str) -> None:
        """The controller is gone, for that reason; another one will answer."""
        self._reason = reason

    def unanswered(self, waited_s: float) -> str | None:
        """Nobody answered for so long. A controller that hangs is ended; returns what to tell then.

        Only time that was waited for an answer counts: `up` itself may have been stopped for a while.
        """
        process = self._process()
        if process is None or process != self._silent:
            self._silent, self._silent_s, self._stopped_s = process, 0.0, 0.0
            self._active_s = {} if process is None else process.active_s()
            return None
        self._silent_s += waited_s
        self._stopped_s = self._stopped_s + waited_s if process.stopped else 0.0
        reason = self._proof(process)
        if not reason or not process.signal(signal.SIGKILL):
            return None
        self._reason, self._silent = reason, None
        return f"the controller (pid {process.pid}) is ended: {reason}; Ray restarts it"

    def _proof(self, process: ProcessId) -> str:
        """Why it is taken to hang; "" where it may only be slow."""
        if self._stopped_s >= STOPPED_S:
            return f"a signal stopped it {self._stopped_s:.0f} s ago"
        if self._silent_s < IDLE_S:
            return ""
        active_s = max(
            (now_s - self._active_s.get(thread, 0.0) for thread, now_s in process.active_s().items()), default=0.0
        )
        if active_s >= BUSY_SHARE * self._silent_s and self._silent_s < BUSY_S:
            return ""
        return f"no answer for {self._silent_s:.0f} s"

    def _process(self) -> ProcessId | None:
        """The controller that runs now: the one that wrote the file, or else the one that answered last."""
        found = read_json(self._pid_file)
        written = None if found is None else ProcessId.from_json(found)
        return next((process for process in (written, self._answered) if process is not None and process.alive), None)
