"""Traffic shapes as data: how the rate goes over time, how regular the arrivals are, and how shapes combine.

A Curve is a rate over time (straight between its points) with a process: gaps of an even process are stretched by the curve (time
rescaling), so cv 0 keeps perfect order, cv 1 is a Poisson process of that very rate, and above 1 requests come in bunches. Everything is
seeded by numpy: the same shape and seed give the same bytes (with one release of numpy). spec.py makes shapes from text and YAML.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from flexpert.loadtest import traces
from flexpert.loadtest.lengths import Mix
from flexpert.loadtest.schedule import Arrival, merged, shifted, stretched, until

__all__ = [
    "Curve",
    "Scale",
    "Sequence",
    "Shape",
    "Sum",
    "Trace",
    "arrivals",
    "duration_s",
    "expected_requests",
    "words",
]

BLOCK = 4096
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Curve:
    """points: (seconds, requests/s), times rising, two at the same time are a jump. cv: of the gaps. text: as it was asked for."""

    points: tuple[tuple[float, float], ...]
    cv: float
    text: str


@dataclass(frozen=True)
class Trace:
    """A recorded schedule; the fields are those of traces.open_trace."""

    source: str
    text: str
    format: str = ""
    start_s: float = 0.0
    end_s: float | None = None
    time: float = 1.0
    rate: float = 1.0
    tokens: float = 1.0


@dataclass(frozen=True)
class Sum:
    """All at once."""

    parts: tuple[Shape, ...]


@dataclass(frozen=True)
class Sequence:
    """One after the other; each but the last has a duration."""

    parts: tuple[Shape, ...]


@dataclass(frozen=True)
class Scale:
    """rate: times as many requests. time: times as long, at the rate divided by that."""

    part: Shape
    rate: float = 1.0
    time: float = 1.0


Shape = Curve | Trace | Sum | Sequence | Scale


def arrivals(shape: Shape, *, seed: int, mix: Mix) -> Iterator[Arrival]:
    """The schedule, lazily. mix: lengths of what a curve sends; a trace brings its own."""
    return _arrivals(shape, np.random.SeedSequence(seed), mix)


def _arrivals(shape: Shape, seed: np.random.SeedSequence, mix: Mix) -> Iterator[Arrival]:
    match shape:
        case Curve():
            return _of_curve(shape, seed, mix)
        case Trace():
            return open_trace(shape, seed=int(seed.generate_state(1)[0])).arrivals()
        case Sum(parts):
            seeds = _children(seed, len(parts))
            return merged([_named(_arrivals(part, seeds[i], mix), i) for i, part in enumerate(parts)])
        case Sequence(parts):
            return _of_sequence(parts, _children(seed, len(parts)), mix)
        case Scale(part, rate, time):
            found = _arrivals(_at_rate(part, rate), seed, mix)
            return found if time == 1 else stretched(found, time)


@functools.lru_cache(maxsize=4)
def open_trace(trace: Trace, *, seed: int) -> traces.Trace:
    """Read and checked. Raises TraceError."""
    return traces.open_trace(
        trace.source, format_name=trace.format, start_s=trace.start_s, end_s=trace.end_s, time_factor=trace.time, rate=trace.rate,
        tokens=trace.tokens, seed=seed,
    )  # fmt: skip


def _children(seed: np.random.SeedSequence, count: int) -> list[np.random.SeedSequence]:
    """Like spawn(), but the same at every call."""
    return [np.random.SeedSequence(seed.entropy, spawn_key=(*seed.spawn_key, i)) for i in range(count)]


def _of_curve(curve: Curve, seed: np.random.SeedSequence, mix: Mix) -> Iterator[Arrival]:
    for_times, for_lengths = (np.random.default_rng(child) for child in _children(seed, 2))
    inverse, total = _inverse(curve.points)
    past = -1.0 if curve.cv == 0 else 0.0  # perfect order begins with a request at 0
    while past < total:
        gaps = _gaps(curve.cv, for_times)
        sums = past + np.cumsum(gaps)
        past = float(sums[-1])
        sums = sums[sums < total - 1e-9]
        yield from mix.draw(inverse(sums), for_lengths)


def _gaps(cv: float, rng: np.random.Generator) -> Floats:
    """Of mean 1."""
    if cv == 0:
        return np.ones(BLOCK)
    return rng.gamma(1 / cv**2, cv**2, BLOCK)


def _inverse(points: tuple[tuple[float, float], ...]) -> tuple[Callable[[Floats], Floats], float]:
    """(the time by which so many requests are expected, how many there are in all)."""
    times, rates = (np.array(column) for column in zip(*points, strict=True))
    spans = np.diff(times)
    expected = np.concatenate([[0.0], np.cumsum((rates[1:] + rates[:-1]) / 2 * spans)])
    slopes = np.divide(np.diff(rates), spans, out=np.zeros_like(spans), where=spans > 0)

    def inverse(counts: Floats) -> Floats:
        segment = np.clip(np.searchsorted(expected, counts, side="right") - 1, 0, len(spans) - 1)
        left, rate, slope = counts - expected[segment], rates[segment], slopes[segment]
        root = rate + np.sqrt(np.maximum(rate**2 + 2 * slope * left, 0))
        return times[segment] + np.divide(2 * left, root, out=np.zeros_like(left), where=root > 0)  # type: ignore[no-any-return]

    return inverse, float(expected[-1])


def _of_sequence(parts: tuple[Shape, ...], seeds: list[np.random.SeedSequence], mix: Mix) -> Iterator[Arrival]:
    began_s = 0.0
    for i, part in enumerate(parts):
        length_s = duration_s(part)
        yield from shifted(until(_named(_arrivals(part, seeds[i], mix), i), length_s), began_s)
        began_s += length_s


def _named(schedule: Iterator[Arrival], number: int) -> Iterator[Arrival]:
    """Conversations of different parts are different ones."""
    return (replace(a, session=f"{number}/{a.session}") if a.session else a for a in schedule)


def _at_rate(shape: Shape, factor: float) -> Shape:
    """The factor taken down to the curves and traces."""
    match shape:
        case Curve():
            return replace(shape, points=tuple((at_s, rate * factor) for at_s, rate in shape.points))
        case Trace():
            return replace(shape, rate=shape.rate * factor)
        case Scale(part, rate, time):
            return Scale(part, rate * factor, time)
        case Sum(parts):
            return Sum(tuple(Scale(part, factor) for part in parts))
        case Sequence(parts):
            return Sequence(tuple(Scale(part, factor) for part in parts))


def duration_s(shape: Shape) -> float:
    """Of the whole. Reads the traces in it."""
    match shape:
        case Curve(points):
            return points[-1][0]
        case Trace():
            return open_trace(shape, seed=0).span_s
        case Scale(part, _, time):
            return duration_s(part) * time
        case Sum(parts):
            return max(map(duration_s, parts))
        case Sequence(parts):
            return math.fsum(map(duration_s, parts))


def expected_requests(shape: Shape) -> float:
    """On the mean over all seeds."""
    match shape:
        case Curve(points):
            return _inverse(points)[1]
        case Trace():
            return open_trace(shape, seed=0).requests
        case Scale(part, rate, _):
            return expected_requests(_at_rate(part, rate))
        case Sum(parts) | Sequence(parts):
            return math.fsum(map(expected_requests, parts))


def words(shape: Shape) -> str:
    """As text that spec.py reads again."""
    match shape:
        case Curve() | Trace():
            return shape.text
        case Sum(parts):
            return " + ".join(_bracketed(part) for part in parts)
        case Sequence(parts):
            return " then ".join(_bracketed(part) for part in parts)
        case Scale(part, rate, time):
            factors: list[Any] = [f"{rate:g} *"] if rate != 1 or time == 1 else []
            factors += [f"time {time:g} *"] if time != 1 else []
            return " ".join([*factors, _bracketed(part)])


def _bracketed(shape: Shape) -> str:
    return words(shape) if isinstance(shape, Curve | Trace) else f"({words(shape)})"
