"""Who may order sizes: one writer at a time, by a lease in a file that its owner renews at every tick.

A lease is free when it was given back, when it has run out, or when the process that had it is gone. Whoever does not have it looks on.
Taken and renewed under a lock on a file beside it, so two that try at once do not both get it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from flexpert.controller.processes import ProcessId
from flexpert.controller.runtime_dir import read_json, write_json


@dataclass(frozen=True)
class Held:
    """A lease: whose, since when, until when (unix time), and the process."""

    owner: str
    since_s: float
    until_s: float
    process: dict[str, object]


class Lease:
    """owner: names this writer, unique among all that ever try on this file. period_s: how long it holds without being renewed."""

    def __init__(self, path: Path, *, owner: str, period_s: float) -> None:
        self._path, self.owner, self.period_s = path, owner, period_s
        self._process = ProcessId.own(owner).to_json()

    def renew(self, now_s: float) -> bool:
        """Take it or keep it; False where another has it."""
        with self._locked():
            found = self.read()
            if found is not None and found.owner != self.owner and not self._is_over(found, now_s):
                return False
            since_s = found.since_s if found is not None and found.owner == self.owner else now_s
            held = Held(self.owner, since_s, now_s + self.period_s, dict(self._process))
            write_json(self._path, asdict(held))
            return True

    def release(self) -> None:
        """Give it back, where it is ours."""
        with self._locked():
            found = self.read()
            if found is not None and found.owner == self.owner:
                self._path.unlink(missing_ok=True)

    def read(self) -> Held | None:
        """Who has it; None where nobody has, or the file is no lease."""
        found = read_json(self._path)
        try:
            return None if found is None else Held(**{name: found[name] for name in Held.__dataclass_fields__})
        except KeyError:
            return None

    def _is_over(self, held: Held, now_s: float) -> bool:
        return now_s >= held.until_s or now_s < held.since_s - self.period_s or not _alive(held.process)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(self._path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


def _alive(process: dict[str, object]) -> bool:
    try:
        return ProcessId.from_json(process).alive
    except (KeyError, TypeError, ValueError):
        return True  # of another machine or another version: only time ends it
