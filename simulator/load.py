"""What arrives in a simulation, as columns: a recorded trace or a part of it, or any schedule.

Where one simulated request stands for n, the columns hold an n-th of the load, and `stands_for` says how many each row counts.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from flexpert.loadtest.schedule import Arrival
from flexpert.loadtest.traces import Trace, open_trace

__all__ = ["Half", "Load", "LoadError", "load_of", "load_of_trace", "open_load"]

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


def load_of(arrivals: Iterable[Arrival], *, span_s: float | None = None, stands_for: int = 1) -> Load:
    """A schedule as it is. span_s None: up to its last arrival. Raises LoadError for an empty or unsorted one."""
    rows = [(arrival.at_s, arrival.prompt_tokens, arrival.output_tokens) for arrival in arrivals]
    if not rows:
        raise LoadError("the schedule has no requests")
    at_s, prompt, output = (list(column) for column in zip(*rows, strict=True))
    if any(np.diff(at_s) < 0):
        raise LoadError("the arrivals are not sorted by time")
    span_s = float(np.nextafter(at_s[-1], np.inf)) if span_s is None else span_s
    return Load(at_s, prompt, output, span_s, stands_for)


def load_of_trace(trace: Trace, *, stands_for: int = 1) -> Load:
    """All of a trace that was opened with its rate divided by stands_for."""
    blocks = list(trace.blocks())
    at_s, prompt, output = (
        np.concatenate([getattr(block, name) for block in blocks]).tolist()
        for name in ("at_s", "prompt_tokens", "output_tokens")
    )
    if not at_s:
        raise LoadError(f"{trace.name}: no requests are left of it")
    return Load(at_s, prompt, output, trace.span_s, stands_for)


def open_load(
    source: str,
    *,
    format_name: str = "",
    half: Half = "",
    part: tuple[float, float] | None = None,
    scale: float = 1.0,
    stands_for: int = 1,
    seed: int = 0,
) -> Load:
    """The trace, `scale` times as dense. half: of its time, the second one begins at 0 again; part: instead, from when to when (s).

    Raises LoadError, and traces.TraceError for what cannot be read.
    """
    if stands_for < 1:
        raise LoadError(f"one request stands for {stands_for}: expected 1 or more")
    trace = open_trace(source, format_name=format_name, rate=scale / stands_for, seed=seed)
    if half:
        middle_s = trace.recorded_s / 2
        part = (0.0, middle_s) if half == "first" else (middle_s, trace.recorded_s)
    if part is not None:
        trace = open_trace(
            source, format_name=format_name, rate=scale / stands_for, seed=seed, start_s=part[0], end_s=part[1]
        )
    return load_of_trace(trace, stands_for=stands_for)
