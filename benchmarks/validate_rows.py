"""What was measured and what the simulator said of the same load, side by side: rows and goals of `validate.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import saved_run

from flexpert.loadtest.measure import RunResult
from flexpert.simulator.changes import Change
from flexpert.simulator.results import SimulationResult

FIGURES = ("ttft_p50_s", "ttft_p95_s", "attainment", "worker_s")  # those with a bound
SHOWN = ("tpot_p50_s", "tpot_p95_s")
BOUND = 0.15
MISSING = 1e9


def worker_seconds(workers: int, changes: Sequence[Change], *, started_s: float, seconds: float) -> float:
    """Of workers that serve, over the length of the load."""
    total = workers * seconds
    for change in changes:
        total += (change.after - change.before) * max(0.0, seconds - (change.committed_s - started_s))
    return total


def measured(result: RunResult, *, workers: int, changes: Sequence[Change]) -> dict[str, Any]:
    whole = result.whole
    return {
        "ttft_p50_s": whole.ttft_s.p50,
        "ttft_p95_s": whole.ttft_s.p95,
        "attainment": whole.attainment,
        "worker_s": round(
            worker_seconds(workers, changes, started_s=result.started_unix_s, seconds=result.duration_s), 2
        ),
        "tpot_p50_s": whole.tpot_s.p50,
        "tpot_p95_s": whole.tpot_s.p95,
        "changes": [
            [*(round(at_s - result.started_unix_s, 2) for at_s in (change.began_s, change.committed_s)), change.before, change.after]
            for change in changes
        ],
    }  # fmt: skip


def predicted(result: SimulationResult) -> dict[str, Any]:
    return {
        "ttft_p50_s": result.ttft_s.p50,
        "ttft_p95_s": result.ttft_s.p95,
        "attainment": result.attainment,
        "worker_s": round(3600 * result.worker_hours, 2),
        "tpot_p50_s": result.tpot_s.p50,
        "tpot_p95_s": result.tpot_s.p95,
        "changes": [
            [round(event.at_s, 2), None if event.ended_s is None else round(event.ended_s, 2), event.from_workers, event.to_workers]
            for event in result.scale_events
        ],
    }  # fmt: skip


def row(
    load: str, result: RunResult, *, workers: int, changes: Sequence[Change], said: SimulationResult, alone: SimulationResult
) -> dict[str, Any]:  # fmt: skip
    """said: with the profile of the serving cluster; alone: with that of the engine by itself, which knows no gateway and no sharing."""
    seen, found = measured(result, workers=workers, changes=changes), predicted(said)
    by_engine = predicted(alone)
    return {
        "load": load,
        "requests": result.whole.sent,
        "failed": result.whole.sent - result.whole.ends["ok"],
        "requests_per_s": round(result.whole.sent / result.duration_s, 3),
        "generator": "degraded" if result.lag.degraded else "kept up",
        "lag_p99_ms": round(1e3 * (result.lag.quantiles_s.p99 or 0.0), 2),
        "measured": seen,
        "predicted": found,
        "predicted_by_engine_alone": by_engine,
        "ratio": {name: _ratio(found[name], seen[name]) for name in (*FIGURES, *SHOWN)},
        "ratio_by_engine_alone": {name: _ratio(by_engine[name], seen[name]) for name in (*FIGURES, *SHOWN)},
    }


def table(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One line a figure, to be printed."""
    return [
        {
            "load": row["load"], "figure": name, "measured": row["measured"][name], "predicted": row["predicted"][name],
            "ratio": row["ratio"][name], "by engine alone": row["ratio_by_engine_alone"][name],
        }
        for name in (*FIGURES, *SHOWN)
    ]  # fmt: skip


def goals(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """How far predicted over measured is from 1, for every figure of every load; a figure that one side lacks is missed."""
    found = []
    for each in rows:
        for name in FIGURES:
            ratio = each["ratio"][name]
            off = MISSING if ratio is None else abs(ratio - 1)
            found.append(
                saved_run.goal(f"{each['load']}: {name}, predicted over measured, off 1 by", off, f"<= {BOUND}")
            )
        found.append(saved_run.goal(f"{each['load']}: failed requests", each["failed"], "<= 0"))
    return found


def _ratio(value: float | None, other: float | None) -> float | None:
    return None if value is None or not other else round(value / other, 4)
