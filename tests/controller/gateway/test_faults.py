"""An error inside the gateway costs the request that caused it, never the others, and never a worker's link."""

from __future__ import annotations

import threading
from typing import Any

import openai
import pytest

from flexpert.controller.gateway.live import LiveChoice
from flexpert.controller.gateway.output import ChoiceOutput
from flexpert.controller.gateway.pool import WorkerPool
from flexpert.workers.messages import SamplingParams, Submit

MODEL = "tiny-moe"
BAD = [7, 7, 7]  # the prompt that makes trouble
GOOD = [5, 6]


@pytest.fixture
def worker(harness: Any) -> Any:
    worker = harness.worker(max_running=1)
    harness.run(worker.hold())
    return worker


@pytest.fixture
def client(harness: Any, worker: Any, make_client: Any) -> openai.OpenAI:
    return make_client(harness.gateway())


class Calls:
    """Requests, each on a thread, arriving in this order."""

    def __init__(self, client: openai.OpenAI, harness: Any) -> None:
        self.results: dict[int, Any] = {}
        self._client, self._harness = client, harness
        self._threads: list[threading.Thread] = []

    def start(self, *prompts: list[int]) -> None:
        pool = self._harness.gateways[0]._pool
        for prompt in prompts:
            self._threads.append(threading.Thread(target=self._call, args=(len(self._threads), prompt)))
            self._threads[-1].start()
            self._harness.ask_until(lambda: len(pool.live) == len(self._threads))

    def join(self) -> list[Any]:
        """What each ended with: its finish_reason, or the status of its error."""
        for thread in self._threads:
            thread.join(20)
        return [self.results.get(number, "hangs") for number in range(len(self._threads))]

    def _call(self, number: int, prompt: list[int]) -> None:
        try:
            answer = self._client.completions.create(model=MODEL, prompt=prompt, seed=prompt[0])
            self.results[number] = answer.choices[0].finish_reason
        except openai.APIStatusError as error:
            self.results[number] = error.status_code


@pytest.fixture
def calls(client: openai.OpenAI, harness: Any) -> Calls:
    return Calls(client, harness)


def test_request_that_cannot_be_encoded_fails_alone(
    calls: Calls, worker: Any, harness: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is given out on the link's own task, when an earlier request ends."""
    encodable = LiveChoice.submit_frame

    def submit_frame(choice: LiveChoice) -> Submit:
        if choice.prompt_token_ids != BAD:
            return encodable(choice)
        params = SamplingParams(max_tokens=3, seed=1, top_k=10**30)
        return Submit(request_id=choice.request_id, prompt_token_ids=BAD, params=params)

    monkeypatch.setattr(LiveChoice, "submit_frame", submit_frame)
    calls.start(GOOD, GOOD, BAD, GOOD, BAD, GOOD)
    assert len(worker.submits) == 2
    harness.run(worker.release())
    assert calls.join() == ["length", "length", 500, "length", 500, "length"]
    assert worker.connections == 1


@pytest.mark.parametrize("method", ["on_submitted", "on_token", "on_finished"])
def test_choice_that_cannot_take_its_output_fails_alone(
    calls: Calls, worker: Any, harness: Any, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    working = getattr(ChoiceOutput, method)

    def fail_for_bad(output: ChoiceOutput, *arguments: Any) -> Any:
        if output._params.seed == BAD[0]:
            raise RuntimeError("a fault of the test")
        return working(output, *arguments)

    monkeypatch.setattr(ChoiceOutput, method, fail_for_bad)
    calls.start(GOOD, GOOD, BAD, GOOD)
    harness.run(worker.release())
    assert calls.join() == ["length", "length", 500, "length"]
    assert worker.connections == 1


@pytest.mark.parametrize("method", ["on_step", "on_up", "on_down"])
def test_link_outlives_an_error_in_the_pool(
    client: openai.OpenAI, worker: Any, harness: Any, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    called = []
    working = getattr(WorkerPool, method)

    def fail_once(*arguments: Any) -> None:
        called.append(method)
        if len(called) == 1:
            raise RuntimeError("a fault of the test")
        working(*arguments)

    monkeypatch.setattr(WorkerPool, method, fail_once)
    harness.run(worker.release())
    if method != "on_step":
        harness.run(worker.die())
        harness.run(worker.start())
        worker.wait_until(lambda: worker.connections > 1)
    assert client.completions.create(model=MODEL, prompt=GOOD).choices[0].finish_reason == "length"
    assert worker.connections == (3 if method == "on_up" else 2)
    assert called
