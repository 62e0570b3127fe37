"""Hundreds of up and down cycles: what the long-lived processes hold may not grow.

    python benchmarks/cycles.py                   # 300 cycles of 1 -> 2 -> 1 workers under a light load
    python benchmarks/cycles.py --cycles 6        # the short form

After each tenth cycle memory, descriptors, mappings and threads are read from /proc for the processes that live through all of them: `up`,
controller, node agent, gateway, HBM managers and the worker that stays. Memory is that of the process alone: granules are the budget's, and
pages of files are shared with whatever else runs here. Drift is the slope of a straight line through the samples after the first quarter,
per 100 cycles, over the mean.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import datetime
import os
import statistics
from pathlib import Path
from typing import Any

import psutil
import saved_run
from elasticity import Load, answer, client, free_port, make_jobs
from local_cluster import Admin, LocalCluster

MEASURES = ("memory_bytes", "descriptors", "mappings", "threads")
NAMES = {"Controller": "controller", "NodeAgent": "agent", "GatewayActor": "gateway", "WorkerActor": "worker"}


def name_of(process: psutil.Process) -> str | None:
    """The role of a long-lived process, from its command line; None for others."""
    command = " ".join(process.cmdline())
    for part, name in NAMES.items():
        if command.startswith(f"ray::{part}"):
            return name
    if "flexpert.hbm.loader" in command:
        return None  # one for each load
    if "flexpert.hbm" in command:
        return "manager " + command.partition("--name ")[2].split(" ")[0]
    return "up" if "flexpert.cli up" in command else None


def sample(pids: dict[int, str]) -> dict[str, dict[str, float]]:
    """What each holds; a child that was about to become another program is gone by now."""
    found = {}
    for pid, name in pids.items():
        with contextlib.suppress(psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
            process = psutil.Process(pid)
            found[f"{name} {pid}"] = {
                "memory_bytes": own_bytes(pid),
                "descriptors": process.num_fds(),
                "mappings": Path(f"/proc/{pid}/maps").read_text().count("\n"),
                "threads": process.num_threads(),
            }
    return found


def own_bytes(pid: int) -> int:
    """Memory that belongs to this process alone."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss_Anon:"))


def cluster_processes(runtime: Path) -> dict[int, str]:
    """Every process that `up` of this runtime directory brought, however it detached itself."""
    found = {}
    for process in psutil.process_iter():
        try:
            mine = process.environ().get("FLEXPERT_RUNTIME_DIR") == str(runtime) or str(runtime) in " ".join(
                process.cmdline()
            )
            name = name_of(process)
        except psutil.Error:
            continue
        if mine and name is not None and process.pid != os.getpid():
            found[process.pid] = name
    return found


def drift(values: list[float], cycles: list[int]) -> float:
    """Slope per 100 cycles over the mean, of the samples after the first quarter."""
    skip = len(values) // 4
    slope = statistics.linear_regression(cycles[skip:], values[skip:]).slope
    return 100 * slope / statistics.fmean(values[skip:])


async def cycle(cluster: LocalCluster, args: argparse.Namespace) -> tuple[list[dict[str, Any]], list[float], Load]:
    admin, load, samples, seconds = Admin(cluster), Load(), [], []
    jobs = make_jobs(400, seed=3)  # enough to fill the KV memory in the first cycles
    stop = asyncio.Event()

    async def light_load() -> None:
        async with client(cluster.url) as http:
            model = (await http.get("/v1/models")).json()["data"][0]["id"]
            while not stop.is_set():
                for job in jobs:
                    try:
                        await answer(http, model, job)
                        load.finished += 1
                    except Exception as error:
                        load.failures.append(f"{type(error).__name__}: {error}")

    serving = asyncio.create_task(light_load())
    try:
        for number in range(1, args.cycles + 1):
            for size in (2, 1):
                begun = await admin.scale(size, f"cycle-{number}-{size}")
                ended = await admin.finished(begun["transition_id"])
                if ended["state"] != "done":
                    raise RuntimeError(f"cycle {number}: {ended['state']}: {ended['reason']}")
                seconds.append(ended["seconds"])
            if number % max(1, args.cycles // 30) == 0:
                samples.append({"cycle": number, "found": sample(cluster_processes(cluster.runtime))})
                print(f"cycle {number}: {statistics.fmean(seconds[-20:]):.2f} s a transition", flush=True)
    finally:
        stop.set()
        await serving
        await admin.close()
    return samples, seconds, load


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cycles", type=int, default=300)
    parser.add_argument("--out", type=Path, default=saved_run.RESULTS)
    args = parser.parse_args()
    started = datetime.datetime.now(datetime.UTC)
    cluster = LocalCluster(
        "--workers",
        "1",
        "--standby",
        "1",
        "--max-workers",
        "2",
        "--memory",
        "512MiB",
        "--kv-memory",
        "16MiB",
        port=free_port(),
    ).start()
    try:
        samples, seconds, load = asyncio.run(cycle(cluster, args))
    finally:
        cluster.close()
    rows, worst = [], dict.fromkeys(MEASURES, 0.0)
    lasting = set.intersection(*(set(each["found"]) for each in samples))
    for process in sorted(lasting):
        for measure in MEASURES:
            values = [each["found"][process][measure] for each in samples]
            change = drift(values, [each["cycle"] for each in samples]) if len(samples) > 3 else 0.0
            worst[measure] = max(worst[measure], change)
            rows.append(
                {"what": f"{process.rpartition(' ')[0]}, {measure}", "median": statistics.median(values), "min": min(values),
                 "max": max(values), "unit": f"drift {100 * change:.3f}% per 100 cycles"}
            )  # fmt: skip
    quarter = max(1, len(seconds) // 4)
    rows.append(
        {"what": "seconds a transition, first quarter", "median": statistics.median(seconds[:quarter]), "unit": "s"}
    )
    rows.append(
        {"what": "seconds a transition, last quarter", "median": statistics.median(seconds[-quarter:]), "unit": "s"}
    )
    goals = [saved_run.goal(f"drift of {name} per 100 cycles", worst[name], "<= 0.001") for name in MEASURES]
    goals.append(saved_run.goal("failed requests", len(load.failures), "<= 0"))
    saved_run.print_table(rows)
    saved_run.print_table(goals)
    print("saved", saved_run.save("cycles", device="cpu", rows=rows, goals=goals, started=started, folder=args.out))


if __name__ == "__main__":
    main()
