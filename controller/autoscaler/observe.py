"""Makes the decision core's `Observation` of what the gateway told and what the controller knows.

Keeps what one look alone does not show: token counters of the last look (rates are differences), the gateway's last good answer (which ages
while it is away), durations of transitions that ended. Reads no clock: times are given. Called by the loop, once a tick.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from flexpert.controller.policy.types import (
    EndedTransition,
    Measured,
    Observation,
    Override,
    Reading,
    TrafficReading,
    TransitionReading,
    WorkerReading,
)

SAMPLES = 50
YOUNG_SHARE = 0.5  # a gateway that has watched for less than this share of the window has seen nothing yet


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterFacts:
    """What the controller knows. serving: members of the epoch in rank order; absent: those of them without a process.

    progress: of the transition that runs, else of the last one (see Controller.transition), with `began_s` and `ended_s` in unix time where
    they are known. memory_floor: fewest workers that hold the model, by KV tokens in use. timings: see controller.timings.
    """

    serving: tuple[str, ...] = ()
    absent: frozenset[str] = frozenset()
    progress: Mapping[str, Any] | None = None
    devices: int | None = None
    timings: Mapping[str, Any] = field(default_factory=dict)


class Observer:
    """restarted_at_s: when this process began to watch. saved: what `to_json` of an earlier one gave."""

    def __init__(self, *, restarted_at_s: float, saved: Any = None) -> None:
        self._restarted_at_s = restarted_at_s
        self._counters: dict[str, tuple[Any, float, int, int]] = {}
        self._rates: dict[str, tuple[float, float]] = {}
        self._traffic_told: Mapping[str, Any] = {}
        self._workers_told: dict[str, Mapping[str, Any]] = {}
        self._traffic_at_s: float | None = None
        self._workers_at_s = 0.0
        self._ended: EndedTransition | None = None
        self._durations: dict[str, deque[float]] = {name: deque(maxlen=SAMPLES) for name in ("join", "leave")}
        self._counted = self._seen = ""
        if isinstance(saved, dict):
            self._counted = str(saved.get("counted", ""))
            for name, kept in self._durations.items():
                kept.extend(float(seconds) for seconds in saved.get(name, ()))

    def to_json(self) -> dict[str, Any]:
        return {"counted": self._counted, **{name: list(kept) for name, kept in self._durations.items()}}

    def hear(self, told: Mapping[str, Any] | None, *, now_s: float, window_s: float) -> None:
        """The gateway's answer (see gateway.load); None or {} where there was none. One that has just begun to watch has no rates yet: its
        zeros are no zeros."""
        if not told:
            return
        self._workers_told, self._workers_at_s = {worker["worker_id"]: worker for worker in told["workers"]}, now_s
        for worker in told["workers"]:
            self._note_rates(worker, now_s)
        self._rates = {name: rates for name, rates in self._rates.items() if name in self._workers_told}
        self._counters = {name: counters for name, counters in self._counters.items() if name in self._workers_told}
        if told["traffic"]["since_s"] >= YOUNG_SHARE * window_s or self._traffic_at_s is None:
            self._traffic_told, self._traffic_at_s = told["traffic"], now_s

    def observe(
        self,
        *,
        now_s: float,
        facts: ClusterFacts,
        readings: Mapping[str, Reading],
        override: Override | None,
        memory_floor: int,
    ) -> Observation:
        transition, parts = self._transition(facts, now_s)
        serving, usual = frozenset(facts.serving) - facts.absent, self._usual_capacity()
        workers = tuple(
            self._worker(name, serving=name in serving, role=parts.get(name, ""), usual_capacity=usual, now_s=now_s)
            for name in _names(facts, parts)
        )
        return Observation(
            now_s=now_s,
            workers=workers,
            traffic=self._traffic(now_s),
            readings=dict(readings),
            transition=transition,
            last_transition=self._ended,
            devices=facts.devices,
            memory_floor=memory_floor,
            join_s=_measured(self._durations["join"]) or _of_timings(facts.timings, "join_cold", "join_warm"),
            leave_s=_measured(self._durations["leave"]),
            stall_s=_of_timings(facts.timings, "commit_pause"),
            restarted_at_s=self._restarted_at_s,
            override=override,
        )

    @property
    def kv_used_tokens(self) -> int:
        """Of all workers, as far as they told."""
        return sum(int(told.get("kv_used_tokens", 0)) for told in self._workers_told.values())

    # The gateway's side

    def _traffic(self, now_s: float) -> TrafficReading:
        if self._traffic_at_s is None:
            return TrafficReading()
        told = self._traffic_told
        return TrafficReading(
            age_s=max(0.0, now_s - self._traffic_at_s),
            requests_per_s=told["requests_per_s"],
            prompt_tokens_per_s=told["prompt_tokens_per_s"],
            output_tokens_per_s=told["output_tokens_per_s"],
            live=told["live"],
            waiting=told["waiting"],
            queue_s=told["queue_s"],
            ttft_s=told["ttft_s"],
            tpot_s=told["tpot_s"],
            met=told["met"],
            missed=told["missed"],
            since_s=self._traffic_at_s - told["since_s"],
        )

    def _worker(self, worker_id: str, *, serving: bool, role: str, usual_capacity: int, now_s: float) -> WorkerReading:
        told = self._workers_told.get(worker_id, {})
        phase: Literal["ready", "joining", "leaving"] = "ready" if serving else "joining"
        reading = WorkerReading(worker_id=worker_id, phase="leaving" if role == "leaves" else phase)
        if told.get("age_s") is None:
            return reading
        behind_s = max(0.0, now_s - self._workers_at_s)
        prefill, decode = self._rates[worker_id]
        return dataclasses.replace(
            reading,
            age_s=told["age_s"] + behind_s,
            running=told["running"],
            waiting=told["waiting"],
            kv_used_tokens=told.get("kv_used_tokens", 0),
            kv_capacity_tokens=told.get("kv_capacity_tokens", 0) or usual_capacity,
            prefill_tokens_per_s=prefill,
            decode_tokens_per_s=decode,
            longest_context_tokens=told["longest_context_tokens"],
            max_running=told["max_running"],
            waiting_tokens=told["waiting_tokens"],
        )

    def _usual_capacity(self) -> int:
        """Of those that told: one that has served nothing yet has said nothing of its KV, and is like the others."""
        return min(
            (told["kv_capacity_tokens"] for told in self._workers_told.values() if told.get("kv_capacity_tokens")),
            default=0,
        )

    def _note_rates(self, worker: Mapping[str, Any], now_s: float) -> None:
        """Tokens/s since the look before; 0.0 at the first look at a process, whose counters begin at zero."""
        worker_id = worker["worker_id"]
        found = (
            worker["incarnation"],
            now_s,
            int(worker.get("prefill_tokens", 0)),
            int(worker.get("decode_tokens", 0)),
        )
        before = self._counters.get(worker_id)
        self._counters[worker_id] = found
        self._rates[worker_id] = (0.0, 0.0)
        if before is not None and before[0] == found[0] and found[1] > before[1] and found[2:] >= before[2:]:
            seconds = found[1] - before[1]
            self._rates[worker_id] = (max(0, found[2] - before[2]) / seconds, max(0, found[3] - before[3]) / seconds)

    # The controller's side

    def _transition(self, facts: ClusterFacts, now_s: float) -> tuple[TransitionReading | None, dict[str, str]]:
        """The one that runs, and the role of each worker in it."""
        progress = facts.progress
        if progress is None:
            return None, {}
        if progress["state"] != "running":
            self._end(progress, now_s)
            return None, {}
        left_s = progress.get("deadline_s")
        running = TransitionReading(
            id=progress["transition_id"],
            from_workers=len(progress["from_workers"]),
            to_workers=len(progress["to_workers"]),
            phase=progress["phase"],
            began_s=_begun(progress, now_s),
            deadline_s=None if left_s is None else now_s + left_s,
            kind=progress["kind"],
        )
        return running, {member["worker_id"]: member["role"] for member in progress["members"]}

    def _end(self, progress: Mapping[str, Any], now_s: float) -> None:
        """Each once; the start of the cluster is no change of its size."""
        if self._seen == progress["transition_id"] or progress["kind"] == "boot":
            return
        self._seen = progress["transition_id"]
        began_s = _begun(progress, now_s)
        ended_s = progress.get("ended_s") or began_s + (progress.get("seconds") or 0.0)
        ended = EndedTransition(
            id=progress["transition_id"],
            from_workers=len(progress["from_workers"]),
            to_workers=len(progress["to_workers"]),
            state=progress["state"],
            reason=progress["reason"],
            began_s=began_s,
            ended_s=ended_s,
            kind=progress["kind"],
        )
        self._ended = ended
        if ended.id == self._counted or ended.state != "done" or ended.kind not in ("scale", "drain"):
            return
        self._counted = ended.id
        change = ended.to_workers - ended.from_workers
        if change and ended.ended_s > ended.began_s:
            self._durations["join" if change > 0 else "leave"].append(ended.ended_s - ended.began_s)

    def refused(self, *, order_id: str, from_workers: int, to_workers: int, reason: str, now_s: float) -> None:
        """An order that the controller did not take: for the core a transition that failed at once."""
        self._ended = EndedTransition(
            id=f"refused-{order_id}", from_workers=from_workers, to_workers=to_workers, state="failed", reason=reason,
            began_s=now_s, ended_s=now_s,
        )  # fmt: skip


def _begun(progress: Mapping[str, Any], now_s: float) -> float:
    return float(progress.get("began_s") or now_s - (progress.get("seconds") or 0.0))


def _names(facts: ClusterFacts, parts: Mapping[str, str]) -> list[str]:
    return list(dict.fromkeys([*facts.serving, *(name for name, role in parts.items() if role == "joins")]))


def _measured(samples: deque[float]) -> Measured | None:
    if not samples:
        return None
    ordered = sorted(samples)
    rank = min(len(ordered) - 1, int(0.95 * len(ordered)))
    return Measured(mean_s=sum(ordered) / len(ordered), p95_s=ordered[rank], count=len(ordered))


def _of_timings(timings: Mapping[str, Any], *names: str) -> Measured | None:
    """Of series that keep no samples: the highest stands for the p95."""
    found = [timings[name] for name in names if name in timings and timings[name]["count"]]
    if not found:
        return None
    count = sum(series["count"] for series in found)
    mean_s = sum(series["sum_s"] for series in found) / count
    return Measured(mean_s=mean_s, p95_s=max(series["max_s"] for series in found), count=count)
