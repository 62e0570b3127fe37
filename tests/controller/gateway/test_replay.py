"""A worker dies, its requests live: clients see a pause, every token once, and nothing that was not asked for."""

from __future__ import annotations

import threading
from typing import Any

import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from flexpert.controller.gateway import WorkerAddress
from flexpert.controller.gateway.link import pause_s
from flexpert.controller.gateway.live import LiveChoice, LiveTable
from flexpert.workers.messages import SamplingParams, StepOutput, TokenOutput

MODEL = "tiny-moe"
TEXT = "The quick brown fox 世界 🎉🚀 jumps over"


@pytest.fixture
def worker(harness: Any) -> Any:
    return harness.worker()


@pytest.fixture
def client(harness: Any, worker: Any, make_client: Any) -> openai.OpenAI:
    return make_client(harness.gateway())


@pytest.mark.parametrize("repeat", [0, 1, 4])
@pytest.mark.parametrize("after", [1, 5])
def test_stream_goes_on_after_the_worker_died(
    client: openai.OpenAI, worker: Any, vocabulary: Tokenizer, after: int, repeat: int
) -> None:
    ids = vocabulary.encode(TEXT).ids
    worker.reply = lambda submit: ids
    worker.repeat_tokens, worker.die_after_steps = repeat, after
    chunks = list(client.completions.create(model=MODEL, prompt="x", max_tokens=len(ids), stream=True, logprobs=0))
    assert "".join(chunk.choices[0].text for chunk in chunks) == TEXT
    scored = [
        value for chunk in chunks if chunk.choices[0].logprobs for value in chunk.choices[0].logprobs.token_logprobs
    ]
    assert scored == [-0.5 * (k + 1) for k in range(len(ids))]
    first, second = worker.submits
    assert second.emitted_token_ids == ids[: len(second.emitted_token_ids)]
    assert 0 < len(second.emitted_token_ids) <= after
    assert (second.request_id, second.params, second.prompt_token_ids) == (
        first.request_id,
        first.params,
        first.prompt_token_ids,
    )


def test_worker_that_dies_again_and_again_costs_only_time(
    client: openai.OpenAI, worker: Any, vocabulary: Tokenizer
) -> None:
    ids = vocabulary.encode(TEXT).ids

    def reply(_submit: Any) -> list[int]:
        if len(worker.submits) < 4:
            worker.die_after_steps = 2
        return ids

    worker.reply = reply
    answer = client.completions.create(model=MODEL, prompt="x", max_tokens=len(ids), n=3)
    assert [choice.text for choice in answer.choices] == [TEXT] * 3
    assert worker.incarnation > 1


def test_death_after_the_last_token_finishes_the_request(
    client: openai.OpenAI, worker: Any, harness: Any, vocabulary: Tokenizer
) -> None:
    """The end was lost with the worker; what was emitted says that nothing is left to do."""
    worker.hold_finished = True
    worker.reply = lambda submit: [20, 0] if submit.choice_index else [21, 22, 23]
    worker.die_after_steps = 3
    answer = client.completions.create(model=MODEL, prompt="x", max_tokens=3, n=2)
    assert [choice.finish_reason for choice in answer.choices] == ["length", "stop"]
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 5
    assert len(worker.submits) == 2


def test_request_that_kills_every_worker_is_given_up(client: openai.OpenAI, worker: Any, harness: Any) -> None:
    def deadly(_submit: Any) -> list[int]:
        worker.die_after_steps = 1
        return []

    worker.hold_finished = True
    worker.reply = deadly
    with pytest.raises(openai.InternalServerError, match="20 workers in a row died"):
        client.completions.create(model=MODEL, prompt="x")
    worker.reset()
    assert client.completions.create(model=MODEL, prompt="x").choices[0].finish_reason == "length"


def test_prompt_logprobs_are_asked_for_once(client: openai.OpenAI, worker: Any, vocabulary: Tokenizer) -> None:
    worker.die_after_steps = 2
    answer = client.completions.create(model=MODEL, prompt="one two", echo=True, logprobs=1)
    assert [submit.params.prompt_logprobs for submit in worker.submits] == [1, None]
    scores = answer.choices[0].logprobs
    assert scores is not None
    assert scores.token_logprobs is not None
    assert scores.token_logprobs[:2] == [None, -1.0]


def test_another_worker_takes_over(harness: Any, make_client: Any, vocabulary: Tokenizer) -> None:
    ids = vocabulary.encode(TEXT).ids
    first, second = harness.worker(), harness.worker()
    for worker in (first, second):
        worker.reply = lambda submit: ids
        harness.run(worker.hold())
    client = make_client(harness.gateway())
    stream = client.completions.create
    result: list[str] = []
    thread = threading.Thread(
        target=lambda: result.append(stream(model=MODEL, prompt="x", max_tokens=len(ids)).choices[0].text)
    )
    thread.start()
    first.wait_until(lambda: first.submits)
    harness.run(first.step(3))
    harness.ask_until(lambda: any(len(choice.emitted_token_ids) == 3 for choice in harness.gateways[0]._pool.live))
    harness.run(first.die())
    second.wait_until(lambda: second.submits)
    harness.run(second.release())
    thread.join(20)
    assert result == [TEXT]
    assert second.submits[0].emitted_token_ids == ids[:3]


def test_removed_worker_hands_its_requests_over(harness: Any, make_client: Any, vocabulary: Tokenizer) -> None:
    """As when the controller replaces a worker that hangs: its stream is open, but it is no longer wanted."""
    ids = vocabulary.encode(TEXT).ids
    hung, fresh = harness.worker(), harness.worker()
    fresh.reply = lambda submit: ids
    harness.run(hung.hold())
    gateway = harness.gateway(worker_addresses=(hung.address,), wait=False)
    result: list[str] = []
    client = make_client(gateway)
    thread = threading.Thread(
        target=lambda: result.append(
            client.completions.create(model=MODEL, prompt="x", max_tokens=len(ids)).choices[0].text
        )
    )
    thread.start()
    hung.wait_until(lambda: hung.submits)
    gateway.set_workers([fresh.address])  # from this thread, not the gateway's
    thread.join(20)
    assert result == [TEXT]


def test_draining_worker_finishes_what_it_has_and_gets_nothing_new(harness: Any, make_client: Any) -> None:
    leaving, staying = harness.worker(), harness.worker()
    harness.run(leaving.hold())
    gateway = harness.gateway(worker_addresses=(leaving.address,), wait=False)
    client = make_client(gateway)
    result: list[str] = []
    thread = threading.Thread(
        target=lambda: result.append(client.completions.create(model=MODEL, prompt="x").choices[0].text)
    )
    thread.start()
    leaving.wait_until(lambda: leaving.submits)
    drained = WorkerAddress(leaving.address.worker_id, leaving.address.address, draining=True)
    gateway.set_workers([drained, staying.address])
    staying.wait_until(lambda: staying.connections)
    for _ in range(3):
        client.completions.create(model=MODEL, prompt="y", n=3)  # more than an even spread would leave to one
    assert len(staying.submits) == 9
    harness.run(leaving.release())
    thread.join(20)
    assert len(result) == 1
    assert len(leaving.submits) == 1


def test_requests_wait_where_no_worker_is(harness: Any, make_client: Any) -> None:
    gateway = harness.gateway(wait=False)
    client = make_client(gateway)
    results: list[str] = []
    threads = [
        threading.Thread(
            target=lambda: results.append(client.completions.create(model=MODEL, prompt="x").choices[0].text)
        )
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    harness.ask_until(lambda: gateway._admission.in_flight == 3)
    gateway.set_workers([harness.worker().address])
    for thread in threads:
        thread.join(20)
    assert len(results) == 3


def test_gap_in_the_outputs_fails_that_request_alone(client: openai.OpenAI, worker: Any, harness: Any) -> None:
    worker.reply = lambda submit: [20] * 5
    harness.run(worker.step(1))
    broken = client.completions.create(model=MODEL, prompt="x", stream=True)
    next(broken)
    request_id = worker.submits[0].request_id

    async def skip() -> None:
        token = TokenOutput(request_id=request_id, output_index=3, token_id=20)
        worker.send(StepOutput(step=99, tokens=[token]))

    harness.run(skip())
    with pytest.raises(openai.APIError, match="error while processing"):
        list(broken)
    harness.run(worker.release())
    assert client.completions.create(model=MODEL, prompt="x").choices[0].finish_reason == "length"


def test_broken_frame_costs_one_reconnect(
    client: openai.OpenAI, worker: Any, harness: Any, vocabulary: Tokenizer
) -> None:
    ids = vocabulary.encode(TEXT).ids
    worker.reply = lambda submit: ids
    harness.run(worker.step(2))
    stream = client.completions.create(model=MODEL, prompt="x", max_tokens=len(ids), stream=True)
    text = next(stream).choices[0].text

    async def babble() -> None:
        for writer in worker._writers:
            writer.write(b"\x00\x00\x00\x05hello")

    harness.run(babble())
    worker.wait_until(lambda: worker.connections == 2)
    harness.run(worker.release())
    assert text + "".join(chunk.choices[0].text for chunk in stream) == TEXT


def make_choice(name: str) -> LiveChoice:
    params = SamplingParams(max_tokens=4, seed=0, stop_token_ids=(9,))
    return LiveChoice(request_id=name, prompt_token_ids=[1], params=params, choice_index=0, sink=None)  # type: ignore[arg-type]


def test_repeated_outputs_are_dropped_and_gaps_named() -> None:
    choice = make_choice("a")
    tokens = [TokenOutput(request_id="a", output_index=k, token_id=k) for k in range(4)]
    assert [choice.accept(tokens[k]) for k in (0, 1, 0, 1, 2)] == [True, True, False, False, True]
    assert choice.emitted_token_ids == [0, 1, 2]
    assert choice.known_end() is None
    choice.emitted_token_ids.append(9)
    assert choice.known_end() == "stop"
    with pytest.raises(ValueError, match="output 6 of a came before output 4"):
        choice.accept(TokenOutput(request_id="a", output_index=6, token_id=1))


@given(
    st.lists(st.tuples(st.sampled_from(["add", "assign", "lose", "release", "remove"]), st.integers(0, 7)), max_size=60)
)
def test_every_live_choice_is_in_exactly_one_place(actions: list[tuple[str, int]]) -> None:
    table = LiveTable()
    alive: dict[str, LiveChoice] = {}
    for number, (action, k) in enumerate(actions):
        if action == "add":
            name = f"r{number}"
            alive[name] = make_choice(name)
            table.add(alive[name])
        elif action == "assign" and table.waiting:
            table.assign(table.waiting[0], f"w{k % 3}")
        elif action == "lose":
            table.take_back(f"w{k % 3}", died=bool(k % 2))
        elif action == "release" and table.count_of(f"w{k % 3}"):
            table.release(next(iter(table.of_worker(f"w{k % 3}"))), target_worker_id=f"w{k % 2}")
        elif action == "remove" and alive:
            name = sorted(alive)[k % len(alive)]
            assert table.remove(name) is alive.pop(name)
            assert table.remove(name) is None
        placed = [choice for worker in ("w0", "w1", "w2") for choice in table.of_worker(worker)]
        assert sorted(choice.request_id for choice in [*placed, *table.waiting]) == sorted(alive)
        assert len(table) == len(alive)
        sequences = [choice.sequence for choice in table.waiting]
        assert sequences == sorted(sequences)
        assert all(choice.worker_id is None for choice in table.waiting)


def test_pause_between_tries_grows_to_two_seconds() -> None:
    pauses = [pause_s(failures) for failures in range(50)]
    assert pauses[0] == 0.02
    assert pauses == sorted(pauses)
    assert pauses[-1] == 2.0
