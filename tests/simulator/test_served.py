"""A cluster that is measured from outside: a modelled one whose times are known gives them back."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import pytest

from flexpert.loadtest.measure import Outcome
from flexpert.loadtest.schedule import Arrival
from flexpert.simulator.fit import MeasureError
from flexpert.simulator.profile import Served, interpolate
from flexpert.simulator.served import Noise, measure_served, probe, probe_step_s

from .small import play_at, profile

KNOWN = Served(
    workers=2,
    decode=((0.0, 0.012), (1.0, 0.016), (8.0, 0.03)),
    prefill=((0.0, 0.0), (16.0, 0.004), (64.0, 0.01), (512.0, 0.09)),
    overlap=0.6,
    answer=((0.0, 0.005), (16.0, 0.011)),
)
LIMITS = {"max_running": 8, "max_batch_tokens": 512, "max_context_tokens": 2048, "kv_tokens": 100_000}
ROUGHLY = {"decode": ((0.0, 0.02), (1.0, 0.02)), "prefill": ((0.0, 0.0), (512.0, 0.1))}


def test_a_cluster_of_known_times_gives_them_back() -> None:
    known = profile(served=(KNOWN,), context_s=1e-7, **LIMITS)
    found = measure_served(
        play_at(known, 2), workers=2, base=profile(context_s=1e-7, **LIMITS, **ROUGHLY), noise=Noise(), seed=1
    )

    for running in (1, 3, 8):
        assert interpolate(found.decode, running) == pytest.approx(interpolate(KNOWN.decode, running), rel=0.03)
    for tokens in (16, 64, 256):
        assert interpolate(found.prefill, tokens) == pytest.approx(interpolate(KNOWN.prefill, tokens), rel=0.1)
    assert interpolate(found.decode, 0) == pytest.approx(0.012, abs=0.002)
    assert found.overlap == pytest.approx(0.6, abs=0.12)
    for running in (2, 12):
        assert interpolate(found.answer, running) == pytest.approx(interpolate(KNOWN.answer, running), abs=0.002)


def test_a_worker_with_one_place_is_measured_too() -> None:
    limits = LIMITS | {"max_running": 1}
    found = measure_served(play_at(profile(**limits), 1), workers=1, base=profile(**limits), noise=Noise(), repeats=1)

    assert interpolate(found.decode, 1) == pytest.approx(0.1)


def test_a_request_that_fails_ends_the_measurement() -> None:
    def refuse(arrivals: Sequence[Arrival]) -> list[Outcome]:
        return [Outcome(0, 0.0, 16, 64, end="refused", error="429 for all") for _ in arrivals]

    with pytest.raises(MeasureError, match="429 for all"):
        measure_served(refuse, workers=1, base=profile(**LIMITS), noise=Noise())


def test_noise_is_told() -> None:
    noise = Noise()
    assert noise.typical([1.0, 1.1, 1.2]) == 1.1
    noise.typical([2.0, 2.0])

    assert str(noise) == "equal measurements lay 9% apart (median), 18% at most"


@pytest.mark.parametrize("workers", [1, 2])
def test_a_probe_tells_how_fast_the_machine_is_against_its_profile(workers: int) -> None:
    known = profile(served=(KNOWN,), context_s=1e-7, **LIMITS)
    said_s = probe_step_s(known, workers=workers, running=4)
    arrivals = probe(workers, 4, batches=3, step_s=said_s)
    assert len(arrivals) == 3 * 4 * workers

    for times in (0.8, 1.0, 1.25):
        seen = play_at(known.slower(times), workers)(arrivals)
        assert statistics.median(each.tpot_s for each in seen) / said_s == pytest.approx(times, rel=0.03)
