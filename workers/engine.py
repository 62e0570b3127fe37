"""One worker's loop: take what arrived, decide a step, compute it, sample, emit; again.

The engine owns no policy and no arithmetic: the scheduler (pure) decides, the runner computes logits, the sampler draws tokens, the KV
memory backs and commits. It runs on one thread; `submit` and `cancel` may be called from any thread and take effect before the next
step. Nothing here knows about sockets: outputs go to the `emit` callback of the request's owner, one StepOutput a step and owner.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import asdict, dataclass, field

import torch

from flexpert.workers.memory import KvMemory
from flexpert.workers.messages import (
    Cancel,
    Failed,
    Finished,
    PromptLogprobs,
    Stats,
    StepOutput,
    Submit,
    TokenOutput,
    WorkerFrame,
)
from flexpert.workers.runner import ModelRunner
from flexpert.workers.sampling import Sampled, Sampler, SamplingState, prompt_logprobs
from flexpert.workers.scheduler import RequestRejected, Scheduler
from flexpert.workers.step import Row, StepPlan

log = logging.getLogger(__name__)

Owner = Hashable
STATS_INTERVAL_S = 0.25
MAX_FAILED_STEPS = 8


@dataclass(slots=True)
class _Live:
    """What the engine keeps of a request beside the scheduler's book-keeping."""

    owner: Owner
    sampling: SamplingState
    prompt_logprobs: list[float] = field(default_factory=list)
    prompt_top: list[tuple[tuple[int, float], ...]] = field(default_factory=list)


@dataclass(slots=True)
class StepTimes:
    """Seconds of the last step: scheduling and batch building apart from the model and the sampler."""

    host_s: float = 0.0
    step_s: float = 0.0


class Engine:
    """emit(owner, frame) is called on the engine's thread and must not block."""

    def __init__(
        self,
        *,
        scheduler: Scheduler,
        runner: ModelRunner,
        sampler: Sampler,
        memory: KvMemory,
        emit: Callable[[Owner, WorkerFrame], None],
    ) -> None:
        self._scheduler = scheduler
        self._runner = runner
        self._sampler = sampler
        self._memory = memory
        self._emit = emit
        self._live: dict[str, _Live] = {}
        self._inbox: deque[tuple[Owner, Submit | Cancel | None]] = deque()
        self._wake = threading.Condition()
        self._stopping = False
        self._owners: set[Owner] = set()
        self._last_stats_s = 0.0
        self._failed_steps = 0
        self.step_began_s: float | None = None
        self.times = StepTimes()
        self.on_step: Callable[[StepPlan, StepTimes], None] | None = None

    # Called from any thread

    def submit(self, owner: Owner, submit: Submit) -> None:
        self._put(owner, submit)

    def cancel(self, owner: Owner, cancel: Cancel) -> None:
        self._put(owner, cancel)

    def join(self, owner: Owner) -> None:
        """From here on `owner` gets Stats."""
        self._owners.add(owner)

    def leave(self, owner: Owner) -> None:
        """The owner is gone: cancel all that it has here."""
        self._owners.discard(owner)
        self._put(owner, None)

    def stop(self) -> None:
        with self._wake:
            self._stopping = True
            self._wake.notify()

    # The engine's thread

    def run(self) -> None:
        """Step while there is work, wait while there is none, return after `stop`."""
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._stopping or self._inbox or self._live)
                if self._stopping:
                    return
            self.step_began_s = time.monotonic()
            self.step()
            self.step_began_s = None

    def step(self) -> bool:
        """One step; False where there was nothing to compute.

        What the model or the sampler cannot compute costs the requests of that step. An error in the books or in the memory
        operations is raised: after it they may contradict each other, and only a replacement's `restore` makes them whole again.
        """
        began_s = time.perf_counter()
        self._take_inbox()
        plan = self._scheduler.schedule()
        if plan is None:
            self._send_stats(force=True)
            return False
        self._memory.apply(plan.memory)
        scheduled_s = time.perf_counter()
        try:
            logits = self._runner.forward(plan.rows)
            sampled = self._sample(plan.rows, logits)
        except Exception as error:
            self._failed_steps += 1
            # After an error of the device (an illegal access, a failed assertion) every later call fails too.
            if isinstance(error, torch.AcceleratorError) or self._failed_steps == MAX_FAILED_STEPS:
                raise  # a replacement replays these requests
            log.exception("step %d failed; its %d requests end with an error", plan.step, len(plan.rows))
            self._fail(plan, error)
        else:
            self._failed_steps = 0
            sampled_s = time.perf_counter()
            self._finish(plan, sampled)
            ended_s = time.perf_counter()
            host_s = scheduled_s - began_s + self._runner.last_build_s + ended_s - sampled_s
            self.times = StepTimes(host_s=host_s, step_s=ended_s - began_s)
            if self.on_step is not None:
                self.on_step(plan, self.times)
        self._send_stats(force=not self._live)
        return True

    def _finish(self, plan: StepPlan, sampled: dict[str, Sampled]) -> None:
        """The step is whole: its KV counts, its tokens go out."""
        self._memory.commit([(row.slot, row.end) for row in plan.rows])
        finished = self._scheduler.complete(plan, {name: token.token_id for name, token in sampled.items()})
        self._emit_outputs(plan, sampled, finished)

    def _sample(self, rows: tuple[Row, ...], logits: torch.Tensor) -> dict[str, Sampled]:
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
                self._fail_request(row.request_id, "invalid_request", f"no token can be drawn: {error}")
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

    def _emit_outputs(self, plan: StepPlan, sampled: dict[str, Sampled], finished: list[Finished]) -> None:
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

    def _fail(self, plan: StepPlan, error: Exception) -> None:
        text = f"the worker could not compute this request: {type(error).__name__}: {error}"
        for row in plan.rows:
            self._fail_request(row.request_id, "internal", text)
        self._scheduler.abandon(plan)

    def _fail_request(self, request_id: str, code: str, message: str) -> None:
        self._scheduler.cancel(request_id)
        live = self._live.pop(request_id, None)
        if live is not None:
            self._emit(live.owner, Failed(request_id=request_id, code=code, message=message))

    # The inbox

    def _put(self, owner: Owner, message: Submit | Cancel | None) -> None:
        with self._wake:
            self._inbox.append((owner, message))
            self._wake.notify()

    def _take_inbox(self) -> None:
        while self._inbox:
            owner, message = self._inbox.popleft()
            if isinstance(message, Submit):
                self._admit(owner, message)
            elif isinstance(message, Cancel):
                self._drop(message.request_id)
            else:
                for name in [name for name, live in self._live.items() if live.owner == owner]:
                    self._drop(name)

    def _admit(self, owner: Owner, submit: Submit) -> None:
        known = self._live.get(submit.request_id)
        if known is not None and known.owner != owner:  # its gateway came back before its old stream was seen to end
            self._drop(submit.request_id)
        try:
            ended = self._scheduler.submit(submit)
        except RequestRejected as error:
            self._emit(owner, Failed(request_id=submit.request_id, code="invalid_request", message=str(error)))
            return
        if ended is not None:
            self._emit(owner, StepOutput(step=0, finished=[ended]))
            return
        sampling = SamplingState(
            params=submit.params,
            choice_index=submit.choice_index,
            prompt_token_ids=submit.prompt_token_ids,
            emitted=submit.emitted_token_ids,
        )
        self._live[submit.request_id] = _Live(owner=owner, sampling=sampling)

    def _drop(self, request_id: str) -> None:
        if self._live.pop(request_id, None) is not None:
            self._scheduler.cancel(request_id)

    def _send_stats(self, *, force: bool = False) -> None:
        now_s = time.monotonic()
        if not self._owners or (now_s - self._last_stats_s < STATS_INTERVAL_S and not force):
            return
        self._last_stats_s = now_s
        stats = self.stats()
        for owner in list(self._owners):
            self._emit(owner, stats)

    def stats(self) -> Stats:
        """Load and times as of the last step."""
        return Stats(**asdict(self._scheduler.stats()), step_s=self.times.step_s, host_s=self.times.host_s)
