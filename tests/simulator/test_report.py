"""The report of a simulation: it parses, stands alone, shows every figure of the result, and says which runs none beats."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from flexpert.simulator.front import Point, front, scatter
from flexpert.simulator.report import render_report, write_report
from flexpert.simulator.results import (
    Percentiles,
    Sampling,
    ScaleEvent,
    Simulation,
    SimulationResult,
    Slo,
    Timeline,
)

from ..loadtest.html_page import Page, assert_stands_alone

STEPS = 30


def timeline(workers: int) -> Timeline:
    def flat(value: float) -> tuple[float, ...]:
        return (value,) * STEPS

    return Timeline(
        interval_s=60.0, at_s=tuple(60.0 * i for i in range(STEPS)), arrivals=(0.0, *flat(300.0)[1:]), met=flat(290.0), missed=flat(10.0),
        arrived_met=(0.0, *flat(291.0)[1:]), workers=flat(workers), devices=flat(workers + 0.5), wanted=(workers,) * STEPS,
        running=flat(12.0), waiting=flat(0.0), kv_share=flat(0.4), ttft_p95_s=(None, *flat(0.2)[1:]), tpot_p95_s=flat(0.03),
    )  # fmt: skip


EVENTS = (
    ScaleEvent(
        at_s=300.0, ended_s=321.5, from_workers=1, to_workers=3, reason="slo", text="TTFT <p95> is above its target", state="done",
        stall_s=0.02, moved_bytes=3 << 30,
    ),
    ScaleEvent(at_s=900.0, ended_s=None, from_workers=3, to_workers=2, reason="consolidate", state="running"),
)  # fmt: skip


def result(name: str, kind: str, device_hours: float, attainment: float, **more: object) -> SimulationResult:
    fields = dict(
        name=name, kind=kind, requests=8700.0, finished=8650.0, rejected=50.0, attainment=attainment, met=8700 * attainment,
        ttft_s=Percentiles(mean=0.15, p50=0.12, p95=0.234, p99=0.456), tpot_s=Percentiles(mean=0.03, p50=0.03, p95=0.041, p99=0.052),
        queue_s=Percentiles(mean=0.0, p50=0.0, p95=0.011, p99=0.022), worker_hours=device_hours - 0.25,
        device_hours=device_hours, standby_hours=0.5, mean_workers=2.25, peak_workers=3, timeline=timeline(2),
    )  # fmt: skip
    return SimulationResult(**{**fields, **more})  # type: ignore[arg-type]


def simulation() -> Simulation:
    policy = result(
        "chat & co", "policy", 12.5, 0.995, scale_events=EVENTS, flaps=1, stall_s=0.04, stalled_stream_s=0.48, preemptions=7.0, ticks=120,
        reasons={"steady": 100, "slo": 20}, sampling=Sampling(stands_for=60.0, simulated=145, attainment_error=0.0012),
    )  # fmt: skip
    return Simulation(
        trace="azure-conv", profile="cpu-tiny", devices=8, seed=5, scale=60.0, half="second", span_s=1800.0,
        slo=Slo(ttft_s=0.5, tpot_s=0.05, attainment=0.99),
        results=(
            policy,
            result("fixed 8", "baseline", 20.0, 0.9951),
            result("hpa", "baseline", 14.0, 0.98, timeline=Timeline(interval_s=0.0)),
        ),
    )  # fmt: skip


@pytest.fixture(scope="module")
def html() -> str:
    return render_report(simulation())


@pytest.fixture(scope="module")
def report(html: str) -> Page:
    return Page(html)


def test_report_parses_and_stands_alone(report: Page) -> None:
    assert_stands_alone(report)
    assert report.elements.count("svg") == 2 + 2, (
        "the front, workers over time, and the course of each run that has one"
    )


def test_report_shows_the_figures_of_every_run(report: Page) -> None:
    assert report.row("chat & co") == [
        "chat & co", "policy", "99.50% ± 0.12", "43.5", "12.5", "12.2", "0.5", "2.25", "3", "2", "1", "40 ms",
    ]  # fmt: skip
    assert report.row("hpa")[:5] == ["hpa", "baseline", "98.00%", "174", "14"]
    assert [row for table in report.tables for row in table if row[0] == "fixed 8"][1] == [
        "fixed 8", "150 ms", "120 ms", "234 ms", "456 ms", "30 ms", "30 ms", "41 ms", "52 ms", "0 s", "0 s", "11 ms", "22 ms",
    ]  # fmt: skip
    assert report.row("steady")[1] == "100"
    assert report.row("stalled") == ["stalled", "40 ms", "480 ms times the streams that ran"]
    assert report.row("preempted")[1] == "7"
    assert report.row("profile")[1] == "cpu-tiny"
    assert report.row("part")[1] == "second half"
    assert "One simulated request stands for 60 of the load (145 were simulated)" in report.text


def test_every_change_is_listed_with_its_reason(report: Page) -> None:
    assert report.row("0:05:00") == [
        "0:05:00",
        "1 → 3",
        "done",
        "21.5 s",
        "20 ms",
        "3 GiB",
        "slo",
        "TTFT <p95> is above its target",
    ]
    assert report.row("0:15:00") == ["0:15:00", "3 → 2", "running", "–", "0 s", "0 B", "consolidate", ""]


def test_policy_is_set_against_the_baselines_that_keep_the_objective_too(report: Page) -> None:
    assert "chat & co keeps the attainment of 99.00%: 99.50% with 12.5 device-hours." in report.text
    assert "Baselines that keep it too: fixed 8 20 (1.60x)." in report.text


def test_policy_that_misses_the_objective_is_said_to() -> None:
    missed = replace(
        simulation(), results=(replace(simulation().results[0], attainment=0.97, timeline=Timeline(interval_s=0.0)),)
    )

    html = render_report(missed)

    found = Page(html)
    assert html == render_report(missed), "the same simulation gives the same page"
    assert "No policy keeps the attainment of 99.00%; chat & co comes nearest with 97.00%." in found.text
    assert "No timeline was kept." in found.text


def test_simulation_without_results_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one result"):
        write_report(replace(simulation(), results=()), tmp_path / "out.html")


def test_front_is_what_no_other_beats() -> None:
    points = [
        Point(x=x, y=y, label=label)
        for x, y, label in [(10, 0.9, "a"), (12, 0.99, "b"), (12, 0.95, "c"), (20, 0.99, "d"), (9, 0.5, "e")]
    ]

    assert [point.label for point in front(points)] == ["e", "a", "b"]


def test_points_are_named_also_where_they_lie_on_each_other() -> None:
    points = [Point(x=5.0, y=1.0, label=f"run {i}") for i in range(6)]

    found = Page(
        scatter(points, x_title="device-hours", y_title="attainment", limit=("asked for", 0.99), name="f", alt="front")
    )

    assert {f"run {i}" for i in range(6)} <= set(found.texts)
    assert {"100%", "99%"} <= set(found.texts), "drawn by nines"
