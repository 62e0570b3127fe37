"""`benchmarks/validate.py`: what it makes of a load that was measured and of the predictions, without a cluster."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from flexpert.loadtest.schedule import Arrival
from flexpert.simulator.profile import Served
from flexpert.simulator.results import SimulationResult

from .small import load, play_at, poisson, profile, run

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import validate_rows as rows

NAMES = ("predicted", "as_profiled", "by_engine_alone", "times_x0.95", "times_x1.05")
SENT = {"requests": 300, "failed": 0}


def said(rate: float) -> dict[str, SimulationResult]:
    """One worker that takes 10 requests/s, at the times that each prediction is made with."""
    of = profile(max_running=1, decode=((0.0, 0.05), (1.0, 0.05)), prefill=((0.0, 0.0), (100.0, 0.5)))
    times = dict(zip(NAMES, (1.0, 1.2, 0.5, 0.95, 1.05), strict=True))
    played = load(poisson(rate, 2000, seed=5), 10, 1)
    return {name: run(played, of=of.slower(each)) for name, each in times.items()}


def row(found: dict[str, SimulationResult], **measured: Any) -> dict[str, Any]:
    seen = {**rows.predicted(found["predicted"]), **measured}
    return rows.row("a load", SENT, measured=seen, said=found, probes=(0.9, 1.1))


def test_a_row_has_the_probes_and_all_that_was_predicted() -> None:
    found = row(said(2.0))

    assert found["speed"] == {"before": 0.9, "after": 1.1, "factor": 1.0}
    assert set(found["ratio"].values()) <= {1.0, None}
    assert found["ratio_as_profiled"]["ttft_p50_s"] > 1.1 > 0.6 > found["ratio_by_engine_alone"]["ttft_p50_s"]
    for name in ("as_profiled", "by_engine_alone", "times_x0.95", "times_x1.05"):
        assert found[f"predicted_{name}"]["worker_s"] == found["predicted"]["worker_s"]
    assert {line["figure"] for line in rows.table(found)} == {*rows.FIGURES, *rows.SHOWN}


def test_what_a_load_cannot_tell_is_named_and_its_goals_stay() -> None:
    """At 3% of what one takes hardly anybody waits; at 90% 5% of the service time are half of the wait."""
    calm, busy = row(said(0.3)), row(said(9.0))

    assert calm["beyond_what_can_be_told"] == []
    assert "ttft_p95_s" in busy["beyond_what_can_be_told"]
    assert busy["moved_by_5_percent"]["ttft_p95_s"] > 0.15
    assert all(goal["met"] for goal in rows.goals([calm, busy]))
    assert len(rows.goals([calm, busy])) == 2 * (len(rows.FIGURES) + 1)


def test_goals_are_missed_by_what_is_too_far_off_and_by_what_nobody_saw() -> None:
    found = said(2.0)
    p50_s = rows.predicted(found["predicted"])["ttft_p50_s"]
    missed = [
        goal["name"] for goal in rows.goals([row(found, ttft_p50_s=p50_s / 1.2, attainment=None)]) if not goal["met"]
    ]

    assert len(missed) == 2
    assert "ttft_p50_s" in missed[0]
    assert "attainment" in missed[1]


@pytest.mark.parametrize("workers", [1, 2])
def test_the_capacity_of_a_profile_is_what_a_full_cluster_answers(workers: int) -> None:
    served = Served(
        workers=workers, decode=((0.0, 0.02), (8.0, 0.03)), prefill=((0.0, 0.0), (64.0, 0.01)), overlap=1.0, answer=((0.0, 0.0),)
    )  # fmt: skip
    of = profile(served=(served,), max_running=8, kv_tokens=100_000)
    found = rows.capacity(of, workers, prompt=64, output=64)
    seen = play_at(of, workers)([Arrival(0.0, 64, 64)] * 400)

    assert len(seen) / max(each.last_s for each in seen) == pytest.approx(found, rel=0.08)
