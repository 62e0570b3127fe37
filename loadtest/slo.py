"""Objectives as text, `ttft_p99<500ms`, and whether a run met them.

A latency's percentile is over all requests sent: one that failed, was refused or timed out counts as endlessly late, so
losing requests never makes a server look fast. Each latency objective is also asked of every single request, and
attainment is the share of those sent that met all.
"""

from __future__ import annotations

import difflib
import math
import operator
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from flexpert.loadtest.measure import Outcome, Summary, Verdict, percentiles

__all__ = ["Objective", "SloError", "met", "parse_slo", "parse_slos", "per_request", "verdict"]

LATENCIES: dict[str, str] = {
    "ttft": "time to first token, from the intended send time",
    "ttft_from_send": "the same from the actual send",
    "tpot": "time per output token of a request",
    "itl": "gap between two tokens",
    "e2e": "intended send time to last byte",
}
SHARES = ("attainment", "error_rate")
RATES: dict[str, Callable[[Summary], float]] = {
    "goodput": lambda summary: summary.goodput_per_s,
    "requests_per_s": lambda summary: summary.requests_per_s,
    "output_tokens_per_s": lambda summary: summary.output_tokens_per_s,
    "prompt_tokens_per_s": lambda summary: summary.prompt_tokens_per_s,
}
_RELATIONS = {"<=": operator.le, ">=": operator.ge, "<": operator.lt, ">": operator.gt}
_UNITS_S = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0}
_FORM = "expected METRIC<LIMIT, like ttft_p99<500ms, tpot_mean<=50ms, attainment>0.99 or output_tokens_per_s>=1000"


class SloError(ValueError):
    """The message names what was found and what is valid."""


@dataclass(frozen=True)
class Objective:
    """stat: "p99", "mean", "max", or "" for what has no distribution, and for a bare latency, which is asked of each request only."""

    text: str
    metric: str
    stat: str
    relation: str
    limit: float

    @property
    def bare(self) -> bool:
        return self.metric in LATENCIES and not self.stat


def parse_slo(text: str) -> Objective:
    """Raises SloError."""
    found = re.fullmatch(r"\s*([A-Za-z_]\w*(?:\.\d+)?)\s*(<=|>=|<|>)\s*(\d+(?:\.\d*)?|\.\d+)\s*([^\s\d]*)\s*", text)
    if not found:
        raise SloError(f"--slo {text!r}: {_FORM}")
    name, relation, number, unit = found[1], found[2], float(found[3]), found[4]
    metric, stat = _metric(name, text)
    plain = f"{name}{relation}{found[3]}{unit}"
    if metric in LATENCIES:
        if relation not in ("<", "<="):
            raise SloError(f"--slo {text!r}: a latency is held below a limit; write {name}<{found[3]}{unit}")
        if unit not in _UNITS_S:
            raise SloError(f"--slo {text!r}: expected a time with its unit, {', '.join(_UNITS_S)}, like {name}<500ms")
        return Objective(plain, metric, stat, relation, number * _UNITS_S[unit])
    if metric in SHARES:
        if unit not in ("", "%"):
            raise SloError(f"--slo {text!r}: {metric} is a share; expected 0 to 1, or a percentage like 99%")
        limit = number / 100 if unit == "%" else number
        if limit > 1:
            raise SloError(f"--slo {text!r}: {metric} is a share from 0 to 1; for percent write {found[3]}%")
        return Objective(plain, metric, "", relation, limit)
    if unit not in ("", "/s"):
        raise SloError(f"--slo {text!r}: {metric} counts per second; expected a plain number")
    return Objective(plain, metric, "", relation, number)


def _metric(name: str, text: str) -> tuple[str, str]:
    names = [*LATENCIES, *SHARES, *RATES]
    if name in names:
        return name, ""
    metric, _, stat = name.rpartition("_")
    if metric in LATENCIES:
        if stat in ("mean", "max", "min") or (re.fullmatch(r"p\d+(\.\d+)?", stat) and 0 < float(stat[1:]) < 100):
            return metric, stat
        raise SloError(
            f"--slo {text!r}: unknown statistic {stat!r}; expected p50, p95, p99, p99.9, ..., mean, max or min"
        )
    if metric in names:
        raise SloError(f"--slo {text!r}: {metric} has no {stat}; write {metric} alone")
    close = difflib.get_close_matches(name, [*names, *(f"{metric}_p99" for metric in LATENCIES)], n=1)
    meant = f" (did you mean {close[0]}?)" if close else ""
    raise SloError(
        f"--slo {text!r}: unknown metric {name!r}{meant}; expected {', '.join(LATENCIES)} followed by _p99, _mean, ..., "
        f"or {', '.join([*SHARES, *RATES])}"
    )


def parse_slos(texts: Iterable[str]) -> list[Objective]:
    """All of a run. Raises SloError also where a bare latency would decide nothing."""
    found = [parse_slo(text) for text in texts]
    bare = next((objective for objective in found if objective.bare), None)
    if bare is not None and not any(objective.metric in ("attainment", "goodput") for objective in found):
        raise SloError(
            f"--slo {bare.text!r} is asked of each request and decides nothing alone: add attainment>0.99 or goodput>10, "
            f"or name a statistic, like {bare.metric}_p99{bare.text.removeprefix(bare.metric)}"
        )
    return found


def per_request(objectives: Iterable[Objective]) -> dict[str, float]:
    """What is asked of each request: latency -> seconds. A bare one decides; else the loosest, since that is the one for nearly all."""
    limits: dict[str, float] = {}
    bare: set[str] = set()
    for objective in objectives:
        name = objective.metric
        if name not in LATENCIES or name == "itl" or objective.stat in ("mean", "min"):
            continue
        if objective.bare:
            limits[name] = min(objective.limit, limits[name]) if name in bare else objective.limit
            bare.add(name)
        elif name not in bare:
            limits[name] = max(objective.limit, limits.get(name, 0.0))
    return limits


def met(outcome: Outcome, limits: dict[str, float]) -> bool:
    """Ended ok and within every limit. An answer of one token has no TPOT and cannot miss it."""
    if outcome.end != "ok":
        return False
    for name, limit_s in limits.items():
        value = latency(outcome, name)
        if value is None and name != "tpot":
            return False
        if value is not None and value > limit_s:
            return False
    return True


def latency(outcome: Outcome, name: str) -> float | None:
    match name:
        case "ttft":
            return outcome.ttft_s
        case "ttft_from_send":
            return outcome.ttft_from_send_s
        case "tpot":
            return outcome.tpot_s
        case _:
            return outcome.e2e_s


def verdict(
    objective: Objective, outcomes: Sequence[Outcome], summary: Summary, itl: Callable[[str], float | None]
) -> Verdict:
    """outcomes: those that summary is about. itl: a statistic of the gaps between tokens."""
    value = _value(objective, outcomes, summary, itl)
    passed = value is not None and bool(_RELATIONS[objective.relation](value, objective.limit))
    if value is None:
        said = "nothing was measured"
    elif math.isinf(value):
        said = "failed requests reach into it"
        if (
            answered := _value(objective, [outcome for outcome in outcomes if outcome.end == "ok"], summary, itl)
        ) is not None:
            said += f" ({_show(objective, answered)} of the answered ones)"
    else:
        said = _show(objective, value)
    text = f"{objective.text}: {said}, {'met' if passed else 'MISSED'}"
    name = f"{objective.metric}_{objective.stat}" if objective.stat else objective.metric
    return Verdict(objective.text, name, objective.relation, objective.limit, value, passed, text)


def _show(objective: Objective, value: float) -> str:
    if objective.metric in LATENCIES:
        return f"{value * 1e3:.4g} ms" if value < 1 else f"{value:.4g} s"
    return f"{value:.4%}" if objective.metric in SHARES else f"{value:.4g}/s"


def _value(
    objective: Objective, outcomes: Sequence[Outcome], summary: Summary, itl: Callable[[str], float | None]
) -> float | None:
    name = objective.metric
    if name in RATES:
        return RATES[name](summary)
    if not summary.sent:
        return None
    if name == "attainment":
        return summary.attainment
    if name == "error_rate":
        return 1 - summary.ends.get("ok", 0) / summary.sent
    if objective.bare:
        return None
    if name == "itl":
        return itl(objective.stat)
    found = [latency(outcome, name) if outcome.end == "ok" else math.inf for outcome in outcomes]
    values = np.array([value for value in found if value is not None])
    if not len(values):
        return None
    if objective.stat in ("mean", "min", "max"):
        return float(getattr(np, objective.stat)(values))
    return percentiles(values, (float(objective.stat[1:]),))[0]
