"""The simulator against a real cluster on the CPU: the same arrivals, the same policy, predicted and measured side by side.

    python benchmarks/validate.py           # some twelve minutes on a machine that does nothing else
    python benchmarks/validate.py --short   # a rehearsal: one turn of each measurement, short loads
    python benchmarks/validate.py --profile served.json --engine engine.json   # profiles that were measured before

In one run: `flexpert profile` measures the engine by itself, then the serving cluster from outside, at one and two workers with joins and
leaves. Then the cluster is loaded, open loop: one worker at 30% and 60% of what the profile says that it takes, two at 40%, and a policy
that follows a step in the load. The simulator plays each load with the profile, and has seen nothing of these loads before.

Such a machine's speed drifts within minutes. So right before and after each load a probe is played, batches as those of the profile, and
the load is predicted with the profile's times multiplied by what the probes took over what the profile says of them. Rows keep the probes,
the prediction without that factor, and what the prediction would be with times 5% shorter and longer: where that moves a figure by more
than the bound, the comparison cannot tell the model from the machine. The shares were chosen by that, before anything was measured.

What a worker takes is bounded by --max-running: workers share the cores, so another one brings places. Latencies count from when a
request was due. worker_s: workers that served, integrated over the load. "By engine alone": the prediction without what the serving
cluster showed, for comparison.
"""

from __future__ import annotations

import argparse
import datetime
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import saved_run
import validate_rows as rows
import yaml
from elasticity import free_port
from local_cluster import ADMIN_KEY, API_KEY, LocalCluster

from flexpert.cli.api import AdminApi
from flexpert.cli.profile_cluster import settle
from flexpert.controller.policy.parse import parse_policy
from flexpert.loadtest import event_loop
from flexpert.loadtest.conduct import LoadTest, conduct
from flexpert.loadtest.lengths import Mix, parse_lengths
from flexpert.loadtest.schedule import Arrival
from flexpert.loadtest.shapes import arrivals, duration_s
from flexpert.loadtest.slo import parse_slos
from flexpert.loadtest.spec import parse_shape
from flexpert.loadtest.target import parse_url
from flexpert.simulator.changes import read_changes
from flexpert.simulator.load import load_of
from flexpert.simulator.policies import PolicyScaler
from flexpert.simulator.profile import Profile, load_profile
from flexpert.simulator.results import SimulationResult, Slo
from flexpert.simulator.runner import Setting, simulate
from flexpert.simulator.scalers import Fixed, Scaler
from flexpert.simulator.served import probe, probe_step_s

POLICY = Path(__file__).parents[1] / "examples" / "policies" / "default.yaml"
WORKERS = 2
SETTLE_S = 2.0
PROBE_BATCHES, PROBE_TRIES = 3, 3
LOW, HIGH = 0.3, 1.0  # of what one worker takes: before and after the step, and meanwhile


@dataclass(frozen=True)
class Played:
    """One load: seconds and rates as the load generator's shape, workers at its begin, "policy" or "" for a fixed size."""

    name: str
    shape: str
    workers: int
    policy: bool = False


def flexpert(*arguments: str) -> None:
    """A command of the CLI; its lines are shown. Raises CalledProcessError."""
    subprocess.run([sys.executable, "-m", "flexpert.cli", *arguments], check=True)


def policy_text(args: argparse.Namespace) -> str:
    """The shipped policy with this cluster's size and SLO, and a shrink that a short load can show."""
    policy = yaml.safe_load(POLICY.read_text())
    spec = policy["spec"]
    spec["workers"] = {"min": 1, "max": WORKERS, "standby": 1}
    spec["slo"] |= {"ttft": args.ttft, "tpot": args.tpot}
    spec["behavior"]["scaleDown"]["stabilizationWindow"] = args.window
    return yaml.safe_dump(policy, sort_keys=False)


class Validation:
    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.args, self.folder = args, folder
        self.policy_file = folder / "policy.yaml"
        self.policy_file.write_text(policy_text(args))
        self.policy = parse_policy(self.policy_file.read_text())
        config = self.policy.to_config()
        assert config.slo is not None
        self.slo = Slo(ttft_s=config.slo.ttft_s, tpot_s=config.slo.tpot_s, attainment=config.slo.attainment)
        self.rows: list[dict[str, Any]] = []
        self.notes: list[dict[str, Any]] = []
        self.last_probe: float | None = None  # of the cluster as it is, where nothing was done since
        self.probes = 0

    def cluster(self, *options: str) -> LocalCluster:
        """Started, and its standby warm."""
        args = self.args
        common = ["--device", "cpu", "--memory", args.memory, "--max-running", str(args.max_running), "--standby", "1"]
        here = LocalCluster(*options, *common, "--max-workers", str(WORKERS), port=free_port())
        try:
            here.start()
            settle(self.api(here), seconds=SETTLE_S)
        except BaseException:
            here.close()
            raise
        return here

    def api(self, here: LocalCluster) -> AdminApi:
        return AdminApi(here.url, ADMIN_KEY)

    # Profiles

    def engine_profile(self) -> Profile:
        args = self.args
        if args.engine is None:
            args.engine = self.folder / "engine.json"
            flexpert(
                "profile", "--out", str(args.engine), "--name", "engine", "--max-running", str(args.max_running),
                "--memory", "128MiB", "--repeats", str(args.repeats),
            )  # fmt: skip
        return load_profile(str(args.engine))

    def served_profile(self, here: LocalCluster) -> Profile:
        args = self.args
        if args.profile is None:
            args.profile = self.folder / "served.json"
            flexpert(
                "profile", "--url", here.url, "--key", API_KEY, "--admin-key", ADMIN_KEY, "--base", str(args.engine), "--name", "served",
                "--sizes", ",".join(str(size + 1) for size in range(WORKERS)), "--max-running", str(args.max_running),
                "--repeats", str(args.repeats), "--out", str(args.profile),
            )  # fmt: skip
        return load_profile(str(args.profile))

    # The machine's speed

    def probed(self, here: LocalCluster, profile: Profile) -> float:
        """What a step takes now over what the profile says of it, with half of the places busy."""
        for _ in range(PROBE_TRIES):
            workers = self.size(here)
            ratio = self.probed_at(here, profile, workers)
            if self.size(here) == workers:  # a policy may change it meanwhile
                return ratio
        raise RuntimeError(
            f"the size changed during each of {PROBE_TRIES} probes: is the policy's window too short for this?"
        )

    def size(self, here: LocalCluster) -> int:
        return len(self.api(here).status()["workers"])

    def probed_at(self, here: LocalCluster, profile: Profile, workers: int) -> float:
        running = max(1, self.args.max_running // 2)
        said_s = probe_step_s(profile, workers=workers, running=running)
        arrivals = probe(workers, running, batches=PROBE_BATCHES, step_s=said_s)
        self.probes += 1  # other prompts each time: none is known already
        result = event_loop.run(conduct(
            LoadTest(
                target=parse_url(here.url, key=API_KEY), words="probe", duration_s=arrivals[-1].at_s + 1e-3,
                seed=self.args.seed + 1000 + self.probes, schedule=lambda: iter(arrivals),
            )
        ))  # fmt: skip
        seen = [outcome.tpot_s for outcome in result.outcomes if outcome.end == "ok" and outcome.tpot_s is not None]
        if 2 * len(seen) < len(arrivals):
            raise RuntimeError(
                f"the probe's {len(arrivals)} requests were sent and {len(seen)} answered: is the cluster up?"
            )
        return statistics.median(seen) / said_s

    # Loads

    def mix(self) -> Mix:
        prompts = parse_lengths(self.args.prompt_tokens, option="--prompt-tokens")
        return Mix(prompts, parse_lengths(self.args.output_tokens, option="--output-tokens"))

    def capacity(self, profile: Profile, workers: int) -> float:
        """Requests/s with all places busy, by the profile: in the time that one takes as many begin as there are places."""
        rng = np.random.default_rng(self.args.seed)
        prompt, output = (float(lengths.draw(1000, rng).mean()) for lengths in (self.mix().prompt, self.mix().output))
        found = rows.capacity(profile, workers, prompt=prompt, output=output)
        self.notes.append({"what": f"capacity of {workers}, by the profile", "requests_per_s": round(found, 3)})
        print(f"{workers} workers take {found:.2f} requests/s", flush=True)
        return found

    def play(self, here: LocalCluster, load: Played, profiles: tuple[Profile, Profile]) -> None:
        served, alone = profiles
        before = self.last_probe or self.probed(here, served)
        shape, seed = parse_shape(load.shape), self.args.seed
        schedule = list(arrivals(shape, seed=seed, mix=self.mix()))
        seconds = duration_s(shape)
        objectives = parse_slos(
            [f"ttft<{self.args.ttft}", f"tpot<{self.args.tpot}", f"attainment>{self.slo.attainment}"]
        )
        result = event_loop.run(conduct(
            LoadTest(
                target=parse_url(here.url, key=API_KEY), words=load.shape, duration_s=seconds, admin_key=ADMIN_KEY, seed=seed,
                schedule=lambda: iter(schedule), objectives=tuple(objectives),
            )
        ))  # fmt: skip
        settle(self.api(here), seconds=0.5)
        after = self.last_probe = self.probed(here, served)
        changes = read_changes([event.fields for event in result.events], workers=load.workers)
        now = (before + after) / 2
        said = {
            name: self.say(load, schedule, seconds, profile)
            for name, profile in {
                "predicted": served.slower(now), "as_profiled": served, "by_engine_alone": alone,
                **{f"times_x{times:g}": served.slower(now * times) for times in rows.OTHER_TIMES},
            }.items()
        }  # fmt: skip
        measured = rows.measured(result, workers=load.workers, changes=changes)
        self.rows.append(rows.row(load.name, rows.sent(result), measured=measured, said=said, probes=(before, after)))
        print(f"{load.name}: steps take {before:.2f} of the profile's before, {after:.2f} after", flush=True)
        saved_run.print_table(rows.table(self.rows[-1]))
        if load.policy:
            print(
                "changes measured",
                self.rows[-1]["measured"]["changes"],
                "predicted",
                self.rows[-1]["predicted"]["changes"],
            )

    def say(self, load: Played, schedule: list[Arrival], seconds: float, profile: Profile) -> SimulationResult:
        """What the simulator makes of it."""
        scaler: Scaler = Fixed(load.workers)
        if load.policy:
            scaler = PolicyScaler("policy", self.policy.to_config(), policy=self.policy)
        setting = Setting(profile=profile, devices=WORKERS, slo=self.slo, workers=load.workers, seed=self.args.seed)
        return simulate(load_of(schedule, span_s=seconds), scaler, setting)

    def all(self) -> None:
        args, engine = self.args, self.engine_profile()
        here = self.cluster("--workers", "1")
        try:
            profiles = (self.served_profile(here), engine)
            one, two = (self.capacity(profiles[0], workers) for workers in (1, WORKERS))
            for share, seconds in ((0.3, args.seconds), (0.6, 1.4 * args.seconds)):
                text = f"poisson rate={share * one:g} duration={seconds:g}"
                self.play(here, Played(f"1 worker at {share:.0%}", text, 1), profiles)
            scaled = here.command("scale", "2", "--url", here.url, "--admin-key", ADMIN_KEY)
            if scaled.returncode:
                raise RuntimeError(f"flexpert scale 2: {scaled.stderr}")
            settle(self.api(here), seconds=SETTLE_S)
            self.last_probe = None
            self.play(
                here, Played("2 workers at 40%", f"poisson rate={0.4 * two:g} duration={args.seconds:g}", 2), profiles
            )
        finally:
            here.close()
        here = self.cluster("--policy", str(self.policy_file))
        self.last_probe = None
        try:
            low, high, each = LOW * one, HIGH * one, args.seconds
            text = f"poisson rate={low:g} duration={each / 2:g} then poisson rate={high:g} duration={each:g} then "
            text += f"poisson rate={low:g} duration={2 * each:g}"
            self.play(here, Played("policy, a step in the load", text, 1, policy=True), profiles)
        finally:
            here.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="a rehearsal of some three minutes")
    parser.add_argument(
        "--seconds",
        type=float,
        default=35.0,
        help="of each load; the second one takes 1.4 times as long, the last one 3.5 times",
    )
    parser.add_argument("--repeats", type=int, default=3, help="turns of each measurement of a profile")
    parser.add_argument("--profile", type=Path, help="of the serving cluster, measured before")
    parser.add_argument("--engine", type=Path, help="of the engine alone, measured before")
    parser.add_argument("--max-running", type=int, default=8)
    parser.add_argument("--prompt-tokens", default="64")
    parser.add_argument("--output-tokens", default="64")
    parser.add_argument("--ttft", default="250ms")
    parser.add_argument("--tpot", default="60ms")
    parser.add_argument("--window", default="20s", help="of the policy's scaleDown")
    parser.add_argument("--memory", default="512MiB")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=saved_run.RESULTS)
    args = parser.parse_args()
    if args.short:
        args.seconds, args.repeats = 12.0, 1
    started = datetime.datetime.now(datetime.UTC)
    with tempfile.TemporaryDirectory() as folder:
        validation = Validation(args, Path(folder))
        validation.all()
        profiles = [
            {"what": f"profile {path.stem}", **yaml.safe_load(path.read_text())} for path in (args.engine, args.profile)
        ]
    reached = rows.goals(validation.rows)
    saved_run.print_table(reached)
    name = "validate-short" if args.short else "validate"
    everything = [*validation.rows, *validation.notes, *profiles]
    print("saved", saved_run.save(name, device="cpu", rows=everything, goals=reached, started=started, folder=args.out))


if __name__ == "__main__":
    main()
