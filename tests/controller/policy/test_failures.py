"""The fourteen failures that other autoscalers were seen to have, each against the decision core in virtual time.

Where the other half of a failure is a transition (what happens to streams, memory, admission), the docstring names the test of it.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import msgspec

from flexpert.controller.policy.decide import decide
from flexpert.controller.policy.types import (
    EndedTransition,
    Measured,
    Reason,
    State,
    TrafficReading,
    TransitionReading,
    WorkerReading,
)

from .decisions import KV, SLO, Cluster, first, free, load_of, policy, seen, workers


def overloaded(now_s: float, count: int):
    return seen(now_s, count, kv=1.0)


def test_f1_a_pending_worker_is_not_ordered_again():
    """F1, cascade 2 -> 4 -> 8 -> 16 while pods are pending: ten ticks of overload with a growth under way are one action."""
    cluster = Cluster(policy(), overloaded, count=2, join_s=1000.0)
    decisions = cluster.run(50.0)
    assert len(decisions) == 10
    assert [decision.action is not None for decision in decisions] == [True] + [False] * 9
    assert {decision.reason for decision in decisions[1:]} == {Reason.IN_FLIGHT}


def test_f1_an_order_whose_transition_has_not_begun_counts_as_well():
    """The same where the cluster has not even begun: what was ordered is on its way."""
    state, actions = State(), []
    for tick in range(10):
        decision, state = decide(overloaded(1000.0 + 5 * tick, 2), state, policy())
        actions.append(decision.action)
    assert [action is not None for action in actions] == [True] + [False] * 9


def test_f2_survivors_that_would_be_too_full_are_not_made():
    """F2, flap 2 <-> 1 at constant load: below the target with two workers, above it with one. See also test_constant_load.py."""
    cluster = Cluster(policy(), lambda now_s, count: seen(now_s, count, kv=min(1.0, load_of(1.3, count))), count=1)
    cluster.run(3600.0)
    assert cluster.changes == [(1, 2)]


def test_f3_zero_traffic_is_a_number_and_shrinks_to_the_minimum():
    """F3, zero read as "no data": with zero everywhere and fresh, the cluster goes to its minimum once the window is full."""
    nothing = TrafficReading(age_s=0.5, ttft_s=None, tpot_s=None, queue_s=None)
    cluster = Cluster(policy(SLO, KV), lambda now_s, count: seen(now_s, count, traffic=nothing), count=4)
    cluster.run(600.0)
    assert cluster.count == 1
    assert cluster.decisions[-1].reason is Reason.FLOOR


def test_f4_missing_data_is_not_zero():
    """F4, missing read as zero: no number from anybody for an hour, and the size is kept."""

    def silence(now_s: float, count: int):
        return seen(now_s, count, workers=workers(count, age_s=None), traffic=TrafficReading(age_s=None))

    cluster = Cluster(policy(SLO, KV), silence, count=4)
    decisions = cluster.run(3600.0)
    assert cluster.changes == []
    assert {decision.reason for decision in decisions} == {Reason.MISSING_DATA}


def test_f4_stale_data_is_not_zero_either():
    def old(now_s: float, count: int):
        return seen(now_s, count, workers=workers(count, age_s=31.0), traffic=TrafficReading(age_s=31.0))

    cluster = Cluster(policy(SLO, KV), old, count=4)
    decisions = cluster.run(3600.0)
    assert cluster.changes == []
    assert {decision.reason for decision in decisions} == {Reason.STALE_DATA}


def test_f5_a_growth_that_never_comes_is_given_up_and_a_later_shrink_works():
    """F5, a wanted pod pending for ever: after grow_timeout the order is aborted, and when load ends the cluster shrinks."""
    busy = True
    cluster = Cluster(policy(), lambda now_s, count: seen(now_s, count, kv=1.0 if busy else 0.0), count=2)
    cluster.comes = False
    cluster.run(310.0)
    given_up = [decision for decision in cluster.decisions if decision.reason is Reason.INSUFFICIENT_CAPACITY]
    assert len(given_up) == 1
    assert given_up[0].action is not None and given_up[0].action.kind == "abort"
    assert cluster.running is None and cluster.count == 2
    cluster.comes, busy = True, False
    cluster.run(600.0)
    assert cluster.count == 1


def test_f5_an_order_that_nobody_took_is_given_up_without_an_abort():
    """There is no transition to abort: only the order is forgotten, and the next growth waits longer each time."""
    state, reasons, actions = State(), [], []
    for tick in range(400):
        decision, state = decide(overloaded(1000.0 + 5 * tick, 2), state, policy())
        reasons.append(decision.reason)
        actions.append(decision.action)
    assert reasons.count(Reason.INSUFFICIENT_CAPACITY) >= 3
    assert all(action is None or action.kind == "grow" for action in actions)
    assert Reason.RETRY_LATER in reasons
    grown = [tick for tick, action in enumerate(actions) if action is not None]
    gaps = [after - before for before, after in itertools.pairwise(grown)]
    assert gaps == sorted(gaps) and gaps[-1] > gaps[0]


def test_f6_one_silent_worker_is_imputed():
    """F6, one bad worker's numbers freeze the loop: seven full workers and a silent one still grow."""
    config = policy(workers=replace(policy().workers, max=16))
    one_silent = (*workers(7, kv=1.0), WorkerReading(worker_id="worker-7"))
    decision = first(seen(1000.0, 8, workers=one_silent), config)
    assert decision.reason is Reason.SCALE_UP
    assert decision.wanted == 10  # as if it were as full as the others: 8 / 0.8


def test_f6_one_silent_worker_does_not_stop_a_shrink():
    def one_silent(now_s: float, count: int):
        said = workers(count, kv=0.05)
        return seen(now_s, count, workers=(replace(said[0], age_s=None), *said[1:]) if count > 1 else said)

    cluster = Cluster(policy(), one_silent, count=4)
    cluster.run(900.0)
    assert cluster.count == 1


def test_f7_a_transition_of_somebody_else_is_waited_for():
    """F7, two writers on one target: while a transition runs that the core did not order, nothing is ordered beside it.

    That a second order is refused by the cluster itself: tests/controller/test_transition.py.
    """
    theirs = TransitionReading(id="by-hand", from_workers=2, to_workers=1, began_s=995.0)
    decision = first(replace(overloaded(1000.0, 2), transition=theirs), policy())
    assert decision.reason is Reason.IN_FLIGHT
    assert decision.action is None and "by-hand" in decision.text


def test_f8_a_shrink_is_refused_while_the_survivors_lack_slots_for_the_streams():
    """F8, a shrink kills streams in flight: what lives must have a slot and its KV at the survivors, else nobody goes.

    That streams which move lose no token: tests/cli/test_scale.py and tests/controller/gateway/test_handover.py.
    """

    def streaming(now_s: float, count: int):
        return seen(now_s, count, workers=workers(count, kv=0.01, running=6, max_running=8))

    cluster = Cluster(policy(), streaming, count=2)
    cluster.run(900.0)
    assert cluster.changes == []
    assert cluster.decisions[-1].reason is Reason.SCALE_DOWN_REFUSED_STREAMS


def test_f9_a_failed_growth_leaves_the_core_open():
    """F9, a failed scale leaves admission closed: the core goes on after a failure; it retries, and it shrinks.

    That the cluster serves on after every failed step: tests/controller/test_transition_chaos.py.
    """
    cluster = Cluster(policy(), overloaded, count=2, join_s=10.0)
    cluster.tick()
    assert cluster.running is not None
    cluster.last = EndedTransition(
        id=cluster.running.id,
        from_workers=2,
        to_workers=3,
        state="failed",
        reason="joiner died",
        began_s=1000,
        ended_s=1003,
    )
    cluster.running = None
    assert cluster.tick().reason is Reason.RETRY_LATER
    cluster.run(70.0)
    assert cluster.count > 2


def test_f10_growth_and_shrink_over_fifty_cycles_leave_no_more_state():
    """F10, leaks over cycles: the core's state is no larger after fifty cycles than after five.

    That workers, mappings and processes do not pile up: tests/cli/test_elastic.py, benchmarks/cycles.py.
    """
    config = policy(down=free(30.0), up=free())
    start_s = 1000.0

    def wave(now_s: float, count: int):
        high = (now_s - start_s) % 120.0 < 60.0
        return seen(now_s, count, kv=load_of(1.9, count) if high else 0.0)

    cluster = Cluster(config, wave, count=1, join_s=5.0, start_s=start_s)
    cluster.run(5 * 120.0)
    after_five = len(msgspec.json.encode(cluster.state))
    cluster.run(45 * 120.0)
    assert len(cluster.changes) >= 90
    assert len(msgspec.json.encode(cluster.state)) <= after_five * 1.2


def test_f11_never_below_min_and_not_straight_to_max():
    """F11, min ignored, or straight to max: zero load keeps min; a long SLO breach grows by the rules, step by step."""
    config = policy(SLO, KV, workers=replace(policy().workers, min=2, max=64))
    idle = Cluster(config, lambda now_s, count: seen(now_s, count), count=2)
    idle.run(900.0)
    assert idle.changes == []

    def late(now_s: float, count: int):
        slow = TrafficReading(age_s=0.5, requests_per_s=1.0, ttft_s=30.0, met=0, missed=100, since_s=now_s - 5.0)
        return seen(now_s, count, workers=workers(count, running=4, waiting=1), traffic=slow)

    breached = Cluster(config, late, count=2, join_s=10.0)
    breached.run(10.0)
    assert breached.changes == [(2, 4)]  # twice as many, not 64


def test_f11_below_min_is_mended_at_once():
    config = policy(workers=replace(policy().workers, min=3))
    decision = first(seen(1000.0, 2), config)
    assert decision.reason is Reason.BELOW_MIN
    assert decision.action is not None and decision.action.target == 3


def test_f12_a_restarted_controller_never_shrinks_before_its_window_is_full():
    """F12, restart without history: restarted at any tick, no shrink within the stable window after it."""

    def idle(now_s: float, count: int):
        return seen(now_s, count)

    for restart in range(0, 400, 25):
        cluster = Cluster(policy(), idle, count=4)
        cluster.run(float(restart))
        restarted_s = cluster.now_s
        cluster.state, before = State(), len(cluster.changes)
        cluster.make = lambda now_s, count, at=restarted_s: replace(idle(now_s, count), restarted_at_s=at)
        cluster.run(299.0)
        assert cluster.changes[before:] == []
        cluster.run(120.0)
        assert cluster.count < 4 or before > 0


def test_f12_a_kept_state_does_not_hide_the_restart():
    """The state was written to disk and read again: the gap between is no history."""
    cluster = Cluster(policy(), lambda now_s, count: seen(now_s, count), count=4)
    cluster.run(295.0)
    cluster.now_s += 1000.0
    at = cluster.now_s
    cluster.make = lambda now_s, count: seen(now_s, count, restarted_at_s=at)
    assert cluster.tick().reason is Reason.SCALE_DOWN_REFUSED_HISTORY
    cluster.run(290.0)
    assert cluster.changes == []


def test_f13_the_last_spare_worker_goes_and_soon():
    """F13, the last worker is never removed, or half an hour later: from two to one right after the window."""
    cluster = Cluster(policy(), lambda now_s, count: seen(now_s, count), count=2)
    cluster.run(330.0)
    assert cluster.changes == [(2, 1)]


def test_f14_long_streams_do_not_hold_workers_that_are_idle_by_rate():
    """F14, streams pin replicas: two streams on four workers without any arrivals; they move, and two workers go.

    That a stream moves without losing a token: tests/controller/gateway/test_handover.py.
    """
    quiet = TrafficReading(age_s=0.5, live=2)

    def two_streams(now_s: float, count: int):
        said = workers(count, kv=0.02, max_running=8, longest_context_tokens=400)
        streaming = tuple(replace(worker, running=1) for worker in said[:2])
        return seen(now_s, count, workers=(*streaming, *said[2:]), traffic=quiet)

    cluster = Cluster(policy(SLO, KV), two_streams, count=4)
    cluster.run(900.0)
    assert cluster.count == 2


def test_f14_a_shrink_that_stalls_streams_for_too_little_is_postponed_with_a_reason():
    config = policy(down=free(0.0), cost_per_device_hour=1.0)
    stall = Measured(mean_s=1.0, p95_s=2.0)

    def many(now_s: float, count: int):
        return seen(now_s, count, workers=workers(count, kv=0.1, running=30), stall_s=stall)

    cluster = Cluster(config, many, count=2)
    decisions = cluster.run(20.0)
    assert {decision.reason for decision in decisions} == {Reason.SCALE_DOWN_REFUSED_COST}
    assert "stalls 60 streams" in decisions[-1].text
    cluster.run(400.0)
    assert cluster.changes == [(2, 1)]  # low for so long that it pays
