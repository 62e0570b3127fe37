"""A worker gives requests away, drains or is taken from the list: their streams go on elsewhere, nothing fails, nothing comes twice."""

from __future__ import annotations

import asyncio
import random
import threading
from typing import Any

import openai
import pytest
from tokenizers import Tokenizer

from flexpert.controller.gateway import Gateway, WorkerAddress
from flexpert.workers.messages import Released, StepOutput, TokenOutput

MODEL = "tiny-moe"
TEXT = "The quick brown fox \u4e16\u754c \U0001f389\U0001f680 jumps over the lazy dog. "


class Streams:
    """Requests in flight, each on a thread of its own, arriving in this order."""

    def __init__(self, client: openai.OpenAI, gateway: Gateway, harness: Any, max_tokens: int) -> None:
        self.texts: dict[int, str] = {}
        self._client, self._gateway, self._harness, self._max_tokens = client, gateway, harness, max_tokens
        self._threads: list[threading.Thread] = []

    def start(self, count: int) -> None:
        for _ in range(count):
            number = len(self._threads)
            self._threads.append(threading.Thread(target=self._ask, args=(number,)))
            self._threads[-1].start()
            self._harness.ask_until(lambda: len(self._gateway._pool.live) == len(self._threads))

    def _ask(self, number: int) -> None:
        answer = self._client.completions.create(model=MODEL, prompt="x", max_tokens=self._max_tokens, seed=number)
        self.texts[number] = answer.choices[0].text

    def wait_emitted(self, tokens: int) -> None:
        live = self._gateway._pool.live
        self._harness.ask_until(lambda: all(len(choice.emitted_token_ids) >= tokens for choice in live))

    def join(self) -> list[str | None]:
        for thread in self._threads:
            thread.join(20)
        return [self.texts.get(number) for number in range(len(self._threads))]


@pytest.fixture
def ids(vocabulary: Tokenizer) -> list[int]:
    return list(vocabulary.encode(TEXT).ids)


@pytest.fixture
def workers(harness: Any, ids: list[int]) -> list[Any]:
    """Three that hold their first step."""
    made = [harness.worker(max_running=2) for _ in range(3)]
    for worker in made:
        worker.reply = lambda submit: ids
        harness.run(worker.hold())
    return made


@pytest.fixture
def gateway(harness: Any, workers: list[Any]) -> Gateway:
    """Knows the first worker only."""
    found: Gateway = harness.gateway(worker_addresses=(workers[0].address,), wait=False)
    return found


@pytest.fixture
def streams(gateway: Gateway, make_client: Any, harness: Any, ids: list[int]) -> Streams:
    return Streams(make_client(gateway), gateway, harness, len(ids))


def know(gateway: Gateway, harness: Any, *workers: Any, draining: tuple[Any, ...] = ()) -> None:
    gateway.set_workers(
        [WorkerAddress(w.address.worker_id, w.address.address, draining=w in draining) for w in workers]
    )
    harness.ask_until(
        lambda: (
            {link.worker_id for link in gateway._pool.links if link.connected} == {w.address.worker_id for w in workers}
        )
    )


def test_released_requests_go_to_the_target_with_their_tokens(
    streams: Streams, workers: list[Any], gateway: Gateway, harness: Any, ids: list[int]
) -> None:
    first, target, other = workers
    streams.start(4)
    first.wait_until(lambda: len(first.submits) == 4)
    harness.run(first.step(3))
    streams.wait_emitted(3)
    know(gateway, harness, *workers, draining=(first,))
    given = harness.run(first.hand_over("worker-1"))
    target.wait_until(lambda: len(target.submits) == 4)
    assert [submit.request_id for submit in target.submits] == given, "in order of arrival, also beyond a full batch"
    assert all(submit.emitted_token_ids == ids[:3] for submit in target.submits)

    async def speak_late() -> None:
        token = TokenOutput(request_id=given[0], output_index=3, token_id=0)
        first.send(StepOutput(step=99, tokens=[token]))

    harness.run(speak_late())
    harness.run(target.release())
    assert streams.join() == [TEXT] * 4
    assert (other.submits, first.cancels) == ([], [])


@pytest.mark.parametrize("target", ["", "worker-2", "worker-7", "worker-0"])
def test_without_an_open_target_routing_decides(
    streams: Streams, workers: list[Any], gateway: Gateway, harness: Any, target: str
) -> None:
    """None named; one that drains; one that nobody knows; the very worker that gives them away."""
    first, second, third = workers
    streams.start(2)
    first.wait_until(lambda: len(first.submits) == 2)
    know(gateway, harness, *workers, draining=(first, third))
    harness.run(first.hand_over(target))
    second.wait_until(lambda: len(second.submits) == 2)
    harness.run(second.release())
    assert streams.join() == [TEXT] * 2
    assert third.submits == []


def test_worker_that_gave_requests_away_gets_them_back_only_when_the_list_says_so(
    streams: Streams, workers: list[Any], gateway: Gateway, harness: Any
) -> None:
    """It leaves before the gateway has heard of it, and there is no other yet."""
    first = workers[0]
    streams.start(2)
    first.wait_until(lambda: len(first.submits) == 2)
    harness.run(first.hand_over())
    harness.ask_until(lambda: len(gateway._pool.live.waiting) == 2)
    assert len(first.submits) == 2
    know(gateway, harness, first)
    first.wait_until(lambda: len(first.submits) == 4)
    harness.run(first.release())
    assert streams.join() == [TEXT] * 2


def test_request_that_waits_for_another_worker_holds_up_nobody(
    streams: Streams, workers: list[Any], gateway: Gateway, harness: Any
) -> None:
    first = workers[0]
    streams.start(1)
    first.wait_until(lambda: first.submits)
    harness.run(first.hand_over("worker-1"))
    harness.ask_until(lambda: gateway._pool.live.waiting)
    streams.start(1)
    first.wait_until(lambda: len(first.submits) == 2)
    know(gateway, harness, first, workers[1], draining=(first,))
    for worker in workers:
        harness.run(worker.release())
    assert streams.join() == [TEXT] * 2
    assert [submit.request_id for submit in workers[1].submits] == [first.submits[0].request_id]


def test_removed_worker_hands_its_requests_over_as_often_as_it_is_removed(
    streams: Streams, workers: list[Any], gateway: Gateway, harness: Any
) -> None:
    """A transition is no death: a request may see many before its next token."""
    first, second, _ = workers
    streams.start(3)
    for turn in range(25):
        gone, stays = (first, second) if turn % 2 == 0 else (second, first)
        gone.wait_until(lambda gone=gone: len(gone._running) == 3)
        know(gateway, harness, gone, stays, draining=(gone,))
        know(gateway, harness, stays)
    assert not gateway._pool.live.waiting
    for worker in workers:
        harness.run(worker.release())
    assert streams.join() == [TEXT] * 3


def test_release_of_what_is_over_or_unknown_changes_nothing(
    streams: Streams, workers: list[Any], gateway: Gateway, harness: Any
) -> None:
    first, second, _ = workers
    know(gateway, harness, first, second)
    streams.start(1)
    owner = next(worker for worker in (first, second) if worker.submits)
    stranger = second if owner is first else first

    async def babble() -> None:
        stranger.send(Released(request_ids=[owner.submits[0].request_id, "cmpl-nobody"], target_worker_id="worker-1"))

    harness.run(babble())
    harness.run(owner.release())
    assert streams.join() == [TEXT]
    assert len(owner.submits) + len(stranger.submits) == 1


@pytest.mark.parametrize("seed", range(3))
async def test_random_handovers_under_load_lose_and_repeat_nothing(harness: Any, ids: list[int], seed: int) -> None:
    """Requests of mixed length while workers hand over, drain, leave, come back and die. Each output once, each text as it must be."""
    workers = [harness.worker(max_running=6) for _ in range(4)]
    for worker in workers:
        worker.reply = lambda submit: [*ids[submit.params.seed % 7 :], *ids]
        worker.repeat_tokens = 1
    gateway = harness.gateway(worker_addresses=(workers[0].address,), max_queued=10_000, wait=False)
    chance, handovers, over = random.Random(seed), 0, False

    async def transitions() -> None:
        nonlocal handovers
        serving = {0}
        while not over:
            for _ in range(chance.randrange(1, 12)):
                await asyncio.sleep(0)
            wanted = set(chance.sample(range(4), chance.randint(1, 4)))
            leaving = serving - wanted
            gateway.set_workers([WorkerAddress(workers[k].address.worker_id, workers[k].address.address, k in leaving)
                                 for k in sorted(serving | wanted)])  # fmt: skip
            for _ in range(chance.randrange(6)):
                await asyncio.sleep(0)
            for k in leaving:
                target = chance.choice(["", *(f"worker-{other}" for other in range(4))])
                handovers += len(await workers[k].hand_over(target))
            if chance.random() < 0.1:
                victim = workers[chance.choice(sorted(serving))]
                await victim.die()
                await victim.start()
            if chance.random() < 0.8:  # sometimes the list comes before what the leaver still has to say
                await asyncio.sleep(0)
            gateway.set_workers([workers[k].address for k in sorted(wanted)])
            serving = wanted

    async def ask(client: openai.AsyncOpenAI, number: int) -> None:
        length = chance.randrange(1, 40)
        expected = [*ids[number % 7 :], *ids][:length]
        stream = await client.completions.create(
            model=MODEL, prompt="x", max_tokens=length, seed=number, stream=True, logprobs=0
        )
        scores: list[float | None] = []
        async for chunk in stream:
            if chunk.choices[0].logprobs is not None:
                scores += chunk.choices[0].logprobs.token_logprobs or []
        assert scores == [-0.5 * (index + 1) for index in range(len(expected))], "every output index exactly once"

    moving = asyncio.run_coroutine_threadsafe(transitions(), harness.loop)
    try:
        async with openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="x", max_retries=0, timeout=60) as client:
            await asyncio.gather(*(ask(client, number) for number in range(120)))
    finally:
        over = True
        await asyncio.wrap_future(moving)
    assert handovers > 20
    harness.ask_until(lambda: len(gateway._pool.live) == 0 and gateway._admission.in_flight == 0)
