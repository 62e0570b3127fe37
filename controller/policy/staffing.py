"""How many workers so that work which comes at random finds a free one in time. Pure; formulas of queues, used by `signals_math`."""

from __future__ import annotations

import math

MOST_SPARE = 3.0  # square roots of the busy ones: beyond, hardly anybody waits
STEPS = 10  # of halving: to 0.003 square roots


def staffed(busy: float, *, late: float, times: float) -> float:
    """Workers with which a share `late` waits for longer than `times` times as long as one piece of work takes; `busy` are on average.

    M/M/m: who waits does so for an exponential time, which ends the sooner the more are spare.
    """
    root, low, high = math.sqrt(busy), 0.0, MOST_SPARE
    for _ in range(STEPS):
        spare = (low + high) / 2.0
        if waits(spare) * math.exp(-spare * root * times) > late:
            low = spare
        else:
            high = spare
    return busy + high * root


def waits(spare: float) -> float:
    """The share that waits at all, where so many square roots of the busy workers are spare (Halfin and Whitt 1981, eq. 2.3)."""
    below = 0.5 * (1.0 + math.erf(spare / math.sqrt(2.0)))
    density = math.exp(-spare * spare / 2.0) / math.sqrt(2.0 * math.pi)
    return 1.0 / (1.0 + spare * below / density)
