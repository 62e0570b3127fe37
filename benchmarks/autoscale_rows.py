"""What a spike did to a cluster: figures of one variant from its load test and its transitions, and goals over all variants."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import saved_run

from flexpert.loadtest.aligned import Change
from flexpert.loadtest.measure import Outcome, RunResult
from flexpert.loadtest.slo import met

WINDOW_S = 5.0
IN_A_ROW = 3  # windows that meet the SLO, before it counts as recovered
FIGURES = (
    "variant", "requests", "failed", "attainment", "attainment_in_spike", "recover_s", "windows_missed", "ttft_p95_s", "tpot_p95_s",
    "worker_s", "held_s", "worker_s_whole", "scale_events", "peak_workers", "workers_at_end", "lag_p99_ms", "generator",
)  # fmt: skip


@dataclass(frozen=True)
class Spike:
    """Seconds since the load began. compared_s: until then all variants have the same load; duration_s: to the end of the calm."""

    at_s: float
    length_s: float
    compared_s: float
    duration_s: float

    @property
    def end_s(self) -> float:
        return self.at_s + self.length_s


def more(change: Change) -> int:
    """Workers that it adds. Raises ValueError where the server's events do not tell its sizes."""
    if change.before is None or change.after is None:
        raise ValueError(
            f"the change of size at {change.at_s:.1f} s is told only in part ({change}): expected begun, with both sizes"
        )
    return change.after - change.before


def worker_seconds(workers: int, found: Sequence[Change], until_s: float) -> tuple[float, float]:
    """(seconds of workers that serve, of workers held: those that join or leave as well) from 0 to until_s."""
    serving = held = workers * until_s
    for change in found:
        added = more(change)
        committed_s = math.inf if change.committed_s is None else change.committed_s
        ended_s = math.inf if change.ended_s is None else change.ended_s
        serving += added * max(0.0, until_s - committed_s)
        # What joins is held from the begin on, what leaves until the end; an aborted join is given back at its end.
        if added > 0:
            held += added * max(0.0, (min(ended_s, until_s) if change.aborted else until_s) - change.at_s)
        elif not change.aborted:
            held += added * max(0.0, until_s - ended_s)
    return serving, held


def windows(outcomes: Sequence[Outcome], *, from_s: float, to_s: float) -> list[tuple[float, float]]:
    """(start, p95 of TTFT) of the windows in which requests were due; one that was not answered counts as endlessly late."""
    found: dict[int, list[float]] = {}
    for outcome in outcomes:
        if from_s <= outcome.intended_s < to_s:
            late_s = outcome.ttft_s if outcome.end == "ok" and outcome.ttft_s is not None else math.inf
            found.setdefault(int((outcome.intended_s - from_s) / WINDOW_S), []).append(late_s)
    return [
        (from_s + number * WINDOW_S, sorted(late)[math.ceil(0.95 * len(late)) - 1])
        for number, late in sorted(found.items())
    ]


def recovery(seen: Sequence[tuple[float, float]], limit_s: float, begin_s: float) -> tuple[float | None, int]:
    """(seconds from begin_s to the first window from which IN_A_ROW meet the limit, 0 where none missed it, None where that never
    came; how many windows missed it)."""
    late = [p95_s > limit_s for _, p95_s in seen]
    if not any(late):
        return 0.0, 0
    for i in range(late.index(True) + 1, len(seen)):
        if not any(late[i : i + IN_A_ROW]) and len(late[i : i + IN_A_ROW]) == IN_A_ROW:
            return seen[i][0] - begin_s, sum(late)
    return None, sum(late)


def row(variant: str, result: RunResult, *, workers: int, found: Sequence[Change], spike: Spike) -> dict[str, Any]:
    """workers: that served as the load began."""
    whole, limits = result.whole, result.objectives
    compared = [each for each in result.outcomes if each.intended_s < spike.compared_s]
    inside = [each for each in compared if spike.at_s <= each.intended_s < spike.end_s]
    seen = windows(result.outcomes, from_s=spike.at_s, to_s=spike.duration_s)
    recover_s, missed = recovery(seen, limits["ttft"], spike.at_s)
    serving_s, held_s = worker_seconds(workers, found, spike.compared_s)
    done = [change for change in found if change.ended_s is not None and not change.aborted and more(change)]
    lag_s = result.lag.quantiles_s.p99 or 0.0
    return {
        "variant": variant,
        "requests": whole.sent,
        "failed": whole.sent - whole.ends["ok"],
        "attainment": _attained(compared, limits),
        "attainment_in_spike": _attained(inside, limits),
        "attainment_whole": _attained(result.outcomes, limits),
        "recover_s": recover_s,
        "windows_missed": missed,
        "ttft_p95_s": whole.ttft_s.p95,
        "tpot_p95_s": whole.tpot_s.p95,
        "worker_s": round(serving_s, 1),
        "held_s": round(held_s, 1),
        "worker_s_whole": round(worker_seconds(workers, found, spike.duration_s)[0], 1),
        "scale_events": len(done),
        "peak_workers": max([workers, *(change.after or 0 for change in done)]),
        "workers_at_end": done[-1].after if done else workers,
        "lag_p99_ms": round(1e3 * lag_s, 2),
        "generator": "degraded" if result.lag.degraded else "kept up",
        "errors": whole.errors,
        "changes": [
            {"at_s": round(change.at_s, 1), "from": change.before, "to": change.after,
             "state": "aborted" if change.aborted else "running" if change.ended_s is None else "done",
             "seconds": None if change.ended_s is None else round(change.ended_s - change.at_s, 2)}
            for change in found
        ],
        "windows": [[round(at_s, 1), round(p95_s, 3) if math.isfinite(p95_s) else None] for at_s, p95_s in seen],
    }  # fmt: skip


def _attained(outcomes: Sequence[Outcome], limits: dict[str, float]) -> float | None:
    return round(sum(met(each, limits) for each in outcomes) / len(outcomes), 4) if outcomes else None


def goals(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """No failed request under the default policy; what it is compared with has no bound."""
    ours = next(row for row in rows if row["variant"] == "default policy")
    return [saved_run.goal("failed requests, default policy", ours["failed"], "<= 0")]


def compared(rows: Sequence[dict[str, Any]], *, duration_s: float) -> list[dict[str, Any]]:
    """What a figure of the default policy is over that of the others. duration_s: of the default policy's whole run."""
    ours = next(row for row in rows if row["variant"] == "default policy")
    found = [
        {
            "default_policy_over": row["variant"],
            "worker_s": _ratio(ours["worker_s"], row["worker_s"]),
            "held_s": _ratio(ours["held_s"], row["held_s"]),
            "attainment": _ratio(ours["attainment"], row["attainment"]),
        }
        for row in rows
        if row is not ours
    ]
    most = max(row["peak_workers"] for row in rows)
    whole = _ratio(ours["worker_s_whole"], most * duration_s)
    return [*found, {"default_policy_over": f"{most} workers to the end of the calm", "worker_s": whole}]


def _ratio(value: float | None, other: float | None) -> float | None:
    return round(value / other, 4) if value is not None and other else None
