"""Who decides in a simulation, behind one method: the controller's policy, and the baselines it is compared with.

Each sees the same Observation at its interval and answers with the number of workers it wants, None for "as it is". What others do is
modelled by what their documents and sources say: HPA v2's ratio with tolerance and a stabilisation window (docs of Kubernetes), Knative's
stable and panic windows (pkg/autoscaler/scaling/autoscaler.go), Ray Serve's target of ongoing requests with counted delays
(serve/autoscaling_policy.py).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from flexpert.controller.policy.types import Observation, WorkerReading

__all__ = ["Fixed", "Hpa", "Kpa", "RayServe", "Scaler", "Scheduled", "Wish"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """target None: as it is. abort: give up the running transition. wanted: what it would have without limits in between."""

    target: int | None = None
    abort: bool = False
    reason: str = "no_change"
    text: str = ""
    decision_id: str = ""
    wanted: int = 0
    timeout_s: float = math.inf


class Scaler(Protocol):
    """blind: it needs no more of an observation than its time and how many workers are ready."""

    name: str
    kind: Literal["policy", "baseline"]
    interval_s: float
    standby: int
    blind: bool

    def decide(self, observation: Observation) -> Wish: ...


def ready_workers(observation: Observation) -> list[WorkerReading]:
    return [worker for worker in observation.workers if worker.phase == "ready"]


def ongoing(observation: Observation) -> float:
    """Requests accepted and not ended."""
    return observation.traffic.live


class _Baseline:
    kind: Literal["policy", "baseline"] = "baseline"
    blind = False

    def __init__(self, name: str, *, low: int, high: int, interval_s: float, standby: int = 0) -> None:
        self.name = name
        self.low, self.high = low, high
        self.interval_s = interval_s
        self.standby = standby

    def wish(self, target: int, now: int, reason: str, text: str) -> Wish:
        target = max(self.low, min(self.high, target))
        return Wish(target=None if target == now else target, reason=reason, text=text, wanted=target)


class Fixed(_Baseline):
    """Always as many."""

    blind = True

    def __init__(self, workers: int, *, interval_s: float = 60.0) -> None:
        super().__init__(f"fixed-{workers}", low=workers, high=workers, interval_s=interval_s)

    def decide(self, observation: Observation) -> Wish:
        return self.wish(self.low, len(ready_workers(observation)), "fixed", f"always {self.low}")


class Hpa(_Baseline):
    """ceil(now x utilisation / target); utilisation is the fuller of batch and KV. A tolerance of 10%, shrinks to the largest of 300 s,
    at most double or four more in 15 s; it decides every 15 s, as Kubernetes does."""

    def __init__(self, *, low: int, high: int, target: float = 0.7, down_s: float = 300.0, standby: int = 0) -> None:
        super().__init__(f"hpa-{target:g}", low=low, high=high, interval_s=15.0, standby=standby)
        self._target = target
        self._down_s = down_s
        self._wanted: deque[tuple[float, int]] = deque()

    def decide(self, observation: Observation) -> Wish:
        ready = ready_workers(observation)
        now = len(ready)
        if not now:
            return Wish(reason="no_workers")
        if not self._wanted:  # the size at the begin was right until then
            self._wanted.append((observation.now_s, now))
        utilisation = sum(_utilisation(worker) for worker in ready) / now
        ratio = utilisation / self._target
        wanted = now if abs(ratio - 1) <= 0.1 else math.ceil(now * ratio)
        wanted = max(self.low, min(self.high, wanted))
        self._wanted.append((observation.now_s, wanted))
        while self._wanted[0][0] < observation.now_s - self._down_s:
            self._wanted.popleft()
        target = min(wanted, max(2 * now, now + 4))
        if wanted < now:
            target = min(now, max(size for _, size in self._wanted))
        text = f"utilisation {utilisation:.2f}, target {self._target:g}: {wanted}"
        return self.wish(target, now, "utilisation", text)


def _utilisation(worker: WorkerReading) -> float:
    batch = (worker.running + worker.waiting) / max(1, worker.max_running)
    return max(batch, worker.kv_used_tokens / max(1, worker.kv_capacity_tokens))


class Kpa(_Baseline):
    """ceil(concurrency / target) over 60 s, and over 6 s in panic: when that asks for twice what is ready. Panic never shrinks and lasts
    until 60 s after the last excess; shrinks go at most to half. target: ongoing requests of one worker x 0.7."""

    def __init__(self, *, low: int, high: int, concurrency: float, standby: int = 0) -> None:
        super().__init__(f"kpa-{concurrency:g}", low=low, high=high, interval_s=2.0, standby=standby)
        self._target = 0.7 * concurrency
        self._seen: deque[tuple[float, float]] = deque()
        self._panic_until_s = -math.inf
        self._panic_most = 0

    def decide(self, observation: Observation) -> Wish:
        now_s, now = observation.now_s, len(ready_workers(observation))
        self._seen.append((now_s, ongoing(observation)))
        while self._seen[0][0] <= now_s - 60.0:
            self._seen.popleft()
        if not now:
            return Wish(reason="no_workers")
        if len(self._seen) == 1 and self._panic_until_s < 0:  # it begins in panic: no history, no shrink
            self._panic_until_s, self._panic_most = now_s + 60.0, now
        slowest = max(1, math.floor(now / 2))
        stable = min(1000 * now, max(slowest, math.ceil(self._mean(now_s - 60.0) / self._target)))
        panic = min(1000 * now, max(slowest, math.ceil(self._mean(now_s - 6.0) / self._target)))
        if panic / now >= 2.0:
            if now_s >= self._panic_until_s:
                self._panic_most = 0
            self._panic_until_s = now_s + 60.0
        if now_s < self._panic_until_s:
            self._panic_most = max(self._panic_most, panic, now)
            return self.wish(self._panic_most, now, "panic", f"panic: {panic}, stable: {stable}")
        return self.wish(stable, now, "stable", f"stable: {stable}")

    def _mean(self, since_s: float) -> float:
        values = [value for at_s, value in self._seen if at_s > since_s]
        return sum(values) / len(values)


class RayServe(_Baseline):
    """ceil(ongoing over 30 s / target), up once it was wanted for 30 s, down for 600 s. target: ongoing requests of one worker."""

    def __init__(
        self, *, low: int, high: int, target: float, up_s: float = 30.0, down_s: float = 600.0, standby: int = 0
    ) -> None:
        super().__init__(f"ray-serve-{target:g}", low=low, high=high, interval_s=2.0, standby=standby)
        self._target = target
        self._up_s, self._down_s = up_s, down_s
        self._seen: deque[tuple[float, float]] = deque()
        self._up, self._down = 0, 0

    def decide(self, observation: Observation) -> Wish:
        now_s, now = observation.now_s, len(ready_workers(observation))
        self._seen.append((now_s, ongoing(observation)))
        while self._seen[0][0] <= now_s - 30.0:
            self._seen.popleft()
        mean = sum(value for _, value in self._seen) / len(self._seen)
        wanted = max(self.low, min(self.high, math.ceil(mean / self._target)))
        self._up = self._up + 1 if wanted > now else 0
        self._down = self._down + 1 if wanted < now else 0
        text = f"{mean:.1f} ongoing, target {self._target:g}: {wanted}"
        if wanted > now and self._up * self.interval_s > self._up_s:
            self._up = 0
            return self.wish(wanted, now, "upscale", text)
        if wanted < now and self._down * self.interval_s > self._down_s:
            self._down = 0
            return self.wish(wanted, now, "downscale", text)
        return Wish(reason="delay" if wanted != now else "no_change", text=text, wanted=wanted)


class Scheduled(_Baseline):
    """Sizes by the clock: from starts_s[i] on (seconds after start_s) sizes[i]. What an oracle is made of."""

    blind = True

    def __init__(
        self, name: str, *, start_s: float, starts_s: Sequence[float], sizes: Sequence[int], interval_s: float = 5.0
    ) -> None:
        super().__init__(name, low=min(sizes), high=max(sizes), interval_s=interval_s, standby=0)
        self._start_s = start_s
        self._starts_s, self._sizes = list(starts_s), list(sizes)
        self._place = 0

    def decide(self, observation: Observation) -> Wish:
        since_s = observation.now_s - self._start_s
        while self._place + 1 < len(self._sizes) and self._starts_s[self._place + 1] <= since_s + 1e-9:
            self._place += 1
        size = self._sizes[self._place]
        return self.wish(size, len(ready_workers(observation)), "schedule", f"{size} by the clock")
