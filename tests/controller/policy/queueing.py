"""A small queueing model of a cluster, with noise, for the properties of the decision core: Poisson arrivals, log-normal lengths,
one queue for prefill, decode steps that grow with the batch, KV, slots. Rates and percentiles over a window, as a gateway gives them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from flexpert.controller.policy.types import Observation, TrafficReading, WorkerReading

PREFILL = 8000.0  # tokens/s of one worker that does nothing else
STEP_S, STREAM_S = 0.020, 0.0005  # of a decode step, and more for each stream in it
SLOTS, KV_TOKENS = 32, 12_000  # of one worker
PROMPT, OUTPUT = 300.0, 100.0  # mean tokens
WINDOW_S = 30.0
DT_S = 1.0
TTFT_S, TPOT_S = 0.5, 0.05
WORKER_RPS = 4.5  # what one worker takes with latencies that are within


class Queueing:
    """Call it with a time and a size: it runs to that time and says what is seen."""

    def __init__(self, rate: Callable[[float], float], *, seed: int, start_s: float) -> None:
        self.rate, self.random = rate, np.random.default_rng(seed)
        self.start_s = self.now_s = start_s
        self.free_s = start_s  # when the prefill of all that has begun is done
        self.waiting: list[tuple[float, float, float]] = []  # arrived, prompt, output
        self.streams = np.zeros((0, 5))  # arrived, prompt, tokens left, first token at, output
        self.arrived: list[tuple[float, float]] = []  # at, prompt
        self.given: list[tuple[float, float, float]] = []  # at, output tokens, prompt tokens computed
        self.firsts: list[tuple[float, float, float]] = []  # at, queue_s, ttft_s
        self.ended: list[tuple[float, float, float]] = []  # at, ttft_s, tpot_s
        self.met = self.missed = 0

    def __call__(self, now_s: float, count: int) -> Observation:
        while self.now_s < now_s - 1e-9:
            self._step(count)
        return self._seen(now_s, count)

    def _step(self, count: int) -> None:
        start_s, end_s = self.now_s, self.now_s + DT_S
        for at_s in np.sort(start_s + DT_S * self.random.random(self.random.poisson(self.rate(start_s) * DT_S))):
            prompt, output = self._length(PROMPT), self._length(OUTPUT)
            self.waiting.append((float(at_s), prompt, output))
            self.arrived.append((float(at_s), prompt))
        computed, begun = 0.0, []
        while self.waiting and len(self.streams) + len(begun) < SLOTS * count:
            at_s, prompt, output = self.waiting[0]
            begin_s = max(at_s, self.free_s)
            if begin_s >= end_s:
                break
            self.waiting.pop(0)
            self.free_s = begin_s + prompt / (PREFILL * count)
            first_s = begin_s + prompt / PREFILL
            self.firsts.append((first_s, begin_s - at_s, first_s - at_s))
            begun.append((at_s, prompt, output, first_s, output))
            computed += prompt
        if begun:
            self.streams = np.concatenate([self.streams, np.array(begun)])
        busy = min(computed / (PREFILL * count * DT_S), 0.95)
        step_s = (STEP_S + STREAM_S * len(self.streams) / count) / (1.0 - busy)
        from_s = np.maximum(self.streams[:, 3], start_s)
        tokens = np.minimum(np.clip(end_s - from_s, 0.0, DT_S) / step_s, self.streams[:, 2])
        ended_s = from_s + tokens * step_s
        self.streams[:, 2] -= tokens
        self.given.append((end_s, float(tokens.sum()), computed))
        done = self.streams[:, 2] <= 0.0
        for (at_s, _, _, first_s, output), last_s in zip(self.streams[done], ended_s[done], strict=True):
            tpot_s, ttft_s = (last_s - first_s) / output, first_s - at_s
            self.ended.append((end_s, ttft_s, tpot_s))
            good = ttft_s <= TTFT_S and tpot_s <= TPOT_S
            self.met, self.missed = self.met + good, self.missed + (not good)
        self.streams = self.streams[~done]
        self.now_s = end_s

    def _length(self, mean: float) -> float:
        return max(1.0, float(self.random.lognormal(np.log(mean) - 0.32, 0.8)))

    def _seen(self, now_s: float, count: int) -> Observation:
        since_s = now_s - WINDOW_S
        for items in (self.arrived, self.given, self.firsts, self.ended):
            while items and items[0][0] <= since_s:
                items.pop(0)
        span_s = max(min(WINDOW_S, now_s - self.start_s), DT_S)
        met = sum(ttft <= TTFT_S and tpot <= TPOT_S for _, ttft, tpot in self.ended)
        used = self.streams[:, 1].sum() + (self.streams[:, 4] - self.streams[:, 2]).sum()
        fives = [item for item in self.given if item[0] > now_s - 5.0]
        traffic = TrafficReading(
            age_s=0.2,
            requests_per_s=len(self.arrived) / span_s,
            prompt_tokens_per_s=sum(prompt for _, prompt in self.arrived) / span_s,
            output_tokens_per_s=sum(item[1] for item in self.given) / span_s,
            live=len(self.streams) + len(self.waiting),
            waiting=len(self.waiting),
            queue_s=_p95([item[1] for item in self.firsts]),
            ttft_s=_p95([item[2] for item in self.firsts]),
            tpot_s=_p95([item[2] for item in self.ended]),
            met=met,
            missed=len(self.ended) - met,
            since_s=since_s,
        )
        running, waiting = np.diff(
            np.linspace(0, [len(self.streams), len(self.waiting)], count + 1).astype(int), axis=0
        ).T
        workers = tuple(
            WorkerReading(
                worker_id=f"worker-{index}",
                age_s=0.5,
                running=int(running[index]),
                waiting=int(waiting[index]),
                kv_used_tokens=min(int(used / count), KV_TOKENS),
                kv_capacity_tokens=KV_TOKENS,
                prefill_tokens_per_s=sum(item[2] for item in fives) / 5.0 / count,
                decode_tokens_per_s=sum(item[1] for item in fives) / 5.0 / count,
                longest_context_tokens=int((self.streams[:, 1] + self.streams[:, 4]).max(initial=0.0)),
                max_running=SLOTS,
                waiting_tokens=int(sum(item[1] for item in self.waiting) / count),
            )
            for index in range(count)
        )
        return Observation(now_s=now_s, workers=workers, traffic=traffic)


def _p95(values: list[float]) -> float | None:
    return float(np.quantile(values, 0.95)) if values else None
