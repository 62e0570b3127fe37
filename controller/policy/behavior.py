"""Stabilisation windows, tolerance and rules per period, with the meaning they have in Kubernetes HPA v2 `behavior`. Pure.

Called by `controller.policy.decide` and the verdicts beside it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from flexpert.controller.policy.types import Change, DirectionConfig, Order, PolicyConfig, RuleConfig, Sample

MOST_SAMPLES = 240  # of one window; a shorter interval is thinned out


def push_peak(steps: tuple[Sample, ...], sample: Sample, *, window_s: float) -> tuple[Sample, ...]:
    """Falling steps: the first is the highest of the last window_s."""
    kept = [step for step in steps if step.at_s > sample.at_s - window_s]
    while kept and kept[-1].value <= sample.value:
        kept.pop()
    return (*kept, sample)


def push_dip(steps: tuple[Sample, ...], sample: Sample, *, window_s: float) -> tuple[Sample, ...]:
    """Rising steps: the first is the lowest of the last window_s."""
    kept = [step for step in steps if step.at_s > sample.at_s - window_s]
    while kept and kept[-1].value >= sample.value:
        kept.pop()
    return (*kept, sample)


def push_load(loads: tuple[Sample, ...], sample: Sample, *, window_s: float) -> tuple[Sample, ...]:
    kept = tuple(load for load in loads if load.at_s > sample.at_s - window_s)
    if len(kept) >= MOST_SAMPLES:
        kept = kept[1::2]
    return (*kept, sample)


def mean_since(loads: Sequence[Sample], since_s: float) -> float | None:
    found = [load.value for load in loads if load.at_s > since_s]
    return math.fsum(found) / len(found) if found else None


def longest_period_s(config: PolicyConfig) -> float:
    return max((rule.period_s for rule in (*config.up.rules, *config.down.rules)), default=0.0)


def _then(changes: Sequence[Change], now: int, *, since_s: float, grew: bool) -> int:
    """How many there were at the period's begin, counted back over the changes of one direction as HPA does."""
    deltas = [change.to_workers - change.from_workers for change in changes if change.at_s > since_s]
    return now - sum(delta for delta in deltas if (delta > 0) == grew)


def up_limit(direction: DirectionConfig, changes: Sequence[Change], now: int, *, now_s: float) -> float:
    """The most workers that the rules allow at this moment; infinite without rules."""

    def limit(rule: RuleConfig) -> int:
        then = max(0, _then(changes, now, since_s=now_s - rule.period_s, grew=True))
        if rule.type == "workers":
            return then + math.floor(rule.value)
        return math.ceil(then * (1.0 + rule.value / 100.0) - 1e-9)

    return _select(direction, [float(limit(rule)) for rule in direction.rules], most=max, least=min, none=math.inf)


def down_limit(direction: DirectionConfig, changes: Sequence[Change], now: int, *, now_s: float) -> float:
    """The fewest workers that the rules allow at this moment."""

    def limit(rule: RuleConfig) -> int:
        then = _then(changes, now, since_s=now_s - rule.period_s, grew=False)
        if rule.type == "workers":
            return then - math.floor(rule.value)
        return math.floor(then * (1.0 - rule.value / 100.0) + 1e-9)

    return _select(direction, [float(limit(rule)) for rule in direction.rules], most=min, least=max, none=0.0)


def _select(
    direction: DirectionConfig,
    limits: list[float],
    *,
    most: Callable[..., float],
    least: Callable[..., float],
    none: float,
) -> float:
    if not limits:
        return none
    return least(limits) if direction.select == "Min" else most(limits)


def without(changes: tuple[Change, ...], order: Order) -> tuple[Change, ...]:
    """The changes less one that came to nothing."""
    return tuple(change for change in changes if change.at_s != order.at_s)
