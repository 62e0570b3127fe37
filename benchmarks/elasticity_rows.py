"""What a run of transitions under load shows: rows and goals from the cluster's own events and from what the clients saw."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import saved_run


def percentile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan")


def summary(what: str, values: Sequence[float], unit: str) -> list[dict[str, Any]]:
    if not values:
        return []
    return [
        {
            "what": f"{what}, {len(values)}",
            "median": statistics.median(values),
            "p99": percentile(values, 0.99),
            "max": max(values),
            "unit": unit,
        }
    ]


def commit_pauses_s(events: Sequence[dict[str, Any]]) -> list[float]:
    """How long the requests of each worker that stayed stood still at each flip."""
    return [event["pause_s"] for event in events if event["kind"] == "retired" and event.get("pause_s")]


def joins(events: Sequence[dict[str, Any]], *, cold: bool) -> list[dict[str, Any]]:
    """After boot: what was serving when the run began is no join."""
    return [event for event in events if event["kind"] == "joined" and event["epoch"] > 1 and event["cold"] == cold]


def join_rows(events: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    rows = []
    for name, cold in (("warm join", False), ("cold join", True)):
        found = joins(events, cold=cold)
        rows += summary(name, [event["seconds"] for event in found], "s")
        for phase in ("process", "start", "prepare", "commit"):
            rows += summary(f"{name}: {phase}", [event["phases"].get(phase, 0.0) for event in found], "s")
    return rows


def disturbance(
    pieces: Sequence[tuple[float, float]], windows: Sequence[tuple[float, float]], before_s: float = 2.0
) -> dict[str, float]:
    """Streams during transitions over streams just before them. pieces: (when, seconds since the piece before it) of all streams;
    windows: (begin, end) of the transitions. {"rate": pieces per second, ratio of medians; "gap_p99": ratio of p99 gaps}."""
    inside, outside = [], []
    rates = []
    for begin_s, end_s in windows:
        during = [gap for when_s, gap in pieces if begin_s <= when_s < end_s]
        earlier = [gap for when_s, gap in pieces if begin_s - before_s <= when_s < begin_s]
        if len(during) >= 10 and len(earlier) >= 10:
            rates.append((len(during) / (end_s - begin_s)) / (len(earlier) / before_s))
            inside += during
            outside += earlier
    if not rates:
        return {}
    return {"rate": statistics.median(rates), "gap_p99": percentile(inside, 0.99) / percentile(outside, 0.99)}


def goals(
    *,
    failed: int,
    different: int,
    finished: int,
    requests: int,
    done: int,
    transitions: int,
    events: Sequence[dict[str, Any]],
    step_s: float,
    disturbed: dict[str, float],
    restart_s: float | None,
    cold_join_s: float | None,
) -> list[dict[str, Any]]:
    found = [
        saved_run.goal("failed requests", failed, "<= 0"),
        saved_run.goal("answers that differ from a fixed cluster's", different, "<= 0"),
        saved_run.goal("requests under transitions", finished, f">= {requests}"),
        saved_run.goal("transitions done", done, f">= {transitions}"),
    ]
    if pauses := commit_pauses_s(events):
        bound_ms = max(2e3 * step_s, 50.0)
        found.append(saved_run.goal("commit pause, p99, ms", 1e3 * percentile(pauses, 0.99), f"<= {bound_ms:.0f}"))
    if warm := [event["seconds"] for event in joins(events, cold=False)]:
        found.append(saved_run.goal("warm join, median, s", statistics.median(warm), "<= 1"))
    if restart_s and cold_join_s:
        found.append(saved_run.goal("cold join over cold restart at the new size", cold_join_s / restart_s, "<= 0.25"))
    if disturbed:
        found.append(saved_run.goal("streams' rate during transitions over before", disturbed["rate"], ">= 0.95"))
        found.append(
            saved_run.goal("p99 gap in streams during transitions over before", disturbed["gap_p99"], "<= 1.1")
        )
    return found
