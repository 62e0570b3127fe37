"""Spare workers by queueing: against Erlang's formula, and the size that follows from it without any strain."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from flexpert.controller.policy.decide import decide
from flexpert.controller.policy.staffing import staffed, waits
from flexpert.controller.policy.types import State, TrafficReading

from .decisions import SLO, Cluster, free, policy, seen, workers


def erlang_c(count: int, busy: float) -> float:
    blocked = 1.0
    for number in range(1, count + 1):
        blocked = busy * blocked / (number + busy * blocked)
    return blocked / (1.0 - busy / count * (1.0 - blocked))


@pytest.mark.parametrize(("count", "busy"), [(12, 8.0), (40, 32.0), (110, 100.0)])
def test_the_share_that_waits_is_about_erlangs(count, busy):
    assert waits((count - busy) / math.sqrt(busy)) == pytest.approx(erlang_c(count, busy), abs=0.04)


def test_fewer_are_spare_where_waiting_is_allowed_and_where_many_even_out():
    at_once, later = staffed(16.0, late=0.01, times=0.0), staffed(16.0, late=0.01, times=2.0)
    assert 16.0 < later < at_once <= 28.0
    assert staffed(400.0, late=0.01, times=0.0) / 400.0 < at_once / 16.0


def quiet(now_s: float, count: int, *, computing: int, live: int = 40, **changes):
    """Fast steps, some workers of all with a prompt to compute."""
    traffic = TrafficReading(
        age_s=0.5, requests_per_s=10.0, prompt_tokens_per_s=5000.0, output_tokens_per_s=2000.0, live=live, waiting=computing,
        queue_s=0.01, ttft_s=0.1, tpot_s=0.05 / count, met=100, since_s=now_s - 10.0, **changes,
    )  # fmt: skip
    said = workers(count, running=live // count, max_running=64)
    said = tuple(replace(worker, waiting_tokens=100 if number < computing else 0) for number, worker in enumerate(said))
    return seen(now_s, count, workers=said, traffic=traffic)


def test_an_oversize_goes_at_once_to_what_prompts_need_and_stays_there():
    cluster = Cluster(policy(SLO, down=free(300.0)), lambda now_s, count: quiet(now_s, count, computing=1), count=8)
    cluster.run(3600.0)
    assert len(cluster.changes) == 1
    assert 2 <= cluster.count <= 4


def test_workers_that_prompts_keep_busy_stay_however_fast_steps_are():
    cluster = Cluster(policy(SLO), lambda now_s, count: quiet(now_s, count, computing=6), count=8)
    cluster.run(3600.0)
    assert cluster.changes == []


def test_spent_misses_keep_more_workers():
    observation = quiet(1000.0, 8, computing=2)
    calm, spent = (
        decide(observation, State(began_s=0.0, computing=2.0, missed_share=share), policy(SLO))[0].proposals[0].load
        for share in (0.0, 0.01)
    )
    assert spent == pytest.approx(1.5 * calm, rel=0.05)
