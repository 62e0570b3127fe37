"""The frames between gateway and worker, and nothing else.

A worker listens, a gateway connects and speaks first. One stream carries all requests of that pair; `workers.framing` puts
the frames on the wire. A frame is a tagged msgspec struct, so an unknown or malformed frame is an error with a name, never code.

    gateway                               worker
    Hello(cluster_token, ...)   ─────>
                                <─────    Welcome(model, limits) | Refused(reason), then the socket closes
    Submit, Cancel              ─────>
                                <─────    StepOutput (one a step), Failed (one a refused request), Stats (a few a second)
                                <─────    Released (the worker leaves its epoch: its requests live on elsewhere)
"""

from __future__ import annotations

import msgspec

PROTOCOL_VERSION = 1


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How the tokens of one choice are drawn. Complete: nothing is looked up later, so a replay draws the same tokens.

    temperature 0 is greedy. top_k 0 means all. Penalties as in OpenAI's API (presence and frequency count output tokens;
    repetition_penalty counts prompt and output tokens, as in transformers). stop_token_ids already hold the model's end-of-sequence ids,
    unless the client asked to ignore them. seed is an unsigned 64-bit number, drawn by the gateway where the client gave none.
    logprobs / prompt_logprobs: the number of alternatives wanted beside each token; None: no log-probabilities at all.
    """

    max_tokens: int
    seed: int
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    stop_token_ids: tuple[int, ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None


# Gateway to worker


class Hello(msgspec.Struct, frozen=True, kw_only=True, tag="hello"):
    cluster_token: str
    gateway_id: str
    protocol: int = PROTOCOL_VERSION


class Submit(msgspec.Struct, frozen=True, kw_only=True, tag="submit"):
    """One choice of one request. After a worker's death the gateway sends it again with the tokens emitted so far."""

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    choice_index: int = 0
    emitted_token_ids: list[int] = []


class Cancel(msgspec.Struct, frozen=True, kw_only=True, tag="cancel"):
    request_id: str


# Worker to gateway


class Welcome(msgspec.Struct, frozen=True, kw_only=True, tag="welcome"):
    worker_id: str
    incarnation: int
    model_id: str
    vocab_size: int
    max_context_tokens: int
    max_running: int


class Refused(msgspec.Struct, frozen=True, kw_only=True, tag="refused"):
    reason: str


class TokenOutput(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, array_like=True):
    """One output token. logprob and top (token id, log-probability; best first) only where asked for, before temperature and penalties."""

    request_id: str
    output_index: int
    token_id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class PromptLogprobs(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """Log-probabilities of prompt tokens 1.. (the first has none), sent once, before the first output token."""

    request_id: str
    logprobs: list[float]
    top: list[tuple[tuple[int, float], ...]]


class Finished(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """reason: "stop" (a stop token, which is emitted as the last TokenOutput) or "length"."""

    request_id: str
    reason: str
    cached_tokens: int = 0


class StepOutput(msgspec.Struct, frozen=True, kw_only=True, tag="step"):
    step: int
    tokens: list[TokenOutput] = []
    prompt_logprobs: list[PromptLogprobs] = []
    finished: list[Finished] = []


class Failed(msgspec.Struct, frozen=True, kw_only=True, tag="failed"):
    """This request cannot be served; code is "invalid_request" (the client's fault) or "internal"."""

    request_id: str
    code: str
    message: str


class Released(msgspec.Struct, frozen=True, kw_only=True, tag="released"):
    """These requests live on elsewhere: submit them again with their emitted tokens, to target_worker_id first where it is given.

    Nothing more comes of them on this stream. Every token that was drawn here was sent before this frame.
    """

    request_ids: list[str]
    target_worker_id: str = ""


class Stats(msgspec.Struct, frozen=True, kw_only=True, tag="stats"):
    """The worker's load. kv counts are tokens; step_s the time of the last step, host_s the part spent in scheduling and batch building."""

    waiting: int
    running: int
    kv_used_tokens: int
    kv_capacity_tokens: int
    steps: int
    prefill_tokens: int
    decode_tokens: int
    cached_prompt_tokens: int
    preemptions: int
    step_s: float
    host_s: float


GatewayFrame = Hello | Submit | Cancel
WorkerFrame = Welcome | Refused | StepOutput | Failed | Released | Stats
