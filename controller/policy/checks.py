"""What no single value of a policy shows: settings that contradict each other. Asked when a policy is read.

A contradiction names the setting to look at first and every setting that takes part, so that none is told about a value that was
itself refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flexpert.controller.policy.cron import meet
from flexpert.controller.policy.units import show_duration

if TYPE_CHECKING:
    from flexpert.controller.policy import spec as written

Path = tuple[str | int, ...]
ONCE = ("slo", "kv_utilization", "queue_time", "tokens_per_second", "forecast")


@dataclass(frozen=True)
class Contradiction:
    """path: below `spec`, what to show; others: what else takes part. {other} in what stands for the first of these."""

    path: Path
    what: str
    todo: str
    others: tuple[Path, ...] = ()

    def told(self, origin: Callable[[Path], Path] = tuple) -> tuple[Path, str]:
        """Where it is and what it is. origin: what the path of a setting is in the file."""
        mine = origin(("spec", *self.path))
        if not self.others:
            return mine, self.what
        other = origin(("spec", *self.others[0]))
        beside = other[:-2] == mine[: len(other) - 2]
        return mine, self.what.replace("{other}", show_path(other[-2:] if beside else other[1:]))


def show_path(path: Path) -> str:
    """("signals", 0, "target") -> "signals[0].target"."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return text.removeprefix(".")


def contradictions(policy: written.ScalingPolicy) -> list[Contradiction]:
    """All of them, in the order of the file's sections."""
    spec = policy.spec
    return [
        *_bounds(spec),
        *_slo(spec),
        *_signals(spec),
        *_behavior("scaleUp", spec.behavior.scale_up),
        *_behavior("scaleDown", spec.behavior.scale_down),
        *_times(spec),
    ]


def _bounds(spec: written.Spec) -> Iterator[Contradiction]:
    workers, devices = spec.workers, spec.budget.devices
    if workers.min > workers.max:
        yield Contradiction(
            ("workers", "min"),
            f"{workers.min} is above max, which is {workers.max}",
            "lower min or raise max",
            (("workers", "max"),),
        )
    if devices is not None and devices < workers.min:
        yield Contradiction(
            ("budget", "devices"),
            f"{devices} is below workers.min, which is {workers.min}, and each worker has a device",
            "raise devices or lower workers.min",
            (("workers", "min"),),
        )


def _slo(spec: written.Spec) -> Iterator[Contradiction]:
    if spec.slo is not None and spec.slo.ttft_s is None and spec.slo.tpot_s is None:
        yield Contradiction(
            ("slo",),
            "promises nothing",
            "give ttft, tpot or both, such as {ttft: 500ms, tpot: 50ms}",
            (("slo", "ttft"), ("slo", "tpot")),
        )


def _signals(spec: written.Spec) -> Iterator[Contradiction]:
    first_of_type: dict[str, int] = {}
    first_of_name: dict[str, int] = {}
    for index, signal in enumerate(spec.signals):
        earlier = first_of_type.setdefault(signal.type, index)
        named = first_of_name.setdefault(signal.name, index)
        if signal.type in ONCE and earlier != index:
            yield _twice(spec, earlier, index)
        elif named != index:
            yield Contradiction(
                ("signals", index, "name"),
                f"{signal.name!r} is the name of {{other}}, too",
                "give each signal a name of its own",
                (("signals", named),),
            )
        yield from _signal(spec, index, signal)
    yield from _overlaps(spec)
    yield from _same_query(spec)
    yield from _nothing_to_follow(spec)


def _twice(spec: written.Spec, earlier: int, index: int) -> Contradiction:
    signal, first = spec.signals[index], spec.signals[earlier]
    same = signal == first
    what = (
        f"a second signal of type {signal.type}, the same as {{other}}"
        if same
        else f"a second signal of type {signal.type}, which contradicts {{other}}"
    )
    todo = "keep one of the two"
    if signal.type == "tokens_per_second":
        todo = "keep one, with prefill and decode in it"
    return Contradiction(("signals", index), what, todo, (("signals", earlier),))


def _signal(spec: written.Spec, index: int, signal: written.Signal) -> Iterator[Contradiction]:
    at: Path = ("signals", index)
    if signal.type == "slo" and spec.slo is None:
        yield Contradiction(
            at,
            "type slo follows spec.slo, which is not there",
            "add slo: {ttft: 500ms, tpot: 50ms} to spec",
            (("slo",),),
        )
    elif signal.type == "queue_time" and spec.slo is not None and signal.target_s >= (spec.slo.ttft_s or float("inf")):
        yield Contradiction(
            (*at, "target"),
            f"{show_duration(signal.target_s)} in the queue contradicts slo.ttft, which is {show_duration(spec.slo.ttft_s or 0)}: "
            "a request that waits so long has missed it",
            "lower target below slo.ttft, or raise slo.ttft",
            (("slo", "ttft"),),
        )
    elif signal.type == "schedule":
        yield from _schedule(spec, index, signal)
    elif signal.type == "forecast":
        yield from _forecast(at, signal)


def _schedule(spec: written.Spec, index: int, signal: written.ScheduleSignal) -> Iterator[Contradiction]:
    low, high = spec.workers.min, spec.workers.max
    bounds: tuple[Path, ...] = (("workers", "min"), ("workers", "max"))
    for number, window in enumerate(signal.windows):
        at: Path = ("signals", index, "windows", number)
        if window.min is None and window.max is None:
            yield Contradiction(at, "bounds nothing", "give min, max or both", ((*at, "min"), (*at, "max")))
        if window.start == window.end:
            yield Contradiction(
                (*at, "end"),
                f"{window.end!r} is start, too, so it is never open",
                "give another end",
                ((*at, "start"),),
            )
        for name, bound in (("min", window.min), ("max", window.max)):
            if bound is not None and low <= high and not low <= bound <= high:
                yield Contradiction(
                    (*at, name),
                    f"{bound} is outside workers, which are {low} to {high}",
                    f"choose {name} from {low} to {high}, or change workers",
                    bounds,
                )
        if window.min is not None and window.max is not None and window.min > window.max:
            yield Contradiction(
                (*at, "min"),
                f"{window.min} is above max of this window, which is {window.max}",
                "lower min or raise max",
                ((*at, "max"),),
            )


def _overlaps(spec: written.Spec) -> Iterator[Contradiction]:
    """Of one schedule or of two: what one window asks for at least, another forbids while both are open."""
    windows = [
        (("signals", index, "windows", number), window, (window.start, window.end, signal.timezone))
        for index, signal in enumerate(spec.signals)
        if signal.type == "schedule"
        for number, window in enumerate(signal.windows)
    ]
    for at, window, times in windows:
        for other_at, other, other_times in windows:
            if at != other_at and (window.min or 0) > (other.max or float("inf")) and meet(times, other_times):
                yield Contradiction(
                    (*at, "min"),
                    f"{window.min} is above max of {{other}}, which is {other.max}, and the two are open at the same time",
                    "make them agree, or open at different times",
                    (other_at, at),
                )


def _forecast(at: Path, signal: written.ForecastSignal) -> Iterator[Contradiction]:
    season, step, history = (
        show_duration(signal.season_s),
        show_duration(signal.step_s),
        show_duration(signal.history_s),
    )
    if signal.history_s < 2 * signal.season_s:
        yield Contradiction(
            (*at, "history"),
            f"{history} is shorter than two seasons of {season}, and one season shows no repetition",
            "lengthen history or shorten season",
            ((*at, "season"),),
        )
    if signal.step_s * 4 > signal.season_s:
        yield Contradiction(
            (*at, "step"),
            f"{step} is longer than a quarter of season, which is {season}",
            "shorten step or lengthen season",
            ((*at, "season"),),
        )


def _same_query(spec: written.Spec) -> Iterator[Contradiction]:
    seen: dict[tuple[str, str, str], int] = {}
    for index, signal in enumerate(spec.signals):
        if signal.type != "prometheus":
            continue
        earlier = seen.setdefault((signal.url, signal.query, signal.per), index)
        first = spec.signals[earlier]
        if earlier != index and first.type == "prometheus":
            word = "the same target" if first.target == signal.target else f"target {first.target:g}: they contradict"
            yield Contradiction(
                ("signals", index, "target"),
                f"{signal.target:g} for the query of {{other}}, which has {word}",
                "keep one of the two",
                (("signals", earlier),),
            )


def _nothing_to_follow(spec: written.Spec) -> Iterator[Contradiction]:
    bounding = {"schedule", "forecast"}
    if {signal.type for signal in spec.signals} <= bounding and spec.workers.min < spec.workers.max:
        yield Contradiction(
            ("signals",),
            "only bound the size, and none follows the load that is there",
            "add one of slo, kv_utilization, queue_time, tokens_per_second, prometheus",
            (("signals",),),
        )


def _behavior(name: str, direction: written.Direction) -> Iterator[Contradiction]:
    at: Path = ("behavior", name)
    if direction.select == "Disabled" and direction.policies:
        yield Contradiction(
            (*at, "policies"),
            "can never count, since select is Disabled",
            "remove them, or write select: Max",
            ((*at, "select"),),
        )
    seen: dict[tuple[str, float], int] = {}
    for index, rule in enumerate(direction.policies or ()):
        if name == "scaleDown" and rule.type == "percent" and rule.value > 100:
            yield Contradiction(
                (*at, "policies", index, "value"),
                f"{rule.value} percent of the workers cannot leave",
                "write 100 or less",
            )
        earlier = seen.setdefault((rule.type, rule.period_s), index)
        if earlier != index:
            yield Contradiction(
                (*at, "policies", index),
                f"limits {rule.type} in {show_duration(rule.period_s)} again, as {{other}} does",
                "keep one of the two",
                ((*at, "policies", earlier),),
            )


def _times(spec: written.Spec) -> Iterator[Contradiction]:
    interval: tuple[Path, ...] = (("interval",),)
    every = show_duration(spec.interval_s)
    if spec.panic.window_s is not None and spec.panic.window_s < spec.interval_s:
        yield Contradiction(
            ("panic", "window"),
            f"{show_duration(spec.panic.window_s)} is shorter than interval, which is {every}, so it may hold no number",
            "lengthen window or shorten interval",
            interval,
        )
    if 0 < spec.panic.threshold <= 1:
        yield Contradiction(
            ("panic", "threshold"),
            f"{spec.panic.threshold:g} would mean panic at the load that the workers take",
            "write more than 1, or 0 for never",
        )
    if spec.fallback.after_s is not None and spec.fallback.after_s < spec.interval_s:
        yield Contradiction(
            ("fallback", "after"),
            f"{show_duration(spec.fallback.after_s)} is shorter than interval, which is {every}: every number would be stale",
            "lengthen after or shorten interval",
            interval,
        )
    if spec.grow_timeout_s < spec.interval_s:
        yield Contradiction(
            ("growTimeout",),
            f"{show_duration(spec.grow_timeout_s)} is shorter than interval, which is {every}",
            "lengthen it",
            interval,
        )
