"""From a valid request to what the workers are asked: prompts as tokens, complete sampling parameters, what to watch for.

Refuses what this server does not do and what the model cannot (context, vocabulary). A request without a seed gets one here, so that
everything that follows, replays included, is determined.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from flexpert.controller.gateway.errors import ApiError, bad_request, context_too_long, unsupported
from flexpert.controller.gateway.schema import IGNORED, UNSUPPORTED, ChatRequest, CompletionRequest
from flexpert.controller.gateway.tokenizer import ModelTokenizer
from flexpert.workers.messages import SamplingParams, Welcome

_DEFAULT_COMPLETION_TOKENS = 16
_MAX_STOPS = 4
_MAX_TOTAL_CHOICES = 2048
# Log-probabilities of prompt tokens, alternatives included, in one request. The worker sends those of a step in one frame, about
# 15 bytes each, and a frame ends at 64 MiB.
_MAX_PROMPT_SCORES = 2_000_000
# Arguments of apply_chat_template itself: the gateway's business, or files of the server.
_RESERVED_TEMPLATE_ARGUMENTS = frozenset({
    "conversation", "messages", "tools", "documents", "chat_template", "tokenize", "padding", "truncation", "max_length",
    "return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs", "continue_final_message",
    "sanitize_control_tokens",
})  # fmt: skip
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt; `text` is what echo shows."""

    token_ids: list[int]
    text: str


@dataclass(frozen=True, slots=True)
class PromptParams:
    """A prompt with the parameters of its choices: max_tokens depends on how much context it leaves."""

    prompt: Prompt
    params: SamplingParams


@dataclass(frozen=True, slots=True)
class Prepared:
    """All that a Generation needs. Choice number `i * n + j` is choice j of prompt i."""

    prompts: list[PromptParams]
    n: int
    stops: tuple[str, ...]
    discard_output: bool = False
    continues_prompt: bool = False


def check_supported(request: CompletionRequest | ChatRequest, *, model_id: str) -> None:
    """Everything that can be refused without looking at the prompt."""
    _check_unknown(request)
    if request.model != model_id:
        raise ApiError(
            404,
            f"The model {request.model!r} does not exist; this server has {model_id!r}.",
            param="model",
            code="model_not_found",
        )
    if request.stream_options is not None and not request.stream:
        raise bad_request("stream_options: only allowed with stream=true", param="stream_options")
    stops = _stops(request)
    if len(stops) > _MAX_STOPS:
        raise bad_request(f"stop: at most {_MAX_STOPS} strings are allowed, found {len(stops)}", param="stop")
    if "" in stops:
        raise bad_request("stop: an empty string cannot be searched for", param="stop")
    if isinstance(request, CompletionRequest):
        _check_completion(request)
    else:
        _check_chat(request)
    if choices_of(request) > _MAX_TOTAL_CHOICES:
        raise bad_request(
            f"prompts times n is {choices_of(request)}, at most {_MAX_TOTAL_CHOICES} choices are allowed in one request",
            param="n",
        )


def choices_of(request: CompletionRequest | ChatRequest) -> int:
    prompts = 1
    if isinstance(request, CompletionRequest) and isinstance(request.prompt, list) and request.prompt:
        prompts = 1 if isinstance(request.prompt[0], int) else len(request.prompt)
    return prompts * (request.n or 1)


async def prepare_completion(request: CompletionRequest, *, tokenizer: ModelTokenizer, limits: Welcome) -> Prepared:
    prompts = await _completion_prompts(request.prompt, tokenizer, limits)
    wanted = request.max_tokens
    echo_scores = request.logprobs if request.echo else None
    if echo_scores is not None:
        _check_prompt_scores(prompts, alternatives=echo_scores, n=request.n or 1)
    prepared = []
    for prompt in prompts:
        left = _room(prompt, wanted, limits, param="prompt", default=_DEFAULT_COMPLETION_TOKENS)
        params = _sampling(
            request, tokenizer, limits, max_tokens=left, logprobs=request.logprobs, prompt_logprobs=echo_scores
        )
        prepared.append(PromptParams(prompt, params))
    return Prepared(prepared, request.n or 1, _stops(request), discard_output=wanted == 0, continues_prompt=True)


async def prepare_chat(request: ChatRequest, *, tokenizer: ModelTokenizer, limits: Welcome) -> Prepared:
    arguments = dict(request.chat_template_kwargs or {})
    if request.reasoning_effort is not None:
        arguments.setdefault("reasoning_effort", request.reasoning_effort)
    text = tokenizer.render_chat(_messages(request), arguments)
    (token_ids,) = await tokenizer.encode([text], add_special_tokens=False)
    prompt = _checked(Prompt(token_ids, text), limits, param="messages")
    wanted = request.max_completion_tokens if request.max_completion_tokens is not None else request.max_tokens
    left = _room(prompt, wanted, limits, param="messages", default=limits.max_context_tokens)
    logprobs = (request.top_logprobs or 0) if request.logprobs else None
    params = _sampling(request, tokenizer, limits, max_tokens=left, logprobs=logprobs, prompt_logprobs=None)
    return Prepared([PromptParams(prompt, params)], request.n or 1, _stops(request))


def _check_unknown(request: BaseModel) -> None:
    for name, value in (request.model_extra or {}).items():
        if name in IGNORED or value is None:
            continue
        if name in UNSUPPORTED:
            if value in ([], {}, False):
                continue
            raise unsupported(name, UNSUPPORTED[name])
        raise bad_request(f"{name}: unknown parameter", param=name, code="unknown_parameter")


def _check_completion(request: CompletionRequest) -> None:
    if request.suffix:
        raise unsupported("suffix", "text after the completion")
    if request.best_of not in (None, 1):
        raise unsupported("best_of", "choosing the best of several")
    if request.max_tokens == 0 and not request.echo:
        raise bad_request("max_tokens: 0 is only allowed with echo=true", param="max_tokens")


def _check_chat(request: ChatRequest) -> None:
    if request.top_logprobs is not None and not request.logprobs:
        raise bad_request("top_logprobs: only allowed with logprobs=true", param="top_logprobs")
    if request.response_format is not None and request.response_format.type != "text":
        raise unsupported("response_format", f"structured output ({request.response_format.type!r})")
    if request.modalities is not None and request.modalities != ["text"]:
        raise unsupported("modalities", f"output other than text ({request.modalities})")
    if request.tool_choice not in (None, "none", "auto"):
        raise unsupported("tool_choice", "tool calling")
    reserved = _RESERVED_TEMPLATE_ARGUMENTS & set(request.chat_template_kwargs or {})
    if reserved:
        raise bad_request(
            f"chat_template_kwargs: {sorted(reserved)} cannot be set by a request", param="chat_template_kwargs"
        )


def _messages(request: ChatRequest) -> list[dict[str, Any]]:
    messages = []
    for number, message in enumerate(request.messages):
        where = f"messages.{number}"
        if message.role in ("tool", "function") or (message.model_extra or {}).get("tool_calls"):
            raise unsupported(where, "tool calling")
        if message.role not in _ROLES:
            raise bad_request(
                f"{where}.role: found {message.role!r}, expected one of {sorted(_ROLES)}", param=f"{where}.role"
            )
        extra = {
            key: value for key, value in (message.model_extra or {}).items() if key in ("name", "reasoning_content")
        }
        messages.append({"role": _ROLES[message.role], "content": _content(message.content, where), **extra})
    return messages


def _content(content: Any, where: str) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    for number, part in enumerate(content):
        if part.type != "text":
            raise unsupported(f"{where}.content.{number}", f"content of type {part.type!r}")
        if part.text is None:
            raise bad_request(f"{where}.content.{number}.text: missing", param=f"{where}.content.{number}.text")
    return "\n".join(str(part.text) for part in content)


async def _completion_prompts(prompt: Any, tokenizer: ModelTokenizer, limits: Welcome) -> list[Prompt]:
    given: list[Any] = [prompt] if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)) else prompt
    if not given:
        raise bad_request("prompt: an empty list; expected at least one prompt", param="prompt")
    if isinstance(given[0], str):
        encoded = await tokenizer.encode(given, add_special_tokens=True)
        prompts = [Prompt(token_ids, text) for token_ids, text in zip(encoded, given, strict=True)]
    else:
        prompts = [Prompt(_in_vocabulary(token_ids, limits, "prompt"), "") for token_ids in given]
        prompts = [Prompt(one.token_ids, tokenizer.decode(one.token_ids)) for one in prompts]
    return [_checked(one, limits, param="prompt") for one in prompts]


def _in_vocabulary(token_ids: list[int], limits: Welcome, param: str) -> list[int]:
    largest = max(token_ids, default=0)
    if largest >= limits.vocab_size:
        raise bad_request(
            f"{param}: token id {largest} is outside the vocabulary (0 to {limits.vocab_size - 1})", param=param
        )
    return token_ids


def _checked(prompt: Prompt, limits: Welcome, *, param: str) -> Prompt:
    if not prompt.token_ids:
        raise bad_request(f"{param}: the prompt has no tokens; give at least one", param=param)
    return prompt


def _check_prompt_scores(prompts: list[Prompt], *, alternatives: int, n: int) -> None:
    tokens = sum(len(prompt.token_ids) for prompt in prompts)
    scores = tokens * (alternatives + 1) * n
    if scores > _MAX_PROMPT_SCORES:
        raise bad_request(
            f"logprobs: with echo, {tokens} prompt tokens times (logprobs {alternatives} + 1) times n {n} are {scores} "
            f"log-probabilities, at most {_MAX_PROMPT_SCORES} are given; ask for fewer logprobs or choices, or a shorter prompt",
            param="logprobs",
        )


def _room(prompt: Prompt, wanted: int | None, limits: Welcome, *, param: str, default: int) -> int:
    """max_tokens for this prompt. Where nothing is wanted (0) one token is drawn all the same, and thrown away."""
    have = len(prompt.token_ids)
    left = limits.max_context_tokens - have
    least = 1 if wanted is None else max(1, wanted)
    if least > left:
        raise context_too_long(
            limit_tokens=limits.max_context_tokens, prompt_tokens=have, wanted_tokens=least, param=param
        )
    return min(default, left) if wanted is None else least


def _stops(request: CompletionRequest | ChatRequest) -> tuple[str, ...]:
    if request.stop is None:
        return ()
    return (request.stop,) if isinstance(request.stop, str) else tuple(request.stop)


def _sampling(
    request: CompletionRequest | ChatRequest,
    tokenizer: ModelTokenizer,
    limits: Welcome,
    *,
    max_tokens: int,
    logprobs: int | None,
    prompt_logprobs: int | None,
) -> SamplingParams:
    seed = secrets.randbits(64) if request.seed is None else request.seed % 2**64
    top_p, top_k = _or(request.top_p, 1.0), max(0, _or(request.top_k, 0))
    if top_p == 0:
        top_p, top_k = 1.0, 1
    stop_ids = [] if request.ignore_eos else list(tokenizer.stop_token_ids)
    min_tokens = _or(request.min_tokens, 0)
    if min_tokens > max_tokens:
        raise bad_request(
            f"min_tokens: found {min_tokens}, expected at most the {max_tokens} tokens that may be generated",
            param="min_tokens",
        )
    return SamplingParams(
        max_tokens=max_tokens,
        seed=seed,
        min_tokens=min_tokens,
        temperature=float(_or(request.temperature, 1.0)),
        top_p=float(top_p),
        top_k=top_k,
        min_p=float(_or(request.min_p, 0.0)),
        repetition_penalty=float(_or(request.repetition_penalty, 1.0)),
        presence_penalty=float(_or(request.presence_penalty, 0.0)),
        frequency_penalty=float(_or(request.frequency_penalty, 0.0)),
        logit_bias=_logit_bias(request.logit_bias or {}, limits),
        stop_token_ids=tuple(
            dict.fromkeys(stop_ids + _in_vocabulary(request.stop_token_ids or [], limits, "stop_token_ids"))
        ),
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
    )


def _logit_bias(given: dict[str, float], limits: Welcome) -> dict[int, float]:
    bias = {}
    for key, value in given.items():
        if not (key.isascii() and key.isdigit() and len(key) < 12 and int(key) < limits.vocab_size):
            raise bad_request(
                f"logit_bias: found key {key!r}, expected a token id from 0 to {limits.vocab_size - 1}",
                param="logit_bias",
            )
        bias[int(key)] = float(value)
    return bias


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value
