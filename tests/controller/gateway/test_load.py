"""Clients that leave, queues that are full, and the end of the gateway itself."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest

from flexpert.controller.gateway import WorkerAddress
from flexpert.controller.gateway.admission import Admission, retry_after_s
from flexpert.controller.gateway.errors import ApiError

MODEL = "tiny-moe"
COMPLETION: dict[str, Any] = {"model": MODEL, "prompt": "x", "max_tokens": 400}


def in_thread(call: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    """Run a call; its result or its exception is appended."""
    results: list[Any] = []

    def run() -> None:
        try:
            results.append(call())
        except Exception as error:
            results.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, results


def post_raw(gateway: Any, body: dict[str, Any]) -> socket.socket:
    """A request on a connection of its own, which the test may close."""
    connection = socket.create_connection(("127.0.0.1", gateway.port))
    data = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    connection.sendall(head.encode() + data)
    return connection


def is_idle(gateway: Any) -> Callable[[], bool]:
    return lambda: gateway._admission.in_flight == 0 and len(gateway._pool.live) == 0


def test_stream_that_its_client_closes_is_cancelled(client: openai.OpenAI, shared: Any, worker: Any) -> None:
    worker.reply = lambda submit: [20] * 400
    shared.run(worker.step(2))
    stream = client.completions.create(**COMPLETION, n=2, stream=True)
    next(stream)
    stream.close()
    worker.wait_until(lambda: len(worker.cancels) == 2)
    assert sorted(worker.cancels) == sorted(submit.request_id for submit in worker.submits)
    shared.ask_until(is_idle(shared.gateways[0]))


@pytest.mark.parametrize("stream", [False, True])
def test_client_that_leaves_before_the_first_token_is_cancelled(shared: Any, worker: Any, stream: bool) -> None:
    shared.run(worker.hold())
    connection = post_raw(shared.gateways[0], {**COMPLETION, "stream": stream})
    worker.wait_until(lambda: worker.submits)
    connection.close()
    worker.wait_until(lambda: worker.cancels == [worker.submits[0].request_id])
    shared.ask_until(is_idle(shared.gateways[0]))


def test_client_that_leaves_the_queue_is_forgotten(harness: Any) -> None:
    worker = harness.worker(max_running=1)
    harness.run(worker.hold())
    gateway = harness.gateway()
    sockets = []
    for number in range(3):
        sockets.append(post_raw(gateway, COMPLETION))
        harness.ask_until(lambda wanted=number + 1: len(gateway._pool.live) == wanted)
    assert len(gateway._pool.live.waiting) == 1  # the worker holds two: one running, one next
    sockets[2].close()
    harness.ask_until(lambda: len(gateway._pool.live) == 2)
    assert not worker.cancels
    assert len(worker.submits) == 2
    for connection in sockets[:2]:
        connection.close()
    worker.wait_until(lambda: len(worker.cancels) == 2)


@pytest.mark.parametrize("leaves", [True, False])
def test_client_that_leaves_before_the_first_worker_is_there_gives_its_place_back(harness: Any, leaves: bool) -> None:
    gateway = harness.gateway(wait=False)
    connection = post_raw(gateway, {**COMPLETION, "n": 3})
    harness.ask_until(lambda: gateway._admission.in_flight == 3)
    if leaves:
        connection.close()
        harness.ask_until(is_idle(gateway))
    worker = harness.worker()
    gateway.set_workers([worker.address])
    if not leaves:
        assert connection.recv(4096).startswith(b"HTTP/1.1 200 ")
        connection.close()
    harness.ask_until(is_idle(gateway))
    assert len(worker.submits) == (0 if leaves else 3)
    outcome = "cancelled" if leaves else "completed"
    metrics = httpx.get(f"{gateway.url}/metrics").text
    assert f'flexpert_requests_total{{endpoint="completions",outcome="{outcome}"}} 1.0' in metrics


def test_full_queue_answers_429_until_there_is_room(harness: Any, make_client: Any) -> None:
    worker = harness.worker(max_running=1)
    harness.run(worker.hold())
    gateway = harness.gateway(max_queued=1)
    client = make_client(gateway)
    running = [in_thread(lambda: client.completions.create(model=MODEL, prompt="x"))]
    harness.ask_until(lambda: gateway._admission.in_flight == 1)
    running.append(in_thread(lambda: client.completions.create(model=MODEL, prompt="x")))
    harness.ask_until(lambda: gateway._admission.in_flight == 2)
    with pytest.raises(openai.RateLimitError) as caught:
        client.completions.create(model=MODEL, prompt="x")
    assert 1 <= int(caught.value.response.headers["retry-after"]) <= 120
    assert caught.value.code == "rate_limit_exceeded"
    harness.run(worker.release())
    for thread, results in running:
        thread.join(20)
        assert results[0].choices[0].finish_reason == "length"
    assert client.completions.create(model=MODEL, prompt="x").choices[0].finish_reason == "length"
    metrics = httpx.get(f"{gateway.url}/metrics").text
    assert 'flexpert_requests_total{endpoint="completions",outcome="rejected"} 1.0' in metrics
    assert 'flexpert_requests_total{endpoint="completions",outcome="completed"} 3.0' in metrics


def test_restarting_worker_makes_nothing_refuse(harness: Any, make_client: Any) -> None:
    """What ran keeps its places in the count while the worker is away."""
    worker = harness.worker(max_running=4)
    worker.reply = lambda submit: [20] * 5
    harness.run(worker.hold())
    gateway = harness.gateway(max_queued=1)
    client = make_client(gateway)
    running = [in_thread(lambda: client.completions.create(model=MODEL, prompt="x")) for _ in range(3)]
    worker.wait_until(lambda: len(worker.submits) == 3)
    harness.run(worker.die())
    harness.ask_until(lambda: not gateway._pool.ready)
    running.append(in_thread(lambda: client.completions.create(model=MODEL, prompt="x")))
    harness.ask_until(lambda: gateway._admission.in_flight == 4)
    harness.run(worker.release())
    harness.run(worker.start())
    for thread, results in running:
        thread.join(20)
        assert results[0].choices[0].finish_reason == "length"


def test_replaced_worker_keeps_its_places_before_it_is_there(harness: Any, make_client: Any) -> None:
    old = harness.worker(max_running=4)
    gateway = harness.gateway(max_queued=1)
    elsewhere = WorkerAddress(old.address.worker_id, f"unix:{harness.directory}/not-yet")
    newcomer = WorkerAddress("worker-9", f"unix:{harness.directory}/not-yet-either")
    gateway.set_workers([elsewhere, newcomer])
    harness.ask_until(lambda: not gateway._pool.ready)
    assert gateway._pool.capacity_choices == 8
    gateway.set_workers([])
    harness.ask_until(lambda: not gateway._pool.links)
    assert gateway._pool.capacity_choices == 8


def test_choices_of_one_request_follow_each_other_through_a_small_worker(harness: Any, make_client: Any) -> None:
    harness.worker(max_running=1)
    answer = make_client(harness.gateway()).completions.create(model=MODEL, prompt="x", n=5)
    assert [choice.finish_reason for choice in answer.choices] == ["length"] * 5


def test_requests_beyond_what_workers_hold_wait_at_the_gateway_for_the_next_worker(
    harness: Any, make_client: Any
) -> None:
    first = harness.worker(max_running=1)
    harness.run(first.hold())
    gateway = harness.gateway()
    client = make_client(gateway)
    calls = [in_thread(lambda: client.completions.create(model=MODEL, prompt="x")) for _ in range(5)]
    harness.ask_until(lambda: len(gateway._pool.live) == 5)
    assert len(first.submits) == 2
    second = harness.worker(max_running=1)
    gateway.set_workers([first.address, second.address])
    second.wait_until(lambda: len(second.submits) == 3)
    harness.run(first.release())
    for thread, results in calls:
        thread.join(20)
        assert results[0].choices[0].finish_reason == "length"


def test_stop_lets_live_requests_end(harness: Any, make_client: Any) -> None:
    worker = harness.worker()
    harness.run(worker.hold())
    gateway = harness.gateway()
    client = make_client(gateway)
    whole = in_thread(lambda: client.completions.create(model=MODEL, prompt="x"))
    worker.wait_until(lambda: worker.submits)
    stopping, stopped = in_thread(lambda: harness.run(gateway.drain_and_stop()))
    harness.ask_until(lambda: gateway._draining)
    ready = httpx.get(f"{gateway.url}/ready")
    assert (ready.status_code, ready.json()["status"]) == (503, "draining")
    refused = httpx.post(f"{gateway.url}/v1/completions", json=COMPLETION)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
    assert refused.headers["retry-after"]
    assert refused.headers["connection"] == "close"
    harness.run(worker.release())
    whole[0].join(20)
    assert whole[1][0].choices[0].finish_reason == "length"
    client.close()
    stopping.join(20)
    assert stopped == [None]
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{gateway.url}/health")


def test_stop_ends_with_an_error_what_takes_too_long(harness: Any, make_client: Any) -> None:
    worker = harness.worker()
    worker.reply = lambda submit: [20] * 400
    harness.run(worker.step(2))
    gateway = harness.gateway(drain_timeout_s=0.05)
    client = make_client(gateway)
    stream = client.completions.create(**COMPLETION, stream=True)
    next(stream)
    harness.run(worker.hold())
    whole = in_thread(lambda: client.completions.create(**COMPLETION))
    worker.wait_until(lambda: len(worker.submits) == 2)
    stopping, _ = in_thread(lambda: harness.run(gateway.drain_and_stop()))
    with pytest.raises(openai.APIError, match="shutting down"):
        list(stream)
    whole[0].join(20)
    assert isinstance(whole[1][0], openai.InternalServerError)
    assert whole[1][0].status_code == 503
    client.close()
    stopping.join(20)
    harness.run(gateway.drain_and_stop())  # a second time does nothing


def test_stop_ends_requests_that_wait_for_a_first_worker(harness: Any, make_client: Any) -> None:
    gateway = harness.gateway(wait=False, drain_timeout_s=0.05)
    client = make_client(gateway)
    thread, results = in_thread(lambda: client.completions.create(**COMPLETION))
    harness.ask_until(lambda: gateway._admission.in_flight == 1)
    stopping, _ = in_thread(lambda: harness.run(gateway.drain_and_stop()))
    thread.join(20)
    assert results[0].status_code == 503
    client.close()
    stopping.join(20)


def test_stop_does_not_wait_for_a_request_that_never_ends(harness: Any) -> None:
    gateway = harness.gateway(wait=False, drain_timeout_s=0.05)
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 50\r\n\r\n{"
    with socket.create_connection(("127.0.0.1", gateway.port)) as connection:
        connection.sendall(head)
        harness.ask_until(lambda: gateway._server.server_state.tasks)
        harness.run(gateway.drain_and_stop())
        while connection.recv(4096):  # until the gateway hung up
            pass


def test_retry_after_follows_the_measured_rate() -> None:
    steady = [float(second) for second in range(30, 61)]  # one a second
    assert retry_after_s(finishes_s=steady, queued=8, now_s=60.0) == 1
    assert retry_after_s(finishes_s=steady, queued=80, now_s=60.0) == 10
    assert retry_after_s(finishes_s=[], queued=1000, now_s=60.0) == 1
    assert retry_after_s(finishes_s=[10.0, 60.0], queued=8000, now_s=60.0) == 120
    assert retry_after_s(finishes_s=[0.0, 1.0], queued=80, now_s=1000.0) == 1  # too long ago to tell anything
    stalled = [float(second) for second in range(30, 41)]
    assert retry_after_s(finishes_s=stalled, queued=80, now_s=60.0) == 30


async def test_admission_counts_what_no_worker_runs_as_queue() -> None:
    admission = Admission(max_queued=2, capacity=lambda: 3)
    admission.admit(3, now_s=0.0)
    admission.admit(1, now_s=0.0)
    admission.admit(5, now_s=0.0)  # the queue was not full; a request is never cut in two
    with pytest.raises(ApiError) as caught:
        admission.admit(1, now_s=0.0)
    assert caught.value.status_code == 429
    admission.release(9, now_s=1.0, served=True)
    await admission.idle()
    admission.admit(1, now_s=2.0)


async def test_no_queue_at_all_still_serves_what_the_workers_run() -> None:
    admission = Admission(max_queued=0, capacity=lambda: 2)
    admission.admit(1, now_s=0.0)
    admission.admit(1, now_s=0.0)
    with pytest.raises(ApiError):
        admission.admit(1, now_s=0.0)
