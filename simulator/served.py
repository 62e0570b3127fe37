"""What a cluster of one size does, found out from outside: loads whose answers tell the times of its steps.

Everything that a client feels is in these times: gateway, HTTP, the client itself, and workers that share cores with each other and with
all of these. Three kinds of loads, each several times:

    batches   n requests for each worker at once: while nothing else comes, a token comes with each step           -> decode
    alone     prompts one by one at an idle cluster: way in, a step of the prompt alone, way out                   -> prefill, by length
    beside    prompts that come while others decode: by how much these end later, and how long the answers take    -> prefill, answer

A prompt's answer takes the rest of the running step, a step with the prompt in it, and the way in and out. Calls the loads by `play`,
reads no clock, knows no cluster: `cli.profile` plays them at a real one, the tests at a modelled one.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from flexpert.loadtest.measure import Outcome
from flexpert.loadtest.schedule import Arrival
from flexpert.simulator.fit import MeasureError, rising
from flexpert.simulator.profile import Profile, Served, interpolate

__all__ = ["Noise", "Play", "measure_served", "probe", "probe_step_s"]

Play = Callable[[Sequence[Arrival]], Sequence[Outcome]]
SHORT = 16  # tokens of a prompt that is only there to be followed by others
BATCH_TOKENS, BESIDE_TOKENS = 64, 96
GOLDEN = 0.618
ALONE = 10  # prompts of each length
LENGTHS = (16, 64, 256, 1024)


@dataclass
class Noise:
    """How far equal measurements lay apart: (largest - smallest) / median of each."""

    spreads: list[float] = field(default_factory=list)

    def typical(self, values: Sequence[float]) -> float:
        """Their median, remembered."""
        middle = statistics.median(values)
        if len(values) > 1 and middle > 0:
            self.spreads.append((max(values) - min(values)) / middle)
        return middle

    def __str__(self) -> str:
        if not self.spreads:
            return "measured once: no spread is known"
        return f"equal measurements lay {statistics.median(self.spreads):.0%} apart (median), {max(self.spreads):.0%} at most"


def probe(workers: int, running: int, *, batches: int, step_s: float) -> list[Arrival]:
    """Batches one after the other, as `measure_served` plays them to time a step; step_s: about so long it takes."""
    apart_s = 0.2 + 1.5 * BATCH_TOKENS * step_s
    return [
        Arrival(number * apart_s, SHORT, BATCH_TOKENS) for number in range(batches) for _ in range(workers * running)
    ]


def probe_step_s(profile: Profile, *, workers: int, running: int) -> float:
    """What the profile says of a probe's mean step."""
    served = profile.serves(workers)
    step_s = interpolate(profile.decode if served is None else served.decode, running)
    return step_s + profile.context_s * running * (SHORT + BATCH_TOKENS / 2)


@dataclass(frozen=True)
class _Beside:
    """What prompts of one length did to the requests that they came beside."""

    running: int  # of one worker, without the prompts
    length: int
    added_s: float  # each, to a step
    ttft_s: float  # mean
    count: int  # of prompts


def measure_served(
    play: Play, *, workers: int, base: Profile, noise: Noise, repeats: int = 3, seed: int = 0, say: Callable[[str], None] = lambda _: None
) -> Served:  # fmt: skip
    """base: the limits of a worker, its context_s, and about how long a step takes. Raises MeasureError where a request fails."""
    return _Measuring(play, workers, base, noise, repeats, random.Random(seed), say).served()


class _Measuring:
    def __init__(
        self, play: Play, workers: int, base: Profile, noise: Noise, repeats: int, rng: random.Random, say: Callable[[str], None]
    ) -> None:  # fmt: skip
        self._play, self._workers, self._base, self._noise = play, workers, base, noise
        self._repeats, self._say = repeats, say
        self._pooled = max(1, repeats - 1)  # turns of what is pooled over lengths anyway, and takes longest
        self._phase = rng.random()
        self._decode: dict[int, float] = {}

    def served(self) -> Served:
        for running in _counts(self._base.max_running):
            self._batches(running)
        decode = rising(self._decode)
        alone_s = {length: self._alone(length) for length in self._lengths()}
        beside = self._all_beside(alone_s)
        # What an answer at an idle cluster takes besides the prompt's own share of the step.
        rest_s = (
            statistics.median(alone_s[each.length] - each.added_s for each in beside)
            if beside
            else min(alone_s.values())
        )
        prefill = {length: max(0.0, seconds - rest_s) for length, seconds in alone_s.items()}
        answer = self._answers(beside, decode, prefill) or {0: self._base.answer_s}
        empty_s = min(max(0.0, rest_s - min(answer.items())[1]), decode[0][1])
        self._say(
            f"{self._workers} workers: a step {1e3 * decode[0][1]:.1f} ms with one request each, {1e3 * decode[-1][1]:.1f} ms with "
            f"{decode[-1][0]:.0f}; the way to the client {1e3 * max(answer.values()):.1f} ms"
        )
        return Served(
            workers=self._workers,
            decode=((0.0, round(empty_s, 7)), *decode),
            prefill=rising({0: 0.0} | prefill),
            overlap=self._overlap(beside) if self._workers > 1 and beside else 0.0,
            answer=tuple((float(running), round(seconds, 7)) for running, seconds in sorted(answer.items())),
        )

    def _ask(self, arrivals: Sequence[Arrival]) -> list[Outcome]:
        outcomes = list(self._play(sorted(arrivals, key=lambda arrival: arrival.at_s)))
        bad = next((outcome for outcome in outcomes if outcome.end != "ok"), None)
        if bad is not None:
            raise MeasureError(f"a request of the measurement came to nothing: {bad.end}: {bad.error}")
        # A token that is no whole character yet shows with the next one, so an answer of one token may show nothing.
        shown = [outcome for outcome in outcomes if outcome.first_s is not None and outcome.last_s is not None]
        if 2 * len(shown) < len(arrivals):
            raise MeasureError(
                f"{len(arrivals)} requests were sent, and of {len(shown)} a token was seen: at least half are needed"
            )
        return shown

    # Batches

    def _batches(self, running: int) -> None:
        found = []
        for _ in range(self._repeats):
            seen = self._ask([Arrival(0.0, SHORT, BATCH_TOKENS)] * (running * self._workers))
            found.append(statistics.median(outcome.tpot_s or 0.0 for outcome in seen))
        typical_s = self._noise.typical(found)
        self._say(
            f"{self._workers} workers, {running} requests each: {1e3 * typical_s:.1f} ms a step ({_range(found)})"
        )
        self._decode[running] = max(1e-6, typical_s - self._context_s(running, BATCH_TOKENS))

    def _context_s(self, running: int, output: int) -> float:
        """What reading KV takes of the mean step."""
        return self._base.context_s * running * (SHORT + output / 2)

    def _step_s(self, running: int) -> float:
        """About so long a step takes, by what was measured so far."""
        return interpolate(rising(self._decode), running) + self._context_s(running, BESIDE_TOKENS)

    # Prompts

    def _lengths(self) -> list[int]:
        most = (
            min(self._base.max_batch_tokens, self._base.max_context_tokens - BESIDE_TOKENS) - 2 * self._base.max_running
        )
        return sorted({length for length in LENGTHS if length <= most} or {max(1, most)})

    def _prompt_s(self, length: int) -> float:
        """How long one may take, before it is known."""
        return interpolate(self._base.prefill, length)

    def _alone(self, length: int) -> float:
        apart_s = 0.05 + 2 * (self._decode[1] + self._prompt_s(length))
        found = []
        for _ in range(self._repeats):
            seen = self._ask([Arrival(number * apart_s, length, 1) for number in range(ALONE)])
            found.append(statistics.median(outcome.ttft_s or 0.0 for outcome in seen))
        typical_s = self._noise.typical(found)
        self._say(
            f"{self._workers} workers, a prompt of {length} tokens alone: {1e3 * typical_s:.1f} ms ({_range(found)})"
        )
        return typical_s

    def _all_beside(self, alone_s: dict[int, float]) -> list[_Beside]:
        most = self._base.max_running
        if most < 2:
            return []
        middle = sorted(alone_s)[len(alone_s) // 2]
        found: list[_Beside] = []
        for _ in range(self._pooled):
            crowd_s = self._crowd_s(most // 2)
            found += [self._beside(most // 2, length, crowd_s) for length in alone_s]
            for running in sorted({1, max(1, most - 2)} - {most // 2}):
                found.append(self._beside(running, middle, self._crowd_s(running)))
        return found

    def _crowd(self, running: int) -> list[Arrival]:
        return [Arrival(0.0, SHORT, BESIDE_TOKENS)] * (running * self._workers)

    def _crowd_s(self, running: int) -> float:
        """How long those that are to be disturbed take without that."""
        return _length_s(self._ask(self._crowd(running)))

    def _beside(self, running: int, length: int, crowd_s: float, *, together: int = 1) -> _Beside:
        """together: so many prompts come at a time, each at another worker."""
        step_s = self._step_s(running)
        apart_s = 3 * step_s + 1.5 * self._prompt_s(length)
        times_s: list[float] = []
        at_s = 4 * step_s + self._workers * running * self._prompt_s(SHORT)
        while at_s < 0.75 * BESIDE_TOKENS * step_s or not times_s:
            self._phase = (
                self._phase + GOLDEN
            ) % 1  # at every moment of a step alike: fewer prompts tell as much as many drawn ones
            times_s.append(at_s + self._phase * step_s)
            at_s += apart_s
        seen = self._ask(self._crowd(running) + [Arrival(at_s, length, 1) for at_s in times_s for _ in range(together)])
        longer = [outcome for outcome in seen if outcome.wanted_output_tokens > 1]
        prompts = [outcome for outcome in seen if outcome.wanted_output_tokens == 1]
        end_s = max(outcome.last_s or 0.0 for outcome in longer)
        inside = [outcome for outcome in prompts if (outcome.first_s or 0.0) < end_s] or prompts
        added_s = (_length_s(longer) - crowd_s) / len(inside) * together
        waits = sorted(outcome.ttft_s or 0.0 for outcome in inside)
        kept = waits[len(waits) // 10 : len(waits) - len(waits) // 10]
        return _Beside(running, length, added_s, statistics.fmean(kept), len(kept))

    def _answers(
        self, beside: Sequence[_Beside], decode: Sequence[tuple[float, float]], prefill: dict[int, float]
    ) -> dict[int, float]:
        """The way in and out, by requests that run in the cluster: the straight line that fits all prompts best, and never falls."""
        found: list[tuple[int, float, int]] = []
        for each in beside:
            step_s = interpolate(decode, each.running) + self._context_s(each.running, BESIDE_TOKENS)
            # Prompts come too far apart to meet in a step: what is left of one that only decodes is half of it on average.
            found.append((each.running * self._workers, each.ttft_s - 1.5 * step_s - prefill[each.length], each.count))
        if not found:
            return {}
        total = sum(count for _, _, count in found)
        middle = sum(running * count for running, _, count in found) / total
        mean_s = sum(seconds * count for _, seconds, count in found) / total
        spread = sum(count * (running - middle) ** 2 for running, _, count in found)
        rise = sum(count * (running - middle) * (seconds - mean_s) for running, seconds, count in found)
        slope_s = max(0.0, rise / spread) if spread else 0.0
        most = self._base.max_running * self._workers
        return {running: max(0.0, mean_s + slope_s * (running - middle)) for running in (0, most)}

    def _overlap(self, beside: Sequence[_Beside]) -> float:
        """Two prompts at two workers in one step, against one."""
        running = self._base.max_running // 2
        lengths = sorted({each.length for each in beside})
        length = lengths[len(lengths) // 2]
        one_s = statistics.median(each.added_s for each in beside if (each.running, each.length) == (running, length))
        pairs = statistics.median(
            self._beside(running, length, self._crowd_s(running), together=2).added_s for _ in range(self._pooled)
        )
        return round(min(1.0, max(0.0, pairs / one_s - 1)), 3) if one_s > 0 else 0.0


def _length_s(outcomes: Sequence[Outcome]) -> float:
    """From first token to last."""
    return statistics.median((outcome.last_s or 0.0) - (outcome.first_s or 0.0) for outcome in outcomes)


def _range(values: Sequence[float]) -> str:
    return f"{1e3 * min(values):.1f} to {1e3 * max(values):.1f}"


def _counts(most: int) -> list[int]:
    counts = [1]
    while counts[-1] * 2 <= most:
        counts.append(counts[-1] * 2)
    return counts if counts[-1] == most else [*counts, most]
