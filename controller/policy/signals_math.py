"""From one observation to what each signal asks for. Pure; called by `controller.policy.decide`.

Every signal is brought to one number, its *load*: the workers, not rounded, that would be right for what is there now. A load does not
depend on how many workers there are, as far as the signal allows that: tokens and KV do, latencies do not. So latencies say that more
workers are needed, and how many is taken from tokens where the capacity of a worker is known.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from flexpert.controller.policy.capacity import (
    QUEUED,
    QUEUED_STEP,
    STRAINED_TICKS,
    WINDOW_S,
    Capacity,
    too_many_missed,
    whole_window,
)
from flexpert.controller.policy.staffing import staffed
from flexpert.controller.policy.types import (
    Observation,
    PolicyConfig,
    Proposal,
    Reading,
    SignalConfig,
    State,
    TrafficReading,
)
from flexpert.controller.policy.view import View, age_fault

KV_TARGET = 0.8  # of a kv_utilization without one
BATCH_TARGET = 0.8  # of the places in batches
MOST_GROWTH = 2.0  # of a size, where only a latency says that it is too small
MOST_CROWD = 4.0  # of a size, where that many requests wait for each that runs
TRIAL_SHARE = 0.34  # of the workers, the most that go because latencies are low
RESERVE = 0.5  # of what low latencies ask for, once the misses that the SLO lets go are spent
OVERSPENT = 1.5  # times the misses that the SLO lets go, over the last minutes: below, a burst that is over is forgiven
UNSPENT = 0.5  # of the misses that the SLO lets go: with more over the last minutes nothing is tried
TRIAL_PAUSE_S = 3600.0  # the next such trial at the same traffic
TRIAL_DEMAND = 0.8  # or when the traffic has fallen to this share
LEAST_GROWTH = 0.49  # workers: rounded up it is one, and in a cluster of one it is no panic
DRAIN_S = 15.0  # in which a backlog of prompts should be gone
MOST_LOAD = 1e6  # workers; beyond, a signal is out of order, and the bounds hold it anyway
P95 = 3.0  # means of an exponential time that its 95th percentile is
FULL = 0.95  # of the KV
WORK = (("kv_utilization", "worker"), ("prometheus", "worker"))  # loads that do not depend on the workers
LEAST_REQUESTS = 20  # below that many in a window a 95th percentile is one unlucky request


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """All that a signal may look at."""

    observation: Observation
    view: View
    capacity: Capacity
    config: PolicyConfig
    state: State
    ahead_s: float = 0.0  # until a worker that is ordered now serves

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
    def batches(self) -> float:
        """Workers whose places in batches the live requests fill as far as they should."""
        slots = self.view.slots * min(BATCH_TARGET, self.capacity.utilisation)
        return self.view.live / slots if slots else 0.0

    @property
    def requests(self) -> float:
        """Of the gateway's window."""
        return self.traffic.requests_per_s * WINDOW_S

    @property
    def reserve(self) -> float:
        """The more of the misses that the SLO lets go are spent, the more is kept free."""
        slo = self.config.slo
        return (
            1.0 if slo is None else 1.0 + RESERVE * min(self.state.missed_share / max(1.0 - slo.attainment, 1e-6), 1.0)
        )

    @property
    def trial_open(self) -> bool:
        """Low latencies may be tried out (again): hardly any miss, and the traffic has fallen, by more than chance, or it is long ago.

        Where workers were seen strained only the first counts: what they take is known for traffic like that.
        """
        at_s, state = self.observation.now_s, self.state
        slo = self.config.slo
        if slo is not None and state.missed_share > UNSPENT * (1.0 - slo.attainment):
            return False
        if state.trial_s is None:
            return True
        sure = max(1.0 - 2.0 / math.sqrt(max(self.requests, 1.0)), 0.3)
        if self.demand < TRIAL_DEMAND * sure * state.trial_demand:
            return True
        return not self.capacity.known and at_s - state.trial_s >= TRIAL_PAUSE_S


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
    each = scene.capacity
    per = " and ".join(
        f"{value:.0f} {name}" for value, name in ((each.prefill, "prompt"), (each.decode, "output")) if value
    )
    if load is None or not (signal.prefill or signal.decode):
        share = latency_share(scene)
        enough = float(scene.now) if share is None else min(_calm(scene, share), float(scene.now))
        measured = "what a worker takes is not measured yet"
        if load is not None and scene.capacity.known:
            measured = f"as measured a worker can be given {per}: {load:.2f} workers; latencies decide whether fewer do"
        return enough, f"{rates}; {measured}"
    return load, f"{rates}; a worker should get {per or 'any number'}"


def prometheus_load(signal: SignalConfig, scene: Scene) -> tuple[float, str]:
    value, target = scene.observation.readings[signal.name].value or 0.0, signal.target or 1.0
    if signal.per == "cluster":
        return scene.now * value / target, f"{value:g}, target {target:g}"
    return value / target, f"{value:g} in all, target {target:g} a worker"


def queue_load(signal: SignalConfig, scene: Scene) -> tuple[float, str]:
    waited, target = scene.traffic.queue_s, signal.target or 1.0
    if waited is None:
        if scene.view.waiting > scene.now:
            return _strained(scene, 1.0), f"{scene.view.waiting:.0f} requests wait and none has begun"
        return _calm(scene, 0.0), "no request has waited"
    words = f"p95 of waiting {waited:.3g} s, target {target:g} s"
    if waited <= target:
        return _calm(scene, math.sqrt(waited / target)), words
    if not _counts(scene) or (scene.requests < LEAST_REQUESTS and waited < MOST_GROWTH * target):
        return float(scene.now), f"{words}; seen before the last change, or of too few requests"
    return _strained(scene, math.sqrt(waited / target)), words


def slo_load(signal: SignalConfig, scene: Scene) -> tuple[float, str]:
    """Latency against target and attainment say whether, tokens and backlog how many. See the module's docstring."""
    slo, traffic = scene.config.slo, scene.traffic
    if slo is None:
        return float(scene.now), "the policy has no SLO"
    ended = traffic.met + traffic.missed
    ratios = _latencies(scene)
    attainment = traffic.met / ended if ended else 1.0
    words = ", ".join(f"{name} p95 {found:.3g} s of {target:g} s" for name, found, target in ratios) or "nothing ended"
    words += f", {attainment:.1%} of {ended} within" if ended else ""
    wait_s = backlog_s(scene)
    if slo.ttft_s is not None and wait_s > slo.ttft_s:
        return _strained(scene, wait_s / slo.ttft_s), f"{words}; what waits needs {wait_s:.3g} s to begin"
    worst = max((found / target for _, found, target in ratios), default=0.0)
    late = (
        worst > 1.0 and 4 * ended < scene.requests >= LEAST_REQUESTS
    )  # answers are long: few have ended, many have begun
    if (late or too_many_missed(traffic, slo.attainment, scene.state.missed_share)) and _counts(scene):
        if not _contended(scene):
            return _alone_too_slow(
                scene, late
            ), f"{words}; but nobody waits and steps are fast: more workers would not help"
        if not late and _over(scene):
            return float(scene.now), f"{words}; a burst that is over"
        return _strained(scene, max(worst, 1.0)), words
    if not ended and scene.view.waiting:
        return float(scene.now), f"{words}, {scene.view.waiting:.0f} wait"
    batches = scene.batches
    if batches > scene.now:
        words += f", {scene.view.live:.0f} live requests for batches of {scene.view.slots:.0f}"
    return max(_calm(scene, latency_share(scene) or 0.0), batches), words


def _over(scene: Scene) -> bool:
    """Nobody waits any more, and over the last minutes hardly more was missed than the SLO lets go."""
    slo = scene.config.slo
    spent = slo is not None and scene.state.missed_share > OVERSPENT * (1.0 - slo.attainment)
    return not spent and not _queued(scene)


def _queued(scene: Scene) -> bool:
    return scene.view.waiting_workers * 2 >= max(scene.view.fresh, 1)


def _alone_too_slow(scene: Scene, late: bool) -> float:
    """Misses that more workers do not help hold the size only while they are at their worst."""
    traffic, slo = scene.traffic, scene.config.slo
    if late or slo is None or too_many_missed(traffic, slo.attainment, 0.0):
        return float(scene.now)
    return _calm(scene, latency_share(scene) or 0.0)


def _latencies(scene: Scene) -> list[tuple[str, float, float]]:
    """Name, p95 and target of those that have both."""
    slo, traffic = scene.config.slo, scene.traffic
    if slo is None:
        return []
    both = (("ttft", traffic.ttft_s, slo.ttft_s), ("tpot", traffic.tpot_s, slo.tpot_s))
    return [(name, found, target) for name, found, target in both if found is not None and target is not None]


def latency_share(scene: Scene) -> float | None:
    """Of the workers that are there, the share that would still be within the SLO if latencies grew as fast as they may."""
    if scene.config.slo is None:
        return None
    return max((_share(scene, name, found, target) for name, found, target in _latencies(scene)), default=0.0)


def _share(scene: Scene, name: str, found: float, target: float) -> float:
    """Of time to first token only what is spent in a queue gets less with more workers."""
    if name == "ttft":
        queued = scene.traffic.queue_s
        return math.sqrt((found if queued is None else min(queued, found)) / target)
    return found / target


def backlog_s(scene: Scene) -> float:
    """How long the prompts that wait behind others need until they are computed; 0 while nobody knows how fast a worker can be.

    One request at each worker is no backlog: nobody is before it, and more workers would not compute it sooner.
    """
    view, traffic = scene.view, scene.traffic
    if view.live <= scene.now:
        return 0.0
    each = traffic.prompt_tokens_per_s / traffic.requests_per_s if traffic.requests_per_s > 0 else 0.0
    tokens = (view.waiting_tokens or view.waiting * each) - scene.now * each
    speed = scene.now * (scene.state.prefill_capacity or 0.0)
    if not speed and scene.state.strained_ticks >= STRAINED_TICKS - 1:
        speed = view.prefill  # most have had more than they can do for two ticks: this is how fast they are
    return tokens / speed if tokens > 0 and speed else 0.0


def _contended(scene: Scene) -> bool:
    """Requests wait for each other: in a queue, or for a turn in a batch. What is slow all the same is slow on its own."""
    slo, traffic = scene.config.slo, scene.traffic
    if slo is None or scene.view.live <= scene.now:
        return False
    queued = traffic.queue_s is not None and slo.ttft_s is not None and traffic.queue_s > QUEUED * slo.ttft_s
    slow = traffic.tpot_s is not None and slo.tpot_s is not None and traffic.tpot_s > QUEUED_STEP * slo.tpot_s
    return queued or slow or _queued(scene)


def _counts(scene: Scene) -> bool:
    """A window that reaches back before the last change tells of the old size, unless requests wait at this moment, too."""
    return scene.view.waiting > 0 or whole_window(scene.observation)


def _one_more(scene: Scene) -> float:
    return max(scene.now + LEAST_GROWTH, scene.now * (1.0 + scene.config.up.tolerance) + 0.01)


def _strained(scene: Scene, ratio: float) -> float:
    """Too few: at least one more, unless what waits is done before one could serve. As many as tokens ask for where capacity is known,
    and what will still wait then; else by the ratio and by what waits, but no more than what arrives for what is served now."""
    load, view, traffic = scene.token_load, scene.view, scene.traffic
    if load is None or not scene.capacity.known:
        crowd = view.live / max(view.running, 1.0)  # what is here for what is served at a time
        times = max(min(ratio, MOST_GROWTH), min(crowd, MOST_CROWD))
        if view.prefill > 0.0 and traffic.prompt_tokens_per_s > 0.0:
            times = min(times, traffic.prompt_tokens_per_s / view.prefill / scene.capacity.utilisation)
        return max(_one_more(scene), scene.now * times)
    work_s = backlog_s(scene) * scene.now
    done_s = max(scene.now - load, 0.0) * scene.ahead_s
    if load < scene.now and work_s <= done_s and scene.batches < scene.now:
        return float(scene.now)
    return max(_one_more(scene), load + max(work_s - done_s, 0.0) / max(DRAIN_S, scene.ahead_s))


def _calm(scene: Scene, share: float) -> float:
    """Enough: the more of what steps and what prompts need. As many workers as requests share nothing. Where no latency is known, some
    of the workers at a time, tried out."""
    alone = scene.config.consolidation_margin * min(float(scene.now), scene.view.live)
    if _latencies(scene):
        if _late_soon(scene):
            return _one_more(scene)
        return min(alone, scene.reserve * max(scene.now * share, prompt_workers(scene)))
    if not scene.trial_open:
        return alone
    least = scene.now - max(1.0, math.floor(scene.now * TRIAL_SHARE))
    return min(alone, max(least * scene.config.consolidation_margin, scene.now * share))


def _late_soon(scene: Scene) -> bool:
    """Many prompts wait, and first tokens come so late that hardly anything is left of their time."""
    traffic, slo = scene.traffic, scene.config.slo
    if slo is None or slo.ttft_s is None or traffic.ttft_s is None or traffic.waiting < LEAST_REQUESTS:
        return False
    return _contended(scene) and traffic.ttft_s > scene.config.consolidation_margin * slo.ttft_s


def prompt_workers(scene: Scene) -> float:
    """So many that a prompt finds a free worker in time, by how many prompts keep busy now and by what ttft leaves for waiting."""
    busy, traffic, slo = scene.state.computing or 0.0, scene.traffic, scene.config.slo
    if slo is None or busy <= 0.0:
        return 0.0
    times = 0.0  # that a prompt's own time fits into what may be waited
    if slo.ttft_s is not None and traffic.ttft_s is not None and traffic.requests_per_s > 0.0:
        own_s = max(busy / traffic.requests_per_s, traffic.ttft_s / P95)
        times = max(slo.ttft_s * scene.config.consolidation_margin - traffic.ttft_s, 0.0) / max(own_s, 1e-6)
    return staffed(busy, late=1.0 - slo.attainment, times=times)


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
