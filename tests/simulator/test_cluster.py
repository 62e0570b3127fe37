"""The modelled cluster against scenarios computed by hand, the formulas of queueing theory, and what must always hold."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexpert.simulator.cluster import Cluster
from flexpert.simulator.profile import Served
from flexpert.simulator.results import ScaleEvent, Slo
from flexpert.simulator.scaling import Scaling
from flexpert.simulator.service import Request

from .small import by_the_clock, load, poisson, profile, run


class Seen:
    """A cluster, and when its requests answered and ended."""

    def __init__(self, **fields) -> None:
        self.first: dict[int, float] = {}
        self.ended: dict[int, float] = {}
        changes = {name: fields.pop(name) for name in list(fields) if name not in {"workers", "stands_for"}}
        self.cluster = Cluster(
            profile(**changes),
            **{"workers": 1, **fields},
            on_first=lambda request, now_s: self.first.update({request.prompt: now_s}),
            on_end=lambda request, now_s: self.ended.update({request.prompt: now_s}),
        )

    def send(self, at_s: float, prompt: int, output: int, weight: float = 1.0) -> None:
        self.cluster.advance(at_s)
        self.cluster.submit(Request(at_s, prompt, output, weight))

    def finish(self) -> None:
        self.cluster.advance(1e6)
        self.cluster.check()


def test_two_requests_share_steps_as_computed_by_hand() -> None:
    seen = Seen()
    seen.send(0.0, 50, 3)
    seen.send(0.05, 250, 2)
    seen.finish()

    # 0.00-0.15 prompt of 50: first token. The second came meanwhile: 99 + 99 + 52 prompt tokens beside one decoding request, which ends
    # with the second of these steps.
    assert seen.first[50] == pytest.approx(0.15)
    assert seen.ended[50] == pytest.approx(0.15 + 2 * 0.199)
    assert seen.first[250] == pytest.approx(0.15 + 2 * 0.199 + 0.152)
    assert seen.ended[250] == pytest.approx(0.15 + 2 * 0.199 + 0.152 + 0.1)


def test_short_prompts_share_a_step() -> None:
    seen = Seen()
    for prompt in (10, 20, 30):
        seen.send(0.0, prompt, 1)
    seen.finish()

    assert list(seen.first.values()) == pytest.approx([0.16] * 3)


def test_ranks_step_at_the_pace_of_the_slowest() -> None:
    seen = Seen(workers=2)
    seen.send(0.0, 10, 3)
    seen.send(0.0, 100, 3)  # goes to the other worker
    seen.finish()

    assert seen.first == {10: pytest.approx(0.2), 100: pytest.approx(0.2)}
    assert seen.ended == {10: pytest.approx(0.4), 100: pytest.approx(0.4)}


def test_exchange_and_context_lengthen_a_step() -> None:
    seen = Seen(workers=2, exchange=((1.0, 0.0), (2.0, 0.05)), context_s=0.001)
    seen.send(0.0, 100, 2)
    seen.finish()

    assert seen.first[100] == pytest.approx(0.25)
    assert seen.ended[100] == pytest.approx(0.25 + 0.1 + 0.05 + 0.101)


def test_a_served_size_has_steps_and_ways_of_its_own() -> None:
    two = Served(
        workers=2,
        decode=((0.0, 0.2),),
        prefill=((0.0, 0.0), (100.0, 0.1)),
        overlap=0.5,
        answer=((0.0, 0.0), (2.0, 0.02)),
    )
    one = Served(workers=1, decode=((0.0, 0.1),), prefill=((0.0, 0.0), (100.0, 0.1)), answer=((0.0, 0.005),))
    seen = Seen(workers=2, served=(one, two))
    first = Request(0.0, 60, 2, 1.0)
    seen.cluster.submit(first)
    seen.send(0.0, 80, 2)
    seen.cluster.advance(0.2)

    # The longer prompt, half of the other one, and the way out beside two that run.
    assert seen.first == {60: pytest.approx(0.2 + 0.08 + 0.03), 80: pytest.approx(0.2 + 0.08 + 0.03)}
    assert first.answer_s == pytest.approx(0.02)
    seen.cluster.shrink(1)
    seen.finish()
    assert seen.ended[60] == pytest.approx(0.31 + 0.1)


def test_steps_take_longer_while_processes_start() -> None:
    slow = profile(starting=2.0, standby_s=3.0)
    found = run(load([0.0], 10, 100, span_s=20.0), by_the_clock((0.0, 1), (2.0, 2)), of=slow)
    calm = run(load([0.0], 10, 100, span_s=20.0), by_the_clock((0.0, 1), (2.0, 2)))

    # From the order at 2 s until the commit at 4 s; no standby is wanted here.
    assert found.tpot_s.mean * 99 - calm.tpot_s.mean * 99 == pytest.approx(1.0, abs=0.15)


@pytest.mark.parametrize("devices", [2, 16])
def test_a_used_standby_is_replaced_also_where_every_device_serves_and_slows_steps_meanwhile(devices: int) -> None:
    slow = profile(starting=2.0, standby_s=3.0)
    found, calm = (
        run(load([0.0], 10, 100, span_s=20.0), by_the_clock((0.0, 1), (2.0, 2), standby=1), of=of, devices=devices)
        for of in (slow, profile(standby_s=3.0))
    )

    # From the order at 2 s until the commit at 4 s, and until the next standby is warm at 7 s.
    assert found.tpot_s.mean * 99 - calm.tpot_s.mean * 99 == pytest.approx(2.5, abs=0.15)


def test_a_leaver_s_process_is_a_standby_for_a_minute_and_spares_the_next_join_a_replacement() -> None:
    slow = profile(starting=2.0, standby_s=3.0)
    ups_and_downs = by_the_clock((0.0, 1), (2.0, 2), (10.0, 1), (14.0, 2), standby=1)
    found = run(load([14.0], 10, 100, span_s=40.0), ups_and_downs, of=slow)
    calm = run(load([14.0], 10, 100, span_s=40.0), by_the_clock((0.0, 1), (2.0, 2), (10.0, 1), (14.0, 2), standby=1))
    # Only the transition from 14 s to 16 s.
    assert found.tpot_s.mean * 99 - calm.tpot_s.mean * 99 == pytest.approx(1.0, abs=0.15)

    scaling = Scaling(slow, workers=2, standby=1, rng=np.random.default_rng(0))
    event = ScaleEvent(at_s=1.0, ended_s=None, from_workers=2, to_workers=1, reason="", text="", decision_id="")
    scaling.order(event)
    scaling.commit()  # at 3 s; the other one waits since 0 s
    assert [scaling.standbys(at_s) for at_s in (3.0, 59.9, 60.0, 200.0)] == [2, 2, 1, 1]


def test_requests_beyond_the_batch_wait_in_order() -> None:
    seen = Seen(max_running=1)
    for prompt in (11, 12, 13, 14):
        seen.send(0.0, prompt, 2)
    assert len(seen.cluster.queue) == 2  # a worker holds two batches, the gateway the rest
    seen.finish()

    assert list(seen.ended) == [11, 12, 13, 14]


def test_full_memory_preempts_the_latest_and_loses_none() -> None:
    seen = Seen(kv_tokens=100)
    seen.send(0.0, 40, 30)
    seen.send(0.0, 41, 30)
    seen.finish()

    assert seen.cluster.preemptions == 1
    # 17 free tokens last for 8 steps; then the older one goes on alone, and the other computes what it had again.
    assert seen.ended[40] < seen.ended[41]
    assert seen.first[41] == pytest.approx(0.181)
    assert seen.cluster.live == 0


def test_leavers_requests_go_on_where_they_stood() -> None:
    seen = Seen(workers=2)
    seen.send(0.0, 10, 21)
    seen.send(0.0, 11, 21)
    seen.cluster.advance(1.0)
    seen.cluster.shrink(1)
    seen.cluster.check()
    assert seen.cluster.preemptions == 0
    seen.finish()

    assert seen.ended == {10: pytest.approx(0.111 + 2.0), 11: pytest.approx(0.111 + 2.0)}


def test_a_joiner_takes_what_waits_in_the_gateway() -> None:
    seen = Seen(max_running=1)
    for prompt in (11, 12, 13):
        seen.send(0.0, prompt, 100)
    seen.cluster.advance(1.0)
    seen.cluster.grow(1)
    seen.cluster.check()
    seen.finish()

    assert seen.first[13] < seen.first[12]


def test_the_last_worker_cannot_leave() -> None:
    with pytest.raises(ValueError, match="one must stay"):
        Seen(workers=2).cluster.shrink(2)


@pytest.mark.parametrize("utilisation", [0.5, 0.8])
def test_constant_service_waits_as_m_d_1(utilisation: float) -> None:
    service_s = 0.101 + 9 * 0.1
    found = run(load(poisson(utilisation / service_s, 40_000, seed=3), 1, 10), of=profile(max_running=1))

    expected_s = utilisation * service_s / (2 * (1 - utilisation))
    assert found.queue_s.mean == pytest.approx(expected_s, rel=0.05)


@pytest.mark.parametrize("utilisation", [0.5, 0.8])
def test_exponential_service_waits_as_m_m_1(utilisation: float) -> None:
    rng = np.random.default_rng(5)
    steps_of = profile(max_running=1, decode=((0.0, 0.001), (1.0, 0.001)), prefill=((0.0, 0.0),))
    output = rng.geometric(1 / 1000, 20_000)
    found = run(load(poisson(utilisation, 20_000, seed=4), 1, output.tolist()), of=steps_of)

    assert found.queue_s.mean == pytest.approx(utilisation / (1 - utilisation), rel=0.12)


def test_little_s_law_holds_in_a_batch() -> None:
    at_s = poisson(5.0, 8_000, seed=6)
    steps_of = profile(max_running=64, decode=((0.0, 0.001), (1.0, 0.001)), prefill=((0.0, 0.0),))
    found = run(load(at_s, 1, 1000), of=steps_of)

    in_batch = np.mean(found.timeline.running)
    rate = len(at_s) / at_s[-1]
    assert in_batch == pytest.approx(rate * 1.0, rel=0.05)  # a thousand steps of 1 ms


requests = st.lists(
    st.tuples(st.floats(0, 30), st.integers(1, 400), st.integers(1, 60)), min_size=1, max_size=60
)  # fmt: skip
sizes = st.lists(st.tuples(st.floats(0, 60), st.integers(1, 9)), min_size=0, max_size=6)


@settings(max_examples=40, deadline=None)
@given(
    requests=requests, sizes=sizes, stands_for=st.sampled_from([1, 3]), kv_tokens=st.sampled_from([500, 1500, 10_000])
)
def test_no_request_is_lost_and_the_books_agree(requests, sizes, stands_for, kv_tokens) -> None:
    requests = sorted(requests)
    played = load(
        [at_s for at_s, _, _ in requests], [p for _, p, _ in requests], [o for _, _, o in requests], span_s=70.0, stands_for=stands_for
    )  # fmt: skip
    clock = by_the_clock((0.0, 1), *sorted(sizes))
    found = run(played, clock, of=profile(kv_tokens=kv_tokens))

    assert found.requests == stands_for * len(requests)
    assert found.finished == pytest.approx(found.requests)
    assert found.rejected == 0
    assert found.met <= found.finished + 1e-9
    # Worker-seconds are the integral over the sizes that the events tell.
    edges = [(0.0, 1)] + [
        (event.ended_s, event.to_workers) for event in found.scale_events if event.ended_s is not None
    ]
    edges = [(min(at_s, 70.0), size) for at_s, size in edges] + [(70.0, 0)]
    expected_s = sum((after[0] - before[0]) * before[1] for before, after in pairwise(edges))
    assert found.worker_hours * 3600 == pytest.approx(expected_s, abs=0.01)
    assert found.device_hours >= found.worker_hours - 1e-6
    assert sum(found.timeline.workers) == pytest.approx(expected_s, abs=0.05)  # intervals of one second


@settings(max_examples=30, deadline=None)
@given(
    requests=requests,
    changes=st.lists(st.tuples(st.floats(0, 60), st.integers(1, 9)), max_size=6),
    stands_for=st.sampled_from([1, 4]),
)
def test_the_books_of_every_lane_agree_at_each_change(requests, changes, stands_for) -> None:
    seen = Seen(kv_tokens=1000, stands_for=stands_for)
    happenings = sorted(
        [(at_s, 0, prompt, output) for at_s, prompt, output in requests]
        + [(at_s, size, 0, 0) for at_s, size in changes]
    )
    for at_s, size, prompt, output in happenings:
        if not size:
            seen.send(at_s, prompt, output, float(stands_for))
            continue
        seen.cluster.advance(at_s)
        change = size - seen.cluster.workers
        seen.cluster.grow(change) if change > 0 else seen.cluster.shrink(-change)
        seen.cluster.check()
    seen.finish()

    assert seen.cluster.live == pytest.approx(0)
    assert seen.cluster.unanswered == pytest.approx(0)


def test_equal_arguments_give_equal_results() -> None:
    played = load(poisson(3.0, 500), 30, 20)
    clock = lambda: by_the_clock((0.0, 1), (20.0, 4), (90.0, 2))  # noqa: E731
    first, second = (run(played, clock(), of=profile(join_cold=profile().join_cold)) for _ in range(2))

    assert first == second


def test_requests_that_fit_no_worker_are_refused_and_count_as_missed() -> None:
    found = run(load([0.0, 1.0], [10, 20_000], 5), slo=Slo(ttft_s=10.0))

    assert (found.requests, found.finished, found.rejected) == (2, 1, 1)
    assert found.attainment == 0.5


def test_more_workers_at_the_begin_than_devices_are_refused() -> None:
    with pytest.raises(ValueError, match="1 to 4"):
        run(load([0.0], 1, 1), devices=4, workers=5)
