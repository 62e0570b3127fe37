"""How long changes of size take and what they cost the streams, from a cluster's events and the answers of a load that ran meanwhile. Pure.

begun ── join or leave ── committed ── (streams stand still: stall) ── a new standby is warm
      └───────────── steps take `starting` times as long ──────────────┘
"""

from __future__ import annotations

import statistics
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from flexpert.simulator.fit import MeasureError
from flexpert.simulator.profile import Duration, Profile

__all__ = ["Answer", "Change", "read_changes", "with_changes"]

Answer = tuple[float, float, float]  # unix times of its first and last token, time per output token


@dataclass(frozen=True)
class Change:
    """Times are unix times. calm_s: when the standby that it took had been replaced; its own end where it took none."""

    before: int
    after: int
    began_s: float
    committed_s: float
    calm_s: float
    stall_s: float


def read_changes(events: Sequence[Mapping[str, Any]], *, workers: int) -> list[Change]:
    """Those that were committed, from the admin API's events in their order. workers: before the first of them."""
    found: list[Change] = []
    begun: dict[str, Mapping[str, Any]] = {}
    size = workers
    for event in events:
        kind, name = event["kind"], str(event.get("transition_id", ""))
        if kind == "begun":
            begun[name] = event
        elif kind == "committed" and name in begun:
            after = len(event["to_workers"])
            pauses = (event.get("pause_s") or {}).values()
            at_s = float(event["time_s"])
            found.append(Change(size, after, float(begun.pop(name)["time_s"]), at_s, at_s, max(pauses, default=0.0)))
            size = after
        elif kind == "retired" and found:
            found[-1] = replace(found[-1], stall_s=max(found[-1].stall_s, float(event.get("pause_s") or 0.0)))
        elif kind == "warm" and found and found[-1].after > found[-1].before:
            found[-1] = replace(found[-1], calm_s=float(event["time_s"]))
    return found


def with_changes(profile: Profile, changes: Sequence[Change], seen: Sequence[Answer]) -> Profile:
    """profile with the times of these changes. seen: answers of the load meanwhile. Raises MeasureError where workers neither joined nor
    left."""
    joins = [change.committed_s - change.began_s for change in changes if change.after > change.before]
    leaves = [change.committed_s - change.began_s for change in changes if change.after < change.before]
    if not joins or not leaves:
        raise MeasureError(f"{len(joins)} joins and {len(leaves)} leaves were seen: one of each is needed")
    warm = [change.calm_s - change.committed_s for change in changes if change.calm_s > change.committed_s]
    return msgspec.structs.replace(
        profile,
        join_warm=_duration(joins),
        leave=_duration(leaves),
        stall=_duration([change.stall_s for change in changes]),
        standby_s=round(statistics.median(warm), 3) if warm else profile.standby_s,
        starting=round(_starting(changes, seen), 3),
    ).check()


def _starting(changes: Sequence[Change], seen: Sequence[Answer]) -> float:
    """Time per token while processes started, over that at the same size when all was calm; of answers that saw nothing else. Sizes
    count by their answers: a warm join is over before many have begun and ended in it, its standby's replacement takes seconds."""
    edges = sorted({at_s for change in changes for at_s in (change.began_s, change.committed_s, change.calm_s)})
    busy: dict[int, list[float]] = {}
    calm: dict[int, list[float]] = {}
    for first_s, last_s, tpot_s in seen:
        if bisect_right(edges, first_s) != bisect_left(edges, last_s):
            continue
        size, starting = _state(changes, first_s)
        (busy if starting else calm).setdefault(size, []).append(tpot_s)
    both = [size for size in busy if size in calm]
    if not both:
        return 1.0
    ratios = [statistics.fmean(busy[size]) / statistics.fmean(calm[size]) for size in both]
    counts = [len(busy[size]) for size in both]
    return max(1.0, sum(ratio * count for ratio, count in zip(ratios, counts, strict=True)) / sum(counts))


def _state(changes: Sequence[Change], at_s: float) -> tuple[int, bool]:
    """The size at a time, and whether processes started."""
    before = [change for change in changes if change.began_s <= at_s]
    if not before:
        return changes[0].before, False
    last = before[-1]
    return (last.after if at_s >= last.committed_s else last.before), at_s < last.calm_s


def _duration(seconds: Sequence[float]) -> Duration:
    return Duration(mean_s=round(statistics.fmean(seconds), 4), p95_s=round(max(seconds), 4))
