"""The bytes of answers: JSON bodies and server-sent events of both endpoints.

A streamed token costs one string encoding between fixed bytes; no model is validated on the way out (the tests hold the bytes
against `schema` and OpenAI's own types).
"""

from __future__ import annotations

from typing import Any, Protocol

import msgspec

from flexpert.controller.gateway.errors import ApiError, error_body
from flexpert.controller.gateway.generation import Generation
from flexpert.controller.gateway.output import ChoiceOutput, Delta, TokenEntry
from flexpert.controller.gateway.tokenizer import ModelTokenizer

DONE = b"data: [DONE]\n\n"
# JSON has no infinities; OpenAI's API says -9999.0 for a token that cannot be drawn.
_LEAST_LOGPROB = -9999.0
# Line ends to Python's str.splitlines and JavaScript, but not to the standard of server-sent events.
_LINE_ENDS = (("\u2028".encode(), b"\\u2028"), ("\u2029".encode(), b"\\u2029"), ("\x85".encode(), b"\\u0085"))
_encode = msgspec.json.Encoder().encode


def event(body: bytes) -> bytes:
    return b"data: " + body + b"\n\n"


def error_event(error: ApiError) -> bytes:
    return event(error_body(error))


class Renderer(Protocol):
    def body(self, generation: Generation) -> bytes:
        """The whole answer as JSON; the generation is done."""

    def opening(self, output: ChoiceOutput) -> bytes:
        """What comes before a choice's first text: the role of a chat message, an echoed prompt."""

    def events(self, output: ChoiceOutput, delta: Delta) -> bytes: ...

    def usage_event(self, generation: Generation) -> bytes: ...


class _Shape:
    """What the chunks of one answer have in common."""

    def __init__(self, generation: Generation, *, model_id: str, fingerprint: str, kind: str, usage_null: bool) -> None:
        self.fields: dict[str, Any] = {
            "id": generation.request_id,
            "object": kind,
            "created": generation.created,
            "model": model_id,
            "system_fingerprint": fingerprint,
        }
        self.head = b"data: " + _encode(self.fields)[:-1] + b',"choices":['
        self.tail = b'],"usage":null}\n\n' if usage_null else b"]}\n\n"

    def chunk(self, choice: bytes) -> bytes:
        """One event with one choice. Characters that some clients take for line ends are escaped."""
        data = self.head + choice + self.tail
        for character, escaped in _LINE_ENDS:
            if character in data:
                data = data.replace(character, escaped)
        return data

    def usage_event(self, generation: Generation) -> bytes:
        return event(_encode(self.fields | {"choices": [], "usage": generation.usage.fields()}))


class ChatRenderer:
    """chat.completion and chat.completion.chunk."""

    def __init__(
        self,
        generation: Generation,
        *,
        tokenizer: ModelTokenizer,
        model_id: str,
        fingerprint: str,
        logprobs: bool,
        stream: bool,
        usage: bool,
    ) -> None:
        kind = "chat.completion.chunk" if stream else "chat.completion"
        self._shape = _Shape(generation, model_id=model_id, fingerprint=fingerprint, kind=kind, usage_null=usage)
        self._tokenizer = tokenizer
        self._logprobs = logprobs
        self.usage_event = self._shape.usage_event

    def body(self, generation: Generation) -> bytes:
        choices = [self._choice(output) for output in generation.outputs]
        return _encode(self._shape.fields | {"choices": choices, "usage": generation.usage.fields()})

    def opening(self, output: ChoiceOutput) -> bytes:
        return self._chunk(output.index, b'{"role":"assistant","content":""}', None, None)

    def events(self, output: ChoiceOutput, delta: Delta) -> bytes:
        data = b""
        if delta.text or delta.entries:
            data = self._chunk(output.index, b'{"content":' + _encode(delta.text) + b"}", delta.entries, None)
        if delta.finish_reason is not None:
            data += self._chunk(output.index, b"{}", None, delta.finish_reason)
        return data

    def _chunk(self, index: int, delta: bytes, entries: list[TokenEntry] | None, finish_reason: str | None) -> bytes:
        scores = b"null" if entries is None or not self._logprobs else _encode(self._scores(entries))
        reason = b"null" if finish_reason is None else _encode(finish_reason)
        choice = b'{"index":%d,"delta":%b,"logprobs":%b,"finish_reason":%b}' % (index, delta, scores, reason)
        return self._shape.chunk(choice)

    def _choice(self, output: ChoiceOutput) -> dict[str, Any]:
        delta = output.take()
        return {
            "index": output.index,
            "message": {"role": "assistant", "content": delta.text, "refusal": None},
            "logprobs": self._scores(delta.entries) if self._logprobs else None,
            "finish_reason": delta.finish_reason,
        }

    def _scores(self, entries: list[TokenEntry]) -> dict[str, Any]:
        content = []
        for entry in entries:
            top = [self._token(token_id, logprob) for token_id, logprob in entry.top]
            content.append(self._token(entry.token_id, entry.logprob) | {"top_logprobs": top})
        return {"content": content, "refusal": None}

    def _token(self, token_id: int, logprob: float | None) -> dict[str, Any]:
        return {
            "token": self._tokenizer.token_text(token_id),
            "logprob": finite(logprob),
            "bytes": list(self._tokenizer.token_bytes(token_id)),
        }


class CompletionRenderer:
    """text_completion, whole and in chunks."""

    def __init__(
        self,
        generation: Generation,
        *,
        tokenizer: ModelTokenizer,
        model_id: str,
        fingerprint: str,
        logprobs: int | None,
        echo: bool,
        usage: bool,
    ) -> None:
        self._shape = _Shape(
            generation, model_id=model_id, fingerprint=fingerprint, kind="text_completion", usage_null=usage
        )
        self._generation = generation
        self._tokenizer = tokenizer
        self._logprobs = logprobs
        self._echo = echo
        self.usage_event = self._shape.usage_event

    def body(self, generation: Generation) -> bytes:
        choices = [self._choice(output) for output in generation.outputs]
        return _encode(self._shape.fields | {"choices": choices, "usage": generation.usage.fields()})

    def opening(self, output: ChoiceOutput) -> bytes:
        if not self._echo:
            return b""
        return self._chunk(output.index, self._generation.prompt_of(output).text, self._prompt_scores(output), None)

    def events(self, output: ChoiceOutput, delta: Delta) -> bytes:
        data = b""
        if delta.text or delta.entries:
            data = self._chunk(output.index, delta.text, self._scores(output, delta.entries), None)
        if delta.finish_reason is not None:
            data += self._chunk(output.index, "", None, delta.finish_reason)
        return data

    def _chunk(self, index: int, text: str, scores: dict[str, Any] | None, finish_reason: str | None) -> bytes:
        logprobs = b"null" if scores is None else _encode(scores)
        reason = b"null" if finish_reason is None else _encode(finish_reason)
        choice = b'{"index":%d,"text":%b,"logprobs":%b,"finish_reason":%b}' % (index, _encode(text), logprobs, reason)
        return self._shape.chunk(choice)

    def _choice(self, output: ChoiceOutput) -> dict[str, Any]:
        delta = output.take()
        text, scores = delta.text, self._scores(output, delta.entries)
        if self._echo:
            text = self._generation.prompt_of(output).text + text
            before = self._prompt_scores(output)
            if before is not None and scores is not None:
                scores = {name: before[name] + scores[name] for name in before}
        return {"index": output.index, "text": text, "logprobs": scores, "finish_reason": delta.finish_reason}

    def _scores(self, output: ChoiceOutput, entries: list[TokenEntry]) -> dict[str, Any] | None:
        if self._logprobs is None:
            return None
        start = len(self._generation.prompt_of(output).text) if self._echo else 0
        return {
            "tokens": [self._tokenizer.token_text(entry.token_id) for entry in entries],
            "token_logprobs": [finite(entry.logprob) for entry in entries],
            "top_logprobs": [self._top(entry.token_id, entry.logprob, entry.top) for entry in entries],
            "text_offset": [start + entry.offset for entry in entries],
        }

    def _prompt_scores(self, output: ChoiceOutput) -> dict[str, Any] | None:
        """Of the prompt's tokens; the first has no log-probability."""
        if self._logprobs is None:
            return None
        token_ids = self._generation.prompt_of(output).token_ids
        found = output.prompt_logprobs
        logprobs = [None, *found.logprobs] if found is not None else [None] * len(token_ids)
        tops = [(), *found.top] if found is not None else [()] * len(token_ids)
        detokenizer = self._tokenizer.detokenizer()
        offsets, position = [], 0
        for token_id in token_ids:
            offsets.append(position)
            position += len(detokenizer.step(token_id))
        return {
            "tokens": [self._tokenizer.token_text(token_id) for token_id in token_ids],
            "token_logprobs": [None if logprob is None else finite(logprob) for logprob in logprobs],
            "top_logprobs": [
                None if logprob is None else self._top(token_id, logprob, top)
                for token_id, logprob, top in zip(token_ids, logprobs, tops, strict=True)
            ],
            "text_offset": offsets,
        }

    def _top(self, token_id: int, logprob: float | None, top: tuple[tuple[int, float], ...]) -> dict[str, float]:
        """The best ones and the token itself: one more than asked for, where it is not among them."""
        named = {self._tokenizer.token_text(other): finite(value) for other, value in top}
        named.setdefault(self._tokenizer.token_text(token_id), finite(logprob))
        return named


def finite(logprob: float | None) -> float:
    return _LEAST_LOGPROB if logprob is None or not logprob > _LEAST_LOGPROB else logprob
