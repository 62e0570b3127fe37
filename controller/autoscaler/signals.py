"""Signals from outside the cluster: each in its own task, the loop takes what is there. A server that is slow or down delays nobody.

A reading ages while the next one is on its way; one that failed is none, with the reason. Called by the loop, once a tick.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import Callable, Coroutine
from typing import Any

from flexpert.controller.autoscaler import forecast, prometheus
from flexpert.controller.autoscaler.schedule import read_schedule
from flexpert.controller.policy.spec import ForecastSignal, PrometheusSignal, ScalingPolicy, ScheduleSignal
from flexpert.controller.policy.types import Reading

log = logging.getLogger(__name__)

BRIEF_S = 0.2  # a tick waits so long for servers that are near
DEFAULT_HORIZON_S = 60.0
Expect = Callable[..., Reading]


class Signals:
    """Those of one policy. saved: the load history that `to_json` gave. clock: unix time."""

    def __init__(
        self, policy: ScalingPolicy, *, clock: Callable[[], float], saved: Any = None, expect: Expect | None = None
    ) -> None:
        self._clock, self._expect = clock, expect or forecast.expect
        self._signals = {signal.name: signal for signal in policy.spec.signals}
        self._readings: dict[str, tuple[Reading, float]] = {}  # with when it was taken
        self._tasks: dict[str, asyncio.Task[Reading]] = {}
        found = [signal for signal in policy.spec.signals if isinstance(signal, ForecastSignal)]
        self.history = forecast.History.of(found[0], saved) if found else None
        self._forecast_of_step = -1

    async def read(self, *, join_s: float | None, brief_s: float = BRIEF_S) -> dict[str, Reading]:
        """By name of the signal. join_s: how long a worker needs to join, for forecasts that look as far ahead."""
        for name, signal in self._signals.items():
            if isinstance(signal, PrometheusSignal) and name not in self._tasks:
                asking = prometheus.query(signal.url, signal.query, timeout_s=signal.timeout_s, now_s=self._clock())
                self._tasks[name] = asyncio.create_task(asking)
            elif isinstance(signal, ForecastSignal) and name not in self._tasks:
                self._begin_forecast(signal, join_s)
        if self._tasks:
            await asyncio.wait(self._tasks.values(), timeout=brief_s)
        self._collect()
        now_s = self._clock()
        readings = {name: self._aged(name, now_s) for name in self._readings}
        for name, signal in self._signals.items():
            if isinstance(signal, ScheduleSignal):
                readings[name] = read_schedule(signal, now_s=now_s)
            elif isinstance(signal, PrometheusSignal | ForecastSignal):
                readings.setdefault(name, Reading(error="asked, and not answered yet"))
        return readings

    def saw(self, now_s: float, *, prompt_tokens_per_s: float, output_tokens_per_s: float) -> None:
        """The load of a tick, where it was measured, for the forecast."""
        if self.history is not None:
            self.history.add(now_s, prompt_tokens_per_s=prompt_tokens_per_s, output_tokens_per_s=output_tokens_per_s)

    def to_json(self) -> Any:
        return None if self.history is None else self.history.to_json()

    async def close(self) -> None:
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        self._tasks.clear()

    def _aged(self, name: str, now_s: float) -> Reading:
        """A forecast holds for the step it was made in and the next."""
        reading, taken_s = self._readings[name]
        if reading.age_s is None:
            return reading
        signal = self._signals[name]
        holds_s = 2 * signal.step_s if isinstance(signal, ForecastSignal) else 0.0
        return dataclasses.replace(reading, age_s=reading.age_s + max(0.0, now_s - taken_s - holds_s))

    def _begin_forecast(self, signal: ForecastSignal, join_s: float | None) -> None:
        """Once a step: nothing new is known in between."""
        assert self.history is not None
        now_s = self._clock()
        step = int(now_s // signal.step_s)
        if step == self._forecast_of_step:
            return
        self._forecast_of_step = step
        prompt, output = self.history.series(now_s)
        horizon_s = signal.horizon_s or join_s or DEFAULT_HORIZON_S
        thread: Coroutine[Any, Any, Reading] = asyncio.to_thread(
            self._expect, prompt, output, signal=signal, horizon_s=horizon_s
        )
        self._tasks[signal.name] = asyncio.create_task(thread)

    def _collect(self) -> None:
        for name, task in list(self._tasks.items()):
            if not task.done():
                continue
            del self._tasks[name]
            try:
                reading = task.result()
            except Exception as error:
                log.exception("signal %s could not be read", name)
                reading = Reading(error=f"{type(error).__name__}: {error}")
            self._readings[name] = (reading, self._clock())
