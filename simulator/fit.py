"""From the steps of an engine to the numbers of a Profile. Pure; `simulator.measure` brings the steps."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import msgspec

from flexpert.simulator.profile import Profile

__all__ = ["MeasureError", "Step", "fit", "rising", "spread"]


class MeasureError(RuntimeError):
    """The engine did not do what is to be measured."""


@dataclass(frozen=True, slots=True)
class Step:
    """One step of the engine: decoding rows and their context, prompt tokens and the context before them (of the last row)."""

    decoding: int
    context: int
    tokens: int
    before: int
    seconds: float


def fit(steps: Sequence[Step], rest: Profile, *, share: float = 0.5) -> Profile:
    """`rest` with the step times that these steps show. Raises MeasureError where they do not show them."""
    short = _typical(
        share,
        ((step.decoding, step.seconds) for step in steps if not step.tokens and step.context < 64 * step.decoding),
    )
    if not short:
        raise MeasureError("no step was seen in which requests only decode")
    long = _typical(
        share,
        ((step.decoding, step.seconds) for step in steps if not step.tokens and step.context >= 64 * step.decoding),
    )
    contexts = {step.decoding: step.context for step in steps if not step.tokens and step.context >= 64 * step.decoding}
    slopes = [(seconds - short[count]) / contexts[count] for count, seconds in long.items() if count in short]
    context_s = max(0.0, statistics.median(slopes)) if slopes else 0.0
    fresh = [step for step in steps if step.tokens and not step.before]
    alone = _typical(share, ((step.tokens, step.seconds) for step in fresh if not step.decoding))
    beside = _typical(
        share, ((step.tokens, step.seconds - short[step.decoding]) for step in fresh if step.decoding in short)
    )
    if not alone:
        raise MeasureError("no step was seen that computes only prompts")
    rises = [alone[tokens] - added for tokens, added in beside.items() if tokens in alone]
    empty_s = min(max(0.0, statistics.median(rises)), min(short.values())) if rises else 0.0
    prefill = {tokens: max(0.0, seconds - empty_s) for tokens, seconds in alone.items()}
    chunks = [step for step in steps if step.before and step.tokens in alone and not step.decoding]
    bends = sorted((step.seconds - alone[step.tokens]) / (step.tokens * step.before) for step in chunks)
    bend_s = max(0.0, bends[int(share * (len(bends) - 1))]) if bends else 0.0
    decode = {0: empty_s} | {count: seconds - context_s * 24 * count for count, seconds in short.items()}
    return msgspec.structs.replace(
        rest,
        decode=rising(decode),
        prefill=rising({0: 0.0} | prefill),
        context_s=round(context_s, 12),
        prefill_context_s=round(bend_s, 15),
    ).check()


def _typical(share: float, pairs: Iterable[tuple[int, float]]) -> dict[int, float]:
    """For each key the value that `share` of its values lie below; a key seen once among many says nothing."""
    found: dict[int, list[float]] = {}
    for key, seconds in pairs:
        found.setdefault(key, []).append(seconds)
    return {
        key: sorted(values)[int(share * (len(values) - 1))]
        for key, values in sorted(found.items())
        if len(values) >= 2 or len(found) < 3
    }


def rising(points: dict[int, float]) -> tuple[tuple[float, float], ...]:
    """More work never takes less time, and what disturbs a measurement only ever adds to it: each point is at most the ones above it."""
    level, found = float("inf"), []
    for key, seconds in sorted(points.items(), reverse=True):
        level = min(level, seconds)
        found.append((float(key), round(level, 7)))
    return tuple(reversed(found))


def spread(steps: Sequence[Step]) -> tuple[float, float]:
    """How far equal steps that only decode lay apart, (75th - 25th percentile) / median: over the batch sizes the median, and the most."""
    found: dict[int, list[float]] = {}
    for step in steps:
        if not step.tokens and step.context < 64 * step.decoding:
            found.setdefault(step.decoding, []).append(step.seconds)
    quarters = [statistics.quantiles(values, n=4) for values in found.values() if len(values) >= 4]
    shares = [(high - low) / middle for low, middle, high in quarters if middle > 0]
    return (statistics.median(shares), max(shares)) if shares else (0.0, 0.0)
