"""Measures a Profile on the real engine: one worker in this process, no gateway, no cluster.

Every step tells what it computed and how long it took; requests are chosen so that the steps that are wanted come about: batches that only
decode, prompts of every length alone and beside a batch, short and long contexts. Of equal steps the lower quartile counts: what disturbs
a step only ever adds to it. How far equal steps lay apart is told and written down, so that a busy machine shows.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from flexpert.simulator.fit import MeasureError, Step, fit, spread
from flexpert.simulator.profile import Profile
from flexpert.workers.messages import Failed, SamplingParams, StepOutput, Submit, WorkerFrame
from flexpert.workers.process import WorkerConfig, WorkerProcess
from flexpert.workers.shape import model_shape
from flexpert.workers.step import StepPlan, StepTimes

__all__ = ["ProfileRequest", "measure"]

OWNER = "profile"
ROUND_LIMIT_S = 600.0
JOINS = "joins, leaves and pauses are those of benchmarks/results/elasticity-cpu-2core.json"
DECODE_STEPS = 24
ALONE = 3  # prompts of each length in each turn
NOISY = 0.1  # of a step: beyond, other work is likely to be in the figures
ANSWER_S = 0.004  # first byte over HTTP against the first token on the worker's stream, benchmarks/serve.py


@dataclass(frozen=True, kw_only=True)
class ProfileRequest:
    name: str
    model_dir: Path
    device: str = "cpu"
    dtype: str | None = None
    memory_bytes: int
    max_running: int = 64
    max_batch_tokens: int = 512
    max_context_tokens: int | None = None
    repeats: int = 5
    share: float = 0.25  # of equal steps that are faster than the one that counts


class _Worker:
    def __init__(self, request: ProfileRequest) -> None:
        self.steps: list[Step] = []
        self._open = 0
        self._done = threading.Event()
        self._problem = ""
        self._number = 0
        self._random = random.Random(0)
        self.process = WorkerProcess(
            WorkerConfig(
                worker_id="profile",
                model_dir=request.model_dir,
                model_id="profile",
                cluster_token=OWNER,
                address="tcp:127.0.0.1:0",
                device=request.device,
                dtype=request.dtype,
                max_running=request.max_running,
                max_batch_tokens=request.max_batch_tokens,
                max_context_tokens=request.max_context_tokens,
                kv_bytes=request.memory_bytes,
            )
        )
        self.process.start()
        self.process.tap(OWNER, self._take)
        self.process.engine.on_step = self._note

    def _take(self, frame: WorkerFrame) -> None:
        if isinstance(frame, Failed):
            self._problem = str(frame)
            self._done.set()
        if isinstance(frame, StepOutput):
            self._open -= len(frame.finished)
            if self._open == 0:
                self._done.set()

    def _note(self, plan: StepPlan, times: StepTimes) -> None:
        decoding = [row for row in plan.rows if len(row.token_ids) == 1 and row.start > 0]
        prompts = [row for row in plan.rows if len(row.token_ids) > 1 or row.start == 0]
        self.steps.append(
            Step(
                len(decoding), sum(row.start for row in decoding), sum(len(row.token_ids) for row in prompts),
                prompts[-1].start if prompts else 0, times.step_s,
            )
        )  # fmt: skip

    def serve(self, requests: Iterable[tuple[int, int]]) -> list[Step]:
        """(prompt tokens, output tokens) of requests that arrive at once; the steps until all have ended."""
        chosen = list(requests)
        self.steps, self._open = [], len(chosen)
        self._done.clear()
        for prompt, output in chosen:
            self._number += 1
            tokens = [self._random.randrange(16, self._vocabulary) for _ in range(prompt)]
            params = SamplingParams(max_tokens=output, seed=0, temperature=0.0)
            submit = Submit(request_id=f"p{self._number}", prompt_token_ids=tokens, params=params)
            self.process.engine.submit(OWNER, submit)
        if not self._done.wait(ROUND_LIMIT_S):
            raise MeasureError(f"{len(chosen)} requests did not end within {ROUND_LIMIT_S:g} s")
        if self._problem:
            raise MeasureError(f"the engine refused a request: {self._problem}")
        return self.steps

    @property
    def context_tokens(self) -> int:
        return int(self.process._require_parts().kv.context_tokens)

    @property
    def _vocabulary(self) -> int:
        return int(self.process._require_parts().vocab_size)


def measure(request: ProfileRequest, *, say: Callable[[str], None] = lambda _: None) -> Profile:
    """Takes about a minute on a CPU. Raises MeasureError, and what the start of a worker raises."""
    worker = _Worker(request)
    try:
        capacity = worker.process.engine.stats().kv_capacity_tokens
        context = min(capacity, worker.context_tokens)
        worker.serve([(16, 4)])  # whatever comes up with the first step
        steps: list[Step] = []
        for turn in range(request.repeats):
            for count in _counts(request.max_running):
                say(f"turn {turn + 1} of {request.repeats}: {count} decoding")
                steps += worker.serve([(16, DECODE_STEPS)] * count)
            beside = max(1, min(8, request.max_running - 1))
            for length in _lengths(request.max_batch_tokens - beside):
                say(f"turn {turn + 1} of {request.repeats}: prompts of {length}")
                for _ in range(ALONE):
                    steps += worker.serve([(length, 1)])
                steps += worker.serve([(8, 8)] * beside + [(length, 1)] * 3)
            long = max(32, min(context // 2, 4 * request.max_batch_tokens, capacity // 10) - DECODE_STEPS)
            steps += worker.serve([(long, DECODE_STEPS)] * min(8, request.max_running))
        shape = model_shape(request.model_dir, worker.process.config.dtype_name)
    finally:
        worker.process.stop()
    usual, most = spread(steps)
    noise = f"the middle half of equal steps lay {usual:.0%} apart, {most:.0%} at most"
    say(
        f"noise: {noise}"
        + ("; the machine is busy with other work: measure again when it is not" if usual > NOISY else "")
    )
    experts_bytes = int(shape["layers"]) * int(shape["experts"]) * int(shape["slab_bytes"])
    return fit(
        steps,
        Profile(
            name=request.name,
            model=str(request.model_dir.name),
            device=request.device,
            source=f"measured by flexpert profile; {noise}; {JOINS}",
            max_running=request.max_running,
            max_batch_tokens=max(request.max_batch_tokens, request.max_running),
            max_context_tokens=context,
            kv_tokens=capacity,
            experts_kv_tokens=experts_bytes // int(shape["kv_token_bytes"]),
            decode=((1.0, 1.0),),
            prefill=((0.0, 0.0),),
            answer_s=ANSWER_S,
            layers=int(shape["layers"]),
            experts=int(shape["experts"]),
            slab_bytes=int(shape["slab_bytes"]),
        ),
        share=request.share,
    )


def _counts(most: int) -> list[int]:
    counts = [1]
    while counts[-1] * 2 <= most:
        counts.append(counts[-1] * 2)
    return counts if counts[-1] == most else [*counts, most]


def _lengths(most: int) -> list[int]:
    return sorted({length for length in (16, 32, 64, 128, 256, 512, 1024, 2048, 4096) if length < most} | {most})
