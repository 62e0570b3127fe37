"""When and how far to grow. Pure; the verdicts that `controller.policy.decide` asks first."""

from __future__ import annotations

import math
from dataclasses import replace

from flexpert.controller.policy.behavior import up_limit
from flexpert.controller.policy.case import Case, Verdict
from flexpert.controller.policy.reasons import Reason

REPLACED_S = 60.0  # after a growth, or as long as a worker needs to join: until then no standby waits again
AT_ONCE = 1.5  # times the present size: so high a load need not last for a second tick


def grow(case: Case) -> Verdict | None:
    wanted, reason, why = _wish(case)
    if wanted <= case.now:
        return None
    given = case.bounds.clamp(wanted)
    case.reject(case.bounds.high_why, wanted, given, f"at most {case.bounds.high} workers")
    if given <= case.now:
        return Verdict(
            target=case.now,
            reason=Reason.CAPPED,
            text=f"{why}, which asks for {wanted} workers; {case.bounds.high_why} allows {case.bounds.high}",
        )
    return (
        _disabled(case, given, why)
        or _unsteady(case, given, why)
        or retry_later(case, given, why)
        or _limited(case, given, reason, why)
    )


def _wish(case: Case) -> tuple[int, Reason, str]:
    """How many, before any rule; the present size where nothing asks for more."""
    now, enough = case.now, case.now * (1.0 + case.scene.config.up.tolerance)
    wanted, reason, why = now, Reason.NO_CHANGE, ""
    if case.load is not None:
        if case.panic and max(case.load, case.mean or 0.0) > now:
            wanted, reason = math.ceil(max(case.load, case.mean or 0.0) - 1e-9), Reason.SCALE_UP_PANIC
            why = (
                f"panic: over {case.scene.config.panic.window_s:g} s the load was {case.mean or case.load:.2f} workers"
            )
        elif case.load > enough:
            if _lasts(case, enough):
                wanted, reason = math.ceil(case.load - 1e-9), Reason.SCALE_UP
                why = f"{case.loudest} asks for {case.load:.2f} workers, {now} are ready"
            else:
                case.reject("two ticks", math.ceil(case.load - 1e-9), now, "seen for one tick only")
        if case.ahead is not None and case.ahead > enough and math.ceil(case.ahead - 1e-9) > wanted:
            wanted, reason = math.ceil(case.ahead - 1e-9), Reason.SCALE_UP
            why = f"the load rises from {case.load:.2f} to {case.ahead:.2f} workers in {case.ahead_s:.0f} s, until one has joined"
    if case.forecast > wanted:
        wanted, reason, why = case.forecast, Reason.SCALE_UP_FORECAST, f"the forecast asks for {case.forecast} workers"
    if wanted <= now and _blind_growth(case):
        wanted, reason = case.now + 1, Reason.SCALE_UP_STALE
        why = f"{case.fault} numbers ({case.faulty}): the fallback adds one worker"
    return wanted, reason, why


def _lasts(case: Case, enough: float) -> bool:
    """Higher by half, or above the tolerance at the last tick as well: one noisy number is not followed."""
    if case.load is not None and case.load >= AT_ONCE * case.now:
        return True
    earlier = case.state.loads[-2:-1]
    return not earlier or earlier[0].value > enough


def _blind_growth(case: Case) -> bool:
    """Once in each outage, and not while a controller has only just begun to look."""
    fallback = case.scene.config.fallback
    return (
        bool(case.fault)
        and fallback.behavior == "scale_up_if_stale"
        and not case.state.fallback_grown
        and case.history_s >= fallback.after_s
    )


def _disabled(case: Case, given: int, why: str) -> Verdict | None:
    if case.scene.config.up.select != "Disabled":
        return None
    case.reject("scaleUp.select", given, case.now, "Disabled")
    return Verdict(target=case.now, reason=Reason.SCALE_UP_DISABLED, text=f"{why}; the policy has switched growing off")


def _unsteady(case: Case, given: int, why: str) -> Verdict | None:
    """As HPA: the lowest of the window counts, and before the window is full the size it began with. Panic does not wait."""
    window_s = case.scene.config.up.stabilization_s
    if window_s <= 0 or case.panic:
        return None
    lowest = case.state.dips[0].value if case.state.dips else 0.0
    if case.history_s >= window_s and lowest > case.now:
        return None
    case.reject("scaleUp.stabilizationWindow", given, case.now, f"lowest of {window_s:g} s")
    return Verdict(
        target=case.now,
        reason=Reason.SCALE_UP_STABILIZING,
        text=f"{why}; not yet for {window_s:g} s (lowest {lowest:.2f})",
    )


def retry_later(case: Case, given: int, why: str) -> Verdict | None:
    again_s = case.state.grow_again_s
    if again_s is None or case.now_s >= again_s:
        return None
    case.reject("pause after a failed growth", given, case.now, f"{again_s - case.now_s:.0f} s to go")
    return Verdict(
        target=case.now,
        reason=Reason.RETRY_LATER,
        text=f"{why}; the last growth failed, the next try is in {again_s - case.now_s:.0f} s",
    )


def _limited(case: Case, given: int, reason: Reason, why: str) -> Verdict:
    limit = up_limit(case.scene.config.up, case.state.changes, case.now, now_s=case.now_s)
    allowed = int(min(float(given), limit))
    case.reject("scaleUp.policies", given, max(allowed, case.now), f"at most {limit:g} at this time")
    allowed = _warm_first(case, allowed)
    if allowed <= case.now:
        text = f"{why}; this period's growth is used up"
        return Verdict(target=case.now, reason=Reason.SCALE_UP_LIMITED, text=text, final=False)
    state = replace(case.state, fallback_grown=True) if reason is Reason.SCALE_UP_STALE else None
    return Verdict(
        target=allowed,
        reason=reason,
        text=f"{why}; growing from {case.now} to {allowed}",
        final=allowed == given,
        state=state,
    )


def _warm_first(case: Case, allowed: int) -> int:
    """Where requests are late or wait: joiners serve when the slowest of them is ready, so standbys come first, and those that have to
    start after them."""
    kinds = {signal.name: signal.type for signal in case.scene.config.signals}
    if kinds.get(case.loudest) not in ("slo", "queue_time") and not case.scene.view.waiting_workers:
        return allowed
    warm, ended = case.now + case.scene.config.workers.standby, case.scene.observation.last_transition
    if not case.now < warm < allowed:
        return allowed
    replaced_s = max(REPLACED_S, case.ahead_s)
    if ended is not None and ended.to_workers > ended.from_workers and case.now_s < ended.ended_s + replaced_s:
        return allowed
    case.reject("standbys first", allowed, warm, f"{warm - case.now} wait warm, others start first")
    return warm
