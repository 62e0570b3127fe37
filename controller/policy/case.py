"""One tick while it is decided: what the verdicts look at and note. Pure; private to `controller.policy.decide` and the verdicts."""

from __future__ import annotations

from dataclasses import dataclass, field

from flexpert.controller.policy.bounds import Bounds
from flexpert.controller.policy.reasons import Reason
from flexpert.controller.policy.signals_math import Scene
from flexpert.controller.policy.types import Plan, Rejected, State


@dataclass(slots=True, kw_only=True)
class Case:
    """load: the highest of all signals. fault: "missing" or "stale" where a signal that measures has no number. rejected grows."""

    scene: Scene
    bounds: Bounds
    load: float | None
    loudest: str  # the signal whose load it is
    fault: str
    faulty: str  # which signals, in words
    forecast: int
    panic: bool
    ahead: float | None  # the load when a worker ordered now serves, if it rises
    ahead_s: float
    mean: float | None  # over the panic window
    rejected: list[Rejected] = field(default_factory=list)

    @property
    def now(self) -> int:
        return self.scene.now

    @property
    def now_s(self) -> float:
        return self.scene.observation.now_s

    @property
    def state(self) -> State:
        return self.scene.state

    @property
    def history_s(self) -> float:
        """For how long the load has been watched without a gap."""
        began = self.state.began_s
        return self.now_s - began if began is not None else 0.0

    def reject(self, rule: str, wanted: int, given: int, why: str) -> None:
        if wanted != given:
            self.rejected.append(Rejected(rule=rule, from_workers=wanted, to_workers=given, why=why))


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """target: the size to order now, or the present one. final: no rule held the target back. trial: it was made on latencies alone."""

    target: int
    reason: Reason
    text: str
    final: bool = True
    trial: bool = False
    plan: Plan | None = None  # where it is no plain change of size
    state: State | None = None  # where the verdict changes it
