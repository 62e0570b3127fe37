"""ServeGen's clients: measured rates and burstiness per client and window, from which arrivals are generated.

A folder or a tar archive holds `chunk-N-trace.csv` for each client N (window start, requests/s, CV of the gaps, pattern, two fitted
parameters) and, where lengths are known, `chunk-N-dataset.json`. Source: Xiang et al., "ServeGen: Workload Characterization and Generation
of LLM Serving in Production", arXiv 2505.09999. Used by traces.py.

In each window each client is a renewal process: gaps from a Gamma or Weibull distribution with the window's CV, then fitted to the window
so that it holds exactly as many requests as were counted there. (For Gamma gaps that is the process itself, given its count.)
"""

from __future__ import annotations

import ast
import csv
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flexpert.loadtest.records import Records, TraceError

__all__ = ["MAX_CV", "MIN_CV", "Clients", "Lengths", "read_clients"]

# Beyond, a CV tells of a pause within the window rather than of bursts: 26 for one window in a hundred, up to 797.
MAX_CV = 16.0
MIN_CV = 0.02
_IDLE, _GAMMA, _WEIBULL = 0, 1, 2
_PATTERNS = {"": _IDLE, "Gamma": _GAMMA, "Weibull": _WEIBULL}
_COLUMNS = "window start, requests/s, cv, pattern (Gamma, Weibull or empty), two parameters"
_TRACE_FILE = re.compile(r"(?:.*/)?(chunk-(\d+))-trace\.csv")
_WEIBULL_SHAPES = np.geomspace(0.1, 100.0, 2000)


def _weibull_cv(shape: float) -> float:
    """sqrt(gamma(1 + 2/k) / gamma(1 + 1/k)^2 - 1), by logarithms."""
    return math.sqrt(math.expm1(math.lgamma(1 + 2 / shape) - 2 * math.lgamma(1 + 1 / shape)))


_WEIBULL_LOG_CVS = np.log([_weibull_cv(shape) for shape in _WEIBULL_SHAPES])  # falls with the shape

# Draws (prompt, output) lengths for n requests.
Lengths = Callable[[int, np.random.Generator], tuple[NDArray[np.int64], NDArray[np.int64]]]


@dataclass(frozen=True, slots=True)
class _Distribution:
    """Of token counts: values, and the cumulative probabilities they end at."""

    values: NDArray[np.int64]
    ends: NDArray[np.float64]

    def draw(self, n: int, random: np.random.Generator) -> NDArray[np.int64]:
        found: NDArray[np.int64] = self.values[np.searchsorted(self.ends, random.random(n), side="right")]
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Clients:
    """requests, shapes, patterns: [client, window]. lengths: [client] -> (window start, prompt, output) by start, empty: none known."""

    names: tuple[str, ...]
    window_s: float
    requests: NDArray[np.float64]
    shapes: NDArray[np.float64]
    patterns: NDArray[np.int8]
    lengths: tuple[tuple[tuple[float, _Distribution, _Distribution], ...], ...]

    @property
    def windows(self) -> int:
        return int(self.requests.shape[1])

    @property
    def has_lengths(self) -> bool:
        return any(self.lengths)

    def generate(self, window: int, *, rate: float, seed: int, others: Lengths) -> Records:
        """The requests of one window, times from the start of the trace. others: lengths for clients that have none.

        Each window has its own random numbers, so a part of a trace is the same whether the rest is generated or not.
        """
        random = np.random.default_rng([seed, window])
        wanted = self.requests[:, window] * rate
        counts = np.floor(wanted + random.random(len(wanted))).astype(np.int64)
        if rate == 1.0:
            counts = np.rint(wanted).astype(np.int64)
        clients = np.flatnonzero(counts)
        at_s = self._times(window, clients, counts[clients], random)
        lengths = [self._draw(int(client), window, int(counts[client]), random, others) for client in clients]
        prompt, output = ([part[side] for part in lengths] for side in (0, 1))
        none = [np.zeros(0, dtype=np.int64)]
        order = np.argsort(at_s, kind="stable")
        return Records(
            at_s=at_s[order],
            prompt_tokens=np.concatenate(prompt or none)[order],
            output_tokens=np.concatenate(output or none)[order],
        )

    def _times(
        self, window: int, clients: NDArray[np.intp], counts: NDArray[np.int64], random: np.random.Generator
    ) -> NDArray[np.float64]:
        """By client, sorted within each: count + 1 gaps that fill the window, the last one behind the last request."""
        gaps = counts + 1
        shape = np.repeat(self.shapes[clients, window], gaps)
        weibull = np.repeat(self.patterns[clients, window] == _WEIBULL, gaps)
        draws = np.empty(len(shape))
        draws[~weibull] = random.standard_gamma(shape[~weibull])
        draws[weibull] = random.weibull(shape[weibull])
        reached = np.cumsum(draws)
        ends = np.cumsum(gaps) - 1  # the row of each client's last gap
        began = np.concatenate(([0.0], reached[ends[:-1]])) if len(ends) else np.zeros(0)
        span = reached[ends] - began
        share = (reached - np.repeat(began, gaps)) / np.repeat(np.where(span > 0, span, 1.0), gaps)
        keep = np.ones(len(share), dtype=bool)
        keep[ends] = False
        # Rounding may reach 1 or leave [0, 1) by a hair; a request of this window stays in it.
        at_s: NDArray[np.float64] = (window + np.clip(share[keep], 0.0, 1.0 - 1e-9)) * self.window_s
        return at_s

    def _draw(
        self, client: int, window: int, n: int, random: np.random.Generator, others: Lengths
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        known = self.lengths[client]
        if not known:
            return others(n, random)
        start_s = window * self.window_s
        _, prompt, output = next((each for each in reversed(known) if each[0] <= start_s), known[0])
        return prompt.draw(n, random), output.draw(n, random)


def read_clients(files: Mapping[str, Callable[[], str]], name: str) -> Clients:
    """files: path -> its text, read when called. Raises TraceError naming the file and the line."""
    found = sorted(
        (int(match[2]), path, path.replace("-trace.csv", "-dataset.json"))
        for path in files
        if (match := _TRACE_FILE.fullmatch(path))
    )
    if not found:
        raise TraceError(f"{name}: no chunk-N-trace.csv in it; expected ServeGen's files of one service")
    rates = [_read_rates(files[path](), f"{name}: {path}") for _, path, _ in found]
    starts = rates[0].starts
    for (_, path, _), each in zip(found, rates, strict=True):
        if each.starts != starts:
            raise TraceError(
                f"{name}: {path}: its windows are not those of {found[0][1]}; expected the same in all files"
            )
    window_s = starts[1] - starts[0] if len(starts) > 1 else 600.0
    requests = np.array([each.rates for each in rates]) * window_s
    return Clients(
        names=tuple(f"client {number}" for number, _, _ in found),
        window_s=window_s,
        requests=np.round(requests, 3),
        shapes=np.array([each.shapes for each in rates]),
        patterns=np.array([each.patterns for each in rates], dtype=np.int8),
        lengths=tuple(_read_lengths(files[path](), f"{name}: {path}") if path in files else () for _, _, path in found),
    )


@dataclass(frozen=True, slots=True)
class _Rates:
    starts: list[float]
    rates: list[float]
    shapes: list[float]
    patterns: list[int]


def _read_rates(text: str, where: str) -> _Rates:
    found = _Rates([], [], [], [])
    for number, cells in enumerate(csv.reader(text.splitlines()), start=1):
        if not cells:
            continue
        try:
            start_s, rate, cv = (float(cell) for cell in cells[:3])
            pattern = _PATTERNS[cells[3].strip()]
        except (ValueError, KeyError, IndexError) as error:
            raise TraceError(f"{where}: line {number}: found {','.join(cells)[:80]}; expected {_COLUMNS}") from error
        if not (0 <= start_s < math.inf and 0 <= rate < math.inf and 0 <= cv < math.inf):
            raise TraceError(f"{where}: line {number}: found {','.join(cells)[:80]}; expected numbers from 0 on")
        if not _follows(start_s, found.starts):
            after = f" after {found.starts[-1]:g}" if found.starts else ""
            raise TraceError(
                f"{where}: line {number}: window start {cells[0]}{after}; expected them to rise from 0 in equal steps"
            )
        if pattern == _IDLE and rate > 0:
            raise TraceError(f"{where}: line {number}: rate {cells[1]} without a pattern; expected Gamma or Weibull")
        found.starts.append(start_s)
        found.rates.append(rate)
        found.patterns.append(pattern)
        found.shapes.append(_shape(pattern, cv))
    if not found.starts:
        raise TraceError(f"{where}: the file is empty; expected a line for each window: {_COLUMNS}")
    return found


def _follows(start_s: float, starts: list[float]) -> bool:
    """Is this the window after those: the first at 0, then in equal steps?"""
    if not starts:
        return start_s == 0
    if len(starts) == 1:
        return start_s > starts[0]
    return abs(start_s - (2 * starts[-1] - starts[-2])) < 1e-6


def _shape(pattern: int, cv: float) -> float:
    """The shape parameter of the gaps that have this CV. Gamma: 1/cv^2."""
    cv = min(max(cv, MIN_CV), MAX_CV)
    if pattern == _WEIBULL:
        return float(np.interp(-math.log(cv), -_WEIBULL_LOG_CVS, _WEIBULL_SHAPES))
    return 1 / cv**2


def _read_lengths(text: str, where: str) -> tuple[tuple[float, _Distribution, _Distribution], ...]:
    try:
        windows = {float(start): sides for start, sides in json.loads(text).items()}
    except (ValueError, AttributeError) as error:
        raise TraceError(f"{where}: {error}; expected a JSON object: window start -> distributions") from error
    found = []
    for start_s, sides in sorted(windows.items(), key=lambda item: item[0]):
        prompt, output = (
            _distribution(sides, key, f"{where}: {start_s:g}") for key in ("input_tokens", "output_tokens")
        )
        if prompt is not None and output is not None:  # a client that was idle has none
            found.append((start_s, prompt, output))
    return tuple(found)


def _distribution(sides: object, key: str, where: str) -> _Distribution | None:
    """A distribution is written as the text of a Python dict: read as a literal, never run."""
    try:
        literal = ast.literal_eval(sides[key])  # type: ignore[index]
        values = np.array([int(value) for value in literal], dtype=np.int64)
        weights = np.array([float(weight) for weight in literal.values()])
    except (ValueError, SyntaxError, TypeError, KeyError, AttributeError, MemoryError, RecursionError) as error:
        raise TraceError(f"{where}: {key}: {error}; expected a dict literal of value: probability") from error
    if not len(values):
        return None
    if (values < 0).any() or (weights < 0).any() or not 0 < weights.sum() < math.inf:
        raise TraceError(f"{where}: {key}: a negative value or probability; expected numbers from 0 on")
    ends = np.cumsum(weights / weights.sum())
    ends[-1] = 1.0
    return _Distribution(np.maximum(values, 1), ends)


def windows_between(clients: Clients, start_s: float, end_s: float) -> Iterator[int]:
    """The windows that hold times of [start_s, end_s)."""
    first = max(int(start_s // clients.window_s), 0)
    last = min(math.ceil(end_s / clients.window_s), clients.windows)
    yield from range(first, last)
