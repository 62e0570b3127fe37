"""Figures over many requests: quantiles, summaries, the timeline, and the generator's verdict on itself. Pure."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from flexpert.loadtest.measure import ENDS, Interval, Lag, Outcome, Quantiles, Summary, percentiles
from flexpert.loadtest.slo import met

__all__ = ["Gaps", "lag_of", "quantiles", "step_for", "summarise", "timeline"]

Floats = npt.NDArray[np.float64]


class Gaps:
    """Gaps between tokens, in buckets of 1% from a microsecond to 3 hours: their number has no bound, their memory has.

    A chunk of k tokens stands for k gaps of its gap / k. Servers do not say k; where usage shows that an answer had more tokens than
    chunks, all its chunks are taken for equally long.
    """

    LOW_S, STEP, BUCKETS = 1e-6, math.log(1.01), 2320
    FOLD = 4096  # values: a tenth of a millisecond, which nobody who has to be sent notices

    def __init__(self) -> None:
        self._counts: Floats = np.zeros(self.BUCKETS)
        self._sum_s = 0.0
        self._most_s = 0.0
        self._least_s = math.inf
        self._values: list[float] = []
        self._weighted: list[tuple[float, float]] = []  # (value, weight) of those that stand for several

    def add(self, gaps_s: list[float], *, tokens: int) -> None:
        """Of one answer; tokens: its output tokens."""
        if not gaps_s:
            return
        each = (tokens - 1) / len(gaps_s)
        if each <= 1.0:
            self._values += gaps_s
        else:
            self._weighted += [(gap_s / each, each) for gap_s in gaps_s]
        if len(self._values) + len(self._weighted) > self.FOLD:
            self.fold()

    def add_one(self, value_s: float) -> None:
        """For figures of which a request has one."""
        self._values.append(value_s)
        if len(self._values) > self.FOLD:
            self.fold()

    def fold(self) -> None:
        """Take what was added into the buckets."""
        if self._values:
            values = np.array(self._values)
            self._values.clear()
            self._count(values, np.ones(len(values)))
        if self._weighted:
            values, weights = np.array(self._weighted).T
            self._weighted.clear()
            self._count(values, weights)

    def _count(self, values: Floats, weights: Floats) -> None:
        buckets = np.clip(np.log(np.maximum(values, self.LOW_S) / self.LOW_S) / self.STEP, 0, self.BUCKETS - 1)
        self._counts += np.bincount(buckets.astype(np.int64), weights, minlength=self.BUCKETS)
        self._sum_s += float(values @ weights)
        self._most_s, self._least_s = max(self._most_s, float(values.max())), min(self._least_s, float(values.min()))

    @property
    def count(self) -> float:
        self.fold()
        return float(self._counts.sum())

    def statistic(self, name: str) -> float | None:
        """ "p99", "mean", "max" or "min"; None where there are none."""
        count = self.count
        if not count:
            return None
        if name == "mean":
            return self._sum_s / count
        if name in ("max", "min"):
            return self._most_s if name == "max" else self._least_s
        bucket = int(np.searchsorted(np.cumsum(self._counts), count * float(name[1:]) / 100 - 1e-9))
        middle_s = self.LOW_S * math.exp((bucket + 0.5) * self.STEP)
        return min(max(middle_s, self._least_s), self._most_s)

    def quantiles(self) -> Quantiles:
        names = ("mean", "min", "p50", "p90", "p95", "p99", "p99.9", "max")
        return Quantiles(round(self.count), *(self.statistic(name) for name in names))


def quantiles(values: Iterable[float | None]) -> Quantiles:
    """Of those that are not None."""
    found = np.array([value for value in values if value is not None])
    if not len(found):
        return Quantiles()
    p50, p90, p95, p99, p999 = percentiles(found, (50, 90, 95, 99, 99.9))
    return Quantiles(len(found), float(found.mean()), float(found.min()), p50, p90, p95, p99, p999, float(found.max()))


def summarise(
    outcomes: Sequence[Outcome], *, from_s: float, to_s: float, limits: dict[str, float], gaps: Gaps
) -> Summary:
    """outcomes: those intended in [from_s, to_s). limits: per request, as slo.per_request gives them."""
    ok = [outcome for outcome in outcomes if outcome.end == "ok"]
    ends = Counter(outcome.end for outcome in outcomes)
    kept = sum(met(outcome, limits) for outcome in ok)
    span_s = max(to_s - from_s, 1e-9)
    return Summary(
        from_s=from_s,
        to_s=to_s,
        sent=len(outcomes),
        ends={end: ends[end] for end in ENDS},
        errors=dict(Counter(outcome.error for outcome in outcomes if outcome.error).most_common()),
        ttft_s=quantiles(outcome.ttft_s for outcome in outcomes),
        ttft_from_send_s=quantiles(outcome.ttft_from_send_s for outcome in outcomes),
        itl_s=gaps.quantiles(),
        tpot_s=quantiles(outcome.tpot_s for outcome in ok),
        e2e_s=quantiles(outcome.e2e_s for outcome in ok),
        lag_s=quantiles(outcome.lag_s for outcome in outcomes),
        one_token=sum(outcome.tokens < 2 for outcome in ok),
        met=kept,
        attainment=kept / len(outcomes) if outcomes else None,
        goodput_per_s=kept / span_s,
        requests_per_s=len(ok) / span_s,
        prompt_tokens_per_s=sum(o.prompt_tokens or o.wanted_prompt_tokens for o in ok) / span_s,
        output_tokens_per_s=sum(outcome.tokens for outcome in outcomes) / span_s,
        without_usage=sum(outcome.output_tokens is None for outcome in ok),
        prompt_mismatch=sum(o.prompt_tokens not in (None, o.wanted_prompt_tokens) and o.turn == 0 for o in ok),
        output_mismatch=sum(outcome.tokens != outcome.wanted_output_tokens for outcome in ok),
    )


def lag_of(outcomes: Sequence[Outcome], *, limit_s: float, shortage: str = "") -> Lag:
    """shortage: what this machine lacked, if anything."""
    found = quantiles(outcome.lag_s for outcome in outcomes)
    why = []
    if found.p99 is not None and found.p99 > limit_s:
        why.append(
            f"p99 of the schedule lag is {found.p99 * 1e3:.1f} ms, above {limit_s * 1e3:g} ms: the generator did not keep up"
        )
    if shortage:
        why.append(shortage)
    return Lag(found, limit_s, bool(why), "; ".join(why))


def step_for(length_s: float) -> float:
    """Width of the timeline's steps: at most some 300 of them."""
    steps = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 15.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0)
    return next((step for step in steps if length_s / step <= 300), 3600.0)


def timeline(
    outcomes: Sequence[Outcome], *, length_s: float, limits: dict[str, float], step_s: float | None = None
) -> list[Interval]:
    """From 0 to length_s, or to when the last request ended, if that is later."""
    last_s = max([length_s, *(o.end_s for o in outcomes if o.end_s is not None)])
    step_s = step_s or step_for(last_s)
    count = max(1, math.ceil(last_s / step_s - 1e-9))
    intended: list[list[Outcome]] = [[] for _ in range(count)]
    finished, tokens, running = [0] * count, [0.0] * count, [0] * (count + 1)
    for outcome in outcomes:
        intended[_bucket(outcome.intended_s, step_s, count)].append(outcome)
        if outcome.sent_s is not None:
            running[_bucket(outcome.sent_s, step_s, count)] += 1
        if outcome.end_s is not None:
            at = _bucket(outcome.end_s, step_s, count)
            finished[at] += outcome.end == "ok"
            running[at] -= outcome.sent_s is not None
        _spread(outcome, tokens, step_s, count)
    in_flight = np.cumsum(running).tolist()
    return [
        _interval(intended[i], i * step_s, step_s, finished[i], in_flight[i], tokens[i] / step_s, limits)
        for i in range(count)
    ]


def _bucket(at_s: float, step_s: float, count: int) -> int:
    return min(max(0, int(at_s / step_s)), count - 1)


def _spread(outcome: Outcome, tokens: list[float], step_s: float, count: int) -> None:
    """An answer's tokens, evenly from its first to its last."""
    if outcome.first_s is None or outcome.last_s is None:
        return
    first, last = _bucket(outcome.first_s, step_s, count), _bucket(outcome.last_s, step_s, count)
    span_s = outcome.last_s - outcome.first_s
    for at in range(first, last + 1):
        inside_s = min(outcome.last_s, (at + 1) * step_s) - max(outcome.first_s, at * step_s)
        tokens[at] += outcome.tokens * (inside_s / span_s if first != last and span_s > 0 else 1.0)


def _interval(
    outcomes: list[Outcome],
    from_s: float,
    step_s: float,
    finished: int,
    in_flight: int,
    tokens_per_s: float,
    limits: dict[str, float],
) -> Interval:
    ttft, tpot = quantiles(o.ttft_s for o in outcomes), quantiles(o.tpot_s for o in outcomes)
    kept = sum(met(outcome, limits) for outcome in outcomes)
    return Interval(
        from_s=round(from_s, 6), seconds=step_s, sent=len(outcomes), failed=sum(o.end != "ok" for o in outcomes), finished=finished,
        in_flight=in_flight, met=kept, attainment=kept / len(outcomes) if outcomes else None,
        ttft_p50_s=ttft.p50, ttft_p95_s=ttft.p95, ttft_p99_s=ttft.p99, tpot_p50_s=tpot.p50, tpot_p95_s=tpot.p95, tpot_p99_s=tpot.p99,
        e2e_p99_s=quantiles(o.e2e_s for o in outcomes).p99, lag_p99_s=quantiles(o.lag_s for o in outcomes).p99,
        output_tokens_per_s=tokens_per_s,
    )  # fmt: skip
