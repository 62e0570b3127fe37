"""What a policy would do, in plain sentences: the answer of `flexpert policy check`. Pure.

The sizes that the rules of `behavior` allow are worked out with the decision core's own functions, so that the words cannot promise
something else.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from flexpert.controller.policy import spec as written
from flexpert.controller.policy.behavior import down_limit, up_limit
from flexpert.controller.policy.capacity import LEAST_UTILISATION, MOST_UTILISATION
from flexpert.controller.policy.spec import ScalingPolicy, Spec
from flexpert.controller.policy.types import Change, DirectionConfig, PolicyConfig, RuleConfig
from flexpert.controller.policy.units import show_duration, show_number, show_share

MODES = {
    "Active": "decides every {every} and acts",
    "Advisory": "decides every {every} and writes down what it would do, without doing it",
    "Paused": "is paused: it decides nothing until it is resumed",
}
FOLLOWS = {"slo", "kv_utilization", "queue_time", "tokens_per_second", "prometheus"}
SHOWN_SIZES = 6


def describe(policy: ScalingPolicy) -> list[str]:
    """One line each; those of a list begin with two spaces and a dash."""
    spec, config = policy.spec, policy.to_config()
    return [
        f"Policy {policy.metadata.name} {MODES[spec.mode].format(every=show_duration(spec.interval_s))}.",
        *_sizes(spec, config),
        *_promise(spec),
        *_signals(spec),
        *_behavior(config),
        *_cautions(spec, config),
        *_notes(spec, config),
    ]


def highest(config: PolicyConfig) -> int:
    """The most workers there can be: max, or fewer by the budget."""
    return min(config.workers.max, config.budget_devices or config.workers.max)


def _sizes(spec: Spec, config: PolicyConfig) -> Iterator[str]:
    low, high = config.workers.min, highest(config)
    serving = "1 worker serves" if high == 1 else f"{high} workers serve"
    size = f"{serving} at all times" if low == high else f"From {low} to {serving}"
    standby = config.workers.standby
    waiting = "1 warm process waits" if standby == 1 else f"{standby or 'no'} warm processes wait"
    yield f"{size}; {waiting} beside."
    if high < config.workers.max:
        yield f"The budget of {_count(high, 'device')} stands before workers.max, which is {config.workers.max}."
    if "cost_per_device_hour" in spec.budget.model_fields_set:
        cost = config.cost_per_device_hour
        span = show_number(low * cost) if low == high else f"{show_number(low * cost)} to {show_number(high * cost)}"
        yield f"At {show_number(cost)} for a device-hour that is {span} an hour."


def _promise(spec: Spec) -> Iterator[str]:
    slo = spec.slo
    if slo is None:
        return
    times = []
    if slo.ttft_s is not None:
        times.append(f"its first token within {show_duration(slo.ttft_s)}")
    if slo.tpot_s is not None:
        times.append(f"each further one within {show_duration(slo.tpot_s)} on average")
    follows = (
        ""
        if any(signal.type == "slo" for signal in spec.signals)
        else " It is measured; no signal of type slo follows it."
    )
    yield f"A request is promised {' and '.join(times)}; {show_share(slo.attainment)} of all requests are to get that.{follows}"


# --- signals


def _signals(spec: Spec) -> Iterator[str]:
    yield "It takes as many workers as the most demanding of these asks for:"
    for signal in spec.signals:
        if signal.type in FOLLOWS:
            yield f"  - {_signal(signal)}"
    for signal in spec.signals:
        if isinstance(signal, written.ForecastSignal):
            yield f"{_named(signal)} may raise that, never lower it: {_forecast(signal)}."
    for signal in spec.signals:
        if isinstance(signal, written.ScheduleSignal):
            yield f"{_named(signal)} bounds it, by the clock of {signal.timezone}:"
            yield from (f"  - {_window(window)}" for window in signal.windows)


def _signal(signal: written.Signal) -> str:
    name = _named(signal)
    match signal:
        case written.SloSignal():
            return f"{name}: so many that the promise is kept"
        case written.KvUtilizationSignal():
            return f"{name}: so many that {show_share(signal.target)} of their KV cache is in use"
        case written.QueueTimeSignal():
            return f"{name}: so many that 95% of the requests wait at most {show_duration(signal.target_s)} before they are computed"
        case written.TokensPerSecondSignal():
            return f"{name}: so many that each has at most {_tokens(signal)}"
        case written.PrometheusSignal():
            target = show_number(signal.target)
            goal = f"one for each {target} of" if signal.per == "worker" else f"so many that there is {target} of"
            return f"{name}: {goal} what {signal.url} answers to {signal.query}"
        case _:
            return name


def _named(signal: written.Signal) -> str:
    return signal.type if signal.name == signal.type else f"{signal.type} {signal.name!r}"


def _tokens(signal: written.TokensPerSecondSignal) -> str:
    rates = {"prompt": signal.prefill, "output": signal.decode}
    given = [f"{show_number(rate)} {kind}" for kind, rate in rates.items() if rate is not None]
    measured = " and ".join(kind for kind, rate in rates.items() if rate is None)
    least = show_share(LEAST_UTILISATION)
    said = [f"{' and '.join(given)} tokens per second"] if given else []
    said += (
        [f"{least} to {show_share(MOST_UTILISATION)} of the {measured} tokens per second that it was measured to take"]
        if measured
        else []
    )
    return " and ".join(said)


def _forecast(signal: written.ForecastSignal) -> str:
    ahead = "as a worker takes to join" if signal.horizon_s is None else f"as {show_duration(signal.horizon_s)}"
    return (
        f"it looks as far ahead {ahead}, at loads averaged over {show_duration(signal.step_s)} "
        f"of the last {show_duration(signal.history_s)}, "
        f"which repeat themselves after {show_duration(signal.season_s)}"
    )


def _window(window: written.Window) -> str:
    bounds = []
    if window.min is not None:
        bounds.append(f"at least {window.min}")
    if window.max is not None:
        bounds.append(f"at most {window.max}")
    return f"from {clock(window.start)} to {clock(window.end)}: {' and '.join(bounds)}"


def clock(cron: str) -> str:
    """ "0 8 * * mon-fri" -> "08:00 mon-fri"; what is not so simple stays as it is."""
    simple = re.fullmatch(r"(\d{1,2}) (\d{1,2}) \* \* (\S+)", cron)
    if simple is None:
        return f"'{cron}'"
    minute, hour, days = simple.groups()
    return f"{int(hour):02}:{int(minute):02}" + ("" if days == "*" else f" {days}")


# --- behavior


def _behavior(config: PolicyConfig) -> Iterator[str]:
    low, high = config.workers.min, highest(config)
    if low == high:
        return
    yield _direction("grows", config.up, low, high)
    yield _direction("shrinks", config.down, high, low)
    up, down = show_share(config.up.tolerance), show_share(config.down.tolerance)
    if up == down:
        yield f"Loads within {up} of what is there change nothing."
    else:
        yield f"Loads up to {up} above what is there, or {down} below, change nothing."


def _direction(verb: str, direction: DirectionConfig, start: int, goal: int) -> str:
    if direction.select == "Disabled":
        return f"It never {verb}."
    extreme = "lowest" if verb == "grows" else "highest"
    window = show_duration(direction.stabilization_s)
    when = f"to the {extreme} size asked for in the last {window}" if direction.stabilization_s else "at once"
    rules = [f"{_rule(rule)} in {show_duration(rule.period_s)}" for rule in direction.rules]
    chosen = "" if len(rules) < 2 else ", whichever is less" if direction.select == "Min" else ", whichever is more"
    sizes, took_s = ramp(direction, start, goal)
    steps = " -> ".join(str(size) for size in sizes[: SHOWN_SIZES - 2])
    if len(sizes) > SHOWN_SIZES:
        steps += f" -> ... -> {sizes[-1]}"
    else:
        steps += "".join(f" -> {size}" for size in sizes[SHOWN_SIZES - 2 :])
    fastest = f"{steps} takes {show_duration(took_s)}" if took_s else f"{steps} in one step"
    end = f"at the fastest {fastest}" if sizes[-1] == goal else f"never all the way from {start} to {goal}"
    return f"It {verb} {when}, by at most {' or '.join(rules)}{chosen}; {end}."


def _rule(rule: RuleConfig) -> str:
    return _count(int(rule.value), "worker") if rule.type == "workers" else f"{show_number(rule.value)}%"


def ramp(direction: DirectionConfig, start: int, goal: int) -> tuple[list[int], float]:
    """The sizes from start to goal as fast as the rules allow, and the seconds from the first change to the last.

    Ends early where the rules allow none.
    """
    sizes, changes, now_s = [start], list[Change](), 0.0
    while sizes[-1] != goal:
        size = sizes[-1]
        if goal > start:
            reached = min(goal, up_limit(direction, changes, size, now_s=now_s))
        else:
            reached = max(goal, down_limit(direction, changes, size, now_s=now_s))
        if (reached - size) * (goal - start) > 0:
            changes.append(Change(at_s=now_s, from_workers=size, to_workers=int(reached)))
            sizes.append(int(reached))
            continue
        ends = [change.at_s + rule.period_s for change in changes for rule in direction.rules]
        later = [end_s for end_s in ends if end_s > now_s]
        if not later:
            break
        now_s = min(later)
    return sizes, changes[-1].at_s if changes else 0.0


# --- cautions and notes


def _cautions(spec: Spec, config: PolicyConfig) -> Iterator[str]:
    if config.workers.min < highest(config) and config.down.select != "Disabled":
        yield (
            f"It shrinks only if those who stay would be below {show_share(config.consolidation_margin)} of every target, hold the model "
            "and all live KV, and the stall costs less than the devices."
        )
    if config.panic.threshold:
        window, times = show_duration(config.panic.window_s), show_number(config.panic.threshold)
        yield (
            f"Panic is a load of {times} times what the workers take, over {window}: "
            "it grows without waiting, and does not shrink until that is over."
        )
    stale = "it keeps its size" if config.fallback.behavior == "hold" else "it grows, as far as one period allows"
    yield f"Without numbers of the last {show_duration(config.fallback.after_s)} {stale}; it never shrinks then."
    yield f"A growth that is not done after {show_duration(config.grow_timeout_s)} is given up and tried again later."


def _notes(spec: Spec, config: PolicyConfig) -> Iterator[str]:
    varies = config.workers.min < highest(config)
    window_s = config.down.stabilization_s
    if varies and config.down.select != "Disabled" and window_s < 60:
        yield (
            f"note: scaleDown.stabilizationWindow is {show_duration(window_s)}; a dip hardly longer costs workers that are wanted again "
            "at once. 300s is usual."
        )
    if varies and not config.workers.standby:
        yield "note: without standby processes a growth waits until new ones have started, tens of seconds on a GPU."


def _count(number: int, one: str) -> str:
    return f"1 {one}" if number == 1 else f"{number:,} {one}s"
