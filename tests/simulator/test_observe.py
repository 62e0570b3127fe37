"""The modelled cluster as the policy sees it: field by field what the gateway and the controller would tell."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from flexpert.controller.policy.types import Observation
from flexpert.simulator.cluster import Cluster
from flexpert.simulator.metrics import Records
from flexpert.simulator.observe import Observer
from flexpert.simulator.results import ScaleEvent, Slo
from flexpert.simulator.scaling import Scaling
from flexpert.simulator.service import Request

from .small import profile

Look = Callable[[float], Observation]


def watched(*, workers: int = 1, window_s: float = 10.0, **changes) -> tuple[Cluster, Scaling, Look]:
    """A cluster, its transitions, and a look at it at a time."""
    of, slo = profile(**changes), Slo(ttft_s=1.0, tpot_s=0.2)
    records = Records(slo=slo)
    cluster = Cluster(of, workers=workers, on_first=records.on_first, on_end=records.on_end, on_route=records.on_route)
    scaling = Scaling(of, workers=workers, standby=0, rng=np.random.default_rng(0))
    observer = Observer(cluster, records, scaling, slo=slo, devices=4, start_s=0.0, window_s=window_s)

    def look(at_s: float) -> Observation:
        cluster.advance(at_s)
        return observer.look(at_s, arrived=0.0, arrived_tokens=0.0)

    return cluster, scaling, look


def change(to_workers: int, *, of: int, at_s: float) -> ScaleEvent:
    return ScaleEvent(
        at_s=at_s, ended_s=None, from_workers=of, to_workers=to_workers, reason="", text="", decision_id=""
    )


def test_the_queue_is_the_gateway_s_a_worker_s_own_is_told_by_its_waiting() -> None:
    """Two batches of one place: one request runs, one waits at the worker, the others wait in the gateway."""
    cluster, _, look = watched(max_running=1)
    for prompt in (11, 12):
        cluster.submit(Request(0.0, prompt, 30, 1.0))
    seen = look(2.0)
    assert (seen.workers[0].running, seen.workers[0].waiting) == (1, 1)
    assert seen.traffic.queue_s == 0.0

    for prompt in (13, 14):
        cluster.submit(Request(2.0, prompt, 30, 1.0))
    first_s = 30 * 0.1 + 0.011  # the first ends, and the third goes to the worker
    assert look(2.5).traffic.queue_s == pytest.approx(0.5, abs=0.11)
    cluster.advance(first_s + 0.05)
    assert not [request for request in cluster.queue if request.prompt == 13]
    assert look(11.9).traffic.queue_s == pytest.approx(2 * 30 * 0.1 - 2.0, abs=0.2)


def test_output_is_all_tokens_the_first_ones_too() -> None:
    cluster, _, look = watched(max_running=8)
    look(0.0)
    for prompt in (10, 20, 30, 40):
        cluster.submit(Request(0.0, prompt, 2, 1.0))

    assert look(10.0).traffic.output_tokens_per_s == pytest.approx(0.8)


def test_tokens_of_a_worker_that_left_were_put_out_all_the_same() -> None:
    cluster, _, look = watched(workers=2, max_running=8)
    look(0.0)
    for prompt in (10, 20):
        cluster.submit(Request(0.0, prompt, 41, 1.0))
    cluster.advance(9.0)
    cluster.shrink(1)

    assert look(10.0).traffic.output_tokens_per_s == pytest.approx(8.2)


def test_workers_of_a_transition_join_and_leave() -> None:
    cluster, scaling, look = watched(workers=3)
    scaling.order(change(2, of=3, at_s=1.0))
    assert [worker.phase for worker in look(2.0).workers] == ["ready", "ready", "leaving"]
    scaling.commit()
    cluster.shrink(1)
    scaling.order(change(4, of=2, at_s=5.0))
    assert [worker.phase for worker in look(6.0).workers] == ["ready", "ready", "joining", "joining"]


def test_rates_of_workers_are_of_the_time_since_the_look_before() -> None:
    cluster, _, look = watched()
    look(0.0)
    cluster.submit(Request(0.0, 50, 100, 1.0))
    look(1.0)

    assert look(2.0).workers[0].decode_tokens_per_s == pytest.approx(10.0, abs=1.0)
    assert look(2.0).workers[0].prefill_tokens_per_s == 0.0
