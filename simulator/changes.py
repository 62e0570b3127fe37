"""How long changes of size take and what they cost the streams, from a cluster's events and the answers of a load that ran meanwhile. Pure.

begun ── join or leave ── committed ── (streams stand still: stall) ── a new standby is warm
      └───────────── steps take `starting` times as long ──────────────┘
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from flexpert.simulator.fit import MeasureError
from flexpert.simulator.profile import Duration, Profile

__all__ = ["Change", "read_changes", "with_changes"]


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


def with_changes(profile: Profile, changes: Sequence[Change], seen: Sequence[tuple[float, float]]) -> Profile:
    """profile with the times of these changes. seen: (unix time, time per output token) of answers. Raises MeasureError where workers
    neither joined nor left."""
    joins = [change.committed_s - change.began_s for change in changes if change.after > change.before]
    leaves = [change.committed_s - change.began_s for change in changes if change.after < change.before]
    if not joins or not leaves:
        raise MeasureError(f"{len(joins)} joins and {len(leaves)} leaves were seen: one of each is needed")
    warm = [change.calm_s - change.committed_s for change in changes if change.calm_s > change.committed_s]
    return Profile(
        **{name: getattr(profile, name) for name in profile.__struct_fields__}
        | {
            "join_warm": _duration(joins),
            "leave": _duration(leaves),
            "stall": _duration([change.stall_s for change in changes]),
            "standby_s": round(statistics.median(warm), 3) if warm else profile.standby_s,
            "starting": round(_starting(changes, seen), 3),
        }
    ).check()


def _starting(changes: Sequence[Change], seen: Sequence[tuple[float, float]]) -> float:
    """Time per token while processes started, over that at the same size when all was calm."""
    busy: dict[int, list[float]] = {}
    calm: dict[int, list[float]] = {}
    for at_s, tpot_s in seen:
        before = [change for change in changes if change.began_s <= at_s]
        size = (
            changes[0].before
            if not before
            else before[-1].after
            if at_s >= before[-1].committed_s
            else before[-1].before
        )
        starting = bool(before) and at_s < before[-1].calm_s
        (busy if starting else calm).setdefault(size, []).append(tpot_s)
    ratios = [statistics.fmean(busy[size]) / statistics.fmean(calm[size]) for size in busy if size in calm]
    return max(1.0, statistics.median(ratios)) if ratios else 1.0


def _duration(seconds: Sequence[float]) -> Duration:
    return Duration(mean_s=round(statistics.fmean(seconds), 4), p95_s=round(max(seconds), 4))
