"""The controller's own decision core as one of those who decide in a simulation: `decide` itself, fed tick by tick.

Signals from outside the cluster: schedules are read by the modelled clock, a forecast learns from the modelled load. A PromQL query has no
answer in a model, so a policy with one is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

from flexpert.controller.autoscaler import forecast
from flexpert.controller.autoscaler.schedule import read_schedule
from flexpert.controller.policy.decide import decide
from flexpert.controller.policy.spec import ForecastSignal, PrometheusSignal, ScalingPolicy, ScheduleSignal
from flexpert.controller.policy.types import Decision, Observation, PolicyConfig, Reading, State
from flexpert.simulator.scalers import Wish

__all__ = ["PolicyError", "PolicyScaler"]

DEFAULT_HORIZON_S = 60.0


class PolicyError(ValueError):
    """A policy that cannot be simulated."""


class PolicyScaler:
    """One policy. `on_decision` is given each observation and decision (to record or replay them)."""

    kind: Literal["policy", "baseline"] = "policy"
    blind = False

    def __init__(
        self,
        name: str,
        config: PolicyConfig,
        *,
        policy: ScalingPolicy | None = None,
        on_decision: Callable[[Observation, Decision], None] | None = None,
    ) -> None:
        """policy: what `config` was made of; needed for its schedules and forecasts. Raises PolicyError for a Prometheus signal."""
        signals = () if policy is None else policy.spec.signals
        for signal in signals:
            if isinstance(signal, PrometheusSignal):
                raise PolicyError(
                    f"{name}: signal {signal.name!r} asks Prometheus, which a simulation has not; leave it out"
                )
        self.name = name
        self.config = replace(config, mode="Active")
        self.interval_s = config.interval_s
        self.standby = config.workers.standby
        self._state = State(run_id=name)
        self._on_decision = on_decision
        self._schedules = [signal for signal in signals if isinstance(signal, ScheduleSignal)]
        self._forecasts = [_Forecast(signal) for signal in signals if isinstance(signal, ForecastSignal)]

    def decide(self, observation: Observation) -> Wish:
        if self._schedules or self._forecasts:
            observation = replace(observation, readings=self._readings(observation))
        decision, self._state = decide(observation, self._state, self.config)
        if self._on_decision is not None:
            self._on_decision(observation, decision)
        plan = decision.action
        return Wish(
            target=None if plan is None or plan.kind == "abort" else plan.target,
            abort=plan is not None and plan.kind == "abort",
            reason=decision.reason.value,
            text=decision.text,
            decision_id=decision.decision_id,
            wanted=decision.wanted,
            timeout_s=math.inf if plan is None else plan.deadline_s - observation.now_s,
        )

    def _readings(self, observation: Observation) -> dict[str, Reading]:
        found = {signal.name: read_schedule(signal, now_s=observation.now_s) for signal in self._schedules}
        for each in self._forecasts:
            found[each.signal.name] = each.read(observation)
        return found


class _Forecast:
    """What autoscaler.signals does in a thread, at once."""

    def __init__(self, signal: ForecastSignal) -> None:
        self.signal = signal
        self._history = forecast.History.of(signal, None)
        self._step = -1
        self._reading = Reading(error="no whole step yet")

    def read(self, observation: Observation) -> Reading:
        now_s, traffic = observation.now_s, observation.traffic
        self._history.add(
            now_s, prompt_tokens_per_s=traffic.prompt_tokens_per_s, output_tokens_per_s=traffic.output_tokens_per_s
        )
        step = int(now_s // self.signal.step_s)
        if step != self._step:
            self._step = step
            prompt, output = self._history.series(now_s)
            horizon_s = self.signal.horizon_s or (
                observation.join_s.mean_s if observation.join_s else DEFAULT_HORIZON_S
            )
            self._reading = forecast.expect(prompt, output, signal=self.signal, horizon_s=horizon_s)
        return self._reading
