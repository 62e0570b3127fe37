"""Constant load in the modelled cluster changes nothing: the default policy, an hour, rates all over the capacity range.

The requests of one kind come evenly, so that some rates are in step with the policy's ticks; the others come as they like.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from flexpert.controller.policy.parse import parse_policy
from flexpert.simulator.load import Load
from flexpert.simulator.policies import PolicyScaler
from flexpert.simulator.profile import load_profile
from flexpert.simulator.results import SimulationResult, Slo
from flexpert.simulator.runner import Setting, simulate

HOUR_S = 3600.0
DEVICES = 8


def an_hour(
    repository: Path, *, rate: float, workers: int, evenly: bool, profile: str = "builtin-cpu"
) -> SimulationResult:
    """Of prompts of 60 tokens and answers of 40, at the default policy's SLO."""
    count, rng = int(rate * HOUR_S), np.random.default_rng(7)
    at_s = np.arange(count) / rate if evenly else np.sort(rng.uniform(0.0, HOUR_S, count))
    spread = np.zeros(count) if evenly else rng.normal(-0.32, 0.8, count)
    prompt, output = (np.maximum(1, mean * np.exp(spread)).astype(int).tolist() for mean in (60, 40))
    config = parse_policy((repository / "examples" / "policies" / "default.yaml").read_text()).to_config()
    config = replace(config, workers=replace(config.workers, max=DEVICES))
    setting = Setting(profile=load_profile(profile), devices=DEVICES, slo=Slo(ttft_s=0.5, tpot_s=0.05), workers=workers)
    return simulate(Load(at_s.tolist(), prompt, output, HOUR_S), PolicyScaler("default", config), setting)


@pytest.mark.parametrize("rate", [0.2, 0.4, 1.0, 2.0])
def test_requests_in_step_with_the_ticks_change_nothing(repository: Path, rate: float) -> None:
    result = an_hour(repository, rate=rate, workers=1, evenly=True)

    assert result.scale_events == ()
    assert result.attainment == 1.0


@pytest.mark.parametrize(("rate", "workers"), [(0.4, 1), (1.0, 2), (2.0, 2), (4.0, 4), (6.0, 5), (8.0, 6)])
def test_constant_load_makes_one_change_at_most(repository: Path, rate: float, workers: int) -> None:
    result = an_hour(repository, rate=rate, workers=workers, evenly=False)

    assert len(result.scale_events) <= 1, result.scale_events
    assert result.attainment >= 0.985


def test_workers_that_a_spike_brought_go_again(repository: Path) -> None:
    """Nothing that was learned in the spike holds them: with what is left, one worker is enough."""
    result = an_hour(repository, rate=0.4, workers=4, evenly=True)

    assert [event.to_workers for event in result.scale_events][-1] == 1
    assert result.scale_events[-1].at_s <= 600.0
