"""Processes by pid and start time: is it still that one, signal it, wait for its end, and never touch a stranger.

A pid alone may name another process by the time it is used. A ProcessId carries the start time too, and every signal goes through a
pidfd opened before the start time is compared, so what is signalled is what was recorded. Used by the controller and by the CLI, which
cleans up after a cluster that was killed. Linux only.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class ProcessId:
    """start_ticks: field 22 of /proc/PID/stat, clock ticks between boot and the start of the process."""

    pid: int
    start_ticks: int
    name: str = ""

    @classmethod
    def of(cls, pid: int, name: str = "") -> ProcessId | None:
        """The process that runs under this pid now; None where there is none."""
        start_ticks = _start_ticks(pid)
        return None if start_ticks is None else cls(pid, start_ticks, name)

    @classmethod
    def own(cls, name: str = "") -> ProcessId:
        found = cls.of(os.getpid(), name)
        assert found is not None, "this process runs"
        return found

    @classmethod
    def from_json(cls, data: dict[str, object]) -> ProcessId:
        return cls(int(str(data["pid"])), int(str(data["start_ticks"])), str(data.get("name", "")))

    def to_json(self) -> dict[str, object]:
        return {"pid": self.pid, "start_ticks": self.start_ticks, "name": self.name}

    @property
    def alive(self) -> bool:
        """Whether it runs; a zombie has ended."""
        return _start_ticks(self.pid) == self.start_ticks

    @property
    def stopped(self) -> bool:
        """Whether a signal stopped it (SIGSTOP) and none has let it go on."""
        fields = _stat_fields(self.pid)
        return fields is not None and fields[0] == "T" and int(fields[19]) == self.start_ticks

    def active_s(self) -> dict[int, float]:
        """Thread -> seconds since it began in which it computed or waited for a core; what waits for anything else is not active."""
        found = {}
        for path in Path(f"/proc/{self.pid}/task").glob("*/schedstat"):
            with contextlib.suppress(OSError):
                ran_ns, waited_ns, _ = path.read_text().split()
                found[int(path.parent.name)] = (int(ran_ns) + int(waited_ns)) / 1e9
        return found

    def open(self) -> int | None:
        """A pidfd of exactly this process, readable once it has ended; None where it is gone. The caller closes it."""
        try:
            pidfd = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return None
        if self.alive:
            return pidfd
        os.close(pidfd)
        return None

    def signal(self, number: signal.Signals) -> bool:
        """Send a signal; False where the process is gone."""
        pidfd = self.open()
        if pidfd is None:
            return False
        try:
            signal.pidfd_send_signal(pidfd, number)
        except ProcessLookupError:
            return False
        finally:
            os.close(pidfd)
        return True

    def wait(self, timeout_s: float) -> bool:
        """Wait for its end; False where it still runs after timeout_s."""
        pidfd = self.open()
        if pidfd is None:
            return True
        try:
            return bool(select.select([pidfd], [], [], max(0.0, timeout_s))[0])
        finally:
            os.close(pidfd)


def end_all(processes: Iterable[ProcessId], *, grace_s: float) -> list[ProcessId]:
    """SIGTERM to each that still runs, SIGKILL to those that are there after grace_s; returns those that had to be ended."""
    running = [process for process in processes if process.signal(signal.SIGTERM)]
    deadline_s = time.monotonic() + grace_s
    for process in running:
        if not process.wait(deadline_s - time.monotonic()):
            process.signal(signal.SIGKILL)
            process.wait(5.0)
    return running


def children(root: ProcessId) -> list[ProcessId]:
    """All descendants of a running process, named by their command."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (fields := _stat_fields(int(entry.name))) is not None:
            parents.setdefault(int(fields[1]), []).append(int(entry.name))
    found: list[ProcessId] = []
    pending = [root.pid]
    while pending:
        for pid in parents.get(pending.pop(), []):
            pending.append(pid)
            with contextlib.suppress(OSError):
                if (process := ProcessId.of(pid, Path(f"/proc/{pid}/comm").read_text().strip())) is not None:
                    found.append(process)
    return found


def _start_ticks(pid: int) -> int | None:
    fields = _stat_fields(pid)
    return None if fields is None or fields[0] in ("Z", "X") else int(fields[19])


def _stat_fields(pid: int) -> list[str] | None:
    """/proc/PID/stat from the state (field 3) on: behind the name, which may hold spaces and parentheses."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
