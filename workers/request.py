"""One request inside a worker: its tokens and how far they are computed. And which requests can never be served.

Pure. Called by `workers.scheduler`, which moves requests between its queue and its slots; sampling has its own state
(`workers.sampling.SamplingState`).
"""

from __future__ import annotations

import math

from flexpert.workers.messages import SamplingParams, Submit


class RequestRejected(ValueError):
    """This request can never be served here; the message is for the client."""


class Request:
    """tokens: prompt and output so far. computed: how many of them have their KV in `slot` (None: not running).

    scored: how many prompt tokens the logits of which were handed out for prompt_logprobs (the whole prompt where none
    were asked for, or where they were sent before a worker's death). cached_tokens: how much of the prompt the first
    admission reused.
    """

    __slots__ = (
        "cached_tokens",
        "computed",
        "limit_tokens",
        "params",
        "prompt_tokens",
        "request_id",
        "scored",
        "slot",
        "tokens",
    )

    def __init__(self, frame: Submit) -> None:
        self.request_id = frame.request_id
        self.params = frame.params
        self.prompt_tokens = len(frame.prompt_token_ids)
        self.tokens = [*frame.prompt_token_ids, *frame.emitted_token_ids]
        self.limit_tokens = self.prompt_tokens + frame.params.max_tokens
        self.computed = 0
        self.slot: int | None = None
        self.cached_tokens: int | None = None
        wants_scores = frame.params.prompt_logprobs is not None and not frame.emitted_token_ids
        self.scored = 0 if wants_scores else self.prompt_tokens

    @property
    def reuse_limit(self) -> int:
        """How many tokens' KV may come from another slot: never the last's, whose logits are wanted, nor unscored ones'."""
        limit = len(self.tokens) - 1
        return limit if self.scored >= self.prompt_tokens else min(self.scored, limit)

    @property
    def most_tokens(self) -> int:
        """Of how many tokens KV is ever kept: the last one's is never computed, unless nothing but the prompt is wanted."""
        return max(self.prompt_tokens, self.limit_tokens - 1)

    def finish_reason(self, max_context_tokens: int) -> str | None:
        """Why the request ends with its last token: "stop", "length" or None (it does not)."""
        outputs = len(self.tokens) - self.prompt_tokens
        if outputs > self.params.min_tokens and self.tokens[-1] in self.params.stop_token_ids:
            return "stop"
        if len(self.tokens) >= min(self.limit_tokens, max_context_tokens):
            return "length"
        return None


def check_request(frame: Submit, *, max_context_tokens: int, vocab_size: int | None) -> None:
    """Raise RequestRejected for what no worker of this model could serve, however much memory it has."""
    params, prompt = frame.params, frame.prompt_token_ids
    if not prompt:
        raise RequestRejected("the prompt is empty: at least one token is needed")
    total = len(prompt) + params.max_tokens
    if total > max_context_tokens:
        left = max_context_tokens - len(prompt)
        advice = f"ask for at most {left} output tokens, or shorten the prompt" if left > 0 else "shorten the prompt"
        raise RequestRejected(
            f"the prompt has {len(prompt)} tokens and max_tokens is {params.max_tokens}: {total} together, "
            f"but the model's context is {max_context_tokens} tokens; {advice}"
        )
    if params.max_tokens == 0 and params.prompt_logprobs is None:
        raise RequestRejected("max_tokens is 0: that is allowed only with prompt_logprobs; ask for at least 1 token")
    if len(frame.emitted_token_ids) > params.max_tokens:
        raise RequestRejected(
            f"{len(frame.emitted_token_ids)} tokens were emitted already, but max_tokens is {params.max_tokens}"
        )
    _check_params(params)
    if vocab_size is not None:
        for what, ids in (
            ("the prompt", prompt),
            ("emitted_token_ids", frame.emitted_token_ids),
            ("logit_bias", list(params.logit_bias)),
            ("stop_token_ids", list(params.stop_token_ids)),
        ):
            if ids and (min(ids) < 0 or max(ids) >= vocab_size):
                wrong = next(token for token in ids if not 0 <= token < vocab_size)
                raise RequestRejected(f"{what} contains token id {wrong}; the model's ids are 0 to {vocab_size - 1}")


def _check_params(params: SamplingParams) -> None:
    checks = (
        ("max_tokens", params.max_tokens >= 0, "0 or more"),
        ("min_tokens", 0 <= params.min_tokens <= params.max_tokens, f"between 0 and max_tokens ({params.max_tokens})"),
        ("seed", 0 <= params.seed < 1 << 64, "an unsigned 64-bit number"),
        ("temperature", params.temperature >= 0 and math.isfinite(params.temperature), "0 (greedy) or more"),
        ("top_p", 0 < params.top_p <= 1, "above 0 and at most 1"),
        ("top_k", params.top_k >= 0, "0 (all) or more"),
        ("min_p", 0 <= params.min_p <= 1, "between 0 and 1"),
        ("repetition_penalty", 0.01 <= params.repetition_penalty <= 100, "between 0.01 and 100"),
        ("presence_penalty", math.isfinite(params.presence_penalty), "a finite number"),
        ("frequency_penalty", math.isfinite(params.frequency_penalty), "a finite number"),
        ("logit_bias", all(math.isfinite(bias) for bias in params.logit_bias.values()), "finite numbers by token id"),
        ("logprobs", (params.logprobs or 0) >= 0, "0 or more"),
        ("prompt_logprobs", (params.prompt_logprobs or 0) >= 0, "0 or more"),
    )
    for name, is_valid, expected in checks:
        if not is_valid:
            raise RequestRejected(f"{name} is {getattr(params, name)!r}; it must be {expected}")
