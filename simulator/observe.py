"""The modelled cluster as the policy sees it: the Observation that the autoscaler's loop would make of it.

Windows and what counts in them are those of controller.gateway.window: requests by their end, first tokens by their time, and of those that
still wait the ones that are already too late; queue_s is the wait in the gateway alone, a worker's own queue is told by its `waiting`.
Rates of workers are of the time since the look before. Workers of one lane are alike and given as one reading repeated.

Coarser than the real one, for speed: requests that go on share one tpot, that of the window's steps, and the longest context is looked for
every CONTEXTS_S.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from flexpert.controller.policy.types import (
    EndedTransition,
    Measured,
    Observation,
    PolicyConfig,
    TrafficReading,
    TransitionReading,
    WorkerReading,
)
from flexpert.simulator.metrics import Records, percentile
from flexpert.simulator.results import Slo
from flexpert.simulator.service import Lane

if TYPE_CHECKING:
    from flexpert.simulator.cluster import Cluster
    from flexpert.simulator.scalers import Scaler
    from flexpert.simulator.scaling import Scaling

__all__ = ["Observer", "window_of"]

SHORTEST_WINDOW_S = 10.0  # of controller.autoscaler.loop
OTHERS_WINDOW_S = 30.0  # for those who decide otherwise
CONTEXTS_S = 30.0  # the longest context is looked for so often
Floats = NDArray[np.float64]
LAST_TIMES = 50  # of joins and leaves, as controller.autoscaler.observe keeps them


def window_of(scaler: Scaler) -> float:
    """Seconds of traffic that it is told of: for a policy those that the autoscaler's loop asks the gateway for."""
    config = getattr(scaler, "config", None)
    if not isinstance(config, PolicyConfig):
        return OTHERS_WINDOW_S
    return max(SHORTEST_WINDOW_S, config.panic.window_s, 2 * config.interval_s)


class Observer:
    """Called at each tick, with times that rise. start_s: the unix time of the trace's begin."""

    def __init__(
        self, cluster: Cluster, records: Records, scaling: Scaling, *, slo: Slo, devices: int, start_s: float, window_s: float
    ) -> None:  # fmt: skip
        self._cluster = cluster
        self._records = records
        self._scaling = scaling
        self._slo = slo
        self._devices = devices
        self._start_s = start_s
        self._window_s = window_s  # of what traffic is told
        self._past: deque[tuple[float, ...]] = deque([(0.0,) * 6])  # at, steps, arrived, its tokens, decoded, busy
        self._counts: dict[
            Lane, tuple[float, float, float, float, float]
        ] = {}  # at, prefilled, decoded and their rates
        self._contexts: dict[Lane, int] = {}
        self._contexts_s = -CONTEXTS_S

    def glance(self, now_s: float) -> Observation:
        """The time and who is ready, nothing else."""
        ready = (WorkerReading(worker_id="worker", age_s=0.0),) * self._cluster.workers
        return Observation(now_s=self._start_s + now_s, workers=ready)

    def look(self, now_s: float, *, arrived: float, arrived_tokens: float) -> Observation:
        """arrived, arrived_tokens: requests and prompt tokens since the begin."""
        cluster, scaling = self._cluster, self._scaling
        running = scaling.running
        return Observation(
            now_s=self._start_s + now_s,
            workers=self._workers(now_s),
            traffic=self._traffic(now_s, arrived, arrived_tokens),
            transition=None if running is None else TransitionReading(
                id=running.id,
                from_workers=running.from_workers,
                to_workers=running.to_workers,
                phase="prepare",
                began_s=self._start_s + running.began_s,
            ),
            last_transition=self._last(),
            devices=self._devices,
            memory_floor=cluster.profile.memory_floor(sum(lane.kv_used(cluster.step) * lane.workers for lane in cluster.lanes)),
            join_s=_measured(scaling.joins_s),
            leave_s=_measured(scaling.leaves_s),
            stall_s=_of_all(scaling.stalls_s),
        )  # fmt: skip

    def _workers(self, now_s: float) -> tuple[WorkerReading, ...]:
        step = self._cluster.step
        if now_s - self._contexts_s >= CONTEXTS_S:
            self._contexts_s = now_s
            self._contexts = {
                lane: max((request.tokens(step) for request in lane.running), default=0) for lane in self._cluster.lanes
            }
        readings: list[WorkerReading] = []
        number = 0
        for lane in self._cluster.lanes:
            prefill, decode = self._rates(lane, now_s)
            share = 1 / lane.workers
            waiting = lane.in_flight - lane.weight
            reading = WorkerReading(
                worker_id=f"worker-{number}",
                age_s=0.0,
                running=round(lane.weight * share),
                waiting=round(waiting * share),
                kv_used_tokens=int(lane.kv_used(step)),
                kv_capacity_tokens=int(lane.kv_capacity),
                prefill_tokens_per_s=prefill,
                decode_tokens_per_s=decode,
                longest_context_tokens=self._contexts.get(lane, 0),
                max_running=self._cluster.profile.max_running,
                waiting_tokens=int(max(0.0, lane.unstarted) * share),
            )
            readings += [reading] * lane.workers
            number += lane.workers
        running = self._scaling.running
        if running is not None:
            more = running.to_workers - running.from_workers
            readings += [WorkerReading(worker_id=f"worker-{number + i}", phase="joining") for i in range(more)]
            if more < 0:  # the last ones, as in Cluster.shrink
                readings[more:] = [replace(reading, phase="leaving") for reading in readings[more:]]
        return tuple(readings)

    def _rates(self, lane: Lane, now_s: float) -> tuple[float, float]:
        """Prompt and output tokens/s of one worker."""
        at_s, prefilled, decoded, prefill, decode = self._counts.get(lane, (now_s, 0.0, 0.0, 0.0, 0.0))
        if now_s > at_s or lane not in self._counts:
            prefilled_now, decoded_now = lane.prefill_tokens, lane.decoded_tokens(self._cluster.step)
            if now_s > at_s:
                per_s = 1 / (now_s - at_s) / lane.workers
                prefill, decode = (prefilled_now - prefilled) * per_s, (decoded_now - decoded) * per_s
            self._counts[lane] = (now_s, prefilled_now, decoded_now, round(prefill, 3), round(decode, 3))
        return round(prefill, 3), round(decode, 3)

    def _traffic(self, now_s: float, arrived: float, arrived_tokens: float) -> TrafficReading:
        cluster, past = self._cluster, self._past
        decoded = cluster.decoded_tokens
        while len(past) > 1 and past[1][0] <= now_s - self._window_s:
            past.popleft()
        since_s, steps, arrived_then, tokens_then, decoded_then, busy_then = past[0]
        past.append((now_s, cluster.step, arrived, arrived_tokens, decoded, cluster.busy_s))
        per_s = 1 / (now_s - since_s) if now_s > since_s else 0.0
        ended, first, routed = self._records.traffic(now_s - self._window_s)
        routed = self._with_queued(routed, now_s)
        first_per_s = float(first[:, 3].sum()) / min(self._window_s, now_s) if now_s > 0 else 0.0
        met = self._records.met(ended[:, 2], ended[:, 3])
        late, late_weights = self._late(now_s)
        first_weights = np.concatenate([first[:, 3], late_weights])
        tpot, tpot_weights = ended[:, 3], ended[:, 5]
        if cluster.running and cluster.step > steps:  # those that go on
            tpot = np.append(tpot, (cluster.busy_s - busy_then) / (cluster.step - steps))
            tpot_weights = np.append(tpot_weights, cluster.running)
        known = ~np.isnan(tpot)
        return TrafficReading(
            age_s=0.0,
            requests_per_s=(arrived - arrived_then) * per_s,
            prompt_tokens_per_s=(arrived_tokens - tokens_then) * per_s,
            output_tokens_per_s=max(0.0, decoded - decoded_then) * per_s + first_per_s,
            live=round(cluster.live),
            waiting=round(cluster.unanswered),
            queue_s=percentile(routed[:, 1], routed[:, 2], 0.95),
            ttft_s=percentile(np.concatenate([first[:, 1], late]), first_weights, 0.95),
            tpot_s=percentile(tpot[known], tpot_weights[known], 0.95),
            met=round(float(ended[met, 5].sum())),
            missed=round(float(ended[~met, 5].sum() + late_weights.sum())),
            since_s=self._start_s + max(0.0, now_s - self._window_s),
        )

    def _with_queued(self, routed: Floats, now_s: float) -> Floats:
        """With those that no worker has yet and that wait longer than the others did."""
        usual_s = percentile(routed[:, 1], routed[:, 2], 0.95) or 0.0
        ages = [(now_s, now_s - request.arrived_s, request.weight) for request in self._cluster.queue]
        longer = [each for each in ages if each[1] > usual_s]
        return np.concatenate([routed, np.array(longer).reshape(-1, 3)])

    def _late(self, now_s: float) -> tuple[Floats, Floats]:
        """Ages and weights of requests without a first token whose time for it is over."""
        limit_s = self._slo.ttft_s
        if limit_s is None or not self._cluster.unanswered:
            return np.empty(0), np.empty(0)
        found = [
            (now_s - request.arrived_s, request.weight)
            for request in self._cluster.unanswered_requests()
            if now_s - request.arrived_s > limit_s
        ]
        return np.array([age for age, _ in found]), np.array([weight for _, weight in found])

    def _last(self) -> EndedTransition | None:
        ended = self._scaling.ended
        if ended is None:
            return None
        event = self._scaling.events[-1]
        return EndedTransition(
            id=ended.id,
            from_workers=ended.from_workers,
            to_workers=ended.to_workers,
            state="done" if event.state == "done" else "aborted",
            began_s=self._start_s + ended.began_s,
            ended_s=self._start_s + self._scaling.ended_s,
        )


def _measured(seconds: Sequence[float]) -> Measured | None:
    if not seconds:
        return None
    last = sorted(seconds[-LAST_TIMES:])
    p95 = last[min(len(last) - 1, int(0.95 * len(last)))]
    return Measured(mean_s=sum(last) / len(last), p95_s=p95, count=len(seconds))


def _of_all(seconds: Sequence[float]) -> Measured | None:
    """As the real one tells what it keeps no samples of: the highest stands for the p95."""
    if not seconds:
        return None
    return Measured(mean_s=sum(seconds) / len(seconds), p95_s=max(seconds), count=len(seconds))
