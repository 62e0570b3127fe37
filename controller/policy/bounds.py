"""Between which sizes a decision may choose, and what the forecast asks for at least. Pure; called by `controller.policy.decide`."""

from __future__ import annotations

import math
from dataclasses import dataclass

from flexpert.controller.policy.signals_math import MOST_LOAD, Scene, fault_of
from flexpert.controller.policy.types import Proposal


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """low <= high always. *_why: the rule that set it, for the reason's text."""

    low: int
    high: int
    low_why: str
    high_why: str

    def clamp(self, workers: int) -> int:
        return min(max(workers, self.low), self.high)


def bounds_of(scene: Scene) -> tuple[Bounds, list[Proposal], str]:
    """The bounds, what the schedules say, and what is wrong with one of them ("missing", "stale", "").

    Where bounds exclude each other, what is physically there wins over memory, memory over money, money over the policy's least.
    """
    observation, config = scene.observation, scene.config
    lows = [(config.workers.min, "workers.min")]
    highs = [(config.workers.max, "workers.max")]
    if config.budget_devices is not None:
        highs.append((config.budget_devices, "budget"))
    said, worst = [], ""
    for signal in config.signals:
        if signal.type != "schedule":
            continue
        fault, why = fault_of(signal, scene)
        if fault:
            worst = worst or fault
            said.append(Proposal(signal=signal.name, wanted=None, why=f"{fault}: {why}"))
            continue
        reading = observation.readings[signal.name]
        if reading.low is not None:
            lows.append((reading.low, f"schedule {signal.name}"))
        if reading.high is not None:
            highs.append((reading.high, f"schedule {signal.name}"))
        why = f"from {_or_any(reading.low)} to {_or_any(reading.high)} workers at this time"
        said.append(Proposal(signal=signal.name, wanted=reading.low, why=why))
    high, high_why = min(highs)
    low, low_why = max(lows)
    if low > high:
        low, low_why = high, high_why
    if observation.memory_floor > low:
        low, low_why = observation.memory_floor, "memory"
        high, high_why = (high, high_why) if high >= low else (low, "memory")
    if observation.devices is not None and observation.devices < high:
        high, high_why = max(observation.devices, 0), "devices"
        low, low_why = (low, low_why) if low <= high else (high, "devices")
    return Bounds(low=low, high=high, low_why=low_why, high_why=high_why), said, worst


def _or_any(workers: int | None) -> str:
    return "any" if workers is None else str(workers)


def forecast_floor(scene: Scene) -> tuple[int, list[Proposal]]:
    """The workers that the forecasts ask for at least, 0 without one: a forecast that is not there holds nothing back."""
    floor, said = 0, []
    for signal in scene.config.signals:
        if signal.type != "forecast":
            continue
        fault, why = fault_of(signal, scene)
        if fault:
            said.append(Proposal(signal=signal.name, wanted=None, why=f"{fault}: {why}"))
            continue
        reading = scene.observation.readings[signal.name]
        load = reading.value
        why = f"in {reading.horizon_s:.0f} s"
        if load is None:
            prompt, output = reading.prompt_tokens_per_s or 0.0, reading.output_tokens_per_s or 0.0
            load = scene.capacity.load(prompt=prompt, output=output)
            why += f" {prompt:.0f} prompt and {output:.0f} output tokens/s"
        if load is None:
            said.append(
                Proposal(signal=signal.name, wanted=None, why=why + "; what a worker takes is not measured yet")
            )
            continue
        load = min(load, MOST_LOAD)
        wanted = math.ceil(load - 1e-9)
        floor = max(floor, wanted)
        said.append(Proposal(signal=signal.name, wanted=wanted, why=why, load=round(load, 6)))
    return floor, said
