"""Constant load changes nothing: a queueing model with noise runs for an hour, and the size changes once at most."""

from __future__ import annotations

import math

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from .decisions import KV, QUEUE, SLO, Cluster, policy
from .queueing import WORKER_RPS, Queueing

SIGNALS = {"slo and kv": (SLO, KV), "slo": (SLO,), "kv": (KV,), "queue": (QUEUE,)}


def an_hour(names: str, rate: float, spare: int, seed: int) -> tuple[Cluster, Queueing]:
    """At `rate` requests/s, begun with `spare` workers more than just hold it."""
    count = min(math.ceil(rate / WORKER_RPS) + spare, 8)
    world = Queueing(lambda now_s: rate, seed=seed, start_s=1000.0)
    cluster = Cluster(policy(*SIGNALS[names], interval_s=10.0), world, count=count)
    cluster.run(3600.0)
    return cluster, world


@settings(max_examples=4, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    names=st.sampled_from(sorted(SIGNALS)),
    rate=st.floats(0.2, 4 * WORKER_RPS),
    spare=st.integers(0, 2),
    seed=st.integers(0, 1000),
)
def test_constant_load_anywhere_in_the_capacity_range_makes_one_change_at_most(names, rate, spare, seed):
    cluster, world = an_hour(names, rate, spare, seed)
    assert len(cluster.changes) <= 1, [decision for decision in cluster.decisions if decision.action]
    assert world.met >= 0.98 * (world.met + world.missed)


@pytest.mark.parametrize(("rate", "spare"), [(4.0, 0), (4.0, 2), (13.0, 0)])
def test_the_edges_of_a_worker_do_not_flap(rate, spare):
    """Where one worker more or less is just right, noise crosses the line again and again."""
    cluster, _ = an_hour("slo and kv", rate, spare, seed=1)
    assert len(cluster.changes) <= 1
