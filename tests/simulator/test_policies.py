"""The controller's decision core in the modelled cluster: the same function, replayable, and what it does to simple loads."""

from __future__ import annotations

import pytest

from flexpert.controller.policy.decide import decide
from flexpert.controller.policy.parse import parse_policy
from flexpert.controller.policy.types import PolicyConfig, SignalConfig, SloConfig, State, WorkersConfig
from flexpert.simulator.policies import PolicyError, PolicyScaler
from flexpert.simulator.results import Simulation, from_json, to_json

from .small import load, poisson, profile, run

CONFIG = PolicyConfig(
    workers=WorkersConfig(min=1, max=8, standby=1),
    slo=SloConfig(ttft_s=1.0, tpot_s=0.2),
    signals=(SignalConfig(type="slo", name="slo"), SignalConfig(type="kv_utilization", name="kv", target=0.8)),
)
WRITTEN = """
apiVersion: flexpert.dev/v1alpha1
kind: ScalingPolicy
spec:
  workers: {min: 1, max: 8}
  signals:
    - {type: kv_utilization, target: 0.8}
    - %s
"""


def step_load(*, before: float, after: float, at_s: float, until_s: float) -> list[float]:
    first = [t for t in poisson(before, int(2 * before * at_s) + 10, seed=1) if t < at_s]
    return first + [t for t in (at_s + t for t in poisson(after, int(2 * after * until_s), seed=2)) if t < until_s]


def test_more_load_brings_more_workers_and_less_takes_them_away() -> None:
    at_s = [
        *step_load(before=0.5, after=8.0, at_s=300.0, until_s=900.0),
        *(900.0 + t for t in poisson(0.5, 600, seed=3)),
    ]
    found = run(load(at_s, 20, 15), PolicyScaler("default", CONFIG))

    sizes = [event.to_workers for event in found.scale_events]
    assert found.peak_workers > 2
    assert sizes[-1] < found.peak_workers
    assert found.finished == found.requests
    assert sum(found.reasons.values()) == found.ticks
    assert all(event.decision_id and event.text for event in found.scale_events)


def test_the_policy_of_a_run_is_its_own_record() -> None:
    """Replaying what was seen gives what was decided, to the byte; and playing it again gives the same result."""
    seen = []
    at_s = step_load(before=1.0, after=6.0, at_s=60.0, until_s=300.0)
    scaler = PolicyScaler(
        "default", CONFIG, on_decision=lambda observation, decision: seen.append((observation, decision))
    )
    first = run(load(at_s, 20, 15), scaler)

    state = State(run_id="default")
    for observation, decision in seen:
        again, state = decide(observation, state, CONFIG)
        assert again == decision
    second = run(load(at_s, 20, 15), PolicyScaler("default", CONFIG))
    texts = [
        to_json(Simulation(trace="t", profile="p", devices=16, seed=0, results=(each,))) for each in (first, second)
    ]
    assert texts[0] == texts[1]
    assert from_json(to_json(from_json(texts[0]))) == from_json(texts[0])


@pytest.mark.parametrize("rate", [0.73, 2.3, 7.1])
def test_constant_load_for_an_hour_changes_once_at_most(rate: float) -> None:
    def even(seconds: float) -> list[float]:
        return [number / rate for number in range(int(rate * seconds))]

    settled = run(load(even(900), 20, 15), PolicyScaler("default", CONFIG))
    size = settled.scale_events[-1].to_workers if settled.scale_events else 1
    found = run(load(even(3600), 20, 15), PolicyScaler("default", CONFIG), workers=size)

    assert len(found.scale_events) <= 1


def test_one_request_may_stand_for_several() -> None:
    """Four times the load on four times the workers, exactly and by a sample: the figures agree."""
    at_s = poisson(4.0, 2400, seed=6)
    each = load(sorted(t + shift for t in at_s for shift in (0.0, 0.013, 0.027, 0.041)), 20, 15)
    exact = run(each, workers=8, of=profile(max_running=16))
    sample = run(load(at_s, 20, 15, stands_for=4), workers=8, of=profile(max_running=16))

    assert sample.requests == exact.requests == 9600
    assert sample.sampling.stands_for == 4
    assert sample.sampling.simulated == 2400
    assert sample.ttft_s.p95 == pytest.approx(exact.ttft_s.p95, rel=0.15)
    assert sample.tpot_s.p50 == pytest.approx(exact.tpot_s.p50, rel=0.1)
    assert sample.sampling.ttft_p95_error_s is not None
    assert 0 < sample.sampling.ttft_p95_error_s < 0.05


def test_a_schedule_is_read_by_the_modelled_clock() -> None:
    window = '{type: schedule, windows: [{start: "10 0 * * *", end: "20 0 * * *", min: 5}]}'
    policy = parse_policy(WRITTEN % window)
    found = run(load([0.0, 1500.0], 10, 5), PolicyScaler("night", policy.to_config(), policy=policy))

    ups = [event.at_s for event in found.scale_events if event.to_workers == 5]
    assert len(ups) == 1
    assert 600.0 <= ups[0] <= 660.0


def test_a_prometheus_signal_is_refused_by_name() -> None:
    policy = parse_policy(WRITTEN % "{type: prometheus, url: 'http://here', query: up, target: 3}")

    with pytest.raises(PolicyError, match="Prometheus"):
        PolicyScaler("asks", policy.to_config(), policy=policy)
