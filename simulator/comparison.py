"""What a policy is compared with on one load: fixed sizes, other autoscalers, and an oracle that knows the load.

Each is given its best: the static peak is the smallest fixed size that holds the SLO; the autoscalers' one number is tuned on another load
(the first half of the trace) where there is one; the oracle searches for the smallest size of each window by simulating again and again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from flexpert.simulator.load import Load
from flexpert.simulator.results import SimulationResult
from flexpert.simulator.runner import Setting, simulate
from flexpert.simulator.scalers import Fixed, Hpa, Kpa, RayServe, Scaler, Scheduled
from flexpert.simulator.sizing import begin_with

__all__ = ["BASELINES", "FAMILIES", "Family", "Tuned", "oracle", "play", "play_on", "static_peak", "tune"]

GOOD = 0.99  # of the static peak's attainment: what still counts as holding the SLO
SHARES = (0.1, 0.2, 0.3, 0.45, 0.6, 0.75, 0.9)  # of a batch, tried as an autoscaler's target
UNTUNED = 0.7
AROUND = (
    1,
    2,
    4,
)  # windows on each side of a harmed one that get their workers back, at the first, second and third time


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """An autoscaler but for its target, which is a share of a worker's batch."""

    name: str
    make: Callable[[float, Setting, int], Scaler]


FAMILIES = (
    Family(name="hpa", make=lambda share, setting, standby: Hpa(
        low=1, high=setting.devices, target=share, standby=standby
    )),
    Family(name="kpa", make=lambda share, setting, standby: Kpa(
        low=1, high=setting.devices, concurrency=round(share * setting.profile.max_running / 0.7, 1), standby=standby
    )),
    Family(name="ray-serve", make=lambda share, setting, standby: RayServe(
        low=1, high=setting.devices, target=round(share * setting.profile.max_running, 1), standby=standby
    )),
)  # fmt: skip
BASELINES = ("static-peak", *(family.name for family in FAMILIES), "oracle")


def play(load: Load, scaler: Scaler, setting: Setting) -> SimulationResult:
    """`simulate` with the size at the begin that the load's first minutes need; that of a fixed one is its own."""
    if scaler.kind == "baseline" and isinstance(scaler, Fixed):
        return simulate(load, scaler, replace(setting, workers=scaler.low))
    return simulate(load, scaler, replace(setting, workers=_begin(load, setting)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuned:
    """What a family's target should be, as a share of a batch; and who played the tuning load with it, and how, where somebody did."""

    share: float
    scaler: Scaler
    past: SimulationResult | None


def play_on(
    before: Load, load: Load, scaler: Scaler, setting: Setting, *, past: SimulationResult | None = None
) -> SimulationResult:
    """`play` of the load by somebody who has just seen `before`: with what was learned from it and the size that it ended with.

    past: what came of it, where this scaler has played `before` already.
    """
    past = past or play(before, scaler, setting)
    workers = past.scale_events[-1].to_workers if past.scale_events else _begin(before, setting)
    return simulate(load, scaler, replace(setting, workers=workers, start_s=setting.start_s + before.span_s))


def _begin(load: Load, setting: Setting) -> int:
    return begin_with(load, setting.profile, setting.slo, most=setting.devices)


def static_peak(load: Load, setting: Setting) -> SimulationResult:
    """The smallest fixed size that holds the SLO over the whole load, or all devices."""
    low, high = 1, setting.devices
    found: dict[int, SimulationResult] = {}

    def holds(size: int) -> bool:
        found[size] = simulate(load, Fixed(size), replace(setting, workers=size))
        return found[size].attainment >= setting.slo.attainment

    size = min(high, begin_with(load, setting.profile, setting.slo, most=high))
    while low < high:
        if holds(size):
            high = size
            size = max(low, size * 3 // 4) if size * 3 // 4 > low else (low + high) // 2
        else:
            low = min(size + 1, high)
            size = min(high, -(-size * 4 // 3)) if -(-size * 4 // 3) < high else (low + high) // 2
    result = found.get(low) or simulate(load, Fixed(low), replace(setting, workers=low))
    return replace(result, name=f"static-peak-{low}")


def tune(load: Load, setting: Setting, family: Family, *, standby: int, wanted: float) -> Tuned:
    """The highest target that still attains `wanted` on this load; where none does, the lowest.

    Found by halving: a higher target is cheaper and attains less.
    """
    low, high = 0, len(SHARES) - 1
    best = Tuned(share=SHARES[0], scaler=family.make(SHARES[0], setting, standby), past=None)
    while low < high:
        middle = (low + high + 1) // 2
        scaler = family.make(SHARES[middle], setting, standby)
        past = play(load, scaler, setting)
        if past.attainment >= wanted:
            low, best = middle, Tuned(share=SHARES[middle], scaler=scaler, past=past)
        else:
            high = middle - 1
    return best


def oracle(load: Load, setting: Setting, peak: SimulationResult, *, window_s: float = 0.0) -> SimulationResult:
    """The fewest workers in each window with which the requests that arrive in it attain what they do at the static peak, or the SLO.

    Found by halving, in all windows at once: workers are taken away from each, and given back around those that this harms. Joins are
    ordered ahead by as long as 95% of them take. A bound in practice, not in theory: a search that sees the future can end a worker above
    the best.
    """
    profile = setting.profile
    ahead_s = profile.join_cold.p95_s + profile.experts * profile.layers * profile.slab_bytes / profile.move_bytes_per_s
    window_s = window_s or max(60.0, 3 * ahead_s, load.span_s / 240)
    setting = replace(setting, timeline_s=window_s)
    count = len(peak.timeline.at_s) if peak.timeline.interval_s == window_s else -(-int(load.span_s) // int(window_s))
    size = peak.peak_workers

    def played(sizes: Sequence[int]) -> SimulationResult:
        starts = [0.0]
        for number, (before, after) in enumerate(pairwise(sizes), start=1):
            starts.append(number * window_s - (ahead_s if after > before else 0.0))
        clock = Scheduled("oracle", start_s=setting.start_s, starts_s=starts, sizes=sizes)
        return simulate(load, clock, replace(setting, workers=sizes[0]))

    sizes = [size] * max(1, count)
    good = played(sizes)
    least = [min(setting.slo.attainment, share) for share in _shares(good)]
    enough = GOOD * good.attainment
    step = 1 << max(0, size - 1).bit_length()
    while step > 1:
        step //= 2
        trial = [max(1, each - step) for each in sizes]
        result = played(trial)
        for around in AROUND:
            harmed = [window for window, share in enumerate(_shares(result)) if share < least[window]]
            repaired = _given_back(trial, sizes, harmed, around)
            if repaired != trial:
                trial, result = repaired, played(repaired)
        # A window that still attains less than it did, with all its own around it, does so by chance: steps fall otherwise in every play.
        if result.attainment >= enough:
            sizes, good = trial, result
    return good


def _given_back(trial: Sequence[int], sizes: Sequence[int], harmed: Sequence[int], around: int) -> list[int]:
    """trial with the sizes of before in the harmed windows and in so many around each: what a window misses may come from those before it,
    whose requests still wait, or after it, where its own still run."""
    repaired = list(trial)
    for window in harmed:
        near = slice(max(0, window - around), window + around + 1)
        repaired[near] = sizes[near]
    return repaired


def _shares(result: SimulationResult) -> list[float]:
    """Attainment by the window of arrival; 1 where nothing arrived."""
    timeline = result.timeline
    return [met / all_ if all_ else 1.0 for met, all_ in zip(timeline.arrived_met, timeline.arrivals, strict=True)]
