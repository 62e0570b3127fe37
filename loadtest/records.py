"""Recorded requests as columns, and what may be done to them before they are replayed: spread, thin, multiply.

The readers of trace_formats.py make Records; traces.py cuts, scales and hands them out as Arrivals. Random choices come
from numpy Generators given from outside, so equal seeds make equal records.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from flexpert.loadtest.schedule import ScheduleError

__all__ = ["BUCKET_S", "COPY_SPREAD_S", "Records", "TraceError", "spread_buckets", "with_rate"]

COPY_SPREAD_S = 5.0  # a copy made for a higher rate stands up to so far from its original
BUCKET_S = 0.5  # a clock that steps so far or further, with several requests a step, is coarse: its steps are buckets


class TraceError(ScheduleError):
    """A trace that cannot be replayed; the message names file and line, what was found and what was expected."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Records:
    """Columns of equal length, sorted by time, from 0 on.

    sessions and prefixes are None where the format has none. prefix_block_tokens: how many tokens an id of prefixes stands for.
    """

    at_s: NDArray[np.float64]
    prompt_tokens: NDArray[np.int64]
    output_tokens: NDArray[np.int64]
    sessions: tuple[str, ...] | None = None
    prefixes: tuple[tuple[int, ...], ...] | None = None
    prefix_block_tokens: int = 0

    def __len__(self) -> int:
        return len(self.at_s)

    @property
    def tick_s(self) -> float:
        """The step of the clock it was recorded with, if that is so coarse that requests share its ticks; else 0."""
        ticks_s = np.unique(self.at_s)
        step_s = float(np.median(np.diff(ticks_s))) if len(ticks_s) > 1 else 0.0
        return step_s if step_s >= BUCKET_S and len(self) >= 1.5 * len(ticks_s) else 0.0

    @property
    def span_s(self) -> float:
        """To the last arrival and one tick or one mean gap on, so that n equal gaps hold n requests."""
        last_s = float(self.at_s[-1])
        return last_s + (self.tick_s or last_s / max(len(self) - 1, 1) or 1.0)

    def take(self, rows: NDArray[np.intp]) -> Records:
        """The rows of these numbers, in that order."""
        return replace(
            self,
            at_s=self.at_s[rows],
            prompt_tokens=self.prompt_tokens[rows],
            output_tokens=self.output_tokens[rows],
            sessions=None if self.sessions is None else tuple(self.sessions[row] for row in rows),
            prefixes=None if self.prefixes is None else tuple(self.prefixes[row] for row in rows),
        )


def spread_buckets(records: Records, random: np.random.Generator) -> Records:
    """Requests that share a time because the recording's clock was coarse, each at a random moment until its next tick.

    Mooncake's conversation trace stands in ticks of 3 s: replayed as it is, it would be a train of bursts of ten. Records whose clock
    is finer than BUCKET_S, or that share no times, are returned as they are. The order is kept.
    """
    step_s = records.tick_s
    if not step_s:
        return records
    ticks_s, counts = np.unique(records.at_s, return_counts=True)
    widths_s = np.minimum(np.diff(ticks_s, append=ticks_s[-1] + step_s), step_s)
    tick_of = np.repeat(np.arange(len(ticks_s)), counts)
    offsets = random.random(len(records))
    offsets = offsets[np.lexsort((offsets, tick_of))]  # sorted within each tick: the order of the file stays
    return replace(records, at_s=ticks_s[tick_of] + offsets * widths_s[tick_of])


def with_rate(records: Records, rate: float, random: np.random.Generator) -> Records:
    """rate times as many requests over the same time.

    Below 1 each request (each whole session, where there are sessions) stays with that probability. Above 1 each gets copies, up to
    COPY_SPREAD_S away; a copy is another user: its session and its prefixes are its own.
    """
    if rate == 1.0 or not len(records):
        return records
    unit_of, units = _units(records)
    copies = np.floor(rate + random.random(units)).astype(np.int64)  # of each session or request; the mean is rate
    parts = [records.take(np.flatnonzero(copies[unit_of] > 0))]
    next_prefix = 1 + max((max(prefix, default=0) for prefix in records.prefixes or ()), default=0)
    for copy in range(1, int(copies.max(initial=0))):
        moved_s = random.uniform(-COPY_SPREAD_S, COPY_SPREAD_S, units)
        rows = np.flatnonzero(copies[unit_of] > copy)
        parts.append(_copy(records, rows, moved_s[unit_of[rows]], copy, next_prefix))
    return _joined(parts)


def _units(records: Records) -> tuple[NDArray[np.int64], int]:
    """For each record the number of its session (or its own, where it has none), and how many there are."""
    if records.sessions is None:
        return np.arange(len(records)), len(records)
    numbers: dict[str, int] = {}
    keys = (session or f"\0{row}" for row, session in enumerate(records.sessions))
    unit_of = np.array([numbers.setdefault(key, len(numbers)) for key in keys], dtype=np.int64)
    return unit_of, len(numbers)


def _copy(
    records: Records, rows: NDArray[np.intp], moved_s: NDArray[np.float64], number: int, next_prefix: int
) -> Records:
    part = records.take(rows)
    end_s = records.span_s
    at_s = np.abs(part.at_s + moved_s)  # what falls out at one end comes back in, as far inside
    at_s = np.where(at_s >= end_s, np.maximum(2 * end_s - at_s, 0.0), at_s)
    sessions, prefixes = part.sessions, part.prefixes
    if sessions is not None:
        sessions = tuple(session and f"{session}#{number}" for session in sessions)
    if prefixes is not None:
        prefixes = tuple(tuple(block + number * next_prefix for block in prefix) for prefix in prefixes)
    return replace(part, at_s=at_s, sessions=sessions, prefixes=prefixes)


def _joined(parts: list[Records]) -> Records:
    """All of them, by time."""
    first = parts[0]
    whole = replace(
        first,
        at_s=np.concatenate([part.at_s for part in parts]),
        prompt_tokens=np.concatenate([part.prompt_tokens for part in parts]),
        output_tokens=np.concatenate([part.output_tokens for part in parts]),
        sessions=None if first.sessions is None else tuple(s for part in parts for s in part.sessions or ()),
        prefixes=None if first.prefixes is None else tuple(p for part in parts for p in part.prefixes or ()),
    )
    return whole.take(np.argsort(whole.at_s, kind="stable"))
