"""What is refused, and how: always a status that fits and OpenAI's error shape, and the server goes on."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from flexpert.controller.gateway import prepare
from flexpert.controller.gateway.schema import ChatRequest, CompletionRequest, ErrorResponse

MODEL = "tiny-moe"
COMPLETION: dict[str, Any] = {"model": MODEL, "prompt": "x"}
CHAT: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "x"}]}


@pytest.fixture(scope="module")
def http(shared: Any) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=shared.gateways[0].url, timeout=20) as client:
        yield client
        assert client.get("/health").status_code == 200
        assert client.post("/v1/completions", json=COMPLETION).status_code == 200


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]
    return ErrorResponse.model_validate_json(response.content).error.model_dump()


BOTH: list[tuple[dict[str, Any], str]] = [
    ({"temperature": 2.5}, "temperature"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"top_p": 1.1}, "top_p"),
    ({"n": 0}, "n"),
    ({"n": 129}, "n"),
    ({"n": 1.5}, "n"),
    ({"presence_penalty": 2.1}, "presence_penalty"),
    ({"frequency_penalty": -2.1}, "frequency_penalty"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"repetition_penalty": 0.0099}, "repetition_penalty"),
    ({"repetition_penalty": 100.5}, "repetition_penalty"),
    ({"min_p": 2}, "min_p"),
    ({"top_k": -2}, "top_k"),
    ({"top_k": 2**31}, "top_k"),
    ({"top_k": 10**30}, "top_k"),
    ({"min_tokens": -1}, "min_tokens"),
    ({"min_tokens": 99, "max_tokens": 5}, "min_tokens"),
    ({"min_tokens": 10**30}, "min_tokens"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": 10**30}, "max_tokens"),
    ({"seed": 2**64}, "seed"),
    ({"seed": -(2**63) - 1}, "seed"),
    ({"temperature": 10**400}, "temperature"),
    ({"stop": ["a"] * 5}, "stop"),
    ({"stop": ""}, "stop"),
    ({"stop": 7}, "stop"),
    ({"logit_bias": {"7": 101}}, "logit_bias.7"),
    ({"logit_bias": {"fox": 1}}, "logit_bias"),
    ({"logit_bias": {"400": 1}}, "logit_bias"),
    ({"logit_bias": {"9" * 5000: 1}}, "logit_bias"),
    ({"stop_token_ids": [400]}, "stop_token_ids"),
    ({"stop_token_ids": [-1]}, "stop_token_ids.0"),
    ({"stop_token_ids": [10**30]}, "stop_token_ids.0"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"surprise": 1}}, "stream_options.surprise"),
    ({"frobnicate": 1}, "frobnicate"),
    ({"guided_json": {"type": "object"}}, "guided_json"),
    ({"lora_request": {"name": "x"}}, "lora_request"),
    ({"model": 7}, "model"),
]
COMPLETION_ONLY: list[tuple[dict[str, Any], str]] = [
    ({"suffix": "tail"}, "suffix"),
    ({"best_of": 2}, "best_of"),
    ({"logprobs": 21}, "logprobs"),
    ({"logprobs": True}, "logprobs"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": ["a", 5]}, "prompt.1"),
    ({"prompt": [400]}, "prompt"),
    ({"prompt": [-1]}, "prompt.0"),
    ({"prompt": [10**30]}, "prompt.0"),
    ({"prompt": [[5] * 400] * 2, "n": 128, "logprobs": 20, "echo": True}, "logprobs"),
    ({"prompt": {"text": "x"}}, "prompt"),
    ({"prompt": None}, "prompt"),
    ({"prompt": ["x"] * 17, "n": 128}, "n"),
    ({"tools": [{"type": "function"}]}, "tools"),
    ({"messages": []}, "messages"),
]
CHAT_ONLY: list[tuple[dict[str, Any], str]] = [
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"functions": [{"name": "f"}]}, "functions"),
    ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"modalities": ["text", "audio"]}, "modalities"),
    ({"audio": {"voice": "x"}}, "audio"),
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages.0.content.0"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages.0.content.0.text"),
    ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "1"}]}, "messages.0"),
    ({"messages": [{"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}]}, "messages.0"),
    ({"messages": [{"role": "wizard", "content": "x"}]}, "messages.0.role"),
    ({"messages": [{"content": "x"}]}, "messages.0.role"),
    ({"messages": "hello"}, "messages"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"logprobs": 3}, "logprobs"),
    ({"max_completion_tokens": 0}, "max_completion_tokens"),
    ({"max_completion_tokens": 10**30}, "max_completion_tokens"),
    ({"chat_template_kwargs": {"chat_template": "x"}}, "chat_template_kwargs"),
    ({"prompt": "x"}, "prompt"),
]
CASES = [
    *(("/v1/completions", {**COMPLETION, **change}, param) for change, param in BOTH + COMPLETION_ONLY),
    *(("/v1/chat/completions", {**CHAT, **change}, param) for change, param in BOTH + CHAT_ONLY),
]


@pytest.mark.parametrize(
    ("path", "body", "param"), CASES, ids=lambda value: str(value)[:60].encode("ascii", "replace").decode()
)
def test_bad_value_is_refused_by_name(
    http: httpx.Client, worker: Any, path: str, body: dict[str, Any], param: str
) -> None:
    error = error_of(http.post(path, content=json.dumps(body), headers={"content-type": "application/json"}), 400)
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert param.split(".")[0] in error["message"]
    assert not worker.submits


@pytest.mark.parametrize("model", [CompletionRequest, ChatRequest])
def test_every_integer_is_bounded(model: Any) -> None:
    """One that a frame cannot hold must not come so far. best_of is refused unless it is 1."""
    properties = model.model_json_schema()["properties"]
    integers = [(name, kind) for name, field in properties.items() for kind in integers_in(field) if name != "best_of"]
    assert {"top_k", "seed", "n", "min_tokens", "stop_token_ids", "max_tokens"} <= {name for name, _ in integers}
    unbounded = [
        name for name, kind in integers if "minimum" not in kind or not {"maximum", "exclusiveMaximum"} & set(kind)
    ]
    assert unbounded == []


def integers_in(field: Any) -> Iterator[dict[str, Any]]:
    if field.get("type") == "integer":
        yield field
    for inner in (*field.get("anyOf", ()), *([field["items"]] if "items" in field else ())):
        yield from integers_in(inner)


def test_lowest_repetition_penalty_is_named(http: httpx.Client) -> None:
    error = error_of(http.post("/v1/completions", json={**COMPLETION, "repetition_penalty": 1e-30}), 400)
    assert "0.01" in error["message"]
    for value in (0.01, 100):
        assert http.post("/v1/completions", json={**COMPLETION, "repetition_penalty": value}).status_code == 200


def test_echoed_log_probabilities_have_a_limit(
    http: httpx.Client, worker: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens of all prompts * (logprobs + 1) * n, and only where the prompt's are asked for."""
    monkeypatch.setattr(prepare, "_MAX_PROMPT_SCORES", 60)
    body = {**COMPLETION, "prompt": [[5, 6], [7, 8, 9]], "logprobs": 3, "n": 3, "echo": True}
    assert http.post("/v1/completions", json=body).status_code == 200
    for change in ({"prompt": [[5, 6], [7, 8, 9, 5]]}, {"logprobs": 4}, {"n": 4}):
        error = error_of(http.post("/v1/completions", json={**body, **change}), 400)
        assert error["param"] == "logprobs"
        assert "at most 60" in error["message"]
        assert http.post("/v1/completions", json={**body, **change, "echo": False}).status_code == 200


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[1, 2]", b'"text"', b"null", b"\xff\xfe", b'{"model": "tiny-moe", "prompt": ' + b"[" * 5000, b"{'a': 1}",
     b'{"model": "tiny-moe", "prompt": "x", "seed": ' + b"1" * 5000 + b"}"],
)  # fmt: skip
def test_malformed_body_is_refused(http: httpx.Client, body: bytes) -> None:
    error = error_of(http.post("/v1/completions", content=body, headers={"content-type": "application/json"}), 400)
    assert "JSON" in error["message"]
    assert error["code"] == "invalid_json"


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_json_does_not_know_are_refused(http: httpx.Client, value: str) -> None:
    body = f'{{"model": "tiny-moe", "prompt": "x", "temperature": {value}}}'
    assert error_of(http.post("/v1/completions", content=body, headers={"content-type": "application/json"}), 400)


@pytest.mark.parametrize(
    ("path", "change"),
    [
        ("/v1/completions", {"prompt": "\ud800"}),
        ("/v1/completions", {"prompt": "x", "\udfff": 1}),
        ("/v1/completions", {"prompt": "x", "user": "\ud800", "stop": "\ud800", "temperature": 3}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a\ud800"}]}),
        ("/v1/chat/completions", {"messages": [{"role": "\ud800", "content": "a"}]}),
    ],
)
def test_text_that_is_no_unicode_is_refused(http: httpx.Client, path: str, change: dict[str, Any]) -> None:
    body = json.dumps({"model": MODEL, **change})
    assert error_of(http.post(path, content=body, headers={"content-type": "application/json"}), 400)


def test_form_content_type_is_refused_with_advice(http: httpx.Client) -> None:
    response = http.post(
        "/v1/completions",
        content=json.dumps(COMPLETION),
        headers={"content-type": "application/x-www-form-urlencoded"},
    )
    assert "Content-Type: application/json" in error_of(response, 400)["message"]


def test_unknown_path_and_method(http: httpx.Client) -> None:
    assert error_of(http.get("/v1/nothing"), 404)["code"] == "not_found"
    response = http.get("/v1/completions")
    assert error_of(response, 405)["code"] == "method_not_allowed"
    assert response.headers["allow"] == "POST"


def test_unknown_model(client: openai.OpenAI) -> None:
    for call in (
        lambda: client.completions.create(model="gpt-9", prompt="x"),
        lambda: client.chat.completions.create(model="gpt-9", messages=CHAT["messages"]),
        lambda: client.models.retrieve("gpt-9"),
    ):
        with pytest.raises(openai.NotFoundError) as caught:
            call()  # type: ignore[no-untyped-call]
        assert caught.value.code == "model_not_found"
        assert "tiny-moe" in str(caught.value)


def test_context_overflow_says_the_limit(client: openai.OpenAI, worker: Any) -> None:
    for arguments in ({"prompt": [5] * 512}, {"prompt": [5] * 500, "max_tokens": 13}):
        with pytest.raises(openai.BadRequestError) as caught:
            client.completions.create(model=MODEL, **arguments)  # type: ignore[arg-type]
        assert caught.value.code == "context_length_exceeded"
        assert "512" in str(caught.value)
    long_chat: Any = [{"role": "user", "content": "fox " * 600}]
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=MODEL, messages=long_chat)
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "messages")
    client.completions.create(model=MODEL, prompt=[5] * 500, max_tokens=12)


@pytest.mark.parametrize("stream", [False, True])
def test_request_that_the_worker_refuses_gets_a_status(client: openai.OpenAI, worker: Any, stream: bool) -> None:
    worker.fail_with = ("invalid_request", "the worker has no memory for this prompt")
    with pytest.raises(openai.BadRequestError, match="no memory for this prompt"):
        client.completions.create(model=MODEL, prompt="x", stream=stream)
    worker.fail_with = ("internal", "step failed")
    with pytest.raises(openai.InternalServerError, match="step failed"):
        client.completions.create(model=MODEL, prompt="x", stream=stream)


def test_failure_in_mid_stream_raises_in_the_client(client: openai.OpenAI, shared: Any, worker: Any) -> None:
    worker.reply = lambda submit: [20] * 9
    shared.run(worker.step(1))
    stream = client.completions.create(model=MODEL, prompt="x", stream=True)
    seen = [next(stream).choices[0].text]
    shared.run(worker.fail(worker.submits[0].request_id, "internal", "the device is lost"))
    with pytest.raises(openai.APIError, match="the device is lost"):
        seen.extend(chunk.choices[0].text for chunk in stream)
    assert len("".join(seen)) == 1


@pytest.fixture
def small(harness: Any) -> Iterator[httpx.Client]:
    """A server that reads at most 10,000 bytes."""
    harness.worker()
    gateway = harness.gateway(max_body_bytes=10_000)
    with httpx.Client(base_url=gateway.url, timeout=20) as client:
        yield client
        assert client.post("/v1/completions", json=COMPLETION).status_code == 200


def test_oversized_body_is_refused(small: httpx.Client) -> None:
    for size in (10_000, 70_000, 1_000_000):
        response = small.post("/v1/completions", json={**COMPLETION, "prompt": "x" * size})
        assert error_of(response, 413)["code"] == "body_too_large"


def test_oversized_chunked_body_is_refused(small: httpx.Client) -> None:
    def chunks() -> Iterator[bytes]:
        yield b'{"model": "tiny-moe", "prompt": "'
        for _ in range(500):
            yield b"x" * 1000

    response = small.post("/v1/completions", content=chunks(), headers={"content-type": "application/json"})
    assert error_of(response, 413)["code"] == "body_too_large"


def test_announced_size_alone_is_enough_to_refuse(small: httpx.Client) -> None:
    """The answer comes before any byte of the body was sent."""
    with socket.create_connection((small.base_url.host, small.base_url.port or 80), timeout=20) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999\r\n\r\n")
        assert connection.recv(4096).startswith(b"HTTP/1.1 413 ")
