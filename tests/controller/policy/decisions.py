"""Helpers of the decision core's tests: observations from a few words, and ticks in virtual time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from flexpert.controller.policy.decide import decide
from flexpert.controller.policy.types import (
    Decision,
    DirectionConfig,
    EndedTransition,
    Observation,
    PolicyConfig,
    SignalConfig,
    SloConfig,
    State,
    TrafficReading,
    TransitionReading,
    WorkerReading,
    WorkersConfig,
)

KV = SignalConfig(type="kv_utilization", name="kv_utilization", target=0.8)
SLO = SignalConfig(type="slo", name="slo")
TOKENS = SignalConfig(type="tokens_per_second", name="tokens_per_second", prefill=1000.0, decode=100.0)
QUEUE = SignalConfig(type="queue_time", name="queue_time", target=1.0)
KV_TOKENS = 10_000  # of each worker


def policy(*signals: SignalConfig, **changes: Any) -> PolicyConfig:
    """From 1 to 8 workers, by KV unless other signals are given; no stabilisation of growth, 300 s of shrinking."""
    wide: dict[str, Any] = {
        "workers": WorkersConfig(min=1, max=8),
        "slo": SloConfig(ttft_s=0.5, tpot_s=0.05, attainment=0.99),
        "signals": signals or (KV,),
    }
    return PolicyConfig(**{**wide, **changes})


def free(stabilization_s: float = 0.0, **changes: Any) -> DirectionConfig:
    """A direction without rules."""
    return DirectionConfig(stabilization_s=stabilization_s, **changes)


def workers(count: int, *, kv: float = 0.0, age_s: float | None = 0.5, **changes: Any) -> tuple[WorkerReading, ...]:
    """`count` ready workers, each with a share `kv` of its KV in use."""
    return tuple(
        WorkerReading(
            worker_id=f"worker-{index}",
            age_s=age_s,
            kv_used_tokens=round(kv * KV_TOKENS),
            kv_capacity_tokens=KV_TOKENS,
            **changes,
        )
        for index in range(count)
    )


QUIET = TrafficReading(age_s=0.5)


def seen(now_s: float, count: int, *, kv: float = 0.0, **changes: Any) -> Observation:
    values: dict[str, Any] = {"workers": workers(count, kv=kv), "traffic": QUIET}
    return Observation(now_s=now_s, **{**values, **changes})


def first(observation: Observation, config: PolicyConfig, state: State | None = None) -> Decision:
    return decide(observation, state or State(), config)[0]


def load_of(load: float, count: int) -> float:
    """The share of KV at which `load` workers would be right, if `count` are there."""
    return load * 0.8 / count


class Cluster:
    """A cluster that does what is ordered: grows after join_s, shrinks after leave_s. `make` gives the observation of a size."""

    def __init__(
        self,
        config: PolicyConfig,
        make: Callable[[float, int], Observation],
        *,
        count: int,
        join_s: float = 10.0,
        leave_s: float = 5.0,
        start_s: float = 1000.0,
        state: State | None = None,
    ) -> None:
        self.config, self.make, self.count = config, make, count
        self.join_s, self.leave_s, self.now_s = join_s, leave_s, start_s
        self.state = state or State()
        self.decisions: list[Decision] = []
        self.observations: list[Observation] = []
        self.running: TransitionReading | None = None
        self.last: EndedTransition | None = None
        self.comes = True  # whether what is ordered ever arrives

    @property
    def changes(self) -> list[tuple[int, int]]:
        return [
            (decision.action.from_workers, decision.action.target)
            for decision in self.decisions
            if decision.action is not None and decision.action.kind != "abort"
        ]

    def tick(self) -> Decision:
        self._advance()
        observation = replace(self.make(self.now_s, self.count), transition=self.running, last_transition=self.last)
        decision, self.state = decide(observation, self.state, self.config)
        self.observations.append(observation)
        self.decisions.append(decision)
        if decision.action is not None:
            self._act(decision)
        self.now_s += self.config.interval_s
        return decision

    def run(self, seconds: float) -> list[Decision]:
        end_s = self.now_s + seconds
        begun = len(self.decisions)
        while self.now_s < end_s - 1e-6:
            self.tick()
        return self.decisions[begun:]

    def _act(self, decision: Decision) -> None:
        plan = decision.action
        assert plan is not None
        if plan.kind == "abort":
            assert self.running is not None and plan.transition_id == self.running.id
            self._end("aborted")
            return
        assert self.running is None, "ordered while another transition runs"
        takes_s = self.join_s if plan.kind == "grow" else self.leave_s
        self.running = TransitionReading(
            id=f"t-{decision.decision_id}",
            from_workers=self.count,
            to_workers=plan.target,
            phase="prepare",
            began_s=self.now_s,
            deadline_s=self.now_s + takes_s,
        )

    def _advance(self) -> None:
        if self.running is None or not self.comes or self.running.deadline_s is None:
            return
        if self.now_s >= self.running.deadline_s:
            self.count = self.running.to_workers
            self._end("done")

    def _end(self, state: Any) -> None:
        assert self.running is not None
        self.last = EndedTransition(
            id=self.running.id,
            from_workers=self.running.from_workers,
            to_workers=self.running.to_workers,
            state=state,
            began_s=self.running.began_s,
            ended_s=self.now_s,
        )
        self.running = None
