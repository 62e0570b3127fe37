"""The decision core: one observation and the state of the last tick give one decision and the next state.

Pure: no clock, no I/O, no randomness; the same inputs give the same bytes. The live loop and the simulator both call it. The way of
a decision, each part a module: what became of the last order (`follow`), what each signal asks for (`signals_math`), between which
bounds (`bounds`), and then the first of these verdicts that applies: in flight, bounds, override, `grow`, blind, `shrink`, no change.
"""

from __future__ import annotations

import math
from dataclasses import replace

from flexpert.controller.policy import behavior, horizon
from flexpert.controller.policy.bounds import bounds_of, forecast_floor
from flexpert.controller.policy.capacity import capacity_of
from flexpert.controller.policy.case import Case, Verdict
from flexpert.controller.policy.follow import follow, grow_failed
from flexpert.controller.policy.grow import grow, retry_later
from flexpert.controller.policy.reasons import Reason
from flexpert.controller.policy.shrink import blind, shrink, unsafe
from flexpert.controller.policy.signals_math import Scene, propose, work_load
from flexpert.controller.policy.types import (
    Change,
    Decision,
    Observation,
    Order,
    Plan,
    PolicyConfig,
    Proposal,
    Sample,
    State,
)
from flexpert.controller.policy.view import view_of

PANIC_LASTS = 10.0  # panic windows: as long as Knative's stable window
ABORT_S = 60.0  # until an abort is asked for again
SMOOTH_S = 30.0  # in which the load is evened out, before its peak holds a shrink


def decide(observation: Observation, state: State, config: PolicyConfig) -> tuple[Decision, State]:
    """One tick. `observation.now_s` must not go back."""
    view = view_of(observation, stale_s=config.fallback.after_s)
    state = follow(observation, view, state, config)
    capacity = capacity_of(config, state, view.live)
    ahead_s = horizon.ahead_s(observation, state, config)
    scene = Scene(observation=observation, view=view, capacity=capacity, config=config, state=state, ahead_s=ahead_s)
    case, proposals = _case(scene)
    verdict = judge(case)
    return _answer(case, verdict, proposals)


def _case(scene: Scene) -> tuple[Case, tuple[Proposal, ...]]:
    observation, config = scene.observation, scene.config
    bounds, said, fault = bounds_of(scene)
    faulty = [
        proposal.signal for proposal in said if proposal.wanted is None and proposal.why.startswith(("miss", "stale"))
    ]
    forecast, forecasts = forecast_floor(scene)
    proposals = [propose(signal, scene) for signal in config.signals if signal.type not in ("schedule", "forecast")]
    for proposal in proposals:
        if proposal.wanted is None:
            fault = fault or proposal.why.partition(":")[0]
            faulty.append(proposal.signal)
    loads = [(proposal.load, proposal.signal) for proposal in proposals if proposal.load is not None]
    load, loudest = max(loads, key=lambda item: item[0]) if loads else (None, "")
    ahead_s = scene.ahead_s
    state = _remember(scene, load, work_load(proposals, scene), ahead_s=ahead_s, whole=not fault)
    scene = replace(scene, state=state)
    now_s = observation.now_s
    case = Case(
        scene=scene,
        bounds=bounds,
        load=load,
        loudest=loudest,
        fault=fault,
        faulty=", ".join(faulty),
        forecast=bounds.clamp(forecast) if forecast else 0,
        panic=state.panic_until_s is not None,
        ahead=_ahead(state, now_s=now_s, ahead_s=ahead_s),
        ahead_s=ahead_s,
        mean=behavior.mean_since(state.loads, now_s - config.panic.window_s),
    )
    return case, (*proposals, *said, *forecasts)


def _ahead(state: State, *, now_s: float, ahead_s: float) -> float | None:
    if not state.trend or state.trend[-1].at_s < now_s:
        return None
    return horizon.load_ahead(state.trend, state.trend[-1].value, now_s=now_s, ahead=ahead_s)


def _remember(scene: Scene, load: float | None, work: float | None, *, ahead_s: float, whole: bool) -> State:
    """The windows with this tick's load. Where a signal has no number the present size counts as needed: what was not seen was not low."""
    state, config, now_s, now = scene.state, scene.config, scene.observation.now_s, scene.now
    down_s = max(config.down.stabilization_s, 1e-9)
    seen = load if load is not None and whole else max(load or 0.0, float(now))
    smooth = (
        seen if state.smooth is None else state.smooth + min(config.interval_s / SMOOTH_S, 1.0) * (seen - state.smooth)
    )
    peaks = behavior.push_peak(state.peaks, Sample(at_s=now_s, value=round(min(smooth, seen), 6)), window_s=down_s)
    demand = round(scene.demand, 3)
    low = whole and load is not None and math.ceil(load / config.consolidation_margin - 1e-9) < now
    state = replace(
        state,
        peaks=peaks,
        smooth=round(smooth, 6),
        demands=behavior.push_peak(state.demands, Sample(at_s=now_s, value=demand), window_s=down_s),
        sized_demand=max(state.sized_demand, demand) if state.sized_demand else 0.0,
        low_since_s=(now_s if state.low_since_s is None else state.low_since_s) if low else None,
        fallback_grown=state.fallback_grown and not whole,
        last_s=now_s,
    )
    if load is None:
        return _panic(scene, state)
    sample = Sample(at_s=now_s, value=round(load, 6))
    if work is not None:
        trend = behavior.push_load(
            state.trend, Sample(at_s=now_s, value=round(work, 6)), window_s=horizon.window_s(ahead_s)
        )
        state = replace(state, trend=trend)
    up_s = max(config.up.stabilization_s, 1e-9)
    return _panic(
        scene,
        replace(
            state,
            dips=behavior.push_dip(state.dips, sample, window_s=up_s),
            loads=behavior.push_load(state.loads, sample, window_s=max(config.panic.window_s, 2.0 * config.interval_s)),
        ),
    )


def _panic(scene: Scene, state: State) -> State:
    """As Knative's: begins, and lasts anew, with every tick at which the short window is over the threshold."""
    panic, now_s = scene.config.panic, scene.observation.now_s
    mean = behavior.mean_since(state.loads, now_s - panic.window_s)
    over = panic.threshold > 0 and scene.now > 0 and mean is not None and mean >= panic.threshold * scene.now
    if over:
        return replace(state, panic_until_s=now_s + PANIC_LASTS * panic.window_s)
    if state.panic_until_s is not None and now_s >= state.panic_until_s:
        return replace(state, panic_until_s=None)
    return state


def judge(case: Case) -> Verdict:
    """The first verdict that applies."""
    return (
        _overdue(case)
        or _in_flight(case)
        or _nobody(case)
        or _below(case)
        or _override(case)
        or _above(case)
        or grow(case)
        or blind(case)
        or shrink(case)
        or Verdict(target=case.now, reason=Reason.NO_CHANGE, text=_content(case))
    )


def _content(case: Case) -> str:
    load = "no signal" if case.load is None else f"{case.loudest} asks for {case.load:.2f} workers"
    return f"{load}, {case.now} are ready: that is right"


def _overdue(case: Case) -> Verdict | None:
    """Growth that did not come in time is given up, so that it blocks nothing: neither the next try nor a shrink."""
    state, running, now_s = case.state, case.scene.observation.transition, case.now_s
    order, timeout_s = state.order, case.scene.config.grow_timeout_s
    grows = running is not None and running.kind == "scale" and running.to_workers > running.from_workers
    late = order is not None and order.plan.kind != "shrink" and now_s > order.plan.deadline_s
    if order is None and running is not None:
        late = grows and now_s > running.began_s + timeout_s
    if not late or (running is not None and not grows):
        return None
    again = order is not None and order.plan.kind == "abort"
    if not again:
        state = grow_failed(state, now_s=now_s)
        state = replace(state, changes=behavior.without(state.changes, order) if order else state.changes)
    plan = None
    if running is not None:
        plan = Plan(
            kind="abort",
            from_workers=running.to_workers,
            target=case.bounds.clamp(case.now),
            deadline_s=now_s + ABORT_S,
            transition_id=running.id,
        )
    wanted = running.to_workers if running is not None else order.plan.target if order is not None else case.now
    return Verdict(
        target=case.now,
        reason=Reason.INSUFFICIENT_CAPACITY,
        text=f"{wanted} workers were ordered and did not come within {timeout_s:g} s: given up, {case.now} serve",
        plan=plan,
        state=replace(state, order=None, sized_workers=0),
    )


def _in_flight(case: Case) -> Verdict | None:
    running, order = case.scene.observation.transition, case.state.order
    if running is not None:
        text = f"transition {running.id} from {running.from_workers} to {running.to_workers} workers is in {running.phase or 'flight'}"
        return Verdict(target=running.to_workers, reason=Reason.IN_FLIGHT, text=text)
    if order is None:
        return None
    text = f"{order.plan.target} workers were ordered by {order.decision_id} and the transition has not begun"
    return Verdict(target=order.plan.target, reason=Reason.IN_FLIGHT, text=text)


def _nobody(case: Case) -> Verdict | None:
    if case.now:
        return None
    return Verdict(target=0, reason=Reason.NO_READY_WORKERS, text="no worker is ready: a start or a repair is due")


def _below(case: Case) -> Verdict | None:
    low = case.bounds.low
    if case.now >= low:
        return None
    asked = math.ceil(case.load - 1e-9) if case.load is not None else 0
    target, why = case.bounds.clamp(max(low, asked)), f"{case.bounds.low_why} asks for at least {low} workers"
    return retry_later(case, target, why) or Verdict(
        target=target, reason=Reason.BELOW_MIN, text=f"{why}, {case.now} are ready"
    )


def _override(case: Case) -> Verdict | None:
    wish = case.scene.observation.override
    if wish is None or case.now_s >= wish.until_s:
        return None
    target = case.bounds.clamp(wish.workers)
    case.reject("bounds", wish.workers, target, f"{case.bounds.low} to {case.bounds.high} workers")
    why = f"{wish.owner} asks for {wish.workers} workers for {wish.until_s - case.now_s:.0f} s more"
    if target > case.now and (held := retry_later(case, target, why)) is not None:
        return held
    return Verdict(target=target, reason=Reason.OVERRIDE, text=why)


def _above(case: Case) -> Verdict | None:
    """More than allowed go at once, without windows and rules, but not against what forbids every shrink."""
    high = case.bounds.high
    if case.now <= high:
        return None
    why = f"{case.bounds.high_why} allows {high} workers, {case.now} are ready"
    return unsafe(case, high) or Verdict(target=high, reason=Reason.ABOVE_MAX, text=why)


def _answer(case: Case, verdict: Verdict, proposals: tuple[Proposal, ...]) -> tuple[Decision, State]:
    """Verdict to decision, and what is remembered of it if it is carried out."""
    config, now, now_s = case.scene.config, case.now, case.now_s
    decision_id = f"{case.state.run_id}-{case.state.tick}"
    plan = verdict.plan or _plan(case, verdict)
    active = config.mode == "Active"
    paused = config.mode == "Paused"
    reason = Reason.PAUSED if paused else verdict.reason
    text = f"paused; {verdict.text}" if paused else verdict.text
    decision = Decision(
        decision_id=decision_id,
        at_s=now_s,
        now=now,
        wanted=case.bounds.clamp(verdict.target),
        action=plan if active else None,
        reason=reason,
        text=text,
        proposals=proposals,
        rejected=tuple(case.rejected),
        mode=config.mode,
        would=plan,
        panic=case.panic,
        policy=config.name,
    )
    state = case.state
    if active:
        state = verdict.state or state
        if plan is not None:
            state = _ordered(case, verdict, state, Order(decision_id=decision_id, plan=plan, at_s=now_s))
    return decision, replace(state, tick=state.tick + 1)


def _plan(case: Case, verdict: Verdict) -> Plan | None:
    now, target = case.now, verdict.target
    if verdict.reason in (Reason.IN_FLIGHT, Reason.NO_READY_WORKERS) or target == now:
        return None
    grows, timeout_s = target > now, case.scene.config.grow_timeout_s
    return Plan(
        kind="grow" if grows else "shrink",
        from_workers=now,
        target=target,
        deadline_s=case.now_s + (timeout_s if grows else timeout_s / 2.0),
    )


def _ordered(case: Case, verdict: Verdict, state: State, order: Order) -> State:
    """The order, the change for the rules, and what the new size is right for."""
    if order.plan.kind == "abort":
        return replace(state, order=order)
    period_s = behavior.longest_period_s(case.scene.config)
    change = Change(at_s=case.now_s, from_workers=case.now, to_workers=order.plan.target)
    kept = tuple(item for item in state.changes if item.at_s > case.now_s - period_s)
    state = replace(state, order=order, changes=(*kept, change))
    if order.plan.kind == "grow":
        demand = _traffic_of(case, case.scene.demand)
        state = replace(state, few_workers=case.now, few_demand=round(demand, 3), few_s=case.now_s)
        state = _sized(state, order, load=case.load or 0.0, demand=demand)
    elif verdict.final:
        peak = max(state.peaks[0].value if state.peaks else 0.0, case.load or 0.0)
        state = _sized(
            state, order, load=peak, demand=_traffic_of(case, state.demands[0].value if state.demands else 0.0)
        )
    if verdict.trial:
        state = replace(state, trial_s=case.now_s, trial_demand=round(case.scene.demand, 6))
    return state


def _traffic_of(case: Case, demand: float) -> float:
    """0 where a signal asked that does not follow tokens: its own load tells when it is over."""
    kinds = {signal.name: signal.type for signal in case.scene.config.signals}
    return demand if kinds.get(case.loudest) in ("slo", "queue_time", "tokens_per_second") else 0.0


def _sized(state: State, order: Order, *, load: float, demand: float) -> State:
    return replace(
        state,
        sized_workers=order.plan.target,
        sized_load=round(load, 6),
        sized_s=order.at_s,
        sized_demand=round(demand, 3),
    )
