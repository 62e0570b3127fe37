"""A spike of ten times the load under the default policy, against fixed sizes and a policy as a Kubernetes HPA would have it.

    python benchmarks/autoscale.py              # some forty minutes: 30 s of base load, 60 s of spike, 420 s of base load, four times
    python benchmarks/autoscale.py --short      # a rehearsal: 10 s of spike, two variants
    python benchmarks/autoscale.py --rate 0.8   # the base rate said, not measured; --ttft, --tpot: another SLO than the policy file's

Each variant gets a fresh cluster of its own on the CPU with the built-in model and the same arrivals, open loop: latencies count from
when a request was due. What a worker takes is bounded by --max-running, since more workers on the same cores bring places, not cores:
how much a full cluster takes beyond one worker is measured first (closed loop, every place taken), printed and saved, and the spike is
set between the two.

recover_s: from the begin of the spike to the first 5 s window of three in a row whose p95 of TTFT is within the SLO (0: none missed it).
worker_s: workers that served, integrated over the run, from the begin and commit times of the controller's own events; held_s: with
those that were joining or leaving. lag and "degraded" are the load generator's own, which runs on the same cores.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import autoscale_rows as rows
import httpx
import saved_run
import yaml
from elasticity import free_port
from local_cluster import ADMIN_KEY, API_KEY, LocalCluster

from flexpert.loadtest.conduct import LoadTest, conduct
from flexpert.loadtest.lengths import Mix, parse_lengths
from flexpert.loadtest.measure import RunResult
from flexpert.loadtest.run import Users
from flexpert.loadtest.shapes import arrivals
from flexpert.loadtest.slo import parse_slos
from flexpert.loadtest.spec import parse_shape
from flexpert.loadtest.target import parse_url

POLICY = Path(__file__).parents[1] / "examples" / "policies" / "default.yaml"
TIMES = 10  # the spike over the base
OVERLOAD, ROOM = 1.5, 0.85  # the spike over what one worker takes, and of what all take; the lower one counts
SETTLE_S, CAPACITY_S = 2.0, 15.0


def policy_text(args: argparse.Namespace) -> str:
    """The shipped policy with this cluster's size and SLO: what an operator changes first."""
    policy = yaml.safe_load(POLICY.read_text())
    policy["spec"]["workers"] = {"min": 1, "max": args.max_workers, "standby": args.standby}
    policy["spec"]["slo"] |= {name: value for name in ("ttft", "tpot") if (value := getattr(args, name))}
    return yaml.safe_dump(policy, sort_keys=False)


def hpa_text(args: argparse.Namespace) -> str:
    """An HPA v2 on KV and queue: its sync period, its default behavior, no SLO, no panic, no margin."""
    twice = [{"type": "workers", "value": 4, "period": "15s"}, {"type": "percent", "value": 100, "period": "15s"}]
    spec = {
        "interval": "15s",
        "workers": {"min": 1, "max": args.max_workers, "standby": args.standby},
        "signals": [{"type": "kv_utilization", "target": 0.7}, {"type": "queue_time", "target": "200ms"}],
        "behavior": {
            "scaleUp": {"stabilizationWindow": "0s", "policies": twice},
            "scaleDown": {"stabilizationWindow": "300s", "policies": [{"type": "percent", "value": 100, "period": "15s"}]},
        },
        "panic": {"threshold": 0},
        "consolidation": {"margin": 1},
    }  # fmt: skip
    header = {"apiVersion": "flexpert.dev/v1alpha1", "kind": "ScalingPolicy", "metadata": {"name": "hpa-like"}}
    return yaml.safe_dump({**header, "spec": spec}, sort_keys=False)


def cluster(args: argparse.Namespace, *options: str) -> LocalCluster:
    """Started and ready, on a free port."""
    common = ["--device", "cpu", "--memory", args.memory, "--max-running", str(args.max_running)]
    common += ["--standby", str(args.standby), "--max-workers", str(args.max_workers)]
    return LocalCluster(*options, *common, port=free_port()).start()


def run(test: LoadTest) -> RunResult:
    """On uvloop where it is installed, as `flexpert loadtest` does."""
    try:
        import uvloop
    except ImportError:
        return asyncio.run(conduct(test))
    return uvloop.run(conduct(test))


def mix(args: argparse.Namespace) -> Mix:
    prompts = parse_lengths(args.prompt_tokens, option="--prompt-tokens")
    return Mix(prompts, parse_lengths(args.output_tokens, option="--output-tokens"))


def capacity(args: argparse.Namespace, workers: int) -> dict[str, Any]:
    """What so many workers take, requests a second, with twice as many users as places."""
    here = cluster(args, "--workers", str(workers))
    try:
        test = LoadTest(
            target=parse_url(here.url, key=API_KEY), words="capacity", duration_s=SETTLE_S + CAPACITY_S, mix=mix(args), seed=args.seed,
            users=Users(2 * workers * args.max_running, 1, 0.0), warmup_s=SETTLE_S,
        )  # fmt: skip
        found = run(test).window
    finally:
        here.close()
    return {
        "what": f"capacity of {workers} workers, closed loop" if workers > 1 else "capacity of one worker, closed loop",
        "requests_per_s": found.requests_per_s,
        "output_tokens_per_s": found.output_tokens_per_s,
        "tpot_p95_s": found.tpot_s.p95,
    }


def play(
    variant: str, options: list[str], args: argparse.Namespace, rate: float, slo: dict[str, str]
) -> dict[str, Any]:
    """One variant: a fresh cluster, the load, its row."""
    spike = rows.Spike(args.before, args.spike, args.before + args.spike + args.after)
    text = f"spike rate={rate:g}:{TIMES * rate:g} duration={spike.duration_s:g} at={spike.at_s:g} length={spike.length_s:g}"
    shape = parse_shape(text)
    here = cluster(args, *options)
    try:
        with httpx.Client(
            base_url=f"{here.url}/admin/v1", headers={"authorization": f"Bearer {ADMIN_KEY}"}, timeout=30
        ) as admin:
            workers = len(ask(admin, "/status")["workers"])
            result = run(
                LoadTest(
                    target=parse_url(here.url, key=API_KEY), words=text, duration_s=spike.duration_s, admin_key=ADMIN_KEY, seed=args.seed,
                    schedule=lambda: arrivals(shape, seed=args.seed, mix=mix(args)),
                    objectives=tuple(parse_slos([*(f"{name}<{limit}" for name, limit in slo.items()), "attainment>0.99"])),
                )
            )  # fmt: skip
            ids = {
                event.fields["transition_id"]
                for event in result.events
                if event.kind in ("begun", "committed", "ended")
            }
            found = rows.changes(result, {name: ask(admin, f"/transitions/{name}") for name in ids})
            decided = decisions(admin, result) if "--policy" in options else {}
        if args.keep:
            keep(args.keep / variant.replace(" ", "-"), here)
    finally:
        here.close()
    return rows.row(variant, result, workers=workers, found=found, spike=spike) | decided


def ask(admin: httpx.Client, path: str) -> dict[str, Any]:
    answer: dict[str, Any] = admin.get(path).raise_for_status().json()
    return answer


def decisions(admin: httpx.Client, result: RunResult) -> dict[str, Any]:
    """Those that ordered, and how many there were of each reason."""
    found = ask(admin, "/decisions?limit=1000")["decisions"]
    found = [each for each in reversed(found) if each["at_s"] >= result.started_unix_s]
    return {
        "decisions": [
            {"at_s": round(each["at_s"] - result.started_unix_s, 1), "reason": each["reason"], "text": each["text"]}
            for each in found
            if each["action"] is not None
        ],
        "reasons": dict(Counter(each["reason"] for each in found)),
    }


def keep(folder: Path, here: LocalCluster) -> None:
    """What the cluster wrote down: decisions, events, its log."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("decisions.jsonl", "events.jsonl"):
        for path in here.runtime.rglob(name):
            (folder / name).write_bytes(path.read_bytes())
    (folder / "up.log").write_bytes(here.log.read_bytes())


def base_rate(args: argparse.Namespace, measured: list[dict[str, Any]]) -> float:
    """So that the spike is beyond one worker and, where the machine allows it, within all of them."""
    one, full = (each["requests_per_s"] for each in measured)
    if full < 1.2 * one:
        print(
            f"{args.max_workers} workers take {full / one:.2f} times what one takes: these cores bring no more; no size holds this spike"
        )
        return OVERLOAD * one / TIMES
    return min(OVERLOAD * one, ROOM * full) / TIMES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--short", action="store_true", help="10 s of spike, the default policy and one worker: a rehearsal"
    )
    parser.add_argument("--rate", type=float, help="base rate, requests/s; default: by the measured capacities")
    parser.add_argument("--before", type=float, default=30.0, help="seconds of base load")
    parser.add_argument("--spike", type=float, default=60.0, help="seconds at ten times the base rate")
    parser.add_argument(
        "--after", type=float, default=420.0, help="seconds of base load; shrinking looks back over 300"
    )
    parser.add_argument("--max-workers", type=int, default=3)
    parser.add_argument("--standby", type=int, default=1, help="warm processes, in every variant")
    parser.add_argument("--max-running", type=int, default=8, help="requests that a worker computes at a time")
    parser.add_argument("--prompt-tokens", default="64")
    parser.add_argument("--output-tokens", default="64")
    parser.add_argument("--ttft", help="of the SLO, like 500ms; default: the policy file's")
    parser.add_argument("--tpot", help="the same")
    parser.add_argument("--memory", default="512MiB")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep", type=Path, help="directory for the clusters' decisions, events and logs")
    parser.add_argument("--out", type=Path, default=saved_run.RESULTS)
    args = parser.parse_args()
    if args.short:
        args.before, args.spike, args.after = 5.0, 10.0, 25.0
    started = datetime.datetime.now(datetime.UTC)
    measured = [] if args.rate else [capacity(args, workers) for workers in (1, args.max_workers)]
    saved_run.print_table(measured)
    rate = args.rate or base_rate(args, measured)
    with tempfile.TemporaryDirectory() as folder:
        ours, hpa = Path(folder) / "default.yaml", Path(folder) / "hpa.yaml"
        ours.write_text(policy_text(args))
        hpa.write_text(hpa_text(args))
        slo = {name: yaml.safe_load(ours.read_text())["spec"]["slo"][name] for name in ("ttft", "tpot")}
        print(f"base {rate:.3g}/s, spike {TIMES * rate:.3g}/s, SLO {slo}", flush=True)
        variants = {
            "default policy": ["--policy", str(ours)],
            "fixed 1": ["--workers", "1"],
            f"fixed {args.max_workers}": ["--workers", str(args.max_workers)],
            "hpa-like": ["--policy", str(hpa)],
        }
        table = []
        for variant, options in list(variants.items())[: 2 if args.short else None]:
            table.append(play(variant, options, args, rate, slo))
            saved_run.print_table([{name: table[-1][name] for name in rows.FIGURES}])
    setting = {
        "what": "setting",
        "rate_per_s": rate,
        "spike_per_s": TIMES * rate,
        "slo": slo,
        "max_workers": args.max_workers,
    }
    reached = rows.goals(table)
    saved_run.print_table([{name: each[name] for name in rows.FIGURES} for each in table])
    saved_run.print_table(reached)
    name = "autoscale-short" if args.short else "autoscale"
    everything = [*measured, setting, *table]
    print("saved", saved_run.save(name, device="cpu", rows=everything, goals=reached, started=started, folder=args.out))
    raise SystemExit(0 if reached[0]["met"] else 1)


if __name__ == "__main__":
    main()
