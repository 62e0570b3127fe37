"""What decides: each signal, each guard, the horizon, the modes; and every reason code is reached."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from flexpert.controller.policy.decide import decide
from flexpert.controller.policy.types import (
    Decision,
    EndedTransition,
    FallbackConfig,
    Measured,
    Override,
    PanicConfig,
    Reading,
    Reason,
    RuleConfig,
    SignalConfig,
    State,
    TrafficReading,
    WorkerReading,
    WorkersConfig,
)

from .decisions import KV, QUEUE, SLO, TOKENS, Cluster, first, free, load_of, policy, seen, workers

SCHEDULE = SignalConfig(type="schedule", name="office")
FORECAST = SignalConfig(type="forecast", name="day")
PROMETHEUS = SignalConfig(type="prometheus", name="depth", target=10.0)
EAGER = policy(down=free(0.0))  # shrinks at once


def steady(load: float, **changes):
    return lambda now_s, count: seen(now_s, count, kv=min(1.0, load_of(load, count)), **changes)


def after(config, make, count: int, seconds: float, **changes) -> Decision:
    cluster = Cluster(config, make, count=count, **changes)
    cluster.run(seconds)
    return cluster.tick()


def panicking() -> Decision:
    """Six times the load for one tick, then almost none: within the panic's length nobody goes."""

    def spike(now_s: float, count: int):
        return seen(
            now_s, count, workers=workers(count, kv=0.1), readings={"depth": _value(60.0 if now_s < 1005 else 0.0)}
        )

    config = policy(PROMETHEUS, down=free(0.0), workers=WorkersConfig(min=1, max=3))
    return after(config, spike, 2, 40.0, join_s=5.0)


def _value(value: float, **changes) -> Reading:
    return Reading(value=value, age_s=1.0, **changes)


def failed_growth() -> Decision:
    cluster = Cluster(policy(), steady(9.0), count=2)
    cluster.tick()
    assert cluster.running is not None
    cluster._end("failed")
    return cluster.tick()


def stalled() -> Decision:
    stall = Measured(mean_s=1.0, p95_s=5.0)
    return first(seen(1000.0, 4, workers=workers(4, kv=0.1, running=9), stall_s=stall), EAGER)


def overdue() -> Decision:
    cluster = Cluster(policy(grow_timeout_s=20.0), steady(9.0), count=2)
    cluster.comes = False
    cluster.run(25.0)
    return cluster.tick()


REACHED: dict[Reason, Callable[[], Decision]] = {
    Reason.SCALE_UP: lambda: first(seen(1000.0, 4, kv=1.0), policy()),
    Reason.SCALE_UP_PANIC: lambda: first(seen(1000.0, 2, readings={"depth": _value(60.0)}), policy(PROMETHEUS)),
    Reason.SCALE_UP_FORECAST: lambda: first(seen(1000.0, 2, readings={"day": _value(5.0)}), policy(KV, FORECAST)),
    Reason.SCALE_UP_STALE: lambda: after(
        policy(fallback=FallbackConfig(behavior="scale_up_if_stale")),
        lambda now_s, count: seen(now_s, count, workers=workers(count, age_s=60.0)),
        2,
        30.0,
    ),
    Reason.SCALE_DOWN: lambda: first(seen(1000.0, 4), EAGER),
    Reason.BELOW_MIN: lambda: first(seen(1000.0, 1), policy(workers=WorkersConfig(min=2, max=8))),
    Reason.ABOVE_MAX: lambda: first(seen(1000.0, 6, kv=0.7), replace(EAGER, budget_devices=4)),
    Reason.OVERRIDE: lambda: first(
        seen(1000.0, 2, override=Override(workers=5, owner="ana", until_s=2000.0)), policy()
    ),
    Reason.INSUFFICIENT_CAPACITY: overdue,
    Reason.NO_CHANGE: lambda: first(seen(1000.0, 4, kv=0.8), policy()),
    Reason.PAUSED: lambda: first(seen(1000.0, 4, kv=1.0), policy(mode="Paused")),
    Reason.IN_FLIGHT: lambda: after(policy(), steady(9.0), 2, 5.0),
    Reason.RETRY_LATER: failed_growth,
    Reason.NO_READY_WORKERS: lambda: first(seen(1000.0, 0), policy()),
    Reason.MISSING_DATA: lambda: first(seen(1000.0, 4, workers=workers(4, age_s=None)), policy()),
    Reason.STALE_DATA: lambda: first(seen(1000.0, 4, workers=workers(4, age_s=99.0)), policy()),
    Reason.CAPPED: lambda: first(seen(1000.0, 8, kv=1.0), policy()),
    Reason.FLOOR: lambda: first(seen(1000.0, 1), EAGER),
    Reason.SCALE_UP_DISABLED: lambda: first(seen(1000.0, 4, kv=1.0), policy(up=free(select="Disabled"))),
    Reason.SCALE_UP_STABILIZING: lambda: first(seen(1000.0, 4, kv=1.0), policy(up=free(60.0))),
    Reason.SCALE_UP_LIMITED: lambda: after(
        policy(up=free(rules=(RuleConfig(type="workers", value=1, period_s=60.0),))), steady(9.0), 2, 10.0, join_s=5.0
    ),
    Reason.SCALE_DOWN_DISABLED: lambda: first(seen(1000.0, 4), policy(down=free(select="Disabled"))),
    Reason.SCALE_DOWN_STABILIZING: lambda: after(
        policy(down=free(60.0)), lambda t, n: seen(t, n, kv=0.7 if t < 1050 else 0.0), 4, 70.0
    ),
    Reason.SCALE_DOWN_LIMITED: lambda: after(
        policy(down=free(rules=(RuleConfig(type="workers", value=1, period_s=60.0),))), steady(0.0), 4, 10.0
    ),
    Reason.SCALE_DOWN_REFUSED_PANIC: panicking,
    Reason.SCALE_DOWN_REFUSED_HISTORY: lambda: first(seen(1000.0, 4), policy()),
    Reason.SCALE_DOWN_REFUSED_CONSOLIDATION: lambda: first(
        seen(
            1000.0,
            2,
            workers=workers(2, kv=0.1, running=4),
            traffic=TrafficReading(age_s=1.0, ttft_s=0.2, tpot_s=0.03, met=99, missed=0),
        ),
        EAGER,
    ),
    Reason.SCALE_DOWN_REFUSED_MEMORY: lambda: first(
        seen(1000.0, 2, workers=workers(2, kv=0.2, longest_context_tokens=9000)), EAGER
    ),
    Reason.SCALE_DOWN_REFUSED_STREAMS: lambda: first(
        seen(1000.0, 2, workers=workers(2, kv=0.1, running=5, max_running=8)), EAGER
    ),
    Reason.SCALE_DOWN_REFUSED_COST: stalled,
}


def test_every_reason_has_its_case():
    assert set(REACHED) == set(Reason)


@pytest.mark.parametrize("reason", sorted(REACHED))
def test_every_reason_is_reached(reason):
    decision = REACHED[reason]()
    assert decision.reason is reason, decision
    assert decision.text


# --- signals


def test_the_highest_signal_decides_and_all_are_told():
    decision = first(seen(1000.0, 2, kv=0.8, readings={"depth": _value(33.0)}), policy(KV, PROMETHEUS))
    assert decision.wanted == 4
    assert [(item.signal, item.wanted) for item in decision.proposals] == [("kv_utilization", 2), ("depth", 4)]


def test_prometheus_for_the_whole_cluster_is_a_ratio():
    signal = replace(PROMETHEUS, per="cluster")
    assert first(seen(1000.0, 4, readings={"depth": _value(15.0)}), policy(signal)).wanted == 6


@pytest.mark.parametrize(
    ("prompt", "output", "wanted"), [(3900.0, 0.0, 4), (0.0, 390.0, 4), (3000.0, 390.0, 4), (100.0, 10.0, 2)]
)
def test_prefill_and_decode_tokens_are_counted_apart(prompt, output, wanted):
    traffic = TrafficReading(age_s=1.0, prompt_tokens_per_s=prompt, output_tokens_per_s=output)
    assert first(seen(1000.0, 2, traffic=traffic), policy(TOKENS)).wanted == wanted


def test_a_measured_capacity_is_told_where_the_policy_gives_none():
    traffic = TrafficReading(age_s=1.0, prompt_tokens_per_s=3000.0, output_tokens_per_s=100.0)
    config = policy(SignalConfig(type="tokens_per_second", name="tokens_per_second"))
    known = first(seen(1000.0, 2, traffic=traffic), config, State(prefill_capacity=2000.0, decode_capacity=200.0))
    unknown = first(seen(1000.0, 2, traffic=traffic), config)
    assert "as measured a worker can be given 1500 prompt and 150 output: 2.00 workers" in known.proposals[0].why
    assert unknown.proposals[0].why.endswith("what a worker takes is not measured yet")


def test_a_bimodal_mix_grows_by_its_tokens_where_its_requests_look_few():
    """Half of 100 and half of 30,000 prompt tokens: two requests a second are 30,100 tokens/s."""
    traffic = TrafficReading(age_s=1.0, requests_per_s=2.0, prompt_tokens_per_s=30_100.0)
    config = policy(TOKENS, workers=WorkersConfig(min=1, max=64), up=free())
    assert first(seen(1000.0, 8, traffic=traffic), config).wanted == 31


def test_a_missing_query_does_not_hide_a_signal_that_wants_more_but_stops_every_shrink():
    config = replace(EAGER, signals=(KV, PROMETHEUS))
    error = {"depth": Reading(error="connection refused")}
    assert first(seen(1000.0, 2, kv=1.0, readings=error), config).reason is Reason.SCALE_UP
    idle = first(seen(1000.0, 2, readings=error), config)
    assert idle.reason is Reason.MISSING_DATA
    assert "connection refused" in idle.proposals[1].why


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_query_that_gives_no_number_is_missing(value):
    decision = first(seen(1000.0, 2, readings={"depth": _value(value)}), policy(PROMETHEUS, down=free()))
    assert decision.reason is Reason.MISSING_DATA
    assert "no number" in decision.proposals[0].why


def test_absurd_numbers_are_held_by_the_bounds():
    traffic = TrafficReading(age_s=1.0, prompt_tokens_per_s=1e300)
    state = State(prefill_capacity=1e-300, decode_capacity=1.0)
    assert first(seen(1000.0, 2, traffic=traffic), policy(replace(TOKENS, prefill=None), up=free()), state).wanted == 8


def test_a_query_that_gives_zero_is_a_number():
    assert first(seen(1000.0, 2, readings={"depth": _value(0.0)}), policy(PROMETHEUS, down=free())).wanted == 1


def breached(now_s: float, count: int, **changes):
    values = {"age_s": 1.0, "requests_per_s": 9.0, "ttft_s": 0.9, "queue_s": 0.5, "met": 50, "missed": 50}
    traffic = TrafficReading(**{**values, "since_s": now_s - 30.0, **changes})
    return seen(now_s, count, workers=workers(count, running=5, waiting=2), traffic=traffic)


def test_a_missed_slo_adds_workers():
    decision = first(breached(1000.0, 4), policy(SLO))
    assert decision.reason is Reason.SCALE_UP
    assert decision.wanted > 4


def test_a_crowd_that_waits_asks_for_as_many_as_it_is_larger_than_what_is_served():
    crowd = replace(breached(1000.0, 2), workers=workers(2, running=5, waiting=12))
    assert first(crowd, policy(SLO, up=free())).wanted == 7  # 34 here, 10 served


def test_with_a_known_capacity_a_missed_slo_asks_for_what_the_tokens_need():
    traffic = {"prompt_tokens_per_s": 5600.0, "output_tokens_per_s": 100.0}
    state = State(prefill_capacity=1000.0, decode_capacity=100.0, began_s=0.0)
    assert first(breached(1000.0, 4, **traffic), policy(SLO), state).wanted >= 7


def test_slow_requests_that_wait_for_nobody_are_no_reason_to_grow():
    """A long prompt that misses its target alone would miss it on any number of workers."""
    traffic = TrafficReading(age_s=1.0, requests_per_s=1.0, ttft_s=3.0, queue_s=0.0, tpot_s=0.01, met=5, missed=5)
    decision = first(seen(1000.0, 2, workers=workers(2, running=2), traffic=traffic), policy(SLO))
    assert decision.reason is Reason.NO_CHANGE
    assert "would not help" in decision.proposals[0].why


def test_a_window_from_before_the_change_does_not_ask_again():
    ended = EndedTransition(
        id="t", from_workers=2, to_workers=4, state="done", began_s=980.0, ended_s=995.0
    )  # the window began at 970
    old = replace(breached(1000.0, 4), last_transition=ended, workers=workers(4, running=5))
    assert first(old, policy(SLO)).reason is Reason.NO_CHANGE


def test_waiting_over_its_target_grows_and_far_below_it_tries_fewer():
    slow = TrafficReading(age_s=1.0, requests_per_s=5.0, queue_s=4.0)
    assert first(seen(1000.0, 2, traffic=slow), policy(QUEUE)).wanted == 4
    fast = TrafficReading(age_s=1.0, requests_per_s=5.0, queue_s=0.0)
    config = policy(QUEUE, down=free())
    busy = workers(8, running=4)
    decision, state = decide(seen(1000.0, 8, workers=busy, traffic=fast), State(), config)
    assert decision.wanted == 6  # a quarter, since nobody knows what a worker takes
    cluster_now = seen(1010.0, 6, workers=workers(6, running=4), traffic=fast)
    assert decide(cluster_now, state, config)[0].reason is Reason.NO_CHANGE  # tried out, not repeated at once


def test_capacity_is_measured_while_workers_have_more_than_they_can_do():
    busy = workers(2, running=8, waiting=3, prefill_tokens_per_s=700.0, decode_tokens_per_s=90.0)
    state = State()
    for tick in range(4):
        _, state = decide(seen(1000.0 + 5 * tick, 2, workers=busy), state, policy(mode="Advisory"))
    assert (state.prefill_capacity, state.decode_capacity) == (700.0, 90.0)
    calm = workers(2, running=1, prefill_tokens_per_s=10.0, decode_tokens_per_s=5.0)
    _, state = decide(seen(1030.0, 2, workers=calm), state, policy())
    assert state.prefill_capacity == 700.0


# --- bounds


def test_schedules_move_the_bounds():
    office = {"office": Reading(age_s=1.0, low=3, high=5)}
    config = policy(KV, SCHEDULE)
    assert first(seen(1000.0, 2, readings=office), config).reason is Reason.BELOW_MIN
    full = first(seen(1000.0, 4, kv=1.0, readings=office), config)
    assert full.wanted == 5


def test_a_schedule_that_cannot_be_read_stops_every_shrink():
    config = replace(EAGER, signals=(KV, SCHEDULE))
    assert first(seen(1000.0, 4), config).reason is Reason.MISSING_DATA


def test_a_forecast_is_a_floor_and_its_absence_holds_nothing():
    config = replace(EAGER, signals=(KV, FORECAST))
    assert first(seen(1000.0, 4, readings={"day": _value(3.0)}), config).wanted == 3
    assert first(seen(1000.0, 4, readings={"day": Reading(error="only 2 h of history")}), config).wanted == 1


def test_a_forecast_in_tokens_is_turned_into_workers():
    reading = {"day": Reading(age_s=1.0, prompt_tokens_per_s=4500.0, output_tokens_per_s=0.0, horizon_s=60.0)}
    decision = first(seen(1000.0, 2, readings=reading), policy(TOKENS, FORECAST))
    assert (decision.reason, decision.wanted) == (Reason.SCALE_UP_FORECAST, 5)


def test_devices_and_budget_cap_growth_and_the_memory_floor_stops_the_shrink():
    assert first(seen(1000.0, 4, kv=1.0, devices=4), policy()).reason is Reason.CAPPED
    assert first(seen(1000.0, 4, kv=1.0), policy(budget_devices=4)).reason is Reason.CAPPED
    floor = first(seen(1000.0, 4, memory_floor=3), EAGER)
    assert floor.wanted == 3
    assert first(seen(1000.0, 3, memory_floor=3), EAGER).reason is Reason.FLOOR


def test_impossible_bounds_give_way_in_a_fixed_order():
    config = policy(KV, SCHEDULE, budget_devices=2)
    night = {"office": Reading(age_s=1.0, low=6)}
    assert first(seen(1000.0, 2, readings=night), config).wanted == 2  # money before the schedule
    assert first(seen(1000.0, 2, readings=night, memory_floor=3), config).wanted == 3  # memory before money
    assert first(seen(1000.0, 2, readings=night, memory_floor=5, devices=2), config).wanted == 2


# --- horizon


def ramp_started_s(join_s: float) -> float:
    """When a ramp of one worker a minute from 2 makes a cluster of 4 order the fifth."""

    def ramp(now_s: float, count: int):
        measured = Measured(mean_s=join_s, p95_s=join_s, count=5)
        load = 2.0 + (now_s - 1000.0) / 60.0
        return seen(now_s, count, kv=min(1.0, load_of(load, count)), join_s=measured)

    cluster = Cluster(policy(), ramp, count=4, join_s=join_s)
    cluster.run(400.0)
    return next(decision.at_s for decision in cluster.decisions if decision.action is not None)


def test_slow_joins_start_the_same_ramp_earlier_by_about_the_difference():
    earlier_s = ramp_started_s(5.0) - ramp_started_s(60.0)
    assert 40.0 <= earlier_s <= 70.0


def test_joins_are_learned_from_what_was_ordered():
    cluster = Cluster(policy(), steady(3.0), count=1, join_s=40.0)
    cluster.run(200.0)
    assert cluster.count >= 3
    assert cluster.state.joins and set(cluster.state.joins) == {40.0}
    assert cluster.state.join_ewma_s == 40.0


def test_a_full_cluster_that_grows_is_no_rising_trend():
    """What cannot be seen while KV is full comes to light as the cluster grows: that is not the future."""
    cluster = Cluster(policy(), steady(4.0), count=1, join_s=20.0)
    cluster.run(1200.0)
    assert cluster.count <= 5


# --- panic, cost, modes, override


def test_panic_lasts_ten_windows_after_the_last_tick_over_the_threshold():
    config = policy(PROMETHEUS, panic=PanicConfig(window_s=10.0, threshold=2.0), workers=WorkersConfig(min=1, max=2))
    cluster = Cluster(config, lambda t, n: seen(t, n, readings={"depth": _value(60.0 if t < 1005 else 1.0)}), count=2)
    decisions = cluster.run(200.0)
    in_panic = [decision.at_s for decision in decisions if decision.panic]
    assert in_panic[0] == 1000.0
    assert 1095.0 <= in_panic[-1] <= 1110.0


def test_a_dip_of_twenty_seconds_is_not_worth_the_stall():
    """Two hundred streams stall 0.2 s at each change; one device fewer for 20 s saves less."""
    stall = Measured(mean_s=0.1, p95_s=0.2)

    def dip(now_s: float, count: int):
        low = 1100.0 <= now_s < 1120.0
        return seen(now_s, count, workers=workers(count, kv=0.3 if low else 0.75, running=100), stall_s=stall)

    cluster = Cluster(EAGER, dip, count=2)
    cluster.run(300.0)
    assert cluster.changes == []
    assert Reason.SCALE_DOWN_REFUSED_COST in {decision.reason for decision in cluster.decisions}


def test_advisory_orders_nothing_and_says_what_it_would():
    cluster = Cluster(policy(mode="Advisory"), steady(9.0), count=2)
    decisions = cluster.run(60.0)
    assert all(decision.action is None for decision in decisions)
    assert all(decision.would is not None and decision.would.kind == "grow" for decision in decisions)
    assert cluster.state.order is None and cluster.state.changes == ()


def test_paused_keeps_on_watching():
    cluster = Cluster(policy(mode="Paused"), steady(0.0), count=4)
    cluster.run(400.0)
    assert cluster.changes == []
    cluster.config = policy()
    assert cluster.tick().reason is Reason.SCALE_DOWN  # its history is full


def test_an_override_stands_before_the_signals_within_bounds_until_it_ends():
    wish = Override(workers=20, owner="ana", until_s=1050.0)
    cluster = Cluster(policy(), steady(0.0, override=wish), count=2)
    decision = cluster.tick()
    assert (decision.reason, decision.wanted) == (Reason.OVERRIDE, 8)
    assert "ana" in decision.text
    cluster.run(500.0)
    assert cluster.count < 8


def test_joining_and_leaving_workers_are_not_ready():
    crowd = (
        *workers(2, kv=0.8),
        WorkerReading(worker_id="new", phase="joining"),
        WorkerReading(worker_id="old", phase="leaving"),
    )
    assert first(seen(1000.0, 2, workers=crowd), policy()).now == 2


def test_ids_are_unique_across_runs_and_count_up():
    _, state = decide(seen(1000.0, 2), State(run_id="c7"), policy())
    assert decide(seen(1005.0, 2), state, policy())[0].decision_id == "c7-1"
