"""The load window and the gateway's answer to how things are: virtual time for the one, a real gateway for the other."""

from __future__ import annotations

import threading
from typing import Any

import httpx
import pytest

from flexpert.controller.gateway.window import LONGEST_S, LoadWindow
from flexpert.workers.messages import Stats


def judged(window: LoadWindow, now_s: float, **settings: Any) -> tuple[int, int]:
    found = window.look(now_s, window_s=60.0, **settings)
    return found["met"], found["missed"]


def test_nothing_seen_is_no_rate_and_no_percentile() -> None:
    found = LoadWindow(began_s=100.0).look(130.0, window_s=10.0)
    assert found["requests_per_s"] == 0.0 and found["since_s"] == 10.0
    assert (found["ttft_s"], found["tpot_s"], found["queue_s"]) == (None, None, None)


def test_a_young_window_says_how_short_it_is() -> None:
    window = LoadWindow(began_s=100.0)
    window.arrived(100.5, choices=4, prompt_tokens=40)
    found = window.look(102.0, window_s=10.0)
    assert (found["since_s"], found["requests_per_s"], found["prompt_tokens_per_s"]) == (2.0, 2.0, 20.0)


def test_percentiles_are_of_the_window_alone_and_near() -> None:
    window = LoadWindow(began_s=0.0)
    for _ in range(100):
        window.first_token(10.2, 9.0)
    for index in range(100):
        window.first_token(30.2, 0.001 * (index + 1))
    assert window.look(31.0, window_s=10.0)["ttft_s"] == pytest.approx(0.095, rel=0.03)
    assert window.look(31.0, window_s=30.0)["ttft_s"] == pytest.approx(9.0, rel=0.03)
    assert window.look(31.0, window_s=10.0)["output_tokens_per_s"] == pytest.approx(10.0)


def test_failures_refusals_and_lateness_miss_the_slo_and_own_mistakes_do_not_count() -> None:
    window = LoadWindow(began_s=0.0)
    window.slo = (0.5, 0.05)
    window.ended(1.0, outcome="completed", ttft_s=0.4, tpot_s=0.04, waited_s=2.0)
    window.ended(1.0, outcome="completed", ttft_s=0.4, tpot_s=None, waited_s=0.4)  # a single token has no tpot
    assert judged(window, 2.0) == (2, 0)
    window.ended(1.0, outcome="completed", ttft_s=0.6, tpot_s=0.04, waited_s=2.0)
    window.ended(1.0, outcome="completed", ttft_s=0.4, tpot_s=0.06, waited_s=2.0)
    window.ended(1.0, outcome="failed", ttft_s=0.4, tpot_s=0.04, waited_s=2.0)
    window.ended(1.0, outcome="cancelled", ttft_s=None, tpot_s=None, waited_s=0.6)
    window.refused(1.0)
    assert judged(window, 2.0) == (2, 5)
    window.ended(1.0, outcome="invalid", ttft_s=None, tpot_s=None, waited_s=9.0)
    window.ended(1.0, outcome="cancelled", ttft_s=None, tpot_s=None, waited_s=0.1)
    assert judged(window, 2.0) == (2, 5)


def test_choices_that_wait_too_long_count_before_they_end() -> None:
    window = LoadWindow(began_s=0.0)
    window.slo = (0.5, None)
    found = window.look(10.0, window_s=10.0, waiting_s=[0.1, 3.0, 3.0])
    assert (found["met"], found["missed"]) == (0, 2)
    assert found["ttft_s"] == pytest.approx(3.0, rel=0.03)
    assert judged(window, 10.0) == (0, 0), "looking leaves nothing behind"


def test_a_queue_that_nobody_leaves_is_seen_as_long_as_it_is() -> None:
    window = LoadWindow(began_s=0.0)
    assert window.look(10.0, window_s=10.0, queued_s=[0.02, 4.0])["queue_s"] == pytest.approx(4.0, rel=0.03)
    for _ in range(18):
        window.queued(9.0, 0.5)
    found = window.look(10.0, window_s=10.0, queued_s=[0.1] * 100)["queue_s"]
    assert found == pytest.approx(0.5, rel=0.03), "those that have only come say nothing yet"
    assert window.look(10.0, window_s=10.0, queued_s=[4.0, 4.0])["queue_s"] == pytest.approx(4.0, rel=0.03)
    assert window.look(10.0, window_s=10.0)["queue_s"] == pytest.approx(0.5, rel=0.03), "looking leaves nothing behind"


def test_without_an_slo_nothing_is_judged() -> None:
    window = LoadWindow(began_s=0.0)
    window.ended(1.0, outcome="failed", ttft_s=None, tpot_s=None, waited_s=9.0)
    window.refused(1.0)
    assert judged(window, 2.0, waiting_s=[99.0]) == (0, 0)


def test_memory_does_not_grow_with_time_nor_with_the_load() -> None:
    window = LoadWindow(began_s=0.0)
    for second in range(3 * LONGEST_S):
        for index in range(50):
            window.first_token(second + 0.5, 0.01 * index)
    assert len(window._slots) == LONGEST_S + 1
    assert sum(len(slot.ttft) for slot in window._slots) < 50 * (LONGEST_S + 1)


# A real gateway


def load(harness: Any, gateway: Any, **settings: Any) -> dict[str, Any]:
    async def ask() -> dict[str, Any]:
        return dict(gateway.load(**{"window_s": 60.0, "slo": (5.0, None), **settings}))

    return dict(harness.run(ask()))


def test_gateway_tells_of_traffic_and_of_each_worker(harness: Any, make_client: Any) -> None:
    worker, idle = harness.worker(), harness.worker()
    gateway = harness.gateway()
    client = make_client(gateway)
    load(harness, gateway)
    client.completions.create(model="tiny-moe", prompt="one two three", max_tokens=3)
    found = load(harness, gateway)
    assert (found["traffic"]["met"], found["traffic"]["missed"], found["traffic"]["live"]) == (1, 0, 0)
    assert found["traffic"]["requests_per_s"] > 0 and found["traffic"]["output_tokens_per_s"] > 0
    assert found["traffic"]["ttft_s"] is not None and found["traffic"]["tpot_s"] is not None
    assert [told["age_s"] for told in found["workers"]] == [0.0, 0.0], "what has nothing is idle, not silent"
    assert {told["max_running"] for told in found["workers"]} == {8}
    text = httpx.get(f"{gateway.url}/metrics").text
    assert "\nflexpert_slo_attainment 1.0\n" in text
    assert worker.submits or idle.submits


def test_busy_worker_tells_its_own_numbers_and_a_silent_one_has_no_age(harness: Any) -> None:
    worker = harness.worker()
    gateway = harness.gateway()
    harness.run(worker.hold())
    with Background(gateway) as answer:
        worker.wait_until(lambda: worker.submits)
        told = load(harness, gateway)
        assert told["workers"][0]["age_s"] is None and told["workers"][0]["in_flight"] == 1
        assert told["traffic"]["live"] == told["traffic"]["waiting"] == 1
        assert told["workers"][0]["waiting_tokens"] == told["workers"][0]["longest_context_tokens"] > 0
        stats = Stats(
            waiting=1, running=2, kv_used_tokens=30, kv_capacity_tokens=100, steps=1, prefill_tokens=5, decode_tokens=6,
            cached_prompt_tokens=0, preemptions=0, step_s=0.1, host_s=0.01,
        )  # fmt: skip
        harness.loop.call_soon_threadsafe(worker.send, stats)
        harness.ask_until(lambda: gateway._pool.links[0].stats is not None)
        told = load(harness, gateway)["workers"][0]
        assert (told["running"], told["waiting"], told["kv_used_tokens"]) == (2, 1, 30)
        assert 0 <= told["age_s"] < 20
        harness.run(worker.release())
        answer.read()


class Background:
    """A request on a thread: its headers come with the first token only."""

    def __init__(self, gateway: Any) -> None:
        body = {"model": "tiny-moe", "prompt": "one two three", "max_tokens": 3, "stream": True}
        arguments = {"url": f"{gateway.url}/v1/completions", "json": body, "timeout": 20}
        self._thread = threading.Thread(target=httpx.post, kwargs=arguments)

    def __enter__(self) -> Background:
        self._thread.start()
        return self

    def read(self) -> None:
        self._thread.join(20)
        assert not self._thread.is_alive()

    def __exit__(self, *error: object) -> None:
        self._thread.join(20)
