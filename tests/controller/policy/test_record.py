"""Properties that hold for whatever is seen, and the record of a run: replayed it decides the same bytes."""

from __future__ import annotations

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from flexpert.controller.policy.bounds import bounds_of
from flexpert.controller.policy.capacity import capacity_of
from flexpert.controller.policy.decide import decide
from flexpert.controller.policy.record import (
    RecordError,
    begin_line,
    differences,
    encode,
    outcome_line,
    read,
    replay,
    tick_line,
)
from flexpert.controller.policy.signals_math import Scene
from flexpert.controller.policy.types import (
    EndedTransition,
    FallbackConfig,
    Measured,
    Observation,
    Outcome,
    Reading,
    Reason,
    SignalConfig,
    State,
    TrafficReading,
    TransitionReading,
    WorkerReading,
    WorkersConfig,
)
from flexpert.controller.policy.view import view_of

from .decisions import KV, QUEUE, SLO, TOKENS, Cluster, free, load_of, policy, seen

PROMETHEUS = SignalConfig(type="prometheus", name="depth", target=10.0)
SCHEDULE = SignalConfig(type="schedule", name="office")
FORECAST = SignalConfig(type="forecast", name="day")

PHASES = (Phase.explicit, Phase.generate)  # the examples are large: to shrink one takes minutes

ages = st.one_of(st.none(), st.floats(0.0, 100.0))
seconds = st.one_of(st.none(), st.floats(0.0, 10.0))
rates = st.floats(0.0, 1e5)


@st.composite
def observations(draw, now_s: float) -> Observation:
    count = draw(st.integers(0, 6))
    worker = st.builds(
        WorkerReading,
        worker_id=st.just("w"),
        phase=st.sampled_from(["ready", "ready", "ready", "joining", "leaving"]),
        age_s=st.one_of(st.floats(0.0, 5.0), ages),
        running=st.integers(0, 40),
        waiting=st.integers(0, 40),
        kv_used_tokens=st.integers(0, 1000),
        kv_capacity_tokens=st.sampled_from([0, 1000]),
        prefill_tokens_per_s=rates,
        decode_tokens_per_s=rates,
        longest_context_tokens=st.integers(0, 1000),
        max_running=st.sampled_from([0, 32]),
    )
    traffic = st.builds(
        TrafficReading,
        age_s=st.one_of(st.floats(0.0, 5.0), ages),
        requests_per_s=rates,
        prompt_tokens_per_s=rates,
        output_tokens_per_s=rates,
        live=st.integers(0, 100),
        queue_s=seconds,
        ttft_s=seconds,
        tpot_s=seconds,
        met=st.integers(0, 100),
        missed=st.integers(0, 100),
        since_s=st.just(now_s - 30.0),
    )
    reading = st.builds(
        Reading,
        value=st.one_of(st.none(), st.floats(0.0, 100.0)),
        age_s=ages,
        error=st.sampled_from(["", "", "HTTP 500"]),
        low=st.one_of(st.none(), st.integers(0, 9)),
        high=st.one_of(st.none(), st.integers(1, 9)),
    )
    running = TransitionReading(id=f"t{now_s}", from_workers=1, to_workers=draw(st.integers(1, 8)), began_s=now_s - 1.0)
    ended = EndedTransition(
        id=f"e{now_s}",
        from_workers=1,
        to_workers=draw(st.integers(1, 8)),
        state=draw(st.sampled_from(["done", "aborted", "failed"])),
        began_s=now_s - 9.0,
        ended_s=now_s - 1.0,
    )
    return Observation(
        now_s=now_s,
        workers=tuple(draw(worker) for _ in range(count)),
        traffic=draw(traffic),
        readings={name: draw(reading) for name in ("depth", "office", "day")},
        transition=draw(st.sampled_from([None, None, None, running])),
        last_transition=draw(st.sampled_from([None, ended])),
        devices=draw(st.one_of(st.none(), st.integers(0, 12))),
        memory_floor=draw(st.integers(1, 4)),
        stall_s=draw(st.sampled_from([None, Measured(mean_s=0.1, p95_s=0.3)])),
    )


@st.composite
def runs(draw) -> tuple[list[Observation], object]:
    signals = draw(
        st.lists(st.sampled_from([KV, SLO, TOKENS, QUEUE, PROMETHEUS, SCHEDULE, FORECAST]), min_size=1, unique=True)
    )
    config = policy(
        *signals,
        workers=WorkersConfig(min=draw(st.integers(1, 3)), max=draw(st.integers(3, 8))),
        down=draw(st.sampled_from([free(0.0), free(20.0), policy().down])),
        up=draw(st.sampled_from([free(0.0), free(15.0), policy().up])),
        fallback=FallbackConfig(behavior=draw(st.sampled_from(["hold", "scale_up_if_stale"])), after_s=30.0),
        budget_devices=draw(st.sampled_from([None, 2, 6])),
        mode=draw(st.sampled_from(["Active", "Active", "Advisory", "Paused"])),
        grow_timeout_s=30.0,
    )
    steps = draw(st.lists(st.sampled_from([1.0, 5.0, 40.0]), min_size=1, max_size=6))
    found, now_s = [], 1000.0
    for step_s in steps:
        now_s += step_s
        found.append(draw(observations(now_s)))
    return found, config


@settings(max_examples=50, deadline=None, derandomize=True, phases=PHASES)
@given(runs())
def test_whatever_is_seen_the_decision_is_within_bounds_and_blind_or_in_panic_it_never_shrinks(run):
    ticks, config = run
    state = State()
    for observation in ticks:
        before = state
        decision, state = decide(observation, state, config)
        view = view_of(observation, stale_s=config.fallback.after_s)
        scene = Scene(
            observation=observation, view=view, capacity=capacity_of(config, before), config=config, state=before
        )
        bounds, _, _ = bounds_of(scene)
        assert bounds.low <= decision.wanted <= bounds.high
        plan = decision.would
        if plan is not None and plan.kind != "abort":
            assert bounds.low <= plan.target <= bounds.high
            assert (plan.kind == "grow") == (plan.target > decision.now)
        if plan is not None and plan.kind == "shrink":
            blind = [
                proposal
                for proposal in decision.proposals
                if proposal.wanted is None and proposal.signal != "day" and not proposal.why.startswith("from")
            ]
            assert not decision.panic and not blind
            assert observation.now_s - (state.began_s or 0.0) >= config.down.stabilization_s
        assert decision.text and decision.decision_id
        if config.mode != "Active":
            assert decision.action is None


@settings(max_examples=25, deadline=None, derandomize=True, phases=PHASES)
@given(runs())
def test_a_replayed_run_is_byte_identical(run):
    ticks, config = run
    state, lines, decided = State(run_id="r"), [], []
    lines.append(begin_line(state, config))
    for observation in ticks:
        decision, state = decide(observation, state, config)
        lines.append(tick_line(observation, decision))
        decided.append(encode(decision))
    assert list(replay(lines)) == decided
    assert list(differences(lines)) == []


def a_record() -> tuple[list[bytes], Cluster]:
    cluster = Cluster(policy(), lambda now_s, count: seen(now_s, count, kv=load_of(2.5, count)), count=1)
    lines = [begin_line(cluster.state, cluster.config)]
    cluster.run(60.0)
    lines += [tick_line(*pair) for pair in zip(cluster.observations, cluster.decisions, strict=True)]
    return lines, cluster


def test_outcomes_lie_between_the_ticks_and_change_nothing():
    lines, cluster = a_record()
    outcome = Outcome(decision_id="d-0", at_s=1300.0, workers=3, met=99, missed=1)
    lines.insert(3, outcome_line(outcome))
    assert list(replay(lines)) == [encode(decision) for decision in cluster.decisions]
    assert [line.outcome for line in read(lines) if hasattr(line, "outcome")] == [outcome]


def test_replayed_with_another_policy_it_says_what_that_would_have_done():
    lines, cluster = a_record()
    other = list(replay(lines, policy(workers=WorkersConfig(min=1, max=1))))
    assert len(other) == len(cluster.decisions)
    assert b'"reason":"capped"' in other[0]
    assert cluster.decisions[0].reason is Reason.SCALE_UP_PANIC


def test_a_changed_decision_is_found():
    lines, _ = a_record()
    lines[1] = lines[1].replace(b'"wanted":3', b'"wanted":4')
    assert len(list(differences(lines))) == 1


@pytest.mark.parametrize("line", [b"{", b"[]", b'{"kind":"tock"}', b'{"kind":"tick","observation":{}}', b"\xff"])
def test_a_broken_line_is_named(line):
    lines, _ = a_record()
    lines[2] = line
    with pytest.raises(RecordError, match="line 3 of the record"):
        list(replay(lines))


def test_without_a_policy_there_is_no_replay():
    lines, _ = a_record()
    with pytest.raises(RecordError, match="no policy"):
        list(replay(lines[1:]))
