"""What one choice has produced: text that may be shown, log-probabilities beside it, and how it ended.

A ChoiceOutput is the sink of a live choice. The pool feeds it as frames arrive; the renderer takes what is new whenever its client can be
written to, so a slow client gets several tokens at once and holds up nobody. A stop token's own text is never shown.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from flexpert.controller.gateway.errors import ApiError
from flexpert.controller.gateway.metrics import GatewayMetrics
from flexpert.controller.gateway.text import Detokenizer, StopScanner
from flexpert.workers.messages import PromptLogprobs, SamplingParams, TokenOutput


@dataclass(frozen=True, slots=True)
class TokenEntry:
    """One shown token with its log-probabilities; `offset` is where its text starts, in characters of the choice's own text."""

    token_id: int
    logprob: float | None
    top: tuple[tuple[int, float], ...]
    offset: int


@dataclass(frozen=True, slots=True)
class Delta:
    """What is new of a choice since it was last asked. finish_reason is None while it goes on."""

    text: str
    entries: list[TokenEntry]
    finish_reason: str | None


class ChoiceOutput:
    """`wake` is called whenever there may be something new to take; with stream=False only at the end. discard: the client wants
    no output token (max_tokens 0)."""

    def __init__(
        self,
        *,
        index: int,
        params: SamplingParams,
        detokenizer: Detokenizer,
        stops: tuple[str, ...],
        metrics: GatewayMetrics,
        arrived_s: float,
        wake: Callable[[], None],
        stream: bool = True,
        discard: bool = False,
    ) -> None:
        self.index = index
        self.finish_reason: str | None = None
        self.error: ApiError | None = None
        self.cached_tokens: int | None = None  # known only where the worker said that the choice is over
        self.completion_tokens = 0
        self.first_token_s: float | None = None
        self.prompt_logprobs: PromptLogprobs | None = None
        self.told_finish = False
        self._last_token_s = 0.0
        self.submitted = False
        self._params = params
        self._stop_ids = frozenset(params.stop_token_ids)
        self._detokenizer = detokenizer
        self._scanner = StopScanner(stops)
        self._metrics = metrics
        self.arrived_s = arrived_s
        self._wake = wake
        self._stream = stream
        self._discard = discard
        self._stop_token: TokenOutput | None = None
        self._text: list[str] = []
        self._entries: deque[TokenEntry] = deque()
        self._decoded_chars = 0
        self._released_chars = 0

    @property
    def done(self) -> bool:
        return self.finish_reason is not None or self.error is not None

    @property
    def tpot_s(self) -> float | None:
        """Mean time per output token after the first; undefined for a single token."""
        if self.first_token_s is None or self.completion_tokens < 2:
            return None
        return (self._last_token_s - self.first_token_s) / (self.completion_tokens - 1)

    def take(self) -> Delta:
        """Everything new. Entries come with the text that they belong to."""
        text = "".join(self._text)
        self._text.clear()
        entries = []
        while self._entries and (self.finish_reason is not None or self._entries[0].offset < self._released_chars):
            entries.append(self._entries.popleft())
        return Delta(text, entries, self.finish_reason)

    # ChoiceSink

    def on_submitted(self, now_s: float) -> None:
        if not self.submitted:
            self.submitted = True
            self._metrics.queue_time.observe(now_s - self.arrived_s)
            self._metrics.window.queued(now_s, now_s - self.arrived_s)

    def on_prompt_logprobs(self, prompt: PromptLogprobs) -> None:
        self.prompt_logprobs = prompt

    def on_token(self, token: TokenOutput, now_s: float) -> bool:
        if self._discard:
            self._finish("length")
            return True
        self._measure(now_s)
        self.completion_tokens += 1
        if self._stop_token is not None:
            self._show(self._stop_token)
            self._stop_token = None
        if token.token_id in self._stop_ids:
            self._stop_token = token
        else:
            self._show(token)
        if self._scanner.stopped:
            self._finish("stop")
            return True
        if self._stream:
            self._wake()
        return False

    def on_finished(self, reason: str, cached_tokens: int | None) -> None:
        self.cached_tokens = cached_tokens
        if self._stop_token is not None and reason != "stop":
            self._show(self._stop_token)
        self._release(self._detokenizer.flush())
        if self._scanner.stopped:
            reason = "stop"
        else:
            self._keep(self._scanner.flush())
        self._finish(reason)

    def on_failed(self, error: ApiError) -> None:
        self.error = error
        self._wake()

    def _measure(self, now_s: float) -> None:
        if self.first_token_s is None:
            self.first_token_s = now_s
            self._metrics.ttft.observe(now_s - self.arrived_s)
            self._metrics.window.first_token(now_s, now_s - self.arrived_s)
        else:
            self._metrics.itl.observe(now_s - self._last_token_s)
            self._metrics.window.token(now_s)
        self._last_token_s = now_s

    def _show(self, token: TokenOutput) -> None:
        if self._params.logprobs is not None:
            self._entries.append(TokenEntry(token.token_id, token.logprob, token.top, self._decoded_chars))
        self._release(self._detokenizer.step(token.token_id))

    def _release(self, text: str) -> None:
        if text:
            self._decoded_chars += len(text)
            self._keep(self._scanner.feed(text, scan=self.completion_tokens >= self._params.min_tokens))

    def _keep(self, text: str) -> None:
        if text:
            self._text.append(text)
            self._released_chars += len(text)

    def _finish(self, reason: str) -> None:
        if self._scanner.stopped:
            # Tokens that begin at or after the stop string are not shown.
            while self._entries and self._entries[-1].offset >= self._released_chars:
                self._entries.pop()
        self.finish_reason = reason
        self._wake()
