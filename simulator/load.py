"""What arrives in a simulation, as columns: a schedule, or a half of it, as recorded or scaled.

Where one simulated request stands for n, the columns hold every n-th part of the load: `stands_for` says how many each row counts.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from flexpert.loadtest.schedule import Arrival

__all__ = ["Load", "LoadError", "load_of"]

Half = Literal["", "first", "second"]


class LoadError(ValueError):
    """A load that cannot be simulated; the message says why."""


@dataclass(frozen=True, slots=True)
class Load:
    """Row i: one request at at_s[i] (seconds, rising, from 0). span_s: how long the load lasts; costs are counted over it."""

    at_s: list[float]
    prompt_tokens: list[int]
    output_tokens: list[int]
    span_s: float
    stands_for: int = 1

    def __len__(self) -> int:
        return len(self.at_s)


def load_of(
    arrivals: Iterable[Arrival],
    *,
    scale: float = 1.0,
    stands_for: int = 1,
    half: Half = "",
    span_s: float | None = None,
    seed: int = 0,
) -> Load:
    """The schedule, `scale` times as dense, each row standing for `stands_for`. half: of the span; the second one begins at 0 again.

    Beyond one row for each arrival, copies are spread around it by up to a second, so that they do not come in step; a fraction is drawn.
    span_s None: up to the last arrival. Raises LoadError for an empty schedule or numbers that cannot be.
    """
    if not scale > 0:
        raise LoadError(f"scale {scale:g}: expected a number above 0")
    if stands_for < 1:
        raise LoadError(f"one request stands for {stands_for}: expected 1 or more")
    rows = [(arrival.at_s, arrival.prompt_tokens, arrival.output_tokens) for arrival in arrivals]
    if not rows:
        raise LoadError("the trace has no requests")
    at_s, prompt, output = (np.array(column, dtype=float) for column in zip(*rows, strict=True))
    if np.any(np.diff(at_s) < 0):
        raise LoadError("the arrivals are not sorted by time")
    span = float(span_s if span_s is not None else np.nextafter(at_s[-1], np.inf))
    if half:
        middle = span / 2
        chosen = at_s < middle if half == "first" else at_s >= middle
        at_s, prompt, output = at_s[chosen] - (middle if half == "second" else 0.0), prompt[chosen], output[chosen]
        span = middle
        if not len(at_s):
            raise LoadError(f"the {half} half of the trace has no requests")
    rng = np.random.default_rng([seed, 0])
    copies = scale / stands_for
    if copies != 1:
        counts = np.floor(copies + rng.random(len(at_s))).astype(int)
        places = np.repeat(np.arange(len(at_s)), counts)
        later = places[1:] == places[:-1]
        at_s, prompt, output = at_s[places], prompt[places], output[places]
        at_s[1:] += np.where(later, rng.uniform(-1.0, 1.0, max(0, len(places) - 1)), 0.0)
        at_s = np.clip(at_s, 0.0, np.nextafter(span, 0.0))
        order = np.argsort(at_s, kind="stable")
        at_s, prompt, output = at_s[order], prompt[order], output[order]
        if not len(at_s):
            raise LoadError(f"scale {scale:g} leaves no request of {len(rows)}")
    return Load(
        at_s=at_s.tolist(),
        prompt_tokens=prompt.astype(int).tolist(),
        output_tokens=output.astype(int).tolist(),
        span_s=span,
        stands_for=stands_for,
    )
