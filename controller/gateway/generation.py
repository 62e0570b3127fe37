"""One HTTP request while it runs: its choices in the pool, one wake-up for all of them, and its end in every case.

Made by the routes, driven by `responses`. `close` may be called at any moment: whatever still runs is cancelled at the workers within
a step, and its place in the queue is given back.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

from flexpert.controller.gateway.admission import Admission
from flexpert.controller.gateway.errors import ApiError
from flexpert.controller.gateway.live import LiveChoice
from flexpert.controller.gateway.metrics import GatewayMetrics
from flexpert.controller.gateway.output import ChoiceOutput
from flexpert.controller.gateway.pool import WorkerPool
from flexpert.controller.gateway.prepare import Prepared, Prompt
from flexpert.controller.gateway.tokenizer import ModelTokenizer


class Ticket:
    """A request's place in the admission count, given back once."""

    def __init__(self, admission: Admission, choices: int) -> None:
        self.arrived_s = time.monotonic()
        admission.admit(choices, now_s=self.arrived_s)
        self._admission = admission
        self._choices = choices

    def release(self, *, served: bool) -> None:
        choices, self._choices = self._choices, 0
        if choices:
            self._admission.release(choices, now_s=time.monotonic(), served=served)


@dataclass(frozen=True, slots=True)
class Usage:
    """cached_tokens None: not known of every prompt."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int | None

    def fields(self) -> dict[str, object]:
        fields: dict[str, object] = {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
        }
        if self.cached_tokens is not None:
            fields["prompt_tokens_details"] = {"cached_tokens": self.cached_tokens}
        return fields


class Generation:
    """The choices of one request. `request_id` is the answer's id."""

    def __init__(
        self,
        *,
        request_id: str,
        prepared: Prepared,
        tokenizer: ModelTokenizer,
        pool: WorkerPool,
        metrics: GatewayMetrics,
        ticket: Ticket,
        stream: bool,
    ) -> None:
        self.stream = stream
        self.request_id = request_id
        self.created = int(time.time())
        self.outputs: list[ChoiceOutput] = []
        self.client_gone = False
        self._prepared = prepared
        self._pool = pool
        self._metrics = metrics
        self._ticket = ticket
        self._woken = asyncio.Event()
        self._choices: list[LiveChoice] = []
        for item in prepared.prompts:
            context_ids = item.prompt.token_ids if prepared.continues_prompt else ()
            for choice_index in range(prepared.n):
                output = ChoiceOutput(
                    index=len(self.outputs),
                    params=item.params,
                    detokenizer=tokenizer.detokenizer(context_ids=context_ids),
                    stops=prepared.stops,
                    metrics=metrics,
                    arrived_s=ticket.arrived_s,
                    wake=self._woken.set,
                    stream=stream,
                    discard=prepared.discard_output,
                )
                self.outputs.append(output)
                self._choices.append(
                    LiveChoice(
                        request_id=f"{request_id}/{output.index}",
                        prompt_token_ids=item.prompt.token_ids,
                        params=item.params,
                        choice_index=choice_index,
                        sink=output,
                    )
                )

    def first_error(self) -> ApiError | None:
        return next((output.error for output in self.outputs if output.error is not None), None)

    @property
    def done(self) -> bool:
        return all(output.done for output in self.outputs)

    @property
    def over(self) -> bool:
        """Nothing more will come that the client should see."""
        return self.client_gone or self.first_error() is not None or self.done

    @property
    def usage(self) -> Usage:
        cached = self._cached_tokens
        return Usage(
            prompt_tokens=sum(len(item.prompt.token_ids) for item in self._prepared.prompts),
            completion_tokens=sum(output.completion_tokens for output in self.outputs),
            cached_tokens=None if None in cached else sum(tokens or 0 for tokens in cached),
        )

    @property
    def _cached_tokens(self) -> list[int | None]:
        """Of each prompt, as its first choice found it. A worker says it with a choice's end, so not of one that ended here."""
        return [output.cached_tokens for output in self.outputs[:: self._prepared.n]]

    def prompt_of(self, output: ChoiceOutput) -> Prompt:
        return self._prepared.prompts[output.index // self._prepared.n].prompt

    def start(self) -> None:
        self._metrics.window.arrived(
            time.monotonic(),
            choices=len(self._choices),
            prompt_tokens=sum(len(choice.prompt_token_ids) for choice in self._choices),
        )
        self._pool.add(self._choices)

    async def wait(self) -> None:
        """Until something may be new. Before the first call everything is."""
        await self._woken.wait()
        self._woken.clear()

    async def wait_over(self) -> None:
        while not self.over:
            await self.wait()

    def leave(self) -> None:
        """The client is gone: whoever waits for outputs wakes up and closes."""
        self.client_gone = True
        self._woken.set()

    def close(self) -> str:
        """The answer is out, or will never be. Returns the outcome for the metrics."""
        self._pool.cancel(choice.request_id for choice in self._choices)
        error = self.first_error()
        finished = self.done and error is None
        self._ticket.release(served=finished)
        if error is not None:
            outcome = "invalid" if error.status_code < 500 else "failed"
        else:
            outcome = "completed" if finished else "cancelled"
        self._measure(finished, outcome)
        return outcome

    def _measure(self, finished: bool, outcome: str) -> None:
        usage, now_s = self.usage, time.monotonic()
        for output in self.outputs:
            ttft_s = None if output.first_token_s is None else output.first_token_s - output.arrived_s
            self._metrics.window.ended(
                now_s, outcome=outcome, ttft_s=ttft_s, tpot_s=output.tpot_s, waited_s=now_s - output.arrived_s
            )
        self._metrics.generation_tokens.inc(usage.completion_tokens)
        if not finished:
            return
        self._metrics.prompt_tokens.inc(usage.prompt_tokens)
        self._metrics.cached_tokens.inc(sum(tokens or 0 for tokens in self._cached_tokens))
        self._metrics.e2e.observe(now_s - self._ticket.arrived_s)
        for output in self.outputs:
            if output.tpot_s is not None:
                self._metrics.tpot.observe(output.tpot_s)
