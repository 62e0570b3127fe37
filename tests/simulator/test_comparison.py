"""What a policy is compared with: the baselines do what their documents say, and the searches find what is there."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from flexpert.controller.policy.types import Observation, TrafficReading, WorkerReading
from flexpert.simulator import comparison
from flexpert.simulator.comparison import oracle, static_peak
from flexpert.simulator.load import LoadError, load_of, open_load
from flexpert.simulator.results import Slo
from flexpert.simulator.runner import Setting
from flexpert.simulator.scalers import Hpa, Kpa, RayServe, Scaler
from flexpert.simulator.sizing import workers_for

from .small import load, poisson, profile


def seen(now_s: float, *, ready: int, ongoing: int) -> Observation:
    workers = tuple(
        WorkerReading(worker_id=f"w{i}", age_s=0.0, running=ongoing // ready, max_running=10, kv_capacity_tokens=1000)
        for i in range(ready)
    )
    return Observation(now_s=now_s, workers=workers, traffic=TrafficReading(age_s=0.0, live=ongoing))


def sizes(scaler: Scaler, course: list[tuple[float, int]], *, ready: int) -> list[int]:
    """The size after each observation, every wish carried out at once."""
    found = []
    for now_s, ongoing in course:
        ready = scaler.decide(seen(now_s, ready=ready, ongoing=ongoing)).target or ready
        found.append(ready)
    return found


def test_hpa_follows_the_ratio_and_shrinks_after_its_window() -> None:
    course = [(0.0, 14), (15.0, 28), (30.0, 29), (45.0, 7), (315.0, 7), (340.0, 7)]

    # 28 ongoing of 20 places is a ratio of 2 to the target; 29 of 40 is within the tolerance.
    assert sizes(Hpa(low=1, high=8, target=0.7), course, ready=2) == [2, 4, 4, 4, 4, 1]


def test_kpa_panics_upward_and_never_shrinks_meanwhile() -> None:
    scaler = Kpa(low=1, high=20, concurrency=10)
    course = [(float(t), 7) for t in range(0, 70, 2)] + [(70.0, 140), (72.0, 140), (74.0, 0), (100.0, 0)]
    found = sizes(scaler, course, ready=1)

    assert set(found[:35]) == {1}
    assert found[35] > 1
    assert found[-2:] == [max(found)] * 2


def test_ray_serve_waits_for_its_delays() -> None:
    scaler = RayServe(low=1, high=20, target=5)
    found = sizes(scaler, [(float(t), 20) for t in range(0, 60, 2)], ready=1)

    assert found.index(4) == 15  # 30 s of ticks, and one more
    assert sizes(scaler, [(60.0 + t, 5) for t in range(0, 600, 2)], ready=4) == [4] * 300


def test_static_peak_is_the_smallest_that_holds() -> None:
    setting = Setting(profile=profile(), devices=16, slo=Slo(ttft_s=1.0, tpot_s=0.2, attainment=0.95))
    found = static_peak(load(poisson(6.0, 600), 20, 15), setting)

    assert found.attainment >= 0.95
    smaller = static_peak(
        load(poisson(6.0, 600), 20, 15), Setting(profile=profile(), devices=found.peak_workers - 1, slo=setting.slo)
    )
    assert smaller.attainment < 0.95


def test_the_oracle_is_as_good_as_the_peak_and_cheaper_where_load_varies() -> None:
    at_s = [*poisson(8.0, 1600), *(300.0 + t for t in poisson(0.5, 150))]
    at_s = sorted(t for t in at_s if t < 600.0)
    setting = Setting(profile=profile(), devices=16, slo=Slo(ttft_s=1.0, tpot_s=0.2, attainment=0.95))
    peak = static_peak(load(at_s, 20, 15, span_s=600.0), setting)
    found = oracle(load(at_s, 20, 15, span_s=600.0), setting, peak)

    assert found.attainment >= 0.99 * peak.attainment
    assert found.device_hours < 0.8 * peak.device_hours


def test_sizing_rises_with_the_load() -> None:
    found = [
        workers_for(
            profile(), Slo(ttft_s=1.0, tpot_s=0.2), requests_per_s=rate, prompt_tokens=20, output_tokens=15, most=50
        )
        for rate in (0.1, 5.0, 20.0)
    ]

    assert found == sorted(found)
    assert found[0] == 1
    assert found[2] > 5


def test_halves_and_scales_of_a_trace_are_parts_of_it() -> None:
    whole, first, second = (open_load("azure-conv", half=half) for half in ("", "first", "second"))  # type: ignore[arg-type]

    assert len(first) + len(second) == len(whole)
    assert second.at_s[0] < 10.0
    assert second.span_s == pytest.approx(whole.span_s / 2)
    assert open_load("azure-conv", part=(0.0, whole.span_s / 2)) == first
    part = open_load("azure-conv", scale=4.0, stands_for=2)
    assert len(part) == pytest.approx(2 * len(whole), rel=0.05)


def test_an_empty_schedule_is_no_load() -> None:
    with pytest.raises(LoadError, match="no requests"):
        load_of([])


def test_the_target_is_the_highest_that_attains_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """Targets above 0.45 attain less than is wanted; three plays find that."""
    asked: list[float] = []

    def played(load: object, share: float, setting: object) -> SimpleNamespace:
        asked.append(share)
        return SimpleNamespace(attainment=1.0 if share <= 0.45 else 0.5)

    monkeypatch.setattr(comparison, "play", played)
    family = comparison.Family(name="any", make=lambda share, setting, standby: share)

    found = comparison.tune(None, None, family, standby=0, wanted=0.9)
    assert (found.share, found.scaler) == (0.45, 0.45)
    assert found.past is not None
    assert found.past.attainment == 1.0
    assert len(asked) <= 3
    none = comparison.tune(None, None, family, standby=0, wanted=1.1)
    assert (none.share, none.past) == (min(comparison.SHARES), None)


def test_a_load_that_was_played_for_tuning_is_not_played_again(monkeypatch: pytest.MonkeyPatch) -> None:
    setting = Setting(profile=profile(), devices=16, slo=Slo(ttft_s=1.0, tpot_s=0.2, attainment=0.95))
    before, after = load(poisson(6.0, 300), 20, 15), load(poisson(6.0, 300, seed=2), 20, 15)

    def entered() -> RayServe:
        return RayServe(low=1, high=16, target=5)

    plain = comparison.play_on(before, after, entered(), setting)
    scaler = entered()
    past = comparison.play(before, scaler, setting)
    monkeypatch.setattr(comparison, "play", None)

    assert comparison.play_on(before, after, scaler, setting, past=past) == plain
