"""How long joins and commits took, phase by phase, as numbers: for events and for the metrics page. Pure.

A *cold* join had to wait for a process to be spawned, a *warm* one took a standby. A join runs from the moment a worker is wanted until
it has entered its epoch; its phases are process (and device), start, prepare, commit. A commit pause is the longest time that a
worker's requests stood still at a flip.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

PHASES = ("process", "start", "prepare", "commit")


@dataclass(slots=True)
class Series:
    count: int = 0
    sum_s: float = 0.0
    max_s: float = 0.0
    last_s: float = 0.0

    def add(self, seconds: float) -> None:
        self.count, self.sum_s = self.count + 1, self.sum_s + seconds
        self.max_s, self.last_s = max(self.max_s, seconds), seconds

    def to_json(self) -> dict[str, float]:
        return {
            "count": self.count,
            "sum_s": round(self.sum_s, 6),
            "max_s": round(self.max_s, 6),
            "last_s": round(self.last_s, 6),
        }


@dataclass(slots=True)
class Join:
    """A worker on its way: when it was wanted, and when each phase was over."""

    began_s: float
    cold: bool = False
    marked_s: float = 0.0
    phases: dict[str, float] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        return "cold" if self.cold else "warm"


class Timings:
    """`wanted`, `mark`, `joined` follow each join; `add` takes any other duration. Times are of one monotonic clock, in seconds."""

    def __init__(self) -> None:
        self._series: dict[str, Series] = {}
        self._joins: dict[str, Join] = {}
        self._kinds: dict[str, bool] = {}

    def add(self, name: str, seconds: float) -> None:
        self._series.setdefault(name, Series()).add(seconds)

    def wanted(self, worker_id: str, *, cold: bool, now_s: float) -> None:
        """The worker's way begins, or goes on with another process after the first one failed."""
        known = self._joins.get(worker_id)
        if known is None:
            self._joins[worker_id] = Join(began_s=now_s, marked_s=now_s, cold=cold)
        else:
            known.cold = known.cold or cold

    def is_cold(self, worker_id: str) -> bool | None:
        """How it joined last, or joins now; None where that is not known."""
        return self._kinds.get(worker_id) if worker_id not in self._joins else self._joins[worker_id].cold

    def mark(self, worker_id: str, phase: str, *, now_s: float) -> None:
        """`phase` of PHASES is over; what a second try takes is added."""
        if (join := self._joins.get(worker_id)) is not None:
            join.phases[phase] = round(join.phases.get(phase, 0.0) + now_s - join.marked_s, 4)
            join.marked_s = now_s

    def forget(self, worker_id: str) -> None:
        self._joins.pop(worker_id, None)

    def joined(self, worker_id: str, *, now_s: float) -> tuple[Join, float] | None:
        """The join and the seconds it took in all; None where this worker was not joining."""
        join = self._joins.pop(worker_id, None)
        if join is None:
            return None
        self._kinds[worker_id] = join.cold
        seconds = now_s - join.began_s
        self.add(f"join_{join.kind}", seconds)
        for phase, phase_s in join.phases.items():
            self.add(f"join_{join.kind}_{phase}", phase_s)
        return join, seconds

    def to_json(self) -> dict[str, Any]:
        """name -> {"count", "sum_s", "max_s", "last_s"}; names: join_cold, join_warm, each with _process, _start, _prepare and _commit, and
        commit_pause."""
        return {name: series.to_json() for name, series in sorted(self._series.items())}
