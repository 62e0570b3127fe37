"""POST /v1/chat/completions with the real client, against a scripted worker."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import openai
import pytest
from tokenizers import Tokenizer, processors

from flexpert.controller.gateway.schema import ChatResponse

MODEL = "tiny-moe"
HELLO: Any = [{"role": "user", "content": "Hello"}]
MULTIBYTE = "Größe 世界 🎉🚀 café"


def reply_with(worker: Any, ids: list[int]) -> None:
    worker.reply = lambda submit: ids


def prompt_text(worker: Any, vocabulary: Tokenizer) -> str:
    return vocabulary.decode(worker.submits[-1].prompt_token_ids, skip_special_tokens=False)


def test_answer_is_a_message(client: openai.OpenAI, worker: Any, vocabulary: Tokenizer) -> None:
    reply_with(worker, [*vocabulary.encode("Hello, world!").ids, 0])
    answer = client.chat.completions.create(model=MODEL, messages=HELLO)
    assert answer.choices[0].message.content == "Hello, world!"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-")
    assert prompt_text(worker, vocabulary) == "<|user|>Hello<|end|><|assistant|>"


def test_body_is_exactly_what_the_document_says(client: openai.OpenAI, worker: Any) -> None:
    raw = client.chat.completions.with_raw_response.create(
        model=MODEL, messages=HELLO, n=2, logprobs=True, top_logprobs=2
    )
    ChatResponse.model_validate_json(raw.content)


def test_stream_begins_with_the_role_and_ends_with_the_reason(
    client: openai.OpenAI, worker: Any, vocabulary: Tokenizer
) -> None:
    reply_with(worker, [*vocabulary.encode(MULTIBYTE).ids, 0])
    chunks = list(client.chat.completions.create(model=MODEL, messages=HELLO, stream=True))
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert deltas[0].role == "assistant"
    assert "".join(delta.content or "" for delta in deltas) == MULTIBYTE
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert deltas[-1].content is None
    assert all(chunk.choices[0].finish_reason is None for chunk in chunks[:-1])
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({(chunk.id, chunk.created, chunk.system_fingerprint) for chunk in chunks}) == 1


def test_clients_own_stream_helper_understands_the_stream(
    client: openai.OpenAI, worker: Any, vocabulary: Tokenizer
) -> None:
    reply_with(worker, [*vocabulary.encode(MULTIBYTE).ids, 0])
    with client.chat.completions.stream(
        model=MODEL, messages=HELLO, logprobs=True, top_logprobs=1, stream_options={"include_usage": True}
    ) as stream:
        for _ in stream:
            pass
        final = stream.get_final_completion()
    assert final.choices[0].message.content == MULTIBYTE
    assert final.usage is not None
    assert final.choices[0].logprobs is not None


def test_usage_chunk_has_no_choices_and_others_no_usage(client: openai.OpenAI, worker: Any) -> None:
    options: Any = {"include_usage": True}
    chunks = list(client.chat.completions.create(model=MODEL, messages=HELLO, stream=True, stream_options=options))
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.total_tokens == chunks[-1].usage.prompt_tokens + 3
    assert all(chunk.usage is None for chunk in chunks[:-1])
    plain = list(client.chat.completions.create(model=MODEL, messages=HELLO, stream=True, stream_options={}))
    assert all(chunk.choices for chunk in plain)


def test_conversation_goes_through_the_template(client: openai.OpenAI, worker: Any, vocabulary: Tokenizer) -> None:
    messages: Any = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]},
        {"role": "assistant", "content": None},
        {"role": "user", "content": "three", "name": "Ada"},
    ]
    client.chat.completions.create(model=MODEL, messages=messages, extra_body={"chat_template_kwargs": {"shout": "!!"}})
    expected = (
        "<|system|>Be brief.<|end|><|user|>one\ntwo<|end|><|assistant|><|end|><|user|>three<|end|>!!<|assistant|>"
    )
    assert prompt_text(worker, vocabulary) == expected


def test_template_alone_decides_on_special_tokens(
    harness: Any, make_client: Any, model_dir: Path, tmp_path: Path
) -> None:
    """A tokenizer that puts a token before every text must not put a second one before a rendered chat."""
    directory = tmp_path / "with-bos"
    shutil.copytree(model_dir, directory)
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing(single="<|system|> $A", special_tokens=[("<|system|>", 1)])
    tokenizer.save(str(directory / "tokenizer.json"))
    worker = harness.worker()
    client = make_client(harness.gateway(model_dir=directory))
    client.completions.create(model=MODEL, prompt="x")
    client.chat.completions.create(model=MODEL, messages=HELLO)
    assert [submit.prompt_token_ids[0] for submit in worker.submits] == [1, tokenizer.token_to_id("<|user|>")]


def test_model_without_a_template_says_so(harness: Any, make_client: Any, model_dir: Path, tmp_path: Path) -> None:
    directory = tmp_path / "no-template"
    shutil.copytree(model_dir, directory)
    (directory / "chat_template.jinja").unlink()
    harness.worker()
    with pytest.raises(openai.BadRequestError) as caught:
        make_client(harness.gateway(model_dir=directory)).chat.completions.create(model=MODEL, messages=HELLO)
    assert caught.value.code == "no_chat_template"


def test_template_gets_the_last_word(client: openai.OpenAI, worker: Any) -> None:
    with pytest.raises(openai.BadRequestError, match="roles must alternate"):
        client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "refuse me"}])


def test_default_length_is_the_rest_of_the_context(client: openai.OpenAI, worker: Any) -> None:
    client.chat.completions.create(model=MODEL, messages=HELLO)
    submit = worker.submits[0]
    assert submit.params.max_tokens == 512 - len(submit.prompt_token_ids)


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
def test_length_is_limited_by_either_name(client: openai.OpenAI, worker: Any, field: str) -> None:
    reply_with(worker, [20] * 9)
    limits: Any = {field: 2}
    answer = client.chat.completions.create(model=MODEL, messages=HELLO, **limits)
    assert answer.usage is not None
    assert (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (2, "length")


def test_logprobs_name_tokens_and_bytes(client: openai.OpenAI, worker: Any, vocabulary: Tokenizer) -> None:
    ids = vocabulary.encode("fox 🦊").ids
    reply_with(worker, [*ids, 0])
    answer = client.chat.completions.create(model=MODEL, messages=HELLO, logprobs=True, top_logprobs=2)
    scores = answer.choices[0].logprobs
    assert scores is not None
    assert scores.content is not None
    assert len(scores.content) == len(ids)  # the stop token is not part of the message
    assert b"".join(bytes(entry.bytes or []) for entry in scores.content).decode() == "fox 🦊"
    assert [entry.logprob for entry in scores.content] == [-0.5 * (k + 1) for k in range(len(ids))]
    assert all(len(entry.top_logprobs) == 2 for entry in scores.content)
    assert scores.content[0].top_logprobs[0].token == scores.content[0].token


def test_logprobs_without_alternatives(client: openai.OpenAI, worker: Any) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=HELLO, logprobs=True)
    scores = answer.choices[0].logprobs
    assert scores is not None
    assert scores.content is not None
    assert [entry.top_logprobs for entry in scores.content] == [[], [], []]
    assert worker.submits[0].params.logprobs == 0


def test_no_logprobs_unless_asked(client: openai.OpenAI, worker: Any) -> None:
    assert client.chat.completions.create(model=MODEL, messages=HELLO).choices[0].logprobs is None
    assert worker.submits[0].params.logprobs is None


def test_streamed_logprobs_are_those_of_the_whole(client: openai.OpenAI, worker: Any, vocabulary: Tokenizer) -> None:
    reply_with(worker, vocabulary.encode("one STO 🦊 two STOP three").ids)
    arguments: Any = {"model": MODEL, "messages": HELLO, "logprobs": True, "top_logprobs": 1, "stop": ["STOP"]}
    whole = client.chat.completions.create(**arguments).choices[0]
    assert whole.logprobs is not None
    choices = [chunk.choices[0] for chunk in client.chat.completions.create(**arguments, stream=True)]
    streamed = [entry for choice in choices if choice.logprobs for entry in choice.logprobs.content or []]
    assert streamed == whole.logprobs.content
    assert whole.message.content == "one STO 🦊 two "


def test_choices_stream_side_by_side(client: openai.OpenAI, worker: Any) -> None:
    worker.reply = lambda submit: [20 + submit.choice_index] * 3
    roles, reasons = set(), []
    for chunk in client.chat.completions.create(model=MODEL, messages=HELLO, n=3, stream=True):
        for choice in chunk.choices:
            if choice.delta.role:
                roles.add(choice.index)
            reasons += [choice.index] if choice.finish_reason else []
    assert roles == {0, 1, 2}
    assert sorted(reasons) == [0, 1, 2]


def test_harmless_parameters_are_ignored(client: openai.OpenAI, worker: Any) -> None:
    client.chat.completions.create(
        model=MODEL,
        messages=HELLO,
        user="u",
        store=False,
        metadata={"a": "b"},
        service_tier="auto",
        parallel_tool_calls=False,
        tools=[],
        tool_choice="none",
        response_format={"type": "text"},
        modalities=["text"],
        reasoning_effort="low",
    )
    assert len(worker.submits) == 1


async def test_async_client_runs_many_at_once(shared: Any, worker: Any) -> None:
    import asyncio

    worker.reply = lambda submit: submit.prompt_token_ids[1:-2]
    async with openai.AsyncOpenAI(base_url=f"{shared.gateways[0].url}/v1", api_key="x", max_retries=0) as client:

        async def ask(text: str) -> str | None:
            messages: Any = [{"role": "user", "content": text}]
            return (await client.chat.completions.create(model=MODEL, messages=messages)).choices[0].message.content

        texts = [f"number {n} 世界" for n in range(30)]
        assert await asyncio.gather(*map(ask, texts)) == texts
