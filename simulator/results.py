"""What a simulation found, as plain values: one SimulationResult for each policy, a Simulation for one call of `flexpert simulate`.

Made by `simulator.runner`, read by the report, by benchmarks and by programs (`to_json`, `from_json`: the same bytes for the same result).
Times are seconds from the start of the trace. Counts of requests are those of the modelled load: where one simulated request stands for n,
it counts n times.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import msgspec

__all__ = [
    "Percentiles", "Sampling", "ScaleEvent", "Simulation", "SimulationResult", "Slo", "Timeline", "from_json", "to_json",
]  # fmt: skip

FLAP_WINDOW_S = 600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Slo:
    """What a request must hold to count as met; None: not asked for. attainment: the share that should."""

    ttft_s: float | None = None
    tpot_s: float | None = None
    attainment: float = 0.99


@dataclass(frozen=True, slots=True, kw_only=True)
class Percentiles:
    """Over all requests that have the figure (tpot: those of two output tokens or more); None where there is none."""

    mean: float | None = None
    p50: float | None = None
    p95: float | None = None
    p99: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaleEvent:
    """One transition. ended_s None: it still ran at the end. stall_s: how long every stream stood still at its commit.

    reason: the reason code of the decision (a word of their own for baselines), text: its sentence.
    """

    at_s: float
    ended_s: float | None
    from_workers: int
    to_workers: int
    reason: str
    text: str = ""
    decision_id: str = ""
    state: Literal["done", "aborted", "running"] = "running"
    stall_s: float = 0.0
    moved_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """Columns of equal length; row i tells of [at_s[i], at_s[i] + interval_s).

    arrivals, met, missed: requests that arrived, ended within and beyond the SLO in that interval (by their end).
    arrived_met: of those that arrived then, how many met the SLO in the end. workers: ready, mean over the interval; devices: with joining
    and leaving ones; wanted: what the policy wanted last. running, waiting, kv_share: at the interval's end. ttft_p95_s, tpot_p95_s: of the
    requests that ended in it, None where none did.
    """

    interval_s: float
    at_s: tuple[float, ...] = ()
    arrivals: tuple[float, ...] = ()
    met: tuple[float, ...] = ()
    missed: tuple[float, ...] = ()
    arrived_met: tuple[float, ...] = ()
    workers: tuple[float, ...] = ()
    devices: tuple[float, ...] = ()
    wanted: tuple[int, ...] = ()
    running: tuple[float, ...] = ()
    waiting: tuple[float, ...] = ()
    kv_share: tuple[float, ...] = ()
    ttft_p95_s: tuple[float | None, ...] = ()
    tpot_p95_s: tuple[float | None, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """One simulated request stands for `stands_for` of the load; the errors are standard errors of the sample, from random groups of it.

    They tell how far the figure would move with another sample of the same load; what the model itself gets wrong is not in them.
    """

    stands_for: float = 1.0
    simulated: int = 0
    attainment_error: float = 0.0
    ttft_p95_error_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulationResult:
    """worker_hours: serving workers; device_hours: serving, joining and leaving ones; standby_hours: warm processes beside them.

    All three over the span of the trace, [0, span_s). rejected: requests that can never fit a worker's KV; they count as missed.
    flaps: changes of size against the direction of the change before, within FLAP_WINDOW_S of it. stall_s: the sum over the commits;
    stalled_stream_s: the same times the requests that ran.
    """

    name: str
    kind: Literal["policy", "baseline"]
    requests: float
    finished: float
    rejected: float = 0.0
    attainment: float
    met: float
    ttft_s: Percentiles
    tpot_s: Percentiles
    queue_s: Percentiles
    worker_hours: float
    device_hours: float
    standby_hours: float = 0.0
    mean_workers: float
    peak_workers: int
    scale_events: tuple[ScaleEvent, ...] = ()
    flaps: int = 0
    stall_s: float = 0.0
    stalled_stream_s: float = 0.0
    preemptions: float = 0.0
    steps: int = 0
    ticks: int = 0
    reasons: dict[str, int] = field(default_factory=dict)  # ticks by reason code
    sampling: Sampling = Sampling()
    timeline: Timeline = Timeline(interval_s=0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulation:
    """One trace under several policies. scale: how many times the recorded load. half: which part of the trace was played."""

    trace: str
    profile: str
    devices: int
    seed: int
    scale: float = 1.0
    half: Literal["", "first", "second"] = ""
    span_s: float = 0.0
    slo: Slo = Slo()
    results: tuple[SimulationResult, ...] = ()


def to_json(simulation: Simulation) -> bytes:
    """Equal simulations give equal bytes."""
    return msgspec.json.encode(simulation, order="deterministic") + b"\n"


def from_json(text: bytes | str) -> Simulation:
    """What to_json wrote. Raises msgspec.ValidationError with the path of what does not fit."""
    return msgspec.json.decode(text, type=Simulation)
