"""What a run leaves behind: one record a request, the sizes over time, and the figures made of them at the end.

Written by `simulator.runner`; `traffic` is what the modelled gateway tells the policy.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from flexpert.simulator.results import FLAP_WINDOW_S, Percentiles, Sampling, ScaleEvent, Slo, Timeline
from flexpert.simulator.service import Request

__all__ = ["Records", "Sizes", "count_flaps", "percentile", "percentiles", "sampling_of", "timeline_of"]

Floats = NDArray[np.float64]
FIELDS = 6  # arrived, ended, ttft, tpot, queue, weight
GROUPS = 32


class Records:
    """Requests by their end. A missing tpot (one output token) is NaN."""

    def __init__(self, *, slo: Slo) -> None:
        self._slo = slo
        self._ended = array("d")
        self._first = array("d")  # at, ttft, queue, weight of each first token
        self._routed = array("d")  # at, since its arrival, weight of each that went to a worker
        self._window = [0, 0, 0]  # where the traffic window begins in each

    def on_route(self, request: Request, now_s: float) -> None:
        self._routed.extend((now_s, now_s - request.arrived_s, request.weight))

    def on_first(self, request: Request, now_s: float) -> None:
        self._first.extend(
            (now_s, now_s - request.arrived_s + request.answer_s, request.started_s - request.arrived_s, request.weight)
        )

    def on_end(self, request: Request, now_s: float) -> None:
        first_s, arrived_s = request.first_s, request.arrived_s
        tpot_s = (now_s - first_s) / (request.output - 1) if request.output > 1 else float("nan")
        self._ended.extend(
            (
                arrived_s,
                now_s,
                first_s - arrived_s + request.answer_s,
                tpot_s,
                request.started_s - arrived_s,
                request.weight,
            )
        )

    def met(self, ttft_s: Floats, tpot_s: Floats) -> NDArray[np.bool_]:
        """A NaN in tpot_s holds every bound."""
        found = np.ones(len(ttft_s), dtype=bool)
        if self._slo.ttft_s is not None:
            found &= ttft_s <= self._slo.ttft_s
        if self._slo.tpot_s is not None:
            found &= ~(tpot_s > self._slo.tpot_s)
        return found

    def table(self) -> Floats:
        """[requests, FIELDS] in the order of their ends."""
        return np.array(self._ended).reshape(-1, FIELDS)

    def traffic(self, since_s: float) -> tuple[Floats, Floats, Floats]:
        """Ended requests [n, FIELDS], first tokens [n, 4] and routed ones [n, 3] from since_s on, which must not fall from call to call."""
        ended, first, routed = self._window
        while ended < len(self._ended) and self._ended[ended + 1] < since_s:
            ended += FIELDS
        while first < len(self._first) and self._first[first] < since_s:
            first += 4
        while routed < len(self._routed) and self._routed[routed] < since_s:
            routed += 3
        self._window = [ended, first, routed]
        return (
            np.array(self._ended[ended:]).reshape(-1, FIELDS),
            np.array(self._first[first:]).reshape(-1, 4),
            np.array(self._routed[routed:]).reshape(-1, 3),
        )


@dataclass(slots=True)
class Sizes:
    """Workers over time, as steps: from at_s[i] on so many are ready, hold a device, stand by."""

    at_s: list[float]
    ready: list[int]
    devices: list[int]
    standby: list[int]

    def note(self, now_s: float, *, ready: int, devices: int, standby: int) -> None:
        self.at_s.append(now_s)
        self.ready.append(ready)
        self.devices.append(devices)
        self.standby.append(standby)

    def integral(self, values: Sequence[int], edges: Floats) -> Floats:
        """Worker-seconds in each interval between two edges."""
        at_s = np.array(self.at_s)
        sums = np.concatenate([[0.0], np.cumsum(np.diff(at_s) * np.array(values[:-1], dtype=float))])
        places = np.clip(np.searchsorted(at_s, edges, side="right") - 1, 0, None)
        return np.diff(sums[places] + (edges - at_s[places]) * np.array(values, dtype=float)[places])


def percentile(values: Floats, weights: Floats, share: float) -> float | None:
    """The smallest value that `share` of the weight is at or below; None without values."""
    if not len(values):
        return None
    order = np.argsort(values, kind="stable")
    sums = np.cumsum(weights[order])
    return float(values[order][min(np.searchsorted(sums, share * sums[-1] * (1 - 1e-12)), len(values) - 1)])


def percentiles(values: Floats, weights: Floats) -> Percentiles:
    known = ~np.isnan(values)
    values, weights = values[known], weights[known]
    if not len(values):
        return Percentiles()
    order = np.argsort(values, kind="stable")
    sums = np.cumsum(weights[order])
    places = np.minimum(np.searchsorted(sums, np.array([0.5, 0.95, 0.99]) * sums[-1] * (1 - 1e-12)), len(values) - 1)
    p50, p95, p99 = (round(float(value), 6) for value in values[order][places])
    return Percentiles(mean=round(float(np.average(values, weights=weights)), 6), p50=p50, p95=p95, p99=p99)


def sampling_of(
    table: Floats, met: NDArray[np.bool_], *, stands_for: int, simulated: int, rng: np.random.Generator
) -> Sampling:
    """Standard errors from random groups of the sample; nothing was sampled where each request stands for itself."""
    if stands_for == 1 or len(table) < 4 * GROUPS:
        return Sampling(stands_for=stands_for, simulated=simulated)
    group = rng.integers(0, GROUPS, len(table))
    weights = table[:, 5]
    shares, tails = [], []
    for number in range(GROUPS):
        chosen = group == number
        shares.append(float(np.average(met[chosen], weights=weights[chosen])))
        tails.append(percentile(table[chosen, 2], weights[chosen], 0.95) or 0.0)
    of_all = float(np.sqrt((1 - 1 / stands_for) / GROUPS))  # groups of 1/GROUPS of the sample, a sample of 1/stands_for
    return Sampling(
        stands_for=stands_for,
        simulated=simulated,
        attainment_error=round(float(np.std(shares, ddof=1)) * of_all, 8),
        ttft_p95_error_s=round(float(np.std(tails, ddof=1)) * of_all, 8),
    )


def timeline_of(
    table: Floats,
    met: NDArray[np.bool_],
    sizes: Sizes,
    *,
    span_s: float,
    interval_s: float,
    arrivals: Floats,
    samples: Sequence[tuple[int, float, float, float]],
) -> Timeline:
    """samples: wanted, running, waiting and KV share at the end of each interval; arrivals: weight in each."""
    count = len(samples)
    edges: Floats = np.arange(count + 1, dtype=np.float64) * np.float64(interval_s)
    edges[-1] = max(span_s, edges[-2]) if count else 0.0
    weights = table[:, 5]

    def sums(times: Floats, amounts: Floats) -> tuple[float, ...]:
        places = np.minimum((times / interval_s).astype(int), count)
        return tuple(np.round(np.bincount(places, weights=amounts, minlength=count + 1)[:count], 6).tolist())

    lengths = np.maximum(np.diff(edges), 1e-9)
    return Timeline(
        interval_s=interval_s,
        at_s=tuple(np.round(edges[:-1], 6).tolist()),
        arrivals=tuple(np.round(arrivals[:count], 6).tolist()),
        met=sums(table[:, 1], weights * met),
        missed=sums(table[:, 1], weights * ~met),
        arrived_met=sums(table[:, 0], weights * met),
        workers=tuple(np.round(sizes.integral(sizes.ready, edges) / lengths, 4).tolist()),
        devices=tuple(np.round(sizes.integral(sizes.devices, edges) / lengths, 4).tolist()),
        wanted=tuple(sample[0] for sample in samples),
        running=tuple(round(sample[1], 3) for sample in samples),
        waiting=tuple(round(sample[2], 3) for sample in samples),
        kv_share=tuple(round(sample[3], 5) for sample in samples),
        ttft_p95_s=_tails(table[:, 1], table[:, 2], weights, edges),
        tpot_p95_s=_tails(table[:, 1], table[:, 3], weights, edges),
    )


def _tails(times: Floats, values: Floats, weights: Floats, edges: Floats) -> tuple[float | None, ...]:
    """p95 in each interval; `times` rise."""
    places = np.searchsorted(times, edges)
    found: list[float | None] = []
    for begin, end in pairwise(places):
        known = ~np.isnan(values[begin:end])
        tail = percentile(values[begin:end][known], weights[begin:end][known], 0.95)
        found.append(None if tail is None else round(tail, 6))
    return tuple(found)


def count_flaps(events: Sequence[ScaleEvent]) -> int:
    """Changes against the direction of the change before them, within FLAP_WINDOW_S of it."""
    changes = [event for event in events if event.state != "aborted" and event.from_workers != event.to_workers]
    return sum(
        (before.to_workers > before.from_workers) != (after.to_workers > after.from_workers)
        and after.at_s - before.at_s <= FLAP_WINDOW_S
        for before, after in pairwise(changes)
    )
