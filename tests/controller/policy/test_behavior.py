"""Windows, tolerance and rules mean what they mean in Kubernetes HPA v2."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexpert.controller.policy.behavior import down_limit, push_dip, push_load, push_peak, up_limit
from flexpert.controller.policy.types import Change, DirectionConfig, Reason, RuleConfig, Sample, WorkersConfig

from .decisions import Cluster, first, free, load_of, policy, seen

FOUR = RuleConfig(type="workers", value=4, period_s=15.0)
DOUBLE = RuleConfig(type="percent", value=100, period_s=15.0)
HALF = RuleConfig(type="percent", value=50, period_s=60.0)
ONE = RuleConfig(type="workers", value=1, period_s=60.0)


def rules(*given: RuleConfig, select: str = "Max") -> DirectionConfig:
    return DirectionConfig(stabilization_s=0.0, rules=given, select=select)


@pytest.mark.parametrize(
    ("direction", "now", "limit"),
    [
        (rules(), 3, math.inf),
        (rules(FOUR), 3, 7),
        (rules(DOUBLE), 3, 6),
        (rules(FOUR, DOUBLE), 3, 7),
        (rules(FOUR, DOUBLE), 10, 20),
        (rules(FOUR, DOUBLE, select="Min"), 10, 14),
        (rules(RuleConfig(type="percent", value=10, period_s=15.0)), 3, 4),  # rounded up: at least one
    ],
)
def test_growth_is_limited_by_the_rule_that_select_takes(direction, now, limit):
    assert up_limit(direction, (), now, now_s=1000.0) == limit


@pytest.mark.parametrize(
    ("direction", "now", "limit"),
    [
        (rules(), 3, 0),
        (rules(HALF), 8, 4),
        (rules(HALF), 3, 1),
        (rules(ONE), 8, 7),
        (rules(HALF, ONE), 8, 4),
        (rules(HALF, ONE, select="Min"), 8, 7),
    ],
)
def test_shrinking_is_limited_by_the_rule_that_select_takes(direction, now, limit):
    assert down_limit(direction, (), now, now_s=1000.0) == limit


def test_what_was_added_in_the_period_counts_from_its_begin():
    grown = (Change(at_s=990.0, from_workers=3, to_workers=6),)
    assert up_limit(rules(FOUR), grown, 6, now_s=1000.0) == 7
    assert up_limit(rules(FOUR), grown, 6, now_s=1005.1) == 10


def test_shrinking_does_not_make_room_for_growth():
    """HPA counts the two directions apart."""
    changes = (Change(at_s=990.0, from_workers=3, to_workers=6), Change(at_s=995.0, from_workers=6, to_workers=4))
    assert up_limit(rules(FOUR), changes, 4, now_s=1000.0) == 5
    assert down_limit(rules(ONE), changes, 4, now_s=1000.0) == 5


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.floats(0.1, 20.0), st.floats(0.0, 9.0)), min_size=1, max_size=60))
def test_the_first_step_is_the_highest_and_the_lowest_of_the_window(steps):
    peaks, dips, seen_, now_s = (), (), [], 0.0
    for step_s, value in steps:
        now_s += step_s
        sample = Sample(at_s=now_s, value=value)
        seen_.append(sample)
        peaks, dips = push_peak(peaks, sample, window_s=30.0), push_dip(dips, sample, window_s=30.0)
        inside = [item.value for item in seen_ if item.at_s > now_s - 30.0]
        assert peaks[0].value == max(inside)
        assert dips[0].value == min(inside)


def test_samples_of_a_short_interval_are_thinned_out():
    loads: tuple[Sample, ...] = ()
    for tick in range(5000):
        loads = push_load(loads, Sample(at_s=tick * 0.1, value=1.0), window_s=1e9)
    assert len(loads) <= 240
    assert loads[-1].at_s == pytest.approx(499.9)


@pytest.mark.parametrize(("load", "reason"), [(4.3, Reason.NO_CHANGE), (4.5, Reason.SCALE_UP), (3.7, Reason.NO_CHANGE)])
def test_within_the_tolerance_nothing_happens(load, reason):
    config = policy(down=free(0.0), panic=policy().panic)
    assert first(seen(1000.0, 4, kv=load_of(load, 4)), config).reason is reason


def test_growth_waits_for_its_window_and_takes_the_lowest_of_it():
    cluster = Cluster(
        policy(up=free(30.0), workers=WorkersConfig(min=1, max=16)),
        lambda now_s, count: seen(now_s, count, kv=load_of(7.0, count)),
        count=5,
    )
    decisions = cluster.run(30.0)
    assert {decision.reason for decision in decisions} == {Reason.SCALE_UP_STABILIZING}
    assert cluster.tick().reason is Reason.SCALE_UP


def test_one_dip_in_the_window_holds_growth_back():
    def dipping(now_s: float, count: int):
        return seen(now_s, count, kv=load_of(2.0 if now_s == 1015.0 else 7.0, count))

    cluster = Cluster(policy(up=free(30.0)), dipping, count=5)
    decisions = cluster.run(45.0)
    assert cluster.changes == [], decisions[-1]


def test_shrinking_takes_the_highest_of_its_window():
    def dropping(now_s: float, count: int):
        return seen(now_s, count, kv=load_of(4.0 if now_s < 1100.0 else 1.0, count))

    cluster = Cluster(policy(), dropping, count=5)
    cluster.run(390.0)
    assert cluster.changes == []
    cluster.run(20.0)
    assert cluster.changes[0] == (5, 2)  # half of 5 in the first minute


def test_a_spike_of_one_tick_within_half_a_size_is_not_followed():
    def noisy(now_s: float, count: int):
        return seen(now_s, count, kv=load_of(5.9 if now_s == 1010.0 else 4.0, count))

    cluster = Cluster(policy(), noisy, count=4)
    cluster.run(30.0)
    assert cluster.changes == []
    assert any(item.rule == "two ticks" for decision in cluster.decisions for item in decision.rejected)
