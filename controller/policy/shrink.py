"""When and how far to shrink. Pure; asked by `controller.policy.decide` when nothing wants to grow.

Every doubt keeps the size: a worker too many costs money, one too few costs requests.
"""

from __future__ import annotations

import math

from flexpert.controller.policy.behavior import down_limit
from flexpert.controller.policy.case import Case, Verdict
from flexpert.controller.policy.consolidation import costs_more, refusal
from flexpert.controller.policy.reasons import Reason

NOISE = 2.0  # standard deviations
MOST_NOISE = 0.5
SIZED_S = 3600.0  # so long a size is kept while its traffic stays
OVERSHOT, OVERSHOT_LEAST = 0.75, 2  # by this share, and so many workers: a growth that went too far is not kept


def blind(case: Case) -> Verdict | None:
    if not case.fault:
        return None
    reason = Reason.MISSING_DATA if case.fault == "missing" else Reason.STALE_DATA
    return Verdict(target=case.now, reason=reason, text=f"{case.fault} numbers ({case.faulty}): the size is kept")


def unsafe(case: Case, wanted: int) -> Verdict | None:
    """What forbids every shrink, however it came about: nothing to go by, panic, a history that is too short."""
    if (found := blind(case)) is not None:
        return found
    window_s = case.scene.config.down.stabilization_s
    if case.panic:
        until_s = (case.state.panic_until_s or case.now_s) - case.now_s
        case.reject("panic", wanted, case.now, f"for {until_s:.0f} s more")
        text = f"{wanted} workers would do; never fewer in panic, which lasts {until_s:.0f} s more"
        return Verdict(target=case.now, reason=Reason.SCALE_DOWN_REFUSED_PANIC, text=text)
    if case.history_s < window_s:
        case.reject("history", wanted, case.now, f"{case.history_s:.0f} s of {window_s:g} s")
        text = f"{wanted} workers would do; the load was watched for {case.history_s:.0f} s, {window_s:g} s are needed"
        return Verdict(target=case.now, reason=Reason.SCALE_DOWN_REFUSED_HISTORY, text=text)
    return None


def shrink(case: Case) -> Verdict | None:
    """Down to what the highest load of the window asks for with a margin, as far as the survivors can take it all over."""
    config, floor = case.scene.config, max(case.bounds.low, case.forecast)
    if case.load is None or case.load > case.now * (1.0 - config.down.tolerance):
        return None
    margin = config.consolidation_margin
    wanted = math.ceil(case.load / margin - 1e-9)
    if wanted >= case.now:
        return None
    if floor >= case.now:
        return _floor(case, wanted)
    wanted = max(wanted, floor)
    if config.down.select == "Disabled":
        case.reject("scaleDown.select", wanted, case.now, "Disabled")
        text = f"{wanted} workers would do; the policy has switched shrinking off"
        return Verdict(target=case.now, reason=Reason.SCALE_DOWN_DISABLED, text=text)
    return unsafe(case, wanted) or _steady(case, wanted, floor)


def _floor(case: Case, wanted: int) -> Verdict:
    name = case.bounds.low_why if case.bounds.low >= case.now else "forecast"
    case.reject(name, wanted, case.now, f"at least {case.now} workers")
    return Verdict(target=case.now, reason=Reason.FLOOR, text=f"{wanted} workers would do; {name} asks for {case.now}")


def _steady(case: Case, wanted: int, floor: int) -> Verdict:
    """The window's peak instead of the present load, and not below a size that was chosen for a load like this."""
    config, state = case.scene.config, case.state
    peak = max(state.peaks[0].value if state.peaks else 0.0, case.load or 0.0)
    steady = max(math.ceil(peak / config.consolidation_margin - 1e-9), floor)
    why = f"the peak of {config.down.stabilization_s:g} s was {peak:.2f} workers"
    kept, reason = _kept(case, steady, peak)
    if kept > steady:
        steady, why = kept, reason
    case.reject("scaleDown.stabilizationWindow", wanted, min(steady, case.now), why)
    if steady >= case.now:
        text = f"{wanted} workers would do at this moment; {why}"
        return Verdict(target=case.now, reason=Reason.SCALE_DOWN_STABILIZING, text=text)
    return _survivable(case, steady, peak)


def _kept(case: Case, steady: int, peak: float) -> tuple[int, str]:
    """More than `steady` where the last size was chosen for traffic like this, or fewer were too few for it; and why."""
    state, now_s = case.state, case.now_s
    demand, chance = state.demands[0].value if state.demands else 0.0, noise(case)
    # What would not have held fewer at the last shrink (memory, latencies) was more than its load asked for, and is no overshoot.
    weighed = state.sized_workers > math.ceil(state.sized_load / case.scene.config.consolidation_margin - 1e-9)
    grew = state.few_s == state.sized_s
    overshot = (grew or not weighed) and steady < OVERSHOT * case.now and steady <= case.now - OVERSHOT_LEAST
    if steady < state.sized_workers and now_s < state.sized_s + SIZED_S and not overshot:
        if peak > state.sized_load * (1.0 - chance):
            words = f"a load of {state.sized_load:.2f}, and {peak:.2f} is no less"
            return state.sized_workers, f"{state.sized_workers} were chosen for {words}"
        if state.sized_demand and demand > state.sized_demand * (1.0 - chance):
            words = f"{state.sized_demand:.0f} tokens/s, and {demand:.0f} is no less"
            return state.sized_workers, f"{state.sized_workers} were chosen for {words}"
    few = state.few_workers
    if steady <= few < case.now and now_s < state.few_s + SIZED_S and 0.0 < state.few_demand * (1.0 - chance) < demand:
        return few + 1, f"{few} were too few for {state.few_demand:.0f} tokens/s, and {demand:.0f} is no less"
    return 0, ""


def noise(case: Case) -> float:
    """The share by which a load may fall without anything having changed: two standard deviations of a Poisson number of requests."""
    by_chance = NOISE / math.sqrt(max(case.scene.view.live, 1.0))
    return min(max(case.scene.config.down.tolerance, by_chance), MOST_NOISE)


def _survivable(case: Case, steady: int, peak: float) -> Verdict:
    """The fewest that would hold everything, found by halving."""
    last = refusal(case.scene, case.now - 1)
    if last is not None:
        case.reject("consolidation", steady, case.now, last[1])
        return Verdict(target=case.now, reason=last[0], text=f"{steady} workers would do by load; {last[1]}")
    low, high = max(steady, 1), case.now - 1
    why = ""
    while low < high:
        middle = (low + high) // 2
        found = refusal(case.scene, middle)
        if found is None:
            high = middle
        else:
            low, why = middle + 1, found[1]
    case.reject("consolidation", steady, high, why)
    return _paid(case, high, peak)


def _paid(case: Case, target: int, peak: float) -> Verdict:
    low_since = case.state.low_since_s
    low_s = case.now_s - low_since if low_since is not None else 0.0
    dear = costs_more(case.scene, target, low_s=low_s)
    if dear:
        case.reject("cost", target, case.now, dear)
        return Verdict(
            target=case.now, reason=Reason.SCALE_DOWN_REFUSED_COST, text=f"{target} workers would do; {dear}"
        )
    limit = down_limit(case.scene.config.down, case.state.changes, case.now, now_s=case.now_s)
    allowed = max(target, int(limit))
    case.reject("scaleDown.policies", target, min(allowed, case.now), f"no fewer than {limit:g} at this time")
    if allowed >= case.now:
        text = f"{target} workers would do; this period's shrinking is used up"
        return Verdict(target=case.now, reason=Reason.SCALE_DOWN_LIMITED, text=text, final=False)
    return Verdict(
        target=allowed,
        reason=Reason.SCALE_DOWN,
        text=f"the highest load of the window, {peak:.2f} workers, fits {allowed} with margin; shrinking from {case.now}",
        final=allowed == target,
        trial=_on_trial(case, allowed),
    )


def _on_trial(case: Case, target: int) -> bool:
    """Fewer than the tokens ask for, or nobody knows what they ask for: latencies were low, and the size is tried out."""
    load = case.scene.token_load
    return not case.scene.capacity.known or load is None or load > target
