"""What was measured and what the simulator said of the same load, side by side: rows and goals of `validate.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import saved_run

from flexpert.loadtest.measure import RunResult
from flexpert.simulator.changes import Change
from flexpert.simulator.profile import Profile, interpolate
from flexpert.simulator.results import SimulationResult

FIGURES = ("ttft_p50_s", "ttft_p95_s", "attainment", "worker_s")  # those with a bound
SHOWN = ("tpot_p50_s", "tpot_p95_s")
BOUND = 0.15
OTHER_TIMES = (0.95, 1.05)
MISSING = 1e9


def worker_seconds(workers: int, changes: Sequence[Change], *, started_s: float, seconds: float) -> float:
    """Of workers that serve, over the length of the load."""
    total = workers * seconds
    for change in changes:
        total += (change.after - change.before) * max(0.0, seconds - (change.committed_s - started_s))
    return total


def capacity(profile: Profile, workers: int, *, prompt: float, output: float) -> float:
    """Requests/s with all places busy: in the time that one takes as many begin at each worker as it has places."""
    served, places = profile.serves(workers), profile.max_running
    assert served is not None, "of a serving cluster's profile"
    others = 1 + served.overlap * (workers - 1)
    one_s = (output - 1) * interpolate(served.decode, places) + places * others * interpolate(served.prefill, prompt)
    return workers * places / one_s


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


def sent(result: RunResult) -> dict[str, Any]:
    """What the generator did."""
    return {
        "requests": result.whole.sent,
        "failed": result.whole.sent - result.whole.ends["ok"],
        "requests_per_s": round(result.whole.sent / result.duration_s, 3),
        "generator": "degraded" if result.lag.degraded else "kept up",
        "lag_p99_ms": round(1e3 * (result.lag.quantiles_s.p99 or 0.0), 2),
    }


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
    load: str, sent: Mapping[str, Any], *, measured: Mapping[str, Any], said: Mapping[str, SimulationResult], probes: tuple[float, float]
) -> dict[str, Any]:  # fmt: skip
    """said: `predicted` with the profile's times at the speed that the probes saw before and after the load, `as_profiled` without that,
    `by_engine_alone` with the profile that knows no gateway and no sharing, and `predicted` with other times."""
    found = {name: predicted(result) for name, result in said.items()}
    best = found.pop("predicted")
    moves = {name: _most_moved(name, best, found) for name in (*FIGURES, *SHOWN)}
    return {
        "load": load,
        **sent,
        "speed": {"before": round(probes[0], 4), "after": round(probes[1], 4), "factor": round(sum(probes) / 2, 4)},
        "measured": dict(measured),
        "predicted": best,
        **{f"predicted_{name}": each for name, each in found.items()},
        "ratio": _ratios(best, measured),
        "ratio_as_profiled": _ratios(found["as_profiled"], measured),
        "ratio_by_engine_alone": _ratios(found["by_engine_alone"], measured),
        "moved_by_5_percent": moves,
        "beyond_what_can_be_told": [name for name in FIGURES if (moves[name] or 0.0) > BOUND],
    }


def table(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One line a figure, to be printed. 5%: by how much the prediction moves where all times are 5% shorter or longer."""
    return [
        {
            "load": row["load"], "figure": name, "measured": row["measured"][name], "predicted": row["predicted"][name],
            "ratio": row["ratio"][name], "as profiled": row["ratio_as_profiled"][name], "5%": row["moved_by_5_percent"][name],
            "by engine alone": row["ratio_by_engine_alone"][name],
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


def _most_moved(name: str, best: Mapping[str, Any], found: Mapping[str, Mapping[str, Any]]) -> float | None:
    ratios = [_ratio(found[f"times_x{times:g}"][name], best[name]) for times in OTHER_TIMES]
    return max((round(abs(ratio - 1), 4) for ratio in ratios if ratio is not None), default=None)


def _ratios(said: Mapping[str, Any], seen: Mapping[str, Any]) -> dict[str, float | None]:
    return {name: _ratio(said[name], seen[name]) for name in (*FIGURES, *SHOWN)}


def _ratio(value: float | None, other: float | None) -> float | None:
    return None if value is None or not other else round(value / other, 4)
