"""A spike of ten times the load under the default policy, against fixed sizes and a policy as a Kubernetes HPA would have it.

    python benchmarks/autoscale.py              # fourteen minutes on a machine with nothing else on it
    python benchmarks/autoscale.py --short      # a rehearsal of all of it in four minutes: 10 s of spike, nothing shrinks
    python benchmarks/autoscale.py --rate 0.8   # the base rate said, not measured; --ttft, --tpot: another SLO than the one found

Every variant gets the same arrivals, open loop: latencies count from when a request was due. The two policies get a fresh cluster each,
since a policy learns; the fixed sizes share one, and are given other prompts each, lest one finds the other's prefixes. All are measured
until --compare seconds after the spike, and attainment and worker-seconds are compared over that part; the default policy goes on for
--after seconds, calm that is long enough to shrink in.

What this shows depends on the machine. On the CPU all workers, the gateway and the load generator share the same cores: a worker is
given few places (--max-running), so that another brings capacity at all, as places. How much one worker takes and how much all take
is measured first (closed loop, every place taken), and the spike lies between the two, at their geometric mean: too much for one, not
for all. Where all take hardly more than one, no size holds the spike: that is printed, `room` in the saved setting says so, and recovery
then says nothing about the policy. The SLO is the policy file's, but for a time per token that a full cluster cannot keep here. A
worker that joins takes its imports and its weights from the same cores.

recover_s: from the begin of the spike to the first 5 s window of three in a row whose p95 of TTFT is within the SLO (0: none missed it).
worker_s: workers that served, integrated, from the begin and commit times of the controller's own events; held_s: with those that were
joining or leaving; worker_s_whole: to the end of the calm. lag and "degraded" are the load generator's own, which runs on the same cores.
"""

from __future__ import annotations

import argparse
import datetime
import math
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import autoscale_rows as rows
import httpx
import saved_run
import yaml
from elasticity import free_port
from local_cluster import ADMIN_KEY, API_KEY, LocalCluster

from flexpert.loadtest import event_loop
from flexpert.loadtest.aligned import changes
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
LEAST_ROOM = 1.2  # of what all workers take over what one takes; below, no size holds a spike
OVERLOAD = 1.1  # the spike over what one worker takes, where there is no room
SLACK = 1.5  # of the SLO's time per token over what a full cluster needs
SETTLE_S, CAPACITY_S, RESIZE_TIMEOUT_S = 2.0, 15.0, 120.0


def policy_text(args: argparse.Namespace, slo: dict[str, str]) -> str:
    """The shipped policy with this cluster's size and SLO: what an operator changes first."""
    policy = yaml.safe_load(POLICY.read_text())
    policy["spec"]["workers"] = {"min": 1, "max": args.max_workers, "standby": args.standby}
    policy["spec"]["slo"] |= slo
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


def mix(args: argparse.Namespace) -> Mix:
    prompts = parse_lengths(args.prompt_tokens, option="--prompt-tokens")
    return Mix(prompts, parse_lengths(args.output_tokens, option="--output-tokens"))


def admin_of(here: LocalCluster) -> httpx.Client:
    return httpx.Client(base_url=f"{here.url}/admin/v1", headers={"authorization": f"Bearer {ADMIN_KEY}"}, timeout=30)


def resize(here: LocalCluster, workers: int) -> None:
    """Returns once that many serve."""
    with admin_of(here) as admin:
        found = admin.post("/scale", json={"workers": workers}).raise_for_status().json()
        ends_s = time.monotonic() + RESIZE_TIMEOUT_S
        while found["state"] == "running" and time.monotonic() < ends_s:
            time.sleep(0.1)
            found = ask(admin, f"/transitions/{found['transition_id']}")
    if found["state"] != "done":
        raise RuntimeError(f"{workers} workers were asked for, and after {RESIZE_TIMEOUT_S:g} s it is {found}")


def capacity(here: LocalCluster, args: argparse.Namespace, workers: int) -> dict[str, Any]:
    """What so many workers take, requests a second, with twice as many users as places."""
    resize(here, workers)
    test = LoadTest(
        target=parse_url(here.url, key=API_KEY), words="capacity", duration_s=SETTLE_S + args.capacity, mix=mix(args),
        seed=args.seed + 100 + workers, users=Users(2 * workers * args.max_running, 1, 0.0), warmup_s=SETTLE_S,
    )  # fmt: skip
    result = event_loop.run(conduct(test))
    ends = [each.end_s for each in result.outcomes if each.end == "ok" and each.end_s is not None]
    answered = sum(SETTLE_S <= end_s < SETTLE_S + args.capacity for end_s in ends)
    if not answered:
        raise RuntimeError(
            f"{workers} workers answered nothing within {args.capacity:g} s ({result.whole.ends}): the machine is too busy, or "
            "--output-tokens too many; give --capacity more seconds"
        )
    return {
        "what": f"capacity, closed loop: {workers}",
        "workers": workers,
        "requests_per_s": answered / args.capacity,
        "tpot_p95_s": result.whole.tpot_s.p95,
    }


def play(
    variant: str, here: LocalCluster, args: argparse.Namespace, setting: dict[str, Any], after_s: float
) -> dict[str, Any]:
    """One variant: the load, and its row. setting: as it is saved."""
    spike = rows.Spike(
        at_s=args.before,
        length_s=args.spike,
        compared_s=args.before + args.spike + args.compare,
        duration_s=args.before + args.spike + after_s,
    )
    rate, limits = setting["rate_per_s"], setting["slo"]
    text = f"spike rate={rate:g}:{TIMES * rate:g} duration={spike.duration_s:g} at={spike.at_s:g} length={spike.length_s:g}"
    shape = parse_shape(text)
    with admin_of(here) as admin:
        workers = len(ask(admin, "/status")["workers"])
        result = event_loop.run(conduct(
            LoadTest(
                target=parse_url(here.url, key=API_KEY), words=text, duration_s=spike.duration_s, admin_key=ADMIN_KEY,
                seed=args.seed + workers, schedule=lambda: arrivals(shape, seed=args.seed, mix=mix(args)),
                objectives=tuple(parse_slos([*(f"{name}<{limit}" for name, limit in limits.items()), "attainment>0.99"])),
            )
        ))  # fmt: skip
        found = changes(result.events)
        decided = decisions(admin, result) if "--policy" in here.options else {}
    if args.keep:
        keep(args.keep / variant.replace(" ", "-"), here)
    row = rows.row(variant, result, workers=workers, found=found, spike=spike) | decided
    saved_run.print_table([{name: row[name] for name in rows.FIGURES}])
    return row


def ask(admin: httpx.Client, path: str) -> dict[str, Any]:
    answer: dict[str, Any] = admin.get(path).raise_for_status().json()
    return answer


def decisions(admin: httpx.Client, result: RunResult) -> dict[str, Any]:
    """Those that ordered, how many there were of each reason, and how many have their outcome by now."""
    found = ask(admin, "/decisions?limit=1000")["decisions"]
    found = [each for each in reversed(found) if each["at_s"] >= result.started_unix_s]
    return {
        "decisions": [
            {"at_s": round(each["at_s"] - result.started_unix_s, 1), "reason": each["reason"], "text": each["text"],
             "outcome": each["outcome"] and each["outcome"]["text"]}
            for each in found
            if each["action"] is not None
        ],
        "reasons": dict(Counter(each["reason"] for each in found)),
        "outcomes": sum(each["outcome"] is not None for each in found),
    }  # fmt: skip


def keep(folder: Path, here: LocalCluster) -> None:
    """What the cluster wrote down: decisions, events, its log."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("decisions.jsonl", "events.jsonl"):
        for path in here.runtime.rglob(name):
            (folder / name).write_bytes(path.read_bytes())
    (folder / "up.log").write_bytes(here.log.read_bytes())


def settle(args: argparse.Namespace, measured: list[dict[str, Any]]) -> dict[str, Any]:
    """Load and SLO for this machine, by what was measured; where nothing was, as the options and the policy file say."""
    written = yaml.safe_load(POLICY.read_text())["spec"]["slo"]
    rate, tpot, room = args.rate, args.tpot or written["tpot"], None
    if measured:
        one, full = (each["requests_per_s"] for each in measured)
        room = round(full / one, 3)
        if room < LEAST_ROOM:
            print(
                f"{args.max_workers} workers take {room} times what one takes: these cores bring no more; no size holds this spike"
            )
        rate = (math.sqrt(one * full) if room >= LEAST_ROOM else OVERLOAD * one) / TIMES
        needed_s = SLACK * max(each["tpot_p95_s"] for each in measured)
        if args.tpot is None and needed_s > parse_slos([f"tpot<{tpot}", "attainment>0.99"])[0].limit:
            tpot = f"{math.ceil(1e3 * needed_s)}ms"
    return {
        "what": "setting",
        "rate_per_s": rate,
        "spike_per_s": TIMES * rate,
        "room": room,
        "slo": {"ttft": args.ttft or written["ttft"], "tpot": tpot},
        "max_workers": args.max_workers,
        "max_running": args.max_running,
        "compared_s": args.before + args.spike + args.compare,
    }


def play_all(args: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, Any], list[dict[str, Any]]]:
    """(capacities, setting, a row for each variant)."""
    table = []
    here = cluster(args, "--workers", "1")
    try:
        measured = [] if args.rate else [capacity(here, args, workers) for workers in (1, args.max_workers)]
        saved_run.print_table(measured)
        setting = settle(args, measured)
        print(
            f"base {setting['rate_per_s']:.3g}/s, spike {setting['spike_per_s']:.3g}/s, SLO {setting['slo']}",
            flush=True,
        )
        for workers in (args.max_workers, 1):
            resize(here, workers)
            table.append(play(f"fixed {workers}", here, args, setting, args.compare))
    finally:
        here.close()
    policies = (
        ("default policy", policy_text(args, setting["slo"]), args.after),
        ("hpa-like", hpa_text(args), args.compare),
    )
    for variant, text, after_s in policies:
        with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
            file.write(text)
            file.flush()
            here = cluster(args, "--policy", file.name)
            try:
                table.append(play(variant, here, args, setting, after_s))
            finally:
                here.close()
    return measured, setting, table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="10 s of spike, little calm: a rehearsal of all variants")
    parser.add_argument("--rate", type=float, help="base rate, requests/s; default: by the measured capacities")
    parser.add_argument("--before", type=float, default=10.0, help="seconds of base load")
    parser.add_argument("--spike", type=float, default=60.0, help="seconds at ten times the base rate")
    parser.add_argument(
        "--compare", type=float, default=40.0, help="seconds after the spike over which all are compared"
    )
    parser.add_argument(
        "--after", type=float, default=335.0, help="the same under the default policy; shrinking looks back over 300"
    )
    parser.add_argument(
        "--capacity", type=float, default=CAPACITY_S, help="seconds to measure what so many workers take"
    )
    parser.add_argument("--max-workers", type=int, default=2)
    parser.add_argument("--standby", type=int, default=1, help="warm processes, in every variant")
    parser.add_argument("--max-running", type=int, default=4, help="requests that a worker computes at a time")
    parser.add_argument("--prompt-tokens", default="64")
    parser.add_argument("--output-tokens", default="64")
    parser.add_argument("--ttft", help="of the SLO, like 500ms; default: the policy file's")
    parser.add_argument("--tpot", help="the same; default: the policy file's, or what this machine can keep")
    parser.add_argument("--memory", default="512MiB")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep", type=Path, help="directory for the clusters' decisions, events and logs")
    parser.add_argument("--out", type=Path, default=saved_run.RESULTS)
    args = parser.parse_args()
    if args.short:
        args.before, args.spike, args.compare, args.after, args.capacity = 5.0, 10.0, 10.0, 25.0, 10.0
    started = datetime.datetime.now(datetime.UTC)
    measured, setting, table = play_all(args)
    reached = rows.goals(table)
    ratios = rows.compared(table, duration_s=args.before + args.spike + args.after)
    saved_run.print_table([{name: each[name] for name in rows.FIGURES} for each in table])
    saved_run.print_table(ratios)
    saved_run.print_table(reached)
    name = "autoscale-short" if args.short else "autoscale"
    everything = [*measured, setting, *table, *ratios]
    print("saved", saved_run.save(name, device="cpu", rows=everything, goals=reached, started=started, folder=args.out))
    raise SystemExit(0 if reached[0]["met"] else 1)


if __name__ == "__main__":
    main()
