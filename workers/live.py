"""The requests that a worker has, and what a step's logits become for them: tokens, log-probabilities, frames.

Called by the engine, on its thread. Who runs when is the scheduler's business; this keeps whose a request is and how it samples.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field

import torch

from flexpert.workers.messages import Failed, Finished, PromptLogprobs, Released, StepOutput, Submit, TokenOutput
from flexpert.workers.messages import WorkerFrame as Frame
from flexpert.workers.sampling import Sampled, Sampler, SamplingState, prompt_logprobs
from flexpert.workers.step import Row, StepPlan

Owner = Hashable


@dataclass(slots=True)
class _Live:
    """What is kept of a request beside the scheduler's book-keeping."""

    owner: Owner
    sampling: SamplingState
    prompt_logprobs: list[float] = field(default_factory=list)
    prompt_top: list[tuple[tuple[int, float], ...]] = field(default_factory=list)


class LiveRequests:
    """emit(owner, frame) is called for every frame that goes to a request's owner. cancel(request_id): the scheduler's."""

    def __init__(
        self, *, sampler: Sampler, emit: Callable[[Owner, Frame], None], cancel: Callable[[str], object]
    ) -> None:
        self._sampler = sampler
        self._emit = emit
        self._cancel = cancel
        self._live: dict[str, _Live] = {}

    def __len__(self) -> int:
        return len(self._live)

    def owner_of(self, request_id: str) -> Owner | None:
        live = self._live.get(request_id)
        return None if live is None else live.owner

    def of(self, owner: Owner) -> list[str]:
        return [request_id for request_id, live in self._live.items() if live.owner == owner]

    def add(self, owner: Owner, submit: Submit) -> None:
        sampling = SamplingState(
            params=submit.params,
            choice_index=submit.choice_index,
            prompt_token_ids=submit.prompt_token_ids,
            emitted=submit.emitted_token_ids,
        )
        self._live[submit.request_id] = _Live(owner=owner, sampling=sampling)

    def drop(self, request_id: str) -> None:
        """Forget a request that nobody wants any more."""
        if self._live.pop(request_id, None) is not None:
            self._cancel(request_id)

    def fail(self, request_id: str, code: str, message: str) -> None:
        self._cancel(request_id)
        live = self._live.pop(request_id, None)
        if live is not None:
            self._emit(live.owner, Failed(request_id=request_id, code=code, message=message))

    def release(self, targets: Mapping[str, str] | None = None) -> list[str]:
        """Give all requests back to their owners, who submit them elsewhere, first to the worker that `targets` names. Their ids."""
        parts: dict[tuple[Owner, str], list[str]] = {}
        for request_id, live in self._live.items():
            parts.setdefault((live.owner, (targets or {}).get(request_id, "")), []).append(request_id)
        released = list(self._live)
        for request_id in released:
            self._cancel(request_id)
        self._live.clear()
        for (owner, target), request_ids in parts.items():
            self._emit(owner, Released(request_ids=request_ids, target_worker_id=target))
        return released

    # A step

    def sample(self, rows: tuple[Row, ...], logits: torch.Tensor) -> dict[str, Sampled]:
        """Split the runner's logits [wanted rows, vocab] by request; draw where a row asks for a token."""
        sampling: list[Row] = []
        picked: list[int] = []
        first = 0
        for row in rows:
            width = len(row.token_ids) if row.all_logits else int(row.sample)
            if row.all_logits:
                self._keep_prompt_logprobs(row, logits[first : first + width])
            if row.sample and row.request_id in self._live:
                sampling.append(row)
                picked.append(first + width - 1)
            first += width
        if not sampling:
            return {}
        chosen = logits if picked == list(range(len(logits))) else logits[picked]
        states = [self._live[row.request_id].sampling for row in sampling]
        try:
            tokens = self._sampler.sample(chosen, states)
        except FloatingPointError:
            return self._sample_one_by_one(sampling, chosen)
        return {row.request_id: token for row, token in zip(sampling, tokens, strict=True)}

    def _sample_one_by_one(self, rows: list[Row], logits: torch.Tensor) -> dict[str, Sampled]:
        """A row that cannot be drawn from costs its own request and no other."""
        drawn: dict[str, Sampled] = {}
        for i, row in enumerate(rows):
            try:
                (drawn[row.request_id],) = self._sampler.sample(
                    logits[i : i + 1], [self._live[row.request_id].sampling]
                )
            except FloatingPointError as error:
                self.fail(row.request_id, "invalid_request", f"no token can be drawn: {error}")
        return drawn

    def _keep_prompt_logprobs(self, row: Row, logits: torch.Tensor) -> None:
        """Row i of `logits` scores the prompt's token start + i + 1; the last row of the prompt scores the first output."""
        live = self._live.get(row.request_id)
        if live is None:
            return
        prompt = live.sampling.prompt_token_ids
        scored = prompt[row.start + 1 : row.end + 1]
        if scored:
            top = live.sampling.params.prompt_logprobs or 0
            values, alternatives = prompt_logprobs(logits[: len(scored)], scored, top)
            live.prompt_logprobs += values
            live.prompt_top += alternatives

    def emit(self, plan: StepPlan, sampled: dict[str, Sampled], finished: list[Finished]) -> None:
        """One StepOutput for each owner with something in this step."""
        outputs: dict[Owner, StepOutput] = {}

        def output_of(owner: Owner) -> StepOutput:
            return outputs.setdefault(owner, StepOutput(step=plan.step, tokens=[], finished=[]))

        ended = {end.request_id for end in finished}
        for row in plan.rows:
            live = self._live.get(row.request_id)
            if live is None:
                continue
            token = sampled.get(row.request_id)
            scored_all = live.prompt_logprobs and (token is not None or row.request_id in ended)
            if scored_all:
                scores = PromptLogprobs(request_id=row.request_id, logprobs=live.prompt_logprobs, top=live.prompt_top)
                output_of(live.owner).prompt_logprobs.append(scores)
                live.prompt_logprobs, live.prompt_top = [], []
            if token is not None:
                output = TokenOutput(
                    request_id=row.request_id,
                    output_index=live.sampling.num_output_tokens,
                    token_id=token.token_id,
                    logprob=token.logprob,
                    top=token.top,
                )
                output_of(live.owner).tokens.append(output)
                live.sampling.append(token.token_id)
        for end in finished:
            live = self._live.pop(end.request_id, None)
            if live is not None:
                output_of(live.owner).finished.append(end)
        for owner, frame in outputs.items():
            self._emit(owner, frame)
