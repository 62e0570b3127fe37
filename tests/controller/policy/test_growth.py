"""How far growth goes, who comes first, and what is kept of it: standbys, backlogs, bursts that are over, sizes that went too far."""

from __future__ import annotations

from dataclasses import replace

import pytest

from flexpert.controller.policy.reasons import Reason
from flexpert.controller.policy.types import EndedTransition, State, TrafficReading, WorkersConfig

from .decisions import KV, SLO, first, free, load_of, policy, seen, workers

STANDBY = WorkersConfig(min=1, max=8, standby=1)


def crowd(now_s: float, count: int, **changes):
    """Three wait for one that is served, and half of those that ended came too late."""
    values = {"requests_per_s": 9.0, "ttft_s": 0.9, "queue_s": 0.5, "met": 50, "missed": 50, "since_s": now_s - 30.0}
    traffic = TrafficReading(age_s=1.0, **{**values, **changes})
    return seen(now_s, count, workers=workers(count, running=5, waiting=12), traffic=traffic)


def test_a_standby_comes_first_where_requests_are_late_and_the_rest_after_it():
    config = policy(SLO, up=free(), workers=STANDBY)
    decision = first(crowd(1000.0, 2), config)
    assert decision.wanted == 3
    assert decision.rejected[-1].rule == "standbys first"
    grown = EndedTransition(id="t", from_workers=1, to_workers=2, state="done", began_s=930.0, ended_s=990.0)
    assert first(replace(crowd(1000.0, 2), last_transition=grown), config).wanted == 7


def test_growth_before_anybody_is_late_comes_in_one():
    config = policy(KV, up=free(), workers=STANDBY)
    full = seen(1000.0, 2, kv=load_of(5.0, 2))
    assert first(full, config).wanted == 5
    waits = workers(2, kv=load_of(5.0, 2), waiting=1)
    assert first(replace(full, workers=waits), config).wanted == 3


def test_no_more_is_ordered_than_arrives_for_what_is_served():
    """However many wait: 4,000 tokens/s come, and 3,200 are computed."""
    said = workers(2, running=5, waiting=12, prefill_tokens_per_s=1600.0)
    slow = replace(crowd(1000.0, 2, prompt_tokens_per_s=4000.0), workers=said)
    assert first(slow, policy(SLO, up=free())).wanted == 4


@pytest.mark.parametrize(("waiting", "reason"), [(0, Reason.NO_CHANGE), (2, Reason.SCALE_UP)])
def test_a_burst_of_misses_that_is_over_is_no_reason_to_grow(waiting, reason):
    traffic = TrafficReading(
        age_s=1.0, requests_per_s=8.0, ttft_s=0.48, queue_s=0.0, tpot_s=0.049, met=72, missed=8, since_s=990.0
    )
    said = workers(4, running=3, waiting=waiting)
    decision = first(seen(1000.0, 4, workers=said, traffic=traffic), policy(SLO))
    assert decision.reason is reason
    assert ("a burst that is over" in decision.proposals[0].why) is (waiting == 0)


def test_a_growth_that_went_too_far_is_taken_back_once_it_shows():
    """Eight were ordered; the load asks for two, though it is no less than the one they were ordered for."""
    state = State(began_s=0.0, sized_workers=8, sized_load=1.5, sized_s=900.0, few_workers=1, few_s=900.0)
    config = policy(KV, down=free(300.0))
    decision = first(seen(1000.0, 8, kv=load_of(1.6, 8)), config, state)
    assert (decision.reason, decision.wanted) == (Reason.SCALE_DOWN, 2)
    chosen = replace(state, few_s=0.0)  # by a shrink, which was weighed
    assert first(seen(1000.0, 8, kv=load_of(1.6, 8)), config, chosen).reason is Reason.SCALE_DOWN_STABILIZING


def test_a_size_that_was_too_few_for_this_traffic_is_not_gone_back_to():
    state = State(began_s=0.0, sized_workers=8, sized_s=900.0, few_workers=3, few_demand=5000.0, few_s=900.0)
    config = policy(KV, down=free(300.0))
    for tokens_per_s, wanted in ((5000.0, 4), (1000.0, 2)):
        traffic = TrafficReading(age_s=0.5, prompt_tokens_per_s=tokens_per_s)
        decision = first(seen(1000.0, 8, kv=load_of(1.6, 8), traffic=traffic), config, state)
        assert decision.wanted == wanted
