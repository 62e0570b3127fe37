"""What the last seconds were like at this gateway: rates, percentiles, choices that met or missed the SLO. For the scaling policy.

A slot for each second, each with a few counters and sparse histograms whose buckets grow by 5%: what is kept and what `look` costs
depend on the length of the window, not on the load. Times are given, of one monotonic clock. Fed by `output`, `generation` and
`front`, read by `load`.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

LONGEST_S = 300
_GROWTH = math.log(1.05)
_LEAST_S = 1e-4
_BUCKETS_MAX = 400  # beyond eight hours


@dataclass(slots=True)
class Slot:
    """One second. met and missed: choices that ended in it, where there was an SLO then."""

    second: int
    arrived: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    met: int = 0
    missed: int = 0
    queue: Counter[int] = field(default_factory=Counter)
    ttft: Counter[int] = field(default_factory=Counter)
    tpot: Counter[int] = field(default_factory=Counter)


class LoadWindow:
    """`slo`: (ttft_s, tpot_s), each None where the policy has no such target; None before anybody asked for one."""

    def __init__(self, *, began_s: float) -> None:
        self.slo: tuple[float | None, float | None] | None = None
        self._began_s = began_s
        self._slots: deque[Slot] = deque(maxlen=LONGEST_S + 1)

    # What happens

    def arrived(self, now_s: float, *, choices: int, prompt_tokens: int) -> None:
        slot = self._slot(now_s)
        slot.arrived += choices
        slot.prompt_tokens += prompt_tokens

    def refused(self, now_s: float) -> None:
        """A 429: it was sent, and it did not meet the SLO."""
        slot = self._slot(now_s)
        slot.arrived += 1
        slot.missed += self.slo is not None

    def queued(self, now_s: float, seconds: float) -> None:
        self._slot(now_s).queue[_bucket(seconds)] += 1

    def token(self, now_s: float) -> None:
        self._slot(now_s).output_tokens += 1

    def first_token(self, now_s: float, seconds: float) -> None:
        slot = self._slot(now_s)
        slot.output_tokens += 1
        slot.ttft[_bucket(seconds)] += 1

    def ended(self, now_s: float, *, outcome: str, ttft_s: float | None, tpot_s: float | None, waited_s: float) -> None:
        """A choice is over. outcome: as in the metrics; the client's own mistakes do not count, nor what it gave up while all was well.
        waited_s: since its arrival."""
        slot = self._slot(now_s)
        if tpot_s is not None and outcome == "completed":
            slot.tpot[_bucket(tpot_s)] += 1
        if self.slo is None or outcome == "invalid":
            return
        late = not self.within(ttft_s=waited_s if ttft_s is None else ttft_s, tpot_s=tpot_s)
        if outcome == "failed" or late:
            slot.missed += 1
        elif outcome == "completed":
            slot.met += 1

    def within(self, *, ttft_s: float | None, tpot_s: float | None) -> bool:
        """Whether these meet the SLO; what is not known, or has no target, does."""
        limits = self.slo or (None, None)
        return all(
            limit is None or found is None or found <= limit
            for limit, found in zip(limits, (ttft_s, tpot_s), strict=True)
        )

    # What it was like

    def look(
        self,
        now_s: float,
        *,
        window_s: float,
        waiting_s: Iterable[float] = (),
        queued_s: Iterable[float] = (),
        running_tpot_s: Iterable[float] = (),
    ) -> dict[str, Any]:
        """The last window_s, at most LONGEST_S. waiting_s: ages of live choices without a token: one that is later than the target already
        counts as missed, and with its age so far. queued_s: of those that no worker has yet: one that waits longer than the others did
        counts with its age. running_tpot_s: of choices that go on. Percentiles are None without a sample."""
        since_s = min(window_s, LONGEST_S, max(0.0, now_s - self._began_s))
        slots = [slot for slot in self._slots if slot.second + 1 > now_s - since_s]
        total = Slot(0)
        for slot in slots:
            for counts, more in ((total.queue, slot.queue), (total.ttft, slot.ttft), (total.tpot, slot.tpot)):
                counts.update(more)
        overdue = [age for age in waiting_s if self.slo is not None and not self.within(ttft_s=age, tpot_s=None)]
        total.ttft.update(_bucket(age) for age in overdue)
        usual_s = percentile(total.queue, 0.95) or 0.0
        total.queue.update(_bucket(age) for age in queued_s if age > usual_s)
        total.tpot.update(_bucket(seconds) for seconds in running_tpot_s)
        per_s = 1.0 / since_s if since_s > 0 else 0.0
        return {
            "since_s": round(since_s, 3),
            "requests_per_s": sum(slot.arrived for slot in slots) * per_s,
            "prompt_tokens_per_s": sum(slot.prompt_tokens for slot in slots) * per_s,
            "output_tokens_per_s": sum(slot.output_tokens for slot in slots) * per_s,
            "queue_s": percentile(total.queue, 0.95),
            "ttft_s": percentile(total.ttft, 0.95),
            "tpot_s": percentile(total.tpot, 0.95),
            "met": sum(slot.met for slot in slots),
            "missed": sum(slot.missed for slot in slots) + len(overdue),
        }

    def _slot(self, now_s: float) -> Slot:
        second = int(now_s)
        if not self._slots or self._slots[-1].second < second:
            self._slots.append(Slot(second))
            while self._slots[0].second < second - LONGEST_S:
                self._slots.popleft()
        return self._slots[-1]


def percentile(counts: Counter[int], share: float) -> float | None:
    """Nearest rank, to within half a bucket (2.5%)."""
    left = math.ceil(counts.total() * share)
    if left <= 0:
        return None
    for bucket in sorted(counts):
        left -= counts[bucket]
        if left <= 0:
            return _LEAST_S * math.exp((bucket + 0.5) * _GROWTH)
    raise AssertionError("the counts add up to less than their total")


def _bucket(seconds: float) -> int:
    if seconds <= _LEAST_S:
        return 0
    return min(_BUCKETS_MAX, int(math.log(seconds / _LEAST_S) / _GROWTH))
