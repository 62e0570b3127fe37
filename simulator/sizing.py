"""How many workers a load needs, by arithmetic on its means: where every simulation of a trace begins, and searches with it. Pure."""

from __future__ import annotations

from bisect import bisect_left

from flexpert.simulator.load import Load
from flexpert.simulator.profile import Profile, interpolate
from flexpert.simulator.results import Slo

__all__ = ["begin_with", "workers_for"]

BEGIN_S = 600.0
MARGIN = 0.9


def begin_with(load: Load, profile: Profile, slo: Slo, *, most: int) -> int:
    """What the first minutes of the load need."""
    until_s = min(BEGIN_S, load.span_s)
    count = bisect_left(load.at_s, until_s)
    if not count:
        return 1
    return workers_for(
        profile,
        slo,
        requests_per_s=count * load.stands_for / until_s,
        prompt_tokens=sum(load.prompt_tokens[:count]) / count,
        output_tokens=sum(load.output_tokens[:count]) / count,
        most=most,
    )


def workers_for(
    profile: Profile, slo: Slo, *, requests_per_s: float, prompt_tokens: float, output_tokens: float, most: int
) -> int:
    """The fewest of 1 to `most` whose batches settle within the time per token; `most` where none do."""

    def holds(workers: int) -> bool:
        rate = requests_per_s / workers
        step_s, limit_s = interpolate(profile.decode, 1), MARGIN * (slo.tpot_s or 10.0)
        for _ in range(50):
            running = rate * output_tokens * step_s
            # Each step waits for the rank with the most prompt tokens: a whole prompt, once one of them has one in most steps.
            own = rate * prompt_tokens * step_s
            tokens = min(profile.max_batch_tokens, max(own, min(1.0, requests_per_s * step_s) * prompt_tokens))
            context = running * (prompt_tokens + output_tokens / 2)
            found_s = (
                interpolate(profile.decode, running)
                + interpolate(profile.prefill, tokens)
                + interpolate(profile.exchange, workers)
                + context * profile.context_s
            )
            if running > MARGIN * profile.max_running or context > MARGIN * profile.kv_capacity(workers):
                return False
            if own > MARGIN * profile.max_batch_tokens or found_s > max(limit_s, 1.05 * interpolate(profile.decode, 1)):
                return False
            if abs(found_s - step_s) < 1e-4 * step_s:
                break
            step_s = found_s
        return True

    low, high = 1, most
    while low < high:
        middle = (low + high) // 2
        if holds(middle):
            high = middle
        else:
            low = middle + 1
    return low
