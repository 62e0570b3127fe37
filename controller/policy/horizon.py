"""How far ahead to look: as long as a worker needs to join, as measured, and what the load will be then. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence

from flexpert.controller.policy.types import Observation, PolicyConfig, Sample, State

EWMA_SHARE = 0.3  # of the newest join
MOST_JOINS = 20
LONGEST_S = 600.0  # nobody trusts a straight line for longer
LEAST_SAMPLES = 6
SURE = 4.0  # standard errors by which a slope must differ from none
MOST_AHEAD = 2.0  # of the load now
LEAST_RISE = 0.1  # of it


def with_join(state: State, seconds: float) -> tuple[tuple[float, ...], float]:
    """`joins` and `join_ewma_s` after one more join."""
    before = state.join_ewma_s
    ewma = seconds if before is None else before + EWMA_SHARE * (seconds - before)
    return (*state.joins, round(seconds, 3))[-MOST_JOINS:], round(ewma, 6)


def join_s(observation: Observation, state: State) -> float:
    """The time until an ordered worker serves, to be on the safe side: the longer of EWMA and p95; 0 where nothing is known."""
    if len(state.joins) >= 3:
        ordered = sorted(state.joins)
        return max(state.join_ewma_s or 0.0, ordered[math.ceil(0.95 * len(ordered)) - 1])
    measured = observation.join_s
    known = 0.0 if measured is None or not measured.count else max(measured.mean_s, measured.p95_s)
    return max(known, state.join_ewma_s or 0.0)


def ahead_s(observation: Observation, state: State, config: PolicyConfig) -> float:
    """A worker ordered at the next tick serves after this long."""
    return min(join_s(observation, state) + config.interval_s, LONGEST_S)


def window_s(ahead: float) -> float:
    """Over which a trend is taken: it must be older than what it foretells."""
    return min(max(60.0, 3.0 * ahead), LONGEST_S)


def slope(loads: Sequence[Sample], since_s: float) -> float:
    """Workers per second by least squares; 0 where that is not sure."""
    points = [(load.at_s, load.value) for load in loads if load.at_s > since_s]
    count = len(points)
    if count < LEAST_SAMPLES:
        return 0.0
    mean_t = math.fsum(t for t, _ in points) / count
    mean_v = math.fsum(v for _, v in points) / count
    across = math.fsum((t - mean_t) ** 2 for t, _ in points)
    if across <= 0.0:
        return 0.0
    found = math.fsum((t - mean_t) * (v - mean_v) for t, v in points) / across
    rest = math.fsum((v - mean_v - found * (t - mean_t)) ** 2 for t, v in points)
    error = math.sqrt(rest / (count - 2) / across)
    return found if abs(found) > SURE * error else 0.0


def load_ahead(trend: Sequence[Sample], load: float, *, now_s: float, ahead: float) -> float | None:
    """The load when a worker ordered now serves; None where it does not rise, or by no more than LEAST_RISE."""
    rise = slope(trend, now_s - window_s(ahead)) * ahead
    if rise <= LEAST_RISE * load:
        return None
    return load + min(rise, (MOST_AHEAD - 1.0) * load)
