"""Workers with unequal memory: what one of them cannot hold is not promised, and what was accepted goes only where it fits."""

from __future__ import annotations

import threading
from typing import Any

import openai
import pytest
from tests.controller.gateway.test_handover import MODEL, TEXT, Streams, know
from tokenizers import Tokenizer

from flexpert.controller.gateway import pool

SMALL_TOKENS = 8


@pytest.fixture
def ids(vocabulary: Tokenizer) -> list[int]:
    return list(vocabulary.encode(TEXT).ids)


@pytest.fixture
def workers(harness: Any, ids: list[int]) -> list[Any]:
    """Large, small, large."""
    made = [harness.worker(max_context=tokens) for tokens in (512, SMALL_TOKENS, 512)]
    for worker in made:
        worker.reply = lambda submit: ids
    return made


def test_promise_is_what_the_smallest_worker_holds(harness: Any, workers: list[Any], make_client: Any) -> None:
    """Whichever said so last: the large one has just come."""
    large, small, _ = workers
    gateway = harness.gateway(worker_addresses=(small.address,), wait=False)
    harness.ask_until(lambda: gateway._pool.ready)
    know(gateway, harness, small, large)
    client = make_client(gateway)
    with pytest.raises(openai.BadRequestError) as error:
        client.completions.create(model=MODEL, prompt="x", max_tokens=SMALL_TOKENS)
    assert error.value.code == "context_length_exceeded"
    assert f"{SMALL_TOKENS} tokens" in error.value.message
    client.completions.create(model=MODEL, prompt="x", max_tokens=SMALL_TOKENS - 1)
    know(gateway, harness, large)
    client.completions.create(model=MODEL, prompt="x", max_tokens=SMALL_TOKENS)


def test_accepted_request_waits_for_a_worker_that_holds_it_and_holds_up_nobody(
    harness: Any, workers: list[Any], make_client: Any, ids: list[int]
) -> None:
    large, small, other = workers
    harness.run(large.hold())
    gateway = harness.gateway(worker_addresses=(large.address,), wait=False)
    streams = Streams(make_client(gateway), gateway, harness, len(ids))
    streams.start(1)
    large.wait_until(lambda: large.submits)
    harness.run(large.step(2))
    streams.wait_emitted(2)
    know(gateway, harness, large, small, draining=(large,))
    harness.run(large.hand_over("worker-1"))
    harness.ask_until(lambda: gateway._pool.live.waiting)
    make_client(gateway).completions.create(model=MODEL, prompt="y", max_tokens=2)
    assert len(small.submits) == 1, "the short one passed, the long one did not come here"
    know(gateway, harness, small, other)
    assert streams.join() == [TEXT]
    assert [submit.emitted_token_ids for submit in other.submits] == [ids[:2]]


def test_accepted_request_that_no_worker_can_hold_any_more_ends_with_the_reason(
    harness: Any, workers: list[Any], make_client: Any, ids: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the worker that had it does not come back in time; a short one is served meanwhile."""
    large, small, other = workers
    harness.run(large.hold())
    gateway = harness.gateway(worker_addresses=(large.address,), wait=False)
    client = make_client(gateway)
    errors: list[openai.APIStatusError] = []

    def ask() -> None:
        with pytest.raises(openai.APIStatusError) as caught:
            client.completions.create(model=MODEL, prompt="x", max_tokens=len(ids))
        errors.append(caught.value)

    asking = threading.Thread(target=ask)
    asking.start()
    large.wait_until(lambda: large.submits)
    know(gateway, harness, small)
    harness.ask_until(lambda: gateway._pool._too_long)
    client.completions.create(model=MODEL, prompt="y", max_tokens=2)
    know(gateway, harness, small, other, draining=(other,))
    harness.ask_until(lambda: not gateway._pool._too_long)
    assert len(gateway._pool.live) == 1, "one that has memory is there: it waits on"
    monkeypatch.setattr(pool, "_COME_BACK_S", 0.0)
    know(gateway, harness, small)
    asking.join(20)
    assert [(error.status_code, error.code) for error in errors] == [(503, "insufficient_memory")]
    assert f"{len(ids) + 1} tokens" in errors[0].message
    assert len(gateway._pool.live) == 0
