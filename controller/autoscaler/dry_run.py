"""What another policy would have done with what was seen: recorded observations, decided about again at the size that it would have had.

Pure. The load is as recorded and shared by the workers there would have been; a change takes as long as joins were measured to take.
No record can tell how requests would have fared with fewer workers than there were: that share is named, not guessed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from flexpert.controller.policy import record
from flexpert.controller.policy.decide import decide
from flexpert.controller.policy.types import (
    EndedTransition,
    Observation,
    Plan,
    PolicyConfig,
    State,
    TransitionReading,
    WorkerReading,
)

LONGEST_GAP_S = 60.0  # between two ticks; beyond it nobody watched
UNMEASURED_JOIN_S = 10.0
CHANGES_SHOWN = 200


class NothingRecorded(ValueError):
    """There is no observation to decide about."""


def dry_run(lines: Iterable[bytes | str], config: PolicyConfig) -> dict[str, Any]:
    """lines: of a record. Raises NothingRecorded, or record.RecordError for what is none."""
    observations = [line.observation for line in record.read(lines) if isinstance(line, record.Tick)]
    if not observations:
        raise NothingRecorded(
            "no decision is recorded yet: let the cluster run with a policy first, also in mode advisory"
        )
    run = _Run(replace(config, mode="Active"))
    for observation in observations:
        run.tick(observation)
    return run.to_json(observations)


class _Run:
    def __init__(self, config: PolicyConfig) -> None:
        self._config, self._state = config, State(run_id="dry")
        self._workers = 0
        self._plan: Plan | None = None
        self._began_s = self._ends_s = 0.0
        self._ended: EndedTransition | None = None
        self._last_s: float | None = None
        self._changes: list[dict[str, Any]] = []
        self._device_s = self._recorded_device_s = self._watched_s = 0.0
        self._met = self._missed = self._all = self._all_met = 0
        self._text = ""

    def tick(self, observation: Observation) -> None:
        ready = sum(worker.phase == "ready" for worker in observation.workers)
        now_s = observation.now_s
        self._workers = self._workers or ready
        self._account(observation, ready)
        self._arrive(now_s)
        if not ready:
            return
        decision, self._state = decide(self._seen(observation), self._state, self._config)
        self._text = f"{decision.reason.value}: {decision.text}"
        plan = decision.action
        if plan is None or plan.kind == "abort" or self._plan is not None:
            return
        measured = observation.join_s if plan.kind == "grow" else observation.leave_s or observation.join_s
        self._plan, self._began_s = plan, now_s
        self._ends_s = now_s + (UNMEASURED_JOIN_S if measured is None else measured.mean_s)
        self._changes.append(
            {
                "at_s": now_s, "from_workers": self._workers, "to_workers": plan.target, "reason": decision.reason.value,
                "text": decision.text,
            }
        )  # fmt: skip

    def _account(self, observation: Observation, ready: int) -> None:
        now_s = observation.now_s
        if self._last_s is not None and 0 < now_s - self._last_s <= LONGEST_GAP_S:
            seconds = now_s - self._last_s
            self._watched_s += seconds
            self._device_s += seconds * self._workers
            self._recorded_device_s += seconds * len(observation.workers)
        self._last_s = now_s
        met, missed = observation.traffic.met, observation.traffic.missed
        self._all, self._all_met = self._all + met + missed, self._all_met + met
        if self._workers >= ready:
            self._met, self._missed = self._met + met, self._missed + missed

    def _arrive(self, now_s: float) -> None:
        plan = self._plan
        if plan is None or now_s < self._ends_s:
            return
        self._ended = EndedTransition(
            id=f"dry-{len(self._changes)}", from_workers=self._workers, to_workers=plan.target, state="done",
            began_s=self._began_s, ended_s=self._ends_s,
        )  # fmt: skip
        self._workers, self._plan = plan.target, None

    def _seen(self, observation: Observation) -> Observation:
        running = None
        if self._plan is not None:
            running = TransitionReading(
                id=f"dry-{len(self._changes)}", from_workers=self._workers, to_workers=self._plan.target, phase="prepare",
                began_s=self._began_s,
            )  # fmt: skip
        return replace(
            observation,
            workers=shared_among(observation.workers, self._workers),
            transition=running,
            last_transition=self._ended,
            override=None,
        )

    def to_json(self, observations: list[Observation]) -> dict[str, Any]:
        hours, recorded_hours = self._device_s / 3600, self._recorded_device_s / 3600
        known = self._met + self._missed
        price = self._config.cost_per_device_hour
        return {
            "policy": self._config.name,
            "ticks": len(observations),
            "from_s": observations[0].now_s,
            "to_s": observations[-1].now_s,
            "watched_s": round(self._watched_s, 3),
            "changes": self._changes[-CHANGES_SHOWN:],
            "changes_total": len(self._changes),
            "workers": self._workers,
            "now": self._text,
            "device_hours": round(hours, 4),
            "cost": round(hours * price, 4),
            "recorded_device_hours": round(recorded_hours, 4),
            "recorded_attainment": self._all_met / self._all if self._all else None,
            "attainment_where_as_many_workers": self._met / known if known else None,
            "attainment_unknown_share": 1.0 - known / self._all if self._all else None,
        }


def shared_among(workers: tuple[WorkerReading, ...], count: int) -> tuple[WorkerReading, ...]:
    """The load of the ready ones, shared evenly by `count`; as they are where they are as many."""
    ready = [worker for worker in workers if worker.phase == "ready"]
    told = [worker for worker in ready if worker.age_s is not None]
    if not told or count == len(ready):
        return tuple(ready)
    scale = len(ready) / len(told) / count  # those that said nothing have as much as the others

    def share(name: str) -> float:
        return float(scale * sum(getattr(worker, name) for worker in told))

    one = WorkerReading(
        worker_id="",
        age_s=max(worker.age_s or 0.0 for worker in told),
        running=round(share("running")),
        waiting=round(share("waiting")),
        kv_used_tokens=round(share("kv_used_tokens")),
        kv_capacity_tokens=min(worker.kv_capacity_tokens for worker in told),
        prefill_tokens_per_s=share("prefill_tokens_per_s"),
        decode_tokens_per_s=share("decode_tokens_per_s"),
        longest_context_tokens=max(worker.longest_context_tokens for worker in told),
        max_running=max(worker.max_running for worker in told),
        waiting_tokens=round(share("waiting_tokens")),
    )
    return tuple(replace(one, worker_id=f"worker-{number}") for number in range(count))
