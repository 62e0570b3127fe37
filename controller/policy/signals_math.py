"""From one observation to what each signal asks for. Pure; called by `controller.policy.decide`.

Every signal is brought to one number, its *load*: the workers, not rounded, that would be right for what is there now. A load does not
depend on how many workers there are, as far as the signal allows that: tokens and KV do, latencies do not. So latencies say that more
workers are needed, and how many is taken from tokens where the capacity of a worker is known.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from flexpert.controller.policy.types import (
    Observation,
    PolicyConfig,
    Proposal,
    Reading,
    SignalConfig,
    State,
    TrafficReading,
)

UTILISATION = 0.8  # of a measured capacity: beyond, queues grow faster than the load
KV_TARGET = 0.8  # of a kv_utilization without one
MOST_GROWTH = 2.0  # of a size, where only a latency says that it is too small
MOST_CROWD = 4.0  # of a size, where that many requests wait for each that runs
TRIAL_SHARE = 0.25  # of the workers, the most that go because latencies are low
TRIAL_PAUSE_S = 3600.0  # the next such trial at the same traffic
TRIAL_DEMAND = 0.8  # or when the traffic has fallen to this share
STRAINED_TICKS = 3  # so long must most workers have more than they can do, before their speed counts as their capacity
DRAIN_S = 15.0  # in which a backlog of prompts should be gone
MOST_LOAD = 1e6  # workers; beyond, a signal is out of order, and the bounds hold it anyway
FULL = 0.95  # of the KV
WORK = (("kv_utilization", "worker"), ("prometheus", "worker"))  # loads that do not depend on the workers
QUEUED, QUEUED_STEP = 0.2, 0.8  # of the targets of ttft and tpot: below, requests do not hold each other up
LEAST_REQUESTS = 5  # below that many ended requests a share says nothing


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """The workers of one tick in sums. What silent workers do is taken to be the others' mean; in kv_worst, the others' highest."""

    now: int
    silent: int = 0
    fresh: int = 0
    oldest_s: float | None = None
    kv_used: float = 0.0
    kv_worst: float = 0.0
    kv_capacity: float = 0.0  # of one worker
    running: float = 0.0
    waiting: float = 0.0
    waiting_workers: int = 0
    waiting_tokens: float = 0.0
    prefill: float = 0.0
    decode: float = 0.0
    longest: int = 0
    slots: float = 0.0  # of one worker; 0: not known

    @property
    def blind(self) -> bool:
        """Too few workers say anything to speak for the rest. One that is silent is never too many, unless it is the only one."""
        return self.now > 0 and (self.fresh == 0 or (self.silent > 1 and self.silent * 2 > self.now))

    @property
    def live(self) -> float:
        return self.running + self.waiting


def view_of(observation: Observation, *, stale_s: float) -> View:
    """One pass over the workers: this is what takes the time of a decision."""
    now = fresh = waiting_workers = longest = slots = 0
    used = capacity = running = waiting = waiting_tokens = prefill = decode = worst = 0.0
    oldest: float | None = None
    for worker in observation.workers:
        if worker.phase != "ready":
            continue
        now += 1
        age = worker.age_s
        if age is None or age > stale_s:
            if age is not None and (oldest is None or age > oldest):
                oldest = age
            continue
        fresh += 1
        kv = worker.kv_used_tokens
        used += kv
        if kv > worst:
            worst = kv
        capacity += worker.kv_capacity_tokens
        running += worker.running
        slots += worker.max_running
        prefill += worker.prefill_tokens_per_s
        decode += worker.decode_tokens_per_s
        if worker.waiting:
            waiting += worker.waiting
            waiting_workers += 1
        waiting_tokens += worker.waiting_tokens
        if worker.longest_context_tokens > longest:
            longest = worker.longest_context_tokens
    scale = now / fresh if fresh else 0.0
    return View(
        now=now,
        silent=now - fresh,
        fresh=fresh,
        oldest_s=oldest,
        kv_used=used * scale,
        kv_worst=used + (now - fresh) * worst,
        kv_capacity=capacity / fresh if fresh else 0.0,
        running=running * scale,
        waiting=waiting * scale,
        waiting_workers=waiting_workers,
        waiting_tokens=waiting_tokens * scale,
        prefill=prefill * scale,
        decode=decode * scale,
        longest=longest,
        slots=slots / fresh if fresh else 0.0,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Capacity:
    """What one worker should be given, tokens/s; None: not known. known: at least one is."""

    prefill: float | None
    decode: float | None

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


def capacity_of(config: PolicyConfig, state: State) -> Capacity:
    """What the policy gives, else what was measured."""
    said = next((signal for signal in config.signals if signal.type == "tokens_per_second"), None)

    def of(target: float | None, measured: float | None) -> float | None:
        return target or (measured * UTILISATION if measured else None)

    return Capacity(
        prefill=of(said.prefill if said else None, state.prefill_capacity),
        decode=of(said.decode if said else None, state.decode_capacity),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """All that a signal may look at."""

    observation: Observation
    view: View
    capacity: Capacity
    config: PolicyConfig
    state: State

    @property
    def traffic(self) -> TrafficReading:
        return self.observation.traffic

    @property
    def now(self) -> int:
        return self.view.now

    @property
    def token_load(self) -> float | None:
        return self.capacity.load(prompt=self.traffic.prompt_tokens_per_s, output=self.traffic.output_tokens_per_s)

    @property
    def demand(self) -> float:
        return self.traffic.prompt_tokens_per_s + self.traffic.output_tokens_per_s

    @property
    def trial_open(self) -> bool:
        """Low latencies may be tried out again."""
        at_s, state = self.observation.now_s, self.state
        return (
            state.trial_s is None
            or at_s - state.trial_s >= TRIAL_PAUSE_S
            or self.demand < TRIAL_DEMAND * state.trial_demand
        )


def age_fault(age_s: float | None, stale_s: float) -> str:
    """ "missing", "stale", or "" for numbers that count; zero is such a number."""
    if age_s is None:
        return "missing"
    return "stale" if age_s > stale_s else ""


def fault_of(signal: SignalConfig, scene: Scene) -> tuple[str, str]:
    """What is wrong with the signal's numbers ("missing", "stale", "") and in which words."""
    stale_s = scene.config.fallback.after_s
    if signal.type in ("slo", "queue_time", "tokens_per_second"):
        fault = age_fault(scene.traffic.age_s, stale_s)
        if fault:
            return fault, "the gateway " + _silence(fault, scene.traffic.age_s)
        if not (signal.type == "slo" and scene.view.blind):
            return "", ""
    if signal.type in ("slo", "kv_utilization"):
        if not scene.view.blind:
            return "", ""
        fault = "missing" if scene.view.oldest_s is None else "stale"
        return fault, f"{scene.view.silent} of {scene.now} workers: " + _silence(fault, scene.view.oldest_s)
    reading = scene.observation.readings.get(signal.name, Reading())
    if reading.value is not None and not math.isfinite(reading.value):
        return "missing", f"{reading.value} is no number"
    known = reading.value is not None or signal.type in ("schedule", "forecast")
    fault = age_fault(reading.age_s, stale_s) if known and not reading.error else "missing"
    return fault, reading.error or ("" if not fault else _silence(fault, reading.age_s))


def _silence(fault: str, age_s: float | None) -> str:
    return "never said anything" if fault == "missing" else f"said nothing for {age_s:.0f} s"


def propose(signal: SignalConfig, scene: Scene) -> Proposal:
    """One signal's wish. schedule and forecast are bounds, see `controller.policy.bounds`."""
    fault, why = fault_of(signal, scene)
    if fault:
        return Proposal(signal=signal.name, wanted=None, why=f"{fault}: {why}")
    load, why = {
        "slo": slo_load,
        "kv_utilization": kv_load,
        "queue_time": queue_load,
        "tokens_per_second": tokens_load,
        "prometheus": prometheus_load,
    }[signal.type](signal, scene)
    load = min(load, MOST_LOAD)
    return Proposal(signal=signal.name, wanted=math.ceil(load - 1e-9), why=why, load=round(load, 6))


def kv_load(signal: SignalConfig, scene: Scene) -> tuple[float, str]:
    view, target = scene.view, signal.target or KV_TARGET
    if not view.kv_capacity:
        return float(scene.now), "no worker says how much KV it can hold"
    share = view.kv_used / (view.kv_capacity * scene.now)
    return share * scene.now / target, f"KV is {share:.0%} full, target {target:.0%}"


def tokens_load(signal: SignalConfig, scene: Scene) -> tuple[float, str]:
    traffic = scene.traffic
    rates = f"{traffic.prompt_tokens_per_s:.0f} prompt and {traffic.output_tokens_per_s:.0f} output tokens/s"
    load = scene.token_load
    if load is None:
        return float(scene.now), rates + "; what a worker takes is not measured yet"
    each = scene.capacity
    per = " and ".join(
        f"{value:.0f} {name}" for value, name in ((each.prefill, "prompt"), (each.decode, "output")) if value
    )
    return load, f"{rates}; a worker should get {per or 'any number'}"


def prometheus_load(signal: SignalConfig, scene: Scene) -> tuple[float, str]:
    value, target = scene.observation.readings[signal.name].value or 0.0, signal.target or 1.0
    if signal.per == "cluster":
        return scene.now * value / target, f"{value:g}, target {target:g}"
    return value / target, f"{value:g} in all, target {target:g} a worker"


def queue_load(signal: SignalConfig, scene: Scene) -> tuple[float, str]:
    waited, target = scene.traffic.queue_s, signal.target or 1.0
    if waited is None:
        if scene.view.waiting:
            return _strained(scene, 1.0), f"{scene.view.waiting:.0f} requests wait and none has begun"
        return _calm(scene, 0.0), "no request has waited"
    words = f"p95 of waiting {waited:.3g} s, target {target:g} s"
    if waited > target:
        return _strained(scene, math.sqrt(waited / target)), words
    return _calm(scene, math.sqrt(waited / target)), words


def slo_load(signal: SignalConfig, scene: Scene) -> tuple[float, str]:
    """Latency against target and attainment say whether, tokens and backlog how many. See the module's docstring."""
    slo, traffic = scene.config.slo, scene.traffic
    if slo is None:
        return float(scene.now), "the policy has no SLO"
    ended = traffic.met + traffic.missed
    ratios = [
        (name, found, target)
        for name, found, target in (("ttft", traffic.ttft_s, slo.ttft_s), ("tpot", traffic.tpot_s, slo.tpot_s))
        if found is not None and target is not None
    ]
    attainment = traffic.met / ended if ended else 1.0
    words = ", ".join(f"{name} p95 {found:.3g} s of {target:g} s" for name, found, target in ratios) or "nothing ended"
    words += f", {attainment:.1%} of {ended} within" if ended else ""
    wait_s = backlog_s(scene)
    if slo.ttft_s is not None and wait_s > slo.ttft_s:
        return _strained(scene, wait_s / slo.ttft_s), f"{words}; what waits needs {wait_s:.3g} s to begin"
    worst = max((found / target for _, found, target in ratios), default=0.0)
    missed = ended >= LEAST_REQUESTS and attainment < slo.attainment
    if (worst > 1.0 or missed) and _counts(scene):
        if not _contended(scene):
            return float(scene.now), f"{words}; but nobody waits and steps are fast: more workers would not help"
        return _strained(scene, max(worst, 1.0)), words
    if not ended and scene.view.waiting:
        return float(scene.now), f"{words}, {scene.view.waiting:.0f} wait"
    shares = [found / target if name == "tpot" else math.sqrt(found / target) for name, found, target in ratios]
    return _calm(scene, max(shares, default=0.0)), words


def backlog_s(scene: Scene) -> float:
    """How long the prompts that wait now need until they are computed; 0 while nobody knows how fast a worker can be."""
    view, traffic = scene.view, scene.traffic
    tokens = view.waiting_tokens
    if not tokens and view.waiting and traffic.requests_per_s > 0:
        tokens = view.waiting * traffic.prompt_tokens_per_s / traffic.requests_per_s
    speed = scene.now * (scene.state.prefill_capacity or 0.0)
    if not speed and scene.state.strained_ticks >= STRAINED_TICKS - 1:
        speed = view.prefill  # most have had more than they can do for two ticks: this is how fast they are
    return tokens / speed if tokens and speed else 0.0


def _contended(scene: Scene) -> bool:
    """Requests wait for each other: in a queue, or for a turn in a batch. What is slow all the same is slow on its own."""
    slo, traffic = scene.config.slo, scene.traffic
    if slo is None or scene.view.live <= scene.now:
        return False
    queued = traffic.queue_s is not None and slo.ttft_s is not None and traffic.queue_s > QUEUED * slo.ttft_s
    slow = traffic.tpot_s is not None and slo.tpot_s is not None and traffic.tpot_s > QUEUED_STEP * slo.tpot_s
    return queued or slow or scene.view.waiting_workers * 2 >= max(scene.view.fresh, 1)


def _counts(scene: Scene) -> bool:
    """A window that reaches back before the last change tells of the old size, unless requests wait at this moment, too."""
    ended = scene.observation.last_transition
    return scene.view.waiting > 0 or ended is None or scene.traffic.since_s >= ended.ended_s


def _strained(scene: Scene, ratio: float) -> float:
    """Too few: at least one more. As many as tokens and backlog ask for where capacity is known, else by the ratio, within limits."""
    least = max(scene.now + 1.0, scene.now * (1.0 + scene.config.up.tolerance) + 0.01)
    load = scene.token_load
    if load is None or not scene.capacity.known:
        crowd = scene.view.live / max(scene.view.running, 1.0)  # what is here for what is served at a time
        return max(least, scene.now * min(ratio, MOST_GROWTH), scene.now * min(crowd, MOST_CROWD))
    return max(least, load + backlog_s(scene) * scene.now / DRAIN_S)


def _calm(scene: Scene, share: float) -> float:
    """Enough. By tokens where capacity is known; else by the share of the latency's target, a few workers at a time, each tried out."""
    load = scene.token_load
    if load is not None and scene.capacity.known:
        return min(load, float(scene.now)) if share < 0.5 else load
    margin = scene.config.consolidation_margin
    alone = margin * min(float(scene.now), scene.view.live)  # as many workers as requests: nobody shares
    if not scene.trial_open:
        return alone
    least = scene.now - max(1.0, math.floor(scene.now * TRIAL_SHARE))
    return min(alone, max(least * margin, scene.now * share))


def work_load(proposals: Sequence[Proposal], scene: Scene) -> float | None:
    """The highest load that tells how much work there is, whatever the number of workers; None while something is full.

    Latencies tell nothing of that kind, and a full KV or a queue says that there is more than is seen: growth would look like a trend.
    """
    view = scene.view
    if view.waiting_workers * 2 >= max(view.fresh, 1) or view.kv_used > FULL * view.kv_capacity * view.now:
        return None
    kinds = {signal.name: signal for signal in scene.config.signals}
    found = [
        proposal.load
        for proposal in proposals
        if proposal.load is not None and (kinds[proposal.signal].type, kinds[proposal.signal].per) in WORK
    ]
    if (
        scene.capacity.known
        and scene.token_load is not None
        and not age_fault(scene.traffic.age_s, scene.config.fallback.after_s)
    ):
        found.append(min(scene.token_load, MOST_LOAD))
    return max(found, default=None)
