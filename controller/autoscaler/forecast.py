"""The load that past seasons lead to expect: history in steps, and Holt and Winters' seasonal smoothing by statsmodels.

`History` averages what it is given over steps and keeps as many as the policy asks for; `expect` fits and looks ahead, which takes up to
seconds, so `signals` runs it in a thread. statsmodels is an extra of the package and imported when it is needed.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np

from flexpert.controller.policy.spec import ForecastSignal
from flexpert.controller.policy.types import Reading

SEASONS_NEEDED = 2
MAX_STEPS = 50_000
MISSING_LIBRARY = (
    "the forecast signal needs statsmodels, which is not installed; install flexpert with its extra: "
    "pip install 'flexpert[forecast]'"
)


def library_is_there() -> bool:
    return find_spec("statsmodels") is not None


class History:
    """Mean rates by step: number of the step (unix time / step_s) -> [prompt tokens/s, output tokens/s, how many readings]."""

    def __init__(self, *, step_s: float, kept_s: float, steps: dict[int, list[float]] | None = None) -> None:
        self.step_s = step_s
        self._kept = min(MAX_STEPS, math.ceil(kept_s / step_s))
        self._steps = dict(steps or {})

    def add(self, now_s: float, *, prompt_tokens_per_s: float, output_tokens_per_s: float) -> None:
        number = int(now_s // self.step_s)
        prompt, output, count = self._steps.get(number, [0.0, 0.0, 0])
        self._steps[number] = [
            prompt + (prompt_tokens_per_s - prompt) / (count + 1),
            output + (output_tokens_per_s - output) / (count + 1),
            count + 1,
        ]
        for old in [found for found in self._steps if found <= number - self._kept]:
            del self._steps[old]

    def series(self, now_s: float) -> tuple[list[float | None], list[float | None]]:
        """Prompt and output rates of all whole steps up to now, oldest first; None where nothing was seen."""
        end = int(now_s // self.step_s)
        whole = [number for number in self._steps if number < end]
        if not whole:
            return [], []
        found = [self._steps.get(number) for number in range(min(whole), end)]
        return [None if one is None else one[0] for one in found], [None if one is None else one[1] for one in found]

    def to_json(self) -> dict[str, Any]:
        return {"step_s": self.step_s, "steps": {str(number): found for number, found in self._steps.items()}}

    @classmethod
    def of(cls, signal: ForecastSignal, saved: Any) -> History:
        """What was saved, where it is of the same step."""
        steps: dict[int, list[float]] = {}
        if isinstance(saved, dict) and saved.get("step_s") == signal.step_s:
            steps = {int(number): list(found) for number, found in saved["steps"].items()}
        return cls(step_s=signal.step_s, kept_s=signal.history_s, steps=steps)


def expect(
    prompt: Sequence[float | None], output: Sequence[float | None], *, signal: ForecastSignal, horizon_s: float
) -> Reading:
    """The highest rates expected up to horizon_s from the end of the series. Slow."""
    period = max(2, round(signal.season_s / signal.step_s))
    needed = SEASONS_NEEDED * period
    if len(prompt) < needed:
        there = len(prompt) * signal.step_s
        return Reading(error=f"needs {needed * signal.step_s:g} s of history (two seasons) and has {there:g} s")
    steps = max(1, math.ceil(horizon_s / signal.step_s))
    rates = [_highest(series, period=period, steps=steps) for series in (prompt, output)]
    return Reading(age_s=0.0, prompt_tokens_per_s=rates[0], output_tokens_per_s=rates[1], horizon_s=horizon_s)


def _highest(series: Sequence[float | None], *, period: int, steps: int) -> float:
    from statsmodels.tsa.holtwinters import ExponentialSmoothing  # type: ignore[import-untyped]

    values = filled(series, period=period)
    if float(values.max()) == float(values.min()):
        return float(values[-1])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it converged badly: a forecast is only a floor
        model = ExponentialSmoothing(
            values, trend=None, seasonal="add", seasonal_periods=period, initialization_method="heuristic"
        )
        ahead = model.fit(use_brute=False).forecast(steps)
    # Never more than twice what was ever seen: a fit that went wrong must not buy machines.
    return float(np.clip(np.nanmax(np.asarray(ahead, dtype=float)), 0.0, 2.0 * values.max()))


def filled(series: Sequence[float | None], *, period: int) -> Any:
    """Gaps take the value of a season before, or the last one known: a cluster that was down had no less load to expect."""
    values: list[float] = []
    known = next((value for value in series if value is not None), 0.0)
    for index, value in enumerate(series):
        if value is None:
            value = values[index - period] if index >= period else known
        values.append(value)
        known = value
    return np.asarray(values, dtype=float)
