"""The workers of one tick in sums, and how old a number may be. Pure; the first thing that a decision makes of an observation."""

from __future__ import annotations

from dataclasses import dataclass

from flexpert.controller.policy.types import Observation


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
    computing: float = 0.0  # workers with a prompt that is not computed yet

    @property
    def blind(self) -> bool:
        """Too few workers say anything to speak for the rest. One that is silent is never too many, unless it is the only one."""
        return self.now > 0 and (self.fresh == 0 or (self.silent > 1 and self.silent * 2 > self.now))

    @property
    def live(self) -> float:
        return self.running + self.waiting


def view_of(observation: Observation, *, stale_s: float) -> View:
    """One pass over the workers: this is what takes the time of a decision."""
    now = fresh = waiting_workers = computing = longest = slots = 0
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
        if worker.waiting_tokens or worker.waiting:
            computing += 1
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
        computing=computing * scale,
    )


def age_fault(age_s: float | None, stale_s: float) -> str:
    """ "missing", "stale", or "" for numbers that count; zero is such a number."""
    if age_s is None:
        return "missing"
    return "stale" if age_s > stale_s else ""
