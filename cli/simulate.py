"""`flexpert simulate`: from options to a comparison of policies and baselines on one trace, its table, files and exit code."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import cast

from flexpert.cli.errors import CommandError
from flexpert.controller.policy.parse import PolicyError as UnreadablePolicy
from flexpert.controller.policy.parse import parse_policy
from flexpert.controller.policy.spec import ScalingPolicy
from flexpert.controller.policy.units import parse_duration
from flexpert.loadtest.schedule import ScheduleError
from flexpert.simulator.comparison import BASELINES, FAMILIES, GOOD, UNTUNED, Family, oracle, play, static_peak, tune
from flexpert.simulator.load import Half, Load, LoadError, open_load
from flexpert.simulator.policies import PolicyError, PolicyScaler
from flexpert.simulator.profile import ProfileError, load_profile
from flexpert.simulator.results import Simulation, SimulationResult, Slo, to_json
from flexpert.simulator.runner import Setting
from flexpert.simulator.scalers import Fixed

__all__ = ["SimulateOptions", "run_simulate", "table"]

MOST_ROWS = 1_500_000  # beyond, one simulated request stands for several


@dataclass(frozen=True, kw_only=True)
class SimulateOptions:
    """As typed."""

    trace: str
    trace_format: str
    policies: str
    baselines: str
    devices: int
    profile: str
    scale: float
    stands_for: int | None
    split: str
    seed: int
    ttft: str | None
    tpot: str | None
    attainment: float | None
    report: Path | None
    json: Path | None


def run_simulate(options: SimulateOptions, *, say: Callable[[str], None]) -> Simulation:
    """Plays everything and writes the files. Raises CommandError."""
    baselines = _baselines(options.baselines)
    policies = [_policy(file) for file in options.policies.split(",") if file]
    if not policies and not baselines:
        raise CommandError("usage", "nothing to simulate: give --policy FILE, --baselines all, or both")
    if options.split not in ("", "half"):
        raise CommandError("usage", f"--split {options.split!r}: expected half")
    _check_files(options)
    if options.devices < 1:
        raise CommandError("usage", f"--devices {options.devices}: expected 1 or more")
    try:
        setting = Setting(
            profile=load_profile(options.profile),
            devices=options.devices,
            slo=_slo(options, policies),
            seed=options.seed,
        )
        scalers = [
            PolicyScaler(name, policy.to_config(), policy=policy) for name, policy in _named(options.policies, policies)
        ]
        load = _load(options, "second" if options.split else "")
        before = _load(options, "first") if options.split else None
        say(f"{len(load):,} requests in {load.span_s / 3600:.3g} h, each for {load.stands_for} of the load")
        results = []
        standby = max((scaler.standby for scaler in scalers), default=1)
        played: list[Callable[[], SimulationResult]] = [partial(play, load, scaler, setting) for scaler in scalers]
        for run in [*played, *_baseline_runs(baselines, load, before, setting, standby=standby)]:
            began_s = time.monotonic()
            results.append(run())
            say(f"{results[-1].name}: {time.monotonic() - began_s:.1f} s")
    except (ScheduleError, LoadError, ProfileError, PolicyError, ValueError) as error:
        raise CommandError("settings", str(error)) from error
    simulation = Simulation(
        trace=options.trace,
        profile=setting.profile.name,
        devices=options.devices,
        seed=options.seed,
        scale=options.scale,
        half="second" if options.split else "",
        span_s=load.span_s,
        slo=setting.slo,
        results=tuple(results),
    )
    _write(simulation, options)
    return simulation


def _baselines(text: str) -> list[str]:
    names = list(BASELINES) if text == "all" else [name for name in text.split(",") if name]
    for name in names:
        size = name.removeprefix("fixed-")
        if name not in BASELINES and not (name.startswith("fixed-") and size.isdigit() and int(size)):
            raise CommandError(
                "usage", f"--baselines {name!r}: expected all, or some of {', '.join(BASELINES)}, fixed-N"
            )
    return names


def _policy(file: str) -> ScalingPolicy:
    try:
        return parse_policy(Path(file).read_text(encoding="utf-8"))
    except UnreadablePolicy as error:
        raise CommandError("settings", "\n".join(problem.in_file(file) for problem in error.problems)) from error
    except (OSError, UnicodeDecodeError) as error:
        raise CommandError("usage", f"--policy {file}: cannot be read: {error}") from error


def _named(files: str, policies: list[ScalingPolicy]) -> Iterator[tuple[str, ScalingPolicy]]:
    """The policy's own name; where two have the same the file's, or its path where these are the same too."""
    names = [policy.metadata.name for policy in policies]
    stems = [Path(file).stem for file in files.split(",") if file]
    for file, policy in zip([file for file in files.split(",") if file], policies, strict=True):
        candidates = ((policy.metadata.name, names), (Path(file).stem, stems))
        yield next((name for name, of in candidates if of.count(name) == 1), file), policy


def _slo(options: SimulateOptions, policies: list[ScalingPolicy]) -> Slo:
    """What was typed, else what the first policy with one says."""
    config = next((found for policy in policies if (found := policy.to_config().slo) is not None), None)
    slo = Slo() if config is None else Slo(ttft_s=config.ttft_s, tpot_s=config.tpot_s, attainment=config.attainment)
    for option, text, name in (("--ttft", options.ttft, "ttft_s"), ("--tpot", options.tpot, "tpot_s")):
        if text is not None:
            try:
                slo = replace(slo, **{name: parse_duration(text)})
            except ValueError as error:
                raise CommandError("usage", f"{option} {text!r}: {error}") from error
    if options.attainment is not None:
        slo = replace(slo, attainment=options.attainment)
    if slo.ttft_s is None and slo.tpot_s is None:
        raise CommandError("usage", "no SLO to judge by: give --ttft or --tpot, or a policy with spec.slo")
    return slo


def _load(options: SimulateOptions, half: str) -> Load:
    stands_for = options.stands_for
    if stands_for is None:
        whole = open_load(options.trace, format_name=options.trace_format, seed=options.seed)
        stands_for = max(1, -(-int(len(whole) * options.scale) // MOST_ROWS))
    return open_load(
        options.trace,
        format_name=options.trace_format,
        half=cast(Half, half),
        scale=options.scale,
        stands_for=stands_for,
        seed=options.seed,
    )


def _baseline_runs(
    names: list[str], load: Load, before: Load | None, setting: Setting, *, standby: int
) -> Iterator[Callable[[], SimulationResult]]:
    """In the order of `names`; the oracle builds upon the static peak."""
    peaks: list[SimulationResult] = []

    def peak() -> SimulationResult:
        if not peaks:
            peaks.append(static_peak(load, setting))
        return peaks[0]

    for name in names:
        if name == "static-peak":
            yield peak
        elif name == "oracle":
            yield lambda: oracle(load, setting, peak())
        elif name.startswith("fixed-"):
            yield partial(play, load, Fixed(int(name.removeprefix("fixed-"))), setting)
        else:
            family = next(family for family in FAMILIES if family.name == name)
            yield partial(_tuned, family, load, before, setting, standby=standby)


def _tuned(family: Family, load: Load, before: Load | None, setting: Setting, *, standby: int) -> SimulationResult:
    share = UNTUNED
    if before is not None:
        share = tune(before, setting, family, standby=standby, wanted=GOOD * setting.slo.attainment).share
    return play(load, family.make(share, setting, standby), setting)


def _check_files(options: SimulateOptions) -> None:
    for option, path in (("--report", options.report), ("--json", options.json)):
        if path is not None and not path.resolve().parent.is_dir():
            raise CommandError("directory", f"{option} {path}: there is no folder {path.resolve().parent}")


def _write(simulation: Simulation, options: SimulateOptions) -> None:
    if options.json is not None:
        options.json.write_bytes(to_json(simulation))
    if options.report is not None:
        from flexpert.loadtest.plots import PlotError
        from flexpert.simulator.report import write_report

        try:
            write_report(simulation, options.report)
        except PlotError as error:
            raise CommandError("settings", f"--report: {error}") from error


def table(simulation: Simulation) -> list[str]:
    """The figures as aligned columns."""
    heads = ("", "attainment", "device-h", "workers", "peak", "changes", "flaps", "stall s", "ttft p95", "tpot p95")
    rows = [
        (
            result.name,
            f"{result.attainment:.2%}",
            f"{result.device_hours:.4g}",
            f"{result.mean_workers:.3g}",
            str(result.peak_workers),
            str(len(result.scale_events)),
            str(result.flaps),
            f"{result.stall_s:.3g}",
            "-" if result.ttft_s.p95 is None else f"{result.ttft_s.p95:.3g} s",
            "-" if result.tpot_s.p95 is None else f"{1e3 * result.tpot_s.p95:.3g} ms",
        )
        for result in simulation.results
    ]
    widths = [max(len(row[column]) for row in (heads, *rows)) for column in range(len(heads))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in (heads, *rows)
    ]
    sampled = simulation.results[0].sampling
    if sampled.stands_for > 1:
        lines.append(
            f"{sampled.simulated:,} requests were simulated, each for {sampled.stands_for:g}: attainment is known to "
            f"+-{2 * sampled.attainment_error:.3%} (two standard errors)"
        )
    for result in simulation.results:
        capped = result.reasons.get("capped", 0) / max(1, result.ticks)
        if capped > 0.2:
            lines.append(f"note: {result.name} wanted more workers than its max in {capped:.0%} of its ticks")
    return lines
