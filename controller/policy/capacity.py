"""What one worker takes, learned while it works, and how much of that it is to be given. Pure.

`learn` is called at every tick by `controller.policy.follow`; the signals ask `capacity_of`. A capacity is the pair of prompt and output
tokens a second: how fast workers were while most of them had more to do than they could. Until that was seen nothing is claimed, and
latencies decide. Afterwards it moves with every further strain, and up with every rate that was served within the SLO.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from flexpert.controller.policy.types import Observation, PolicyConfig, State, TrafficReading
from flexpert.controller.policy.view import View, age_fault

LEAST_UTILISATION, MOST_UTILISATION = 0.75, 0.9  # of a measured capacity
SQUARE_ROOT = 1.5  # standard deviations of the number of live requests that are kept free
STRAINED_TICKS = 3  # so long must most workers have more than they can do, before their speed counts as their capacity
LEARN_SHARE = 0.3
LEAST_SPEED = 0.01  # tokens/s: less is no measurement
QUEUED, QUEUED_STEP = 0.2, 0.8  # of the targets of ttft and tpot: below, requests do not hold each other up
PROVED = 2.0  # standard deviations by which a rate that was served well is lowered before it counts as proved
WINDOW_S = 30.0  # of the gateway's rates
FAST_BURN, SLOW_BURN = 3.0, 2.0  # times the misses that the SLO lets go: in one window, and over BURN_S
BURN_S = 300.0
COMPUTING_S = 60.0  # in which the number of workers that compute prompts is evened out


@dataclass(frozen=True, slots=True, kw_only=True)
class Capacity:
    """What one worker should be given, tokens/s; None: not known. known: at least one is. utilisation: its share of what was measured."""

    prefill: float | None
    decode: float | None
    utilisation: float = LEAST_UTILISATION

    @property
    def known(self) -> bool:
        return self.prefill is not None or self.decode is not None

    def load(self, *, prompt: float, output: float) -> float | None:
        """Workers for these rates; None where a rate is not zero and no capacity of it is known."""
        found = 0.0
        for rate, each in ((prompt, self.prefill), (output, self.decode)):
            if each is not None:
                found = max(found, rate / each)
            elif rate > 0 and not self.known:
                return None
        return found


def utilisation(live: float) -> float:
    """Square-root staffing (Halfin and Whitt 1981): many requests even out, few do not, so a large cluster needs the smaller reserve."""
    return min(max(1.0 - SQUARE_ROOT / math.sqrt(max(live, 1.0)), LEAST_UTILISATION), MOST_UTILISATION)


def capacity_of(config: PolicyConfig, state: State, live: float = 0.0) -> Capacity:
    """What the policy gives, else what was measured."""
    said = next((signal for signal in config.signals if signal.type == "tokens_per_second"), None)
    share = utilisation(live)

    def of(target: float | None, measured: float | None) -> float | None:
        return target or (measured * share if measured else None)

    return Capacity(
        prefill=of(said.prefill if said else None, state.prefill_capacity),
        decode=of(said.decode if said else None, state.decode_capacity),
        utilisation=share,
    )


def whole_window(observation: Observation) -> bool:
    """The gateway's window tells of the present size alone."""
    ended = observation.last_transition
    return ended is None or observation.traffic.since_s >= ended.ended_s


def too_many_missed(traffic: TrafficReading, attainment: float, missed_share: float) -> bool:
    """The SLO's budget of misses burns too fast: a window with several times what it lets go and chance adds to it, or minutes with twice.

    Misses come in clusters (one long prompt holds up those behind it), so a single window with a few of them says little.
    """
    share = 1.0 - attainment
    allowed = share * (traffic.met + traffic.missed)
    at_once = FAST_BURN * allowed
    if traffic.missed > at_once + 2.0 * math.sqrt(at_once) + 1.0:
        return True
    return missed_share > SLOW_BURN * share and traffic.missed > allowed


def burn(state: State, traffic: TrafficReading, *, interval_s: float) -> float:
    """`missed_share` after this tick."""
    ended = traffic.met + traffic.missed
    found = traffic.missed / ended if ended else 0.0
    return round(state.missed_share + min(interval_s / BURN_S, 1.0) * (found - state.missed_share), 6)


def learn(observation: Observation, view: View, state: State, config: PolicyConfig) -> State:
    traffic = observation.traffic
    state = replace(
        state,
        computing=_computing(observation, view, state, config),
        missed_share=burn(state, traffic, interval_s=config.interval_s) if whole_window(observation) else 0.0,
    )
    if observation.transition is not None or not view.fresh or age_fault(traffic.age_s, config.fallback.after_s):
        return replace(state, strained_ticks=0) if state.strained_ticks else state
    ticks = min(state.strained_ticks + 1, STRAINED_TICKS) if _busy(traffic, view, config) else 0
    prefill, decode = state.prefill_capacity, state.decode_capacity
    if ticks >= STRAINED_TICKS:
        prefill, decode = _strained(prefill, view.prefill / view.now), _strained(decode, view.decode / view.now)
        demand = traffic.prompt_tokens_per_s + traffic.output_tokens_per_s
        state = replace(
            state, trial_s=observation.now_s, trial_demand=round(demand, 6), trend=()
        )  # the loads had another measure
    elif not ticks and whole_window(observation) and _served(traffic, state, config):
        sure = 1.0 - PROVED / math.sqrt(max(traffic.requests_per_s * WINDOW_S, 1.0))
        prefill = _proved(prefill, sure * traffic.prompt_tokens_per_s / view.now)
        decode = _proved(decode, sure * traffic.output_tokens_per_s / view.now)
    return replace(state, strained_ticks=ticks, prefill_capacity=prefill, decode_capacity=decode)


def _computing(observation: Observation, view: View, state: State, config: PolicyConfig) -> float | None:
    """Workers that prompts keep busy, evened out: those that say so, or as many as requests without a first token."""
    if not view.fresh or age_fault(observation.traffic.age_s, config.fallback.after_s):
        return state.computing
    found = max(view.computing, min(float(view.now), float(observation.traffic.waiting)))
    before = found if state.computing is None else state.computing
    return round(before + min(config.interval_s / COMPUTING_S, 1.0) * (found - before), 6)


def _busy(traffic: TrafficReading, view: View, config: PolicyConfig) -> bool:
    """Most have more to do than they can: requests wait behind others, and so long that it counts; or steps are slow with many in them."""
    slo = config.slo
    slow = slo is not None and slo.tpot_s is not None and traffic.tpot_s is not None and traffic.tpot_s > slo.tpot_s
    queues = view.waiting_workers * 2 >= view.fresh and view.live > view.now
    if queues and slo is not None and slo.ttft_s is not None and traffic.queue_s is not None:
        queues = traffic.queue_s > QUEUED * slo.ttft_s
    return queues or (slow and view.live > view.now)


def _served(traffic: TrafficReading, state: State, config: PolicyConfig) -> bool:
    """Within the SLO, as far as there is one."""
    slo = config.slo
    if slo is None:
        return True
    late = slo.ttft_s is not None and traffic.ttft_s is not None and traffic.ttft_s > slo.ttft_s
    slow = slo.tpot_s is not None and traffic.tpot_s is not None and traffic.tpot_s > slo.tpot_s
    return not late and not slow and not too_many_missed(traffic, slo.attainment, state.missed_share)


def _strained(known: float | None, speed: float) -> float | None:
    if speed < LEAST_SPEED:
        return known
    return speed if known is None else known + LEARN_SHARE * (speed - known)


def _proved(known: float | None, rate: float) -> float | None:
    return None if known is None else max(known, rate)
