"""The requests as OpenAI's API defines them, with the common extensions: pydantic models for validation and for the OpenAPI document.

Types and ranges are checked here, once for each request; what depends on the model (vocabulary, context) is checked in `prepare`.
A field that is not listed is ignored if it is harmless (IGNORED), else refused by name.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

# Known to OpenAI's API, without effect on the tokens.
IGNORED = frozenset({
    "user", "store", "metadata", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention", "parallel_tool_calls",
})  # fmt: skip
# Known, and refused with a word on what is missing.
UNSUPPORTED = {
    "tools": "tool calling",
    "functions": "function calling",
    "function_call": "function calling",
    "audio": "audio output",
    "prediction": "predicted output",
    "web_search_options": "web search",
    "verbosity": "verbosity control",
    "lora": "LoRA",
    "lora_request": "LoRA",
    "guided_json": "structured output",
    "guided_regex": "structured output",
    "guided_grammar": "structured output",
    "structured_outputs": "structured output",
}
MAX_CHOICES = 128
MAX_LOGPROBS = 20

# Python's integers have no end, the frames' and the sampler's have: this much is beyond every vocabulary and context.
MAX_INT = 2**31 - 1

Token = Annotated[int, Field(ge=0, le=MAX_INT)]


class StreamOptions(BaseModel):
    """Only with stream=true."""

    model_config = ConfigDict(strict=True, extra="forbid")

    include_usage: bool | None = Field(
        None, description="Send one more event before [DONE], with the usage and no choices."
    )
    include_obfuscation: bool | None = Field(None, description="Accepted and ignored.")


class _Sampling(BaseModel):
    """What both endpoints share. null means the default."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    model: str = Field(description="The id that GET /v1/models lists.")
    temperature: float | None = Field(None, ge=0, le=2, description="Below 0.00001 is greedy. Default 1.")
    top_p: float | None = Field(None, ge=0, le=1, description="Nucleus sampling. Default 1.")
    n: int | None = Field(None, ge=1, le=MAX_CHOICES, description="Choices for each prompt. Default 1.")
    stop: str | list[str] | None = Field(
        None, description="Up to 4 strings; the text ends before the first that appears."
    )
    seed: int | None = Field(
        None, ge=-(2**63), lt=2**64, description="Same request and same seed: same tokens. Default: drawn at random."
    )
    presence_penalty: float | None = Field(None, ge=-2, le=2, description="Counts output tokens. Default 0.")
    frequency_penalty: float | None = Field(None, ge=-2, le=2, description="Counts output tokens. Default 0.")
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = Field(
        None, description="Token id to a number added to its logit."
    )
    stream: bool | None = Field(None, description="Answer with server-sent events.")
    stream_options: StreamOptions | None = None
    top_k: int | None = Field(
        None, ge=-1, le=MAX_INT, description="Extension. Sample among the k likeliest tokens; 0 or -1: all."
    )
    min_p: float | None = Field(
        None, ge=0, le=1, description="Extension. Drop tokens below this share of the likeliest one's probability."
    )
    repetition_penalty: float | None = Field(
        None, ge=0.01, le=100, description="Extension. As in transformers; counts prompt and output. Default 1."
    )
    min_tokens: int | None = Field(
        None, ge=0, le=MAX_INT, description="Extension. No stop before so many output tokens. Default 0."
    )
    ignore_eos: bool | None = Field(None, description="Extension. Go on after the model's end-of-sequence tokens.")
    stop_token_ids: list[Token] | None = Field(
        None, description="Extension. Further tokens that end the text; they are not shown."
    )


class CompletionRequest(_Sampling):
    """POST /v1/completions."""

    prompt: str | list[str] | list[Token] | list[list[Token]] = Field(
        description="A text, texts, one token list, or several."
    )
    max_tokens: int | None = Field(None, ge=0, le=MAX_INT, description="Default 16, or what fits. 0 only with echo.")
    logprobs: int | None = Field(
        None, ge=0, le=MAX_LOGPROBS, description="Log-probabilities, with so many alternatives for each token."
    )
    echo: bool | None = Field(
        None, description="Put the prompt before the text; with logprobs also its log-probabilities."
    )
    suffix: str | None = Field(None, description="Not supported: refused unless empty.")
    best_of: int | None = Field(None, description="Not supported: refused unless 1.")


class ContentPart(BaseModel):
    """A part of a message; only text is supported."""

    model_config = ConfigDict(strict=True, extra="allow")

    type: str = Field(description='"text"; anything else is refused.')
    text: str | None = None


class ChatMessage(BaseModel):
    """One message. The chat template decides which orders of roles it takes."""

    model_config = ConfigDict(strict=True, extra="allow")

    role: str = Field(description='"system", "developer" (read as system), "user" or "assistant".')
    content: str | list[ContentPart] | None = Field(None, description="Text; parts are joined by newlines.")


class ResponseFormat(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")

    type: str = Field(description='Only "text".')


class ChatRequest(_Sampling):
    """POST /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1, le=MAX_INT, description="Default: what the context has left.")
    max_tokens: int | None = Field(None, ge=1, le=MAX_INT, description="The older name of max_completion_tokens.")
    logprobs: bool | None = Field(None, description="Log-probabilities of the output tokens.")
    top_logprobs: int | None = Field(
        None, ge=0, le=MAX_LOGPROBS, description="Alternatives for each token; needs logprobs=true."
    )
    response_format: ResponseFormat | None = None
    modalities: list[str] | None = Field(None, description='Only ["text"].')
    tool_choice: Any = Field(None, description='Only "none" or "auto", which do nothing without tools.')
    reasoning_effort: str | None = Field(None, description="Given to the chat template.")
    chat_template_kwargs: dict[str, Any] | None = Field(
        None, description="Extension. Further variables for the chat template."
    )


# Answers. The gateway builds their bytes itself; these are the document, and the tests' check on the bytes.


class _Answer(BaseModel):
    model_config = ConfigDict(extra="forbid")


class PromptTokensDetails(_Answer):
    cached_tokens: int = Field(description="Prompt tokens whose KV a worker had already.")


class Usage(_Answer):
    prompt_tokens: int = Field(description="Of all prompts; a prompt counts once, however many choices it has.")
    completion_tokens: int = Field(description="Of all choices, stop tokens included.")
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails | None = Field(
        None, description="Missing where it is not known, as after a stop string."
    )


class CompletionLogprobs(_Answer):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int] = Field(description="Where each token begins in `text`, in characters.")


class CompletionChoice(_Answer):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"] | None


class CompletionResponse(_Answer):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class TopLogprob(_Answer):
    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(_Answer):
    content: list[ChatTokenLogprob]
    refusal: None = None


class AssistantMessage(_Answer):
    role: Literal["assistant"]
    content: str
    refusal: None = None


class ChatChoice(_Answer):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"]


class ChatResponse(_Answer):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage


class ModelCard(_Answer):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "flexpert"


class ModelList(_Answer):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class ErrorFields(_Answer):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(_Answer):
    error: ErrorFields


class Health(_Answer):
    status: str
    reasons: list[str] = Field(default=[], description="Why it is not ready.")
