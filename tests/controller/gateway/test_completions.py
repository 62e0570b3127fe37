"""POST /v1/completions with the real client, against a scripted worker."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest
from tokenizers import Tokenizer

from flexpert.controller.gateway.schema import CompletionResponse

MODEL = "tiny-moe"
MULTIBYTE = "Größe 世界 🎉🚀👩‍💻 ∑∞ café"


def reply_with(worker: Any, ids: list[int]) -> None:
    worker.reply = lambda submit: ids


def test_text_of_the_tokens_is_returned(client: openai.OpenAI, worker: Any, vocabulary: Tokenizer) -> None:
    ids = vocabulary.encode("The quick brown fox").ids
    reply_with(worker, ids)
    answer = client.completions.create(model=MODEL, prompt="Hello", max_tokens=len(ids))
    assert answer.choices[0].text == "The quick brown fox"
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    prompt_tokens = len(vocabulary.encode("Hello").ids)
    assert answer.usage.completion_tokens == len(ids)
    assert answer.usage.prompt_tokens == prompt_tokens
    assert answer.usage.total_tokens == prompt_tokens + len(ids)
    assert answer.id.startswith("cmpl-")
    assert answer.system_fingerprint
    assert answer.model == MODEL


def test_body_is_exactly_what_the_document_says(client: openai.OpenAI, worker: Any) -> None:
    raw = client.completions.with_raw_response.create(model=MODEL, prompt="a", n=2, logprobs=1)
    CompletionResponse.model_validate_json(raw.content)


def test_stream_concatenates_to_the_whole_text(client: openai.OpenAI, worker: Any, vocabulary: Tokenizer) -> None:
    reply_with(worker, vocabulary.encode(MULTIBYTE).ids)
    whole = client.completions.create(model=MODEL, prompt="Hello", max_tokens=200).choices[0].text
    chunks = list(client.completions.create(model=MODEL, prompt="Hello", max_tokens=200, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole == MULTIBYTE
    assert all("\ufffd" not in chunk.choices[0].text for chunk in chunks)
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices[0].finish_reason] == ["length"]
    assert len({(chunk.id, chunk.created, chunk.model, chunk.object) for chunk in chunks}) == 1


def test_stream_survives_clients_that_split_lines_generously(shared: Any, worker: Any, vocabulary: Tokenizer) -> None:
    text = "a\u2028b\u2029c\x85d\u2028\ne"
    reply_with(worker, vocabulary.encode(text).ids)
    body = {"model": MODEL, "prompt": "x", "max_tokens": 90, "stream": True, "logprobs": 0}
    with httpx.stream("POST", f"{shared.gateways[0].url}/v1/completions", json=body) as answer:
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]  # splits like str.splitlines
    assert lines[-1] == "[DONE]"
    assert "".join(json.loads(line)["choices"][0]["text"] for line in lines[:-1]) == text


def test_stop_token_ends_the_text_and_is_not_shown(client: openai.OpenAI, worker: Any, vocabulary: Tokenizer) -> None:
    ids = vocabulary.encode("done").ids
    reply_with(worker, [*ids, 0, *ids])
    answer = client.completions.create(model=MODEL, prompt="x", max_tokens=50)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("done", "stop")
    assert answer.usage is not None
    assert answer.usage.completion_tokens == len(ids) + 1


def test_ignore_eos_goes_on(client: openai.OpenAI, worker: Any, vocabulary: Tokenizer) -> None:
    ids = vocabulary.encode("done").ids
    reply_with(worker, [*ids, 0, *ids])
    answer = client.completions.create(model=MODEL, prompt="x", max_tokens=50, extra_body={"ignore_eos": True})
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("donedone", "length")


def test_own_stop_token_ids_end_the_text(client: openai.OpenAI, worker: Any, vocabulary: Tokenizer) -> None:
    ids = vocabulary.encode("one two").ids
    reply_with(worker, ids)
    answer = client.completions.create(model=MODEL, prompt="x", extra_body={"stop_token_ids": [ids[-1]]})
    assert answer.choices[0].text == vocabulary.decode(ids[:-1])
    assert answer.choices[0].finish_reason == "stop"
    assert set(worker.submits[-1].params.stop_token_ids) == {0, ids[-1]}


def test_stop_string_across_tokens_is_never_shown(client: openai.OpenAI, worker: Any, vocabulary: Tokenizer) -> None:
    pieces = ["one S", "T", "O", "P", " two"]
    reply_with(worker, [token for piece in pieces for token in vocabulary.encode(piece).ids])
    for stop in ("STOP", ["never", "TOP", "STOP"]):
        for stream in (False, True):
            answer = client.completions.create(model=MODEL, prompt="x", max_tokens=90, stop=stop, stream=stream)  # type: ignore[call-overload]
            choices = [chunk.choices[0] for chunk in answer] if stream else [answer.choices[0]]
            assert "".join(choice.text for choice in choices) == "one "
            assert choices[-1].finish_reason == "stop"


def test_stop_string_cancels_the_worker(client: openai.OpenAI, worker: Any, vocabulary: Tokenizer) -> None:
    reply_with(worker, vocabulary.encode("one STOP ").ids + [20] * 300)
    answer = client.completions.create(model=MODEL, prompt="x", max_tokens=400, stop="STOP")
    assert answer.choices[0].text == "one "
    worker.wait_until(lambda: worker.cancels == [f"{answer.id}/0"])


def test_text_held_for_a_stop_string_is_shown_at_the_end(
    client: openai.OpenAI, worker: Any, vocabulary: Tokenizer
) -> None:
    ids = vocabulary.encode("one ST").ids
    reply_with(worker, ids)
    answer = client.completions.create(model=MODEL, prompt="x", max_tokens=len(ids), stop=["STOP"])
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("one ST", "length")


def test_min_tokens_lets_an_early_stop_string_pass(client: openai.OpenAI, worker: Any, vocabulary: Tokenizer) -> None:
    ids = vocabulary.encode("STOP one STOP two").ids
    reply_with(worker, ids)
    early = len(vocabulary.encode("STOP one").ids)
    answer = client.completions.create(
        model=MODEL, prompt="x", max_tokens=len(ids), stop="STOP", extra_body={"min_tokens": early}
    )
    assert answer.choices[0].text == "STOP one "


def test_n_choices_share_a_prompt_and_a_seed(client: openai.OpenAI, worker: Any) -> None:
    worker.reply = lambda submit: [20 + submit.choice_index] * 3
    answer = client.completions.create(model=MODEL, prompt="abc", n=3, max_tokens=3)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len({choice.text for choice in answer.choices}) == 3
    assert [submit.request_id for submit in worker.submits] == [f"{answer.id}/{k}" for k in range(3)]
    assert [submit.choice_index for submit in worker.submits] == [0, 1, 2]
    assert len({submit.params.seed for submit in worker.submits}) == 1
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(worker.submits[0].prompt_token_ids)
    assert answer.usage.completion_tokens == 9


def test_streamed_choices_each_end_once(client: openai.OpenAI, worker: Any) -> None:
    worker.reply = lambda submit: [20 + submit.choice_index] * (3 + submit.choice_index)
    text, reasons = {0: "", 1: ""}, {0: [], 1: []}  # type: ignore[var-annotated]
    for chunk in client.completions.create(model=MODEL, prompt="abc", n=2, stream=True):
        for choice in chunk.choices:
            text[choice.index] += choice.text
            reasons[choice.index] += [choice.finish_reason] if choice.finish_reason else []
    assert (len(text[0]), len(text[1])) == (3, 4)
    assert reasons == {0: ["length"], 1: ["length"]}


@pytest.mark.parametrize("as_tokens", [False, True])
def test_several_prompts_give_their_choices_in_order(
    client: openai.OpenAI, worker: Any, vocabulary: Tokenizer, as_tokens: bool
) -> None:
    texts = ["one", "two three", "four"]
    worker.reply = lambda submit: submit.prompt_token_ids
    prompt: Any = [vocabulary.encode(text).ids for text in texts] if as_tokens else texts
    answer = client.completions.create(model=MODEL, prompt=prompt, n=2)
    assert [choice.text for choice in answer.choices] == [text for text in texts for _ in range(2)]
    assert [submit.choice_index for submit in worker.submits] == [0, 1] * 3
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == sum(len(vocabulary.encode(text).ids) for text in texts)


def test_one_token_list_is_one_prompt(client: openai.OpenAI, worker: Any) -> None:
    answer = client.completions.create(model=MODEL, prompt=[5, 6, 7])
    assert len(answer.choices) == 1
    assert worker.submits[0].prompt_token_ids == [5, 6, 7]


def test_echo_puts_the_prompt_first(client: openai.OpenAI, worker: Any, vocabulary: Tokenizer) -> None:
    reply_with(worker, vocabulary.encode(" two").ids)
    for prompt in ("one", vocabulary.encode("one").ids):
        assert client.completions.create(model=MODEL, prompt=prompt, echo=True).choices[0].text == "one two"
        chunks = client.completions.create(model=MODEL, prompt=prompt, echo=True, stream=True)
        assert "".join(chunk.choices[0].text for chunk in chunks) == "one two"


def test_logprobs_of_the_output(client: openai.OpenAI, worker: Any, vocabulary: Tokenizer) -> None:
    ids = vocabulary.encode("one 🦊!").ids
    reply_with(worker, ids)
    answer = client.completions.create(model=MODEL, prompt="x", max_tokens=len(ids), logprobs=2)
    scores = answer.choices[0].logprobs
    assert scores is not None
    assert scores.tokens is not None
    assert scores.text_offset is not None
    assert scores.top_logprobs is not None
    assert scores.token_logprobs == [-0.5 * (k + 1) for k in range(len(ids))]
    assert scores.tokens[0] == vocabulary.decode([ids[0]])
    assert any(token.startswith("bytes:") for token in scores.tokens)
    assert scores.text_offset[-1] == len("one 🦊")
    assert len(scores.top_logprobs) == len(ids)
    assert all(token in top for token, top in zip(scores.tokens, scores.top_logprobs, strict=True))
    assert worker.submits[-1].params.logprobs == 2


def test_token_that_is_no_alternative_is_named_beside_them(client: openai.OpenAI, worker: Any) -> None:
    worker.top_shift = 1
    scores = client.completions.create(model=MODEL, prompt="x", logprobs=2).choices[0].logprobs
    assert scores is not None
    assert scores.tokens is not None
    assert scores.top_logprobs is not None
    assert all(len(top) == 3 and token in top for token, top in zip(scores.tokens, scores.top_logprobs, strict=True))


def test_streamed_logprobs_are_those_of_the_whole(client: openai.OpenAI, worker: Any, vocabulary: Tokenizer) -> None:
    reply_with(worker, vocabulary.encode("one STO 🦊 two STOP three").ids)
    arguments: dict[str, Any] = {
        "model": MODEL,
        "prompt": "xy",
        "max_tokens": 90,
        "logprobs": 1,
        "stop": "STOP",
        "echo": True,
    }
    whole = client.completions.create(**arguments).choices[0]
    assert whole.logprobs is not None
    parts = [chunk.choices[0] for chunk in client.completions.create(**arguments, stream=True)]
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        joined = [value for part in parts if part.logprobs for value in getattr(part.logprobs, name)]
        assert joined == getattr(whole.logprobs, name)
    assert whole.text == "xyone STO 🦊 two "
    assert whole.logprobs.text_offset is not None
    assert whole.logprobs.text_offset[-1] < len(whole.text)


def test_echo_with_logprobs_scores_the_prompt(client: openai.OpenAI, worker: Any, vocabulary: Tokenizer) -> None:
    ids = vocabulary.encode("one two").ids
    answer = client.completions.create(model=MODEL, prompt="one two", echo=True, logprobs=2, max_tokens=0)
    assert answer.choices[0].text == "one two"
    assert answer.choices[0].finish_reason == "length"
    scores = answer.choices[0].logprobs
    assert scores is not None
    assert scores.token_logprobs == [None] + [-1.0] * (len(ids) - 1)
    assert scores.tokens is not None
    assert "".join(scores.tokens) == "one two"
    assert scores.top_logprobs is not None
    assert scores.top_logprobs[0] is None
    assert scores.text_offset is not None
    assert scores.text_offset[0] == 0
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 0


def test_defaults_are_openais(client: openai.OpenAI, worker: Any) -> None:
    client.completions.create(model=MODEL, prompt="x")
    params = worker.submits[0].params
    assert params.max_tokens == 16
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (1.0, 1.0, 0, 0.0)
    assert params.logprobs is None
    assert params.prompt_logprobs is None


def test_default_of_max_tokens_shrinks_to_what_fits(client: openai.OpenAI, worker: Any) -> None:
    client.completions.create(model=MODEL, prompt=[5] * 508)
    assert worker.submits[0].params.max_tokens == 4


def test_parameters_reach_the_worker(client: openai.OpenAI, worker: Any) -> None:
    client.completions.create(
        model=MODEL,
        prompt="x",
        temperature=0.5,
        top_p=0.25,
        seed=-1,
        presence_penalty=1,
        frequency_penalty=-2,
        logit_bias={"7": 5, "8": -100},
        extra_body={"top_k": 5, "min_p": 0.125, "repetition_penalty": 1.5, "min_tokens": 2},
    )
    params = worker.submits[0].params
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (0.5, 0.25, 5, 0.125)
    assert (params.presence_penalty, params.frequency_penalty, params.repetition_penalty) == (1.0, -2.0, 1.5)
    assert params.logit_bias == {7: 5.0, 8: -100.0}
    assert params.seed == 2**64 - 1
    assert params.min_tokens == 2


def test_seed_is_drawn_where_none_is_given(client: openai.OpenAI, worker: Any) -> None:
    for _ in range(3):
        client.completions.create(model=MODEL, prompt="x")
    assert len({submit.params.seed for submit in worker.submits}) == 3
    assert all(0 <= submit.params.seed < 2**64 for submit in worker.submits)


def test_top_p_zero_is_the_likeliest_token(client: openai.OpenAI, worker: Any) -> None:
    client.completions.create(model=MODEL, prompt="x", top_p=0)
    assert (worker.submits[0].params.top_p, worker.submits[0].params.top_k) == (1.0, 1)


def test_cached_tokens_are_reported(client: openai.OpenAI, worker: Any) -> None:
    worker.cached_tokens = 3
    usage = client.completions.create(model=MODEL, prompt="one two three", n=2).usage
    assert usage is not None
    assert usage.prompt_tokens_details is not None
    assert usage.prompt_tokens_details.cached_tokens == 3


@pytest.mark.parametrize("settings", [{"stop": "fox", "max_tokens": 50}, {"max_tokens": 0, "echo": True}])
def test_cached_tokens_are_left_out_where_the_worker_did_not_say(
    client: openai.OpenAI, worker: Any, vocabulary: Tokenizer, settings: dict[str, Any]
) -> None:
    """The gateway ended the choice itself. A zero would be wrong."""
    worker.cached_tokens = 3
    reply_with(worker, vocabulary.encode("The quick brown fox jumps over").ids)
    answer = client.completions.create(model=MODEL, prompt=["one two three", "four"], **settings)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is None
    assert answer.usage.prompt_tokens > 0


def test_usage_comes_as_one_more_chunk(client: openai.OpenAI, worker: Any) -> None:
    chunks = list(
        client.completions.create(model=MODEL, prompt="x", stream=True, stream_options={"include_usage": True})
    )
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 3
    assert all(chunk.usage is None and chunk.choices for chunk in chunks[:-1])


async def test_async_client_streams(shared: Any, worker: Any, vocabulary: Tokenizer) -> None:
    reply_with(worker, vocabulary.encode(MULTIBYTE).ids)
    async with openai.AsyncOpenAI(base_url=f"{shared.gateways[0].url}/v1", api_key="x", max_retries=0) as client:
        text = ""
        async for chunk in await client.completions.create(model=MODEL, prompt="x", max_tokens=200, stream=True):
            text += chunk.choices[0].text
        answer = await client.completions.create(model=MODEL, prompt="x", max_tokens=200)
    assert text == answer.choices[0].text == MULTIBYTE


def test_long_text_is_encoded_like_a_short_one(client: openai.OpenAI, worker: Any, vocabulary: Tokenizer) -> None:
    text = " ".join(["The quick brown fox"] * 600)  # beyond what is encoded inline; longer than the context
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=MODEL, prompt=text)
    assert caught.value.code == "context_length_exceeded"
    assert str(len(vocabulary.encode(text).ids)) in str(caught.value)
