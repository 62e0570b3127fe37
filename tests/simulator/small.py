"""Loads and profiles small enough to know what comes out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from flexpert.loadtest.measure import Outcome
from flexpert.loadtest.schedule import Arrival
from flexpert.simulator.cluster import Cluster
from flexpert.simulator.load import Load
from flexpert.simulator.profile import Duration, Profile
from flexpert.simulator.results import SimulationResult, Slo
from flexpert.simulator.runner import START_S, Setting, simulate
from flexpert.simulator.scalers import Fixed, Scaler, Scheduled
from flexpert.simulator.service import Request

NOW = Duration(mean_s=0.0, p95_s=0.0)


def exactly(seconds: float) -> Duration:
    return Duration(mean_s=seconds, p95_s=seconds)


def profile(**changes) -> Profile:
    """A step takes 0.1 s, and 1 ms more for each prompt token; changes of size take 2 s, and nobody stands still."""
    fields = {
        "name": "small",
        "max_running": 4,
        "max_batch_tokens": 100,
        "max_context_tokens": 100_000,
        "kv_tokens": 10_000,
        "decode": ((0.0, 0.1), (1.0, 0.1)),
        "prefill": ((0.0, 0.0), (100.0, 0.1)),
        "join_warm": exactly(2.0),
        "join_cold": exactly(2.0),
        "leave": exactly(2.0),
        "stall": NOW,
    }
    return Profile(**fields | changes).check()


def load(
    at_s: Sequence[float], prompt: int | Sequence[int], output: int | Sequence[int], *, span_s: float = 0.0, stands_for: int = 1
) -> Load:  # fmt: skip
    count = len(at_s)
    return Load(
        at_s=list(at_s),
        prompt_tokens=[prompt] * count if isinstance(prompt, int) else list(prompt),
        output_tokens=[output] * count if isinstance(output, int) else list(output),
        span_s=span_s or at_s[-1] + 1.0,
        stands_for=stands_for,
    )


def poisson(rate: float, count: int, *, seed: int = 0) -> list[float]:
    return np.cumsum(np.random.default_rng(seed).exponential(1 / rate, count)).tolist()


def by_the_clock(*sizes: tuple[float, int], interval_s: float = 1.0, standby: int = 0) -> Scheduled:
    found = Scheduled(
        "clock", start_s=START_S, starts_s=[at_s for at_s, _ in sizes], sizes=[size for _, size in sizes], interval_s=interval_s
    )  # fmt: skip
    found.standby = standby
    return found


def run(
    played: Load, scaler: Scaler | None = None, *, of: Profile | None = None, slo: Slo | None = None, **setting
) -> SimulationResult:
    fields = {"devices": 16, "workers": 1, **setting}
    return simulate(
        played, scaler or Fixed(fields["workers"]), Setting(profile=of or profile(), slo=slo or Slo(ttft_s=1.0, tpot_s=0.2), **fields)
    )  # fmt: skip


def play_at(of: Profile, workers: int):
    """Loads are played at a modelled cluster of this profile."""

    def play(arrivals: Sequence[Arrival]) -> list[Outcome]:
        outcomes: dict[Request, Outcome] = {}

        def first(request: Request, now_s: float) -> None:
            outcomes[request].first_s = now_s + request.answer_s

        def last(request: Request, now_s: float) -> None:
            outcomes[request].last_s, outcomes[request].end = now_s + request.answer_s, "ok"

        cluster = Cluster(of, workers=workers, on_first=first, on_end=last)
        for number, arrival in enumerate(arrivals):
            cluster.advance(arrival.at_s)
            request = Request(arrival.at_s, arrival.prompt_tokens, arrival.output_tokens, 1.0)
            outcomes[request] = Outcome(
                number, arrival.at_s, arrival.prompt_tokens, arrival.output_tokens, chunks=arrival.output_tokens
            )
            cluster.submit(request)
        cluster.advance(1e6)
        return list(outcomes.values())

    return play
