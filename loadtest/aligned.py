"""What the server did beside what its clients saw: its events as changes of size, and the requests that each of them touched. Pure.

Events are those of `GET /admin/v1/events` (docs/api.md): a transition's `begun`, `committed` and `ended` share its id; `begun` names the
workers before and after, `committed` those after. Used by the report.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flexpert.loadtest.measure import Interval, ServerEvent

__all__ = ["AFTER_S", "Change", "Touched", "changes", "decisions", "others", "touched", "troubles", "workers_over_time"]

AFTER_S = 30.0  # a change is answerable for the requests intended from its begin to so long after its end
_TROUBLES = ("died", "manager_died", "failed", "expired", "killed", "left_out", "gave_up")
_STEPS = ("begun", "committed", "aborting", "ended")


@dataclass(slots=True)
class Change:
    """One transition. before, after: numbers of workers, None where not told. committed_s: when the new size began to serve."""

    at_s: float
    text: str
    before: int | None = None
    after: int | None = None
    committed_s: float | None = None
    ended_s: float | None = None
    pause_s: float | None = None  # the longest that a worker stood still at the commit
    aborted: bool = False

    @property
    def label(self) -> str:
        sizes = "" if self.before is None or self.after is None else f"{self.before}→{self.after}"
        return f"{sizes} aborted".strip() if self.aborted else sizes


@dataclass(frozen=True, slots=True, kw_only=True)
class Touched:
    """Requests intended from a change's begin to AFTER_S after its end."""

    from_s: float
    to_s: float
    sent: int
    failed: int
    missed: int  # did not meet the objectives, failed ones included
    worst_ttft_p95_s: float | None


def changes(events: Sequence[ServerEvent]) -> list[Change]:
    """By their begin. A transition that the events show only in part is shown with that part."""
    found: dict[str, Change] = {}
    for event in events:
        if event.kind not in _STEPS:
            continue
        name = str(event.fields.get("transition_id", event.at_s))
        change = found.setdefault(name, Change(event.at_s, event.text))
        if event.kind == "begun":
            change.before = _count(event.fields.get("from_workers"))
            change.after = _count(event.fields.get("to_workers"))
        elif event.kind == "committed":
            change.committed_s = event.at_s
            change.after = _count(event.fields.get("to_workers"))
            change.pause_s = _longest(event.fields.get("pause_s"))
        elif event.kind == "aborting":
            change.aborted = True
        else:
            change.ended_s = event.at_s
    return sorted(found.values(), key=lambda change: change.at_s)


def others(events: Sequence[ServerEvent]) -> list[ServerEvent]:
    """What is no step of a transition."""
    return [event for event in events if event.kind not in (*_STEPS, "retired")]


def troubles(events: Sequence[ServerEvent]) -> list[ServerEvent]:
    """Deaths and failures."""
    return [event for event in events if event.kind in _TROUBLES]


def decisions(events: Sequence[ServerEvent]) -> list[ServerEvent]:
    """What a scaling policy decided to change."""
    return [event for event in events if event.kind == "scaling"]


def _count(workers: object) -> int | None:
    return len(workers) if isinstance(workers, list | tuple) else None


def _longest(pauses: object) -> float | None:
    values = list(pauses.values()) if isinstance(pauses, dict) else [pauses]
    return max((float(value) for value in values if isinstance(value, int | float)), default=None)


def workers_over_time(found: Sequence[Change], until_s: float) -> tuple[list[float], list[int]]:
    """Steps (time, workers from then on); empty where no change tells its sizes."""
    known = [change for change in found if change.before is not None and change.after is not None]
    if not known:
        return [], []
    steps = [(0.0, known[0].before or 0)]
    steps += [(change.committed_s, change.after or 0) for change in known if change.committed_s is not None]
    steps.append((max(until_s, steps[-1][0]), steps[-1][1]))
    return [at_s for at_s, _ in steps], [workers for _, workers in steps]


def touched(change: Change, timeline: Sequence[Interval]) -> Touched:
    """In whole steps of the timeline."""
    from_s, to_s = change.at_s, (change.ended_s or change.committed_s or change.at_s) + AFTER_S
    rows = [row for row in timeline if row.from_s + row.seconds > from_s and row.from_s < to_s]
    return Touched(
        from_s=rows[0].from_s if rows else from_s,
        to_s=rows[-1].from_s + rows[-1].seconds if rows else to_s,
        sent=sum(row.sent for row in rows),
        failed=sum(row.failed for row in rows),
        missed=sum(row.sent - row.met for row in rows),
        worst_ttft_p95_s=max((row.ttft_p95_s for row in rows if row.ttft_p95_s is not None), default=None),
    )
