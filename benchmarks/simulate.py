"""The default policy against fixed sizes, other autoscalers and an oracle on recorded traces, in the simulator: a table and a saved run.

    python benchmarks/simulate.py            # all of it, on all cores
    python benchmarks/simulate.py --traces azure-conv mooncake-synthetic --no-day --out /tmp

Each trace is played scaled, because one device takes some of them as they were recorded. Baselines are tuned on the first half of the
trace, everything is reported on the second one, which every autoscaler enters with the size and the state that the first one left it
with; "fixed" is the smallest size that held the SLO on the first half, "static-peak" the smallest that holds it on the second one. Where
the oracle itself needs more than 0.75 of static peak's device-hours, the load is too even for that goal; it stays, its row says what the
oracle needs, and the policy is held against the oracle as well. With --folder, whole recordings there stand for the shipped excerpts.
servegen-m-small holds 166 million requests, and a worker takes a million in a day, each of which is played: of both days 17:00 to 21:00 is
played, in which the load rises by half, at a fifth of its rate, with one simulated request for 20.
"day": 24 h of ServeGen's deepseek-r1 as recorded, and 60 times that on 1,000 devices with one simulated request for 60: how long it takes,
each on one core. "sample": the same load played whole and with one request for ten: how far apart the figures are.
"""

from __future__ import annotations

import argparse
import datetime
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import saved_run

from flexpert.controller.policy.parse import parse_policy
from flexpert.controller.policy.types import PolicyConfig, SloConfig
from flexpert.simulator.comparison import FAMILIES, GOOD, oracle, play, play_on, static_peak, tune
from flexpert.simulator.load import Load, open_load
from flexpert.simulator.policies import PolicyScaler
from flexpert.simulator.profile import load_profile
from flexpert.simulator.results import SimulationResult, Slo
from flexpert.simulator.runner import Setting
from flexpert.simulator.scalers import Fixed

POLICY = Path(__file__).parents[1] / "examples" / "policies" / "default.yaml"
SLO = Slo(ttft_s=1.0, tpot_s=0.05)
LONG_SLO = Slo(ttft_s=5.0, tpot_s=0.05)  # a prompt of 12,000 tokens takes longer than a second by itself


@dataclass(frozen=True, kw_only=True)
class Played:
    """How a trace is played. parts: to tune on and to report on, seconds of the recording; its halves where none are given."""

    scale: float
    slo: Slo = SLO
    stands_for: int = 1
    parts: tuple[tuple[float, float], tuple[float, float]] | None = None


DAY_S, HOUR_S = 86400.0, 3600.0
TRACES = {  # those that take longest first
    "servegen-deepseek-r1": Played(scale=1),
    "servegen-m-small": Played(
        scale=0.2, stands_for=20, parts=((17 * HOUR_S, 21 * HOUR_S), (DAY_S + 17 * HOUR_S, DAY_S + 21 * HOUR_S))
    ),
    "azure-conv": Played(scale=25),
    "mooncake-conversation": Played(scale=5, slo=LONG_SLO),
    "mooncake-synthetic": Played(scale=5, slo=LONG_SLO),
}
FILES = {
    "azure-conv": "AzureLLMInferenceTrace_conv_2023.csv",
    "mooncake-conversation": "mooncake_conversation_trace.jsonl.gz",
    "mooncake-synthetic": "mooncake_synthetic_trace.jsonl.gz",
}  # fmt: skip
DAY = "servegen-deepseek-r1"
MOST_HOURS = 0.75  # of static peak's


def default_policy(*, devices: int, slo: Slo) -> PolicyConfig:
    """The shipped one with room to grow and the trace's SLO, as an operator would set first."""
    config = parse_policy(POLICY.read_text()).to_config()
    return replace(
        config,
        workers=replace(config.workers, max=devices),
        slo=SloConfig(ttft_s=slo.ttft_s, tpot_s=slo.tpot_s, attainment=slo.attainment),
    )


def row(trace: str, result: SimulationResult) -> dict[str, Any]:
    return {
        "trace": trace,
        "who": result.name,
        "requests": round(result.requests),
        "attainment": result.attainment,
        "device_hours": result.device_hours,
        "standby_hours": result.standby_hours,
        "changes": len(result.scale_events),
        "flaps": result.flaps,
        "stall_s": round(result.stall_s, 3),
        "ttft_p95_s": result.ttft_s.p95,
        "tpot_p95_s": result.tpot_s.p95,
        "peak_workers": result.peak_workers,
        "simulated": result.sampling.simulated,
        "attainment_error": result.sampling.attainment_error,
        "ttft_p95_error_s": result.sampling.ttft_p95_error_s,
    }


def _load(trace: str, half: int, options: argparse.Namespace) -> Load:
    """half 0: to tune on, 1: to report on."""
    how = TRACES[trace]
    source = str(options.folder / FILES[trace]) if options.folder and trace in FILES else trace
    opened = partial(open_load, source, scale=how.scale, stands_for=how.stands_for, seed=options.seed)
    return opened(part=how.parts[half]) if how.parts else opened(half=("first", "second")[half])  # type: ignore[arg-type]


def _setting(trace: str, options: argparse.Namespace) -> Setting:
    return Setting(
        profile=load_profile(options.profile), devices=options.devices, slo=TRACES[trace].slo, seed=options.seed
    )


def bounds(trace: str, options: argparse.Namespace) -> list[SimulationResult]:
    """The smallest fixed size that would have held, and who sees the load beforehand."""
    load, setting = _load(trace, 1, options), _setting(trace, options)
    peak = static_peak(load, setting)
    return [peak, oracle(load, setting, peak)]


def default(trace: str, options: argparse.Namespace) -> list[SimulationResult]:
    setting = _setting(trace, options)
    scaler = PolicyScaler("default", default_policy(devices=options.devices, slo=setting.slo))
    return [play_on(_load(trace, 0, options), _load(trace, 1, options), scaler, setting)]


def fixed(trace: str, options: argparse.Namespace) -> list[SimulationResult]:
    setting = _setting(trace, options)
    workers = static_peak(_load(trace, 0, options), setting).peak_workers
    return [play(_load(trace, 1, options), Fixed(workers), setting)]


def tuned(trace: str, options: argparse.Namespace, *, family: int) -> list[SimulationResult]:
    first, setting = _load(trace, 0, options), _setting(trace, options)
    found = tune(first, setting, FAMILIES[family], standby=1, wanted=GOOD * setting.slo.attainment)
    return [play_on(first, _load(trace, 1, options), found.scaler, setting, past=found.past)]


def sample(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A hundred times the load of a quarter of an hour on a fixed cluster: whole, and one request for ten."""
    setting = Setting(profile=load_profile(options.profile), devices=1000, slo=SLO, seed=options.seed, workers=60)
    whole, part = (
        play(
            open_load("azure-conv", half="second", scale=100, stands_for=n, seed=options.seed), Fixed(60), setting
        )
        for n in (1, 10)
    )  # fmt: skip
    return [{
        "trace": "azure-conv x100, 60 workers",
        "who": "sample: 1 for 1, 1 for 10",
        "attainment": [whole.attainment, part.attainment],
        "ttft_p95_s": [whole.ttft_s.p95, part.ttft_s.p95],
        "tpot_p95_s": [whole.tpot_s.p95, part.tpot_s.p95],
        "attainment_error": part.sampling.attainment_error,
        "ttft_p95_error_s": part.sampling.ttft_p95_error_s,
    }]  # fmt: skip


def day(scale: int, devices: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    began_s = time.perf_counter()
    load = open_load(DAY, scale=scale, stands_for=scale, seed=options.seed)
    read_s = time.perf_counter() - began_s
    setting = Setting(profile=load_profile(options.profile), devices=devices, slo=SLO, seed=options.seed)
    result = play(load, PolicyScaler("default", default_policy(devices=devices, slo=SLO)), setting)
    seconds = time.perf_counter() - began_s
    return [row(f"{DAY}, 24 h, x{scale}", result) | {"seconds": round(seconds, 2), "read_s": round(read_s, 2)}]


def timed(work: Callable[[], list[Any]]) -> tuple[list[Any], float, float]:
    """What it gives, and seconds: by the clock, and of a core."""
    began_s, cpu_s = time.perf_counter(), time.process_time()
    found = work()
    return found, round(time.perf_counter() - began_s, 2), round(time.process_time() - cpu_s, 2)


def compare(trace: str, found: list[tuple[SimulationResult, float]]) -> list[dict[str, Any]]:
    """Rows of one trace, over its static peak. found: results and the seconds of a core that each took."""
    peak = next(result for result, _ in found if result.name.startswith("static-peak"))
    rows = [
        row(trace, result) | {
            "attainment_of_peak": round(result.attainment / peak.attainment, 4),
            "hours_of_peak": round((result.device_hours + result.standby_hours) / peak.device_hours, 4),
            "hours_of_peak_without_standbys": round(result.device_hours / peak.device_hours, 4),
            "cpu_s": seconds,
        }
        for result, seconds in found
    ]  # fmt: skip
    best = next(each["hours_of_peak"] for each in rows if each["who"] == "oracle")
    return [each | {"oracle_hours_of_peak": best} for each in rows]


def play_all(options: argparse.Namespace) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[dict[str, Any]]]:
    """(rows of the traces, the days, the sample), by one process a core. The days go first: at most one process has a core beside them."""
    whom: list[Callable[..., list[SimulationResult]]] = [bounds, default, fixed]
    whom += [partial(tuned, family=number) for number in range(len(FAMILIES))]
    days = [] if options.no_day else [partial(day, 1, options.devices, options), partial(day, 60, 1000, options)]
    work = [(trace, partial(who, trace, options)) for who in whom for trace in options.traces]
    with ProcessPoolExecutor(options.processes) as pool:
        of_days = [pool.submit(timed, each) for each in days]
        of_traces = [(trace, pool.submit(timed, each)) for trace, each in work]
        of_sample = pool.submit(timed, partial(sample, options))
        found: dict[str, list[tuple[SimulationResult, float]]] = {}
        for trace, future in of_traces:
            results, seconds, cpu_s = future.result()
            found.setdefault(trace, []).extend((result, cpu_s) for result in results)
            told = ", ".join(f"{each.name} {each.attainment:.4f} {each.device_hours:.2f} h" for each in results)
            print(f"{trace}: {told}; {seconds} s, {cpu_s} s of a core", flush=True)
        timed_days = [rows[0] | {"cpu_s": cpu_s} for rows, _, cpu_s in (future.result() for future in of_days)]
        return [each for trace in found for each in compare(trace, found[trace])], timed_days, of_sample.result()[0]


def _ahead(other: dict[str, Any], ours: dict[str, Any]) -> bool:
    """On the front the other one is before the policy: as good and cheaper, or better and as cheap."""
    reached = min(ours["attainment_of_peak"], GOOD)  # more than what counts as holding the SLO is worth nothing
    return other["attainment_of_peak"] >= reached and other["hours_of_peak"] < ours["hours_of_peak"]


def goals(rows: list[dict[str, Any]], days: list[dict[str, Any]]) -> list[dict[str, Any]]:
    found = []
    for trace in dict.fromkeys(each["trace"] for each in rows):
        ours = next(each for each in rows if each["trace"] == trace and each["who"] == "default")
        found.append(saved_run.goal(f"{trace}: attainment over static peak's", ours["attainment_of_peak"], ">= 0.99"))
        best = next(each for each in rows if each["trace"] == trace and each["who"] == "oracle")
        hours = ours["hours_of_peak"]
        needed = f"{trace}: device-hours over static peak's, standbys counted (oracle: {best['hours_of_peak']:.2f})"
        found.append(saved_run.goal(needed, hours, f"<= {MOST_HOURS}"))
        without = f"{trace}: device-hours over static peak's, without standbys (oracle: {best['hours_of_peak']:.2f})"
        found.append(saved_run.goal(without, ours["hours_of_peak_without_standbys"], f"<= {MOST_HOURS}"))
        if best["hours_of_peak"] > MOST_HOURS:
            even = f"{trace}: too even for that; device-hours over the oracle's, standbys counted"
            found.append(saved_run.goal(even, round(hours / best["hours_of_peak"], 4), "<= 1.25"))
        found += [
            saved_run.goal(
                f"{trace}: {each['who']} is cheaper and attains as much (1 if so)", float(_ahead(each, ours)), "<= 0"
            )
            for each in rows
            if each["trace"] == trace and each["who"].startswith(("fixed", *(family.name for family in FAMILIES)))
        ]
    found += [saved_run.goal(f"{each['trace']}, s on one core", each["seconds"], "<= 120") for each in days]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", nargs="*", choices=list(TRACES), default=list(TRACES), metavar="NAME")
    parser.add_argument("--folder", type=Path, help="with the whole recordings, under the names they were published by")
    parser.add_argument("--profile", default="example-gpu")
    parser.add_argument("--devices", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--no-day", action="store_true")
    parser.add_argument("--out", type=Path, default=saved_run.RESULTS)
    options = parser.parse_args()
    started = datetime.datetime.now(datetime.UTC)
    rows, days, samples = play_all(options)
    saved_run.print_table(rows)
    saved_run.print_table(days)
    reached = goals(rows, days)
    saved_run.print_table(reached)
    everything = [*rows, *days, *samples]
    print(
        "saved",
        saved_run.save("simulate", device="cpu", rows=everything, goals=reached, started=started, folder=options.out),
    )


if __name__ == "__main__":
    main()
