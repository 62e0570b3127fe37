"""Hundreds of up and down cycles: what the long-lived processes hold may not grow.

    python benchmarks/cycles.py                   # a warm-up, then 300 cycles of 1 -> 2 -> 1 workers, under a light load
    python benchmarks/cycles.py --cycles 60       # the short form

Read are `up`, controller, node agent, gateway, HBM managers, the worker that stays and the process that joins and leaves: all that live
through every cycle. What is read: the process's own anonymous memory (granules are the budget's, pages of files are shared), descriptors,
mappings and threads, all from /proc.

A reading is taken every tenth cycle (of a shorter run 30 times), when all is calm: the load is held, the worker has answered the same
requests as before every other reading, enough of them to fill its KV memory anew (so a cache holds as much each time), the cycle has gone
up and down since (so KV is tidied, and lies in as many pieces each time as that leaves), each manager's next loader helper waits, and
nothing that can be counted has changed between two looks. Memory is no condition of calm, so growth is never waited away. All readings are
in the saved file beside what was made of them, with their cycles.

Drift is the Theil-Sen slope, the median of the slopes between all pairs of readings, per 100 cycles, over their median: a reading that was
disturbed moves it little, growth moves all pairs. Printed beside it are the medians of the first and the last quarter of the readings.
The warm-up does not count: in it what is bounded fills. The controller's histories (1,000 events, 256 request ids, 100 transitions) take
130 cycles, the gateway's window of traffic five minutes; it lasts until both are over, in runs of less than 100 cycles a quarter of these.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import datetime
import itertools
import os
import statistics
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import httpx
import psutil
import saved_run
from elasticity import Job, Load, answer, client, free_port, make_jobs
from local_cluster import Admin, LocalCluster

MEASURES = ("memory_bytes", "descriptors", "mappings", "threads")
COUNTS = MEASURES[1:]
NAMES = {"Controller": "controller", "NodeAgent": "agent", "GatewayActor": "gateway", "WorkerActor": "worker"}
READINGS = 30
WARM_UP_CYCLES = 130
WARM_UP_S = 310.0
SHORT_CYCLES = 100  # fewer have a short warm-up, and say little of small drifts
CALM_TIMEOUT_S = 30.0
LOOK_EVERY_S = 0.3
OPTIONS = ("--workers", "1", "--standby", "1", "--max-workers", "2", "--memory", "512MiB", "--kv-memory", "16MiB")
# Together about the tokens that 16 MiB of KV hold; the first words differ, so none begins with another's prefix.
FILLING = [
    Job(prompt=f"{i} " + f"{i * i} of the table " * 24, max_tokens=2, temperature=0, seed=0, stream=False)
    for i in range(60)
]

Reading = dict[str, dict[str, float]]  # process -> measure -> value


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


def read(pids: dict[int, str]) -> Reading:
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
    """Anonymous memory: heap, stacks and what else is no file's. Counted page by page, not from the kernel's estimates."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("Anonymous:"))


def helpers(pids: dict[int, str]) -> dict[int, tuple[int, float]] | None:
    """Manager -> its loader helper and the processor time that has used; None while one has none, or a second."""
    found = {}
    for pid, name in pids.items():
        if not name.startswith("manager"):
            continue
        try:
            children = psutil.Process(pid).children()
            if len(children) != 1:
                return None
            found[pid] = children[0].pid, sum(children[0].cpu_times()[:2])
        except psutil.Error:
            return None
    return found


async def calm_reading(runtime: Path) -> Reading:
    """Two looks in a row saw the same helpers, at rest, and the same counts; the second one's."""
    before: tuple[Any, Any] | None = None
    ends_s = time.monotonic() + CALM_TIMEOUT_S
    while time.monotonic() < ends_s:
        pids = cluster_processes(runtime)
        at_rest = helpers(pids)
        found = read(pids)
        look = at_rest, {process: [values[name] for name in COUNTS] for process, values in found.items()}
        if at_rest is not None and look == before:
            return found
        before = look
        await asyncio.sleep(LOOK_EVERY_S)
    raise TimeoutError(f"nothing was calm for {CALM_TIMEOUT_S:g} s; last: {before}")


def drift(values: list[float], cycles: list[int]) -> float:
    """Theil-Sen slope per 100 cycles, over the median."""
    slopes = [
        (later - sooner) / (there - here)
        for (here, sooner), (there, later) in itertools.combinations(zip(cycles, values, strict=True), 2)
    ]
    return 100 * statistics.median(slopes) / statistics.median(values) if slopes else 0.0


class LightLoad:
    """One request after the other until `end`; none runs while it is `held`."""

    def __init__(self, http: httpx.AsyncClient, model: str) -> None:
        self.seen = Load()
        self._http, self._model = http, model
        self._lock = asyncio.Lock()
        self._task = asyncio.create_task(self._run())

    def held(self) -> asyncio.Lock:
        """A context in which nothing of the load runs."""
        return self._lock

    async def ask(self, job: Job) -> None:
        try:
            await answer(self._http, self._model, job)
            self.seen.finished += 1
        except Exception as error:
            self.seen.failures.append(f"{type(error).__name__}: {error}")

    async def _run(self) -> None:
        for job in itertools.cycle(make_jobs(400, seed=3)):
            async with self._lock:
                await self.ask(job)

    async def end(self) -> None:
        async with self._lock:
            self._task.cancel()
        await asyncio.wait([self._task])


async def up_and_down(admin: Admin, number: int) -> list[float]:
    """Seconds of each transition of a cycle."""
    seconds = []
    for size in (2, 1):
        begun = await admin.scale(size, f"cycle-{number}-{size}")
        ended = await admin.finished(begun["transition_id"])
        if ended["state"] != "done":
            raise RuntimeError(f"cycle {number}: {ended['state']}: {ended['reason']}")
        seconds.append(ended["seconds"])
    return seconds


class Progress:
    """Which cycle counts, which is the last, in which a reading is taken. num_cycles: those that count."""

    def __init__(self, num_cycles: int) -> None:
        self._num_cycles, self._every = num_cycles, max(1, num_cycles // READINGS)
        self._share = 1.0 if num_cycles >= SHORT_CYCLES else 0.25
        self._began_s: float | None = None
        self.number = 0
        self.warm_at: int | None = None

    def next(self) -> bool:
        """Whether there is another cycle."""
        if self._began_s is None:
            self._began_s = time.monotonic()
        if self.warm_at is None:
            long_enough = time.monotonic() - self._began_s >= WARM_UP_S * self._share
            if long_enough and self.number >= WARM_UP_CYCLES * self._share and self.number % self._every == 0:
                self.warm_at = self.number
        self.number += 1
        return self.warm_at is None or self.number <= self.warm_at + self._num_cycles

    @property
    def reads(self) -> bool:
        return self.number % self._every == 0


async def run(cluster: LocalCluster, progress: Progress) -> tuple[dict[int, Reading], list[float], Load]:
    """Readings by cycle, seconds of every transition, what the clients saw."""
    admin, readings, seconds = Admin(cluster), {}, []
    async with client(cluster.url) as http:
        model = (await http.get("/v1/models")).json()["data"][0]["id"]
        load = LightLoad(http, model)
        try:
            while progress.next():
                number = progress.number
                if not progress.reads:
                    seconds += await up_and_down(admin, number)
                    continue
                async with load.held():
                    for job in FILLING:
                        await load.ask(job)
                    seconds += await up_and_down(admin, number)
                    try:
                        readings[number] = await calm_reading(cluster.runtime)
                    except TimeoutError as error:
                        print(f"cycle {number}: no reading: {error}", flush=True)
                print(f"cycle {number}: {statistics.fmean(seconds[-20:]):.2f} s a transition", flush=True)
        finally:
            await load.end()
            await admin.close()
    return readings, seconds, load.seen


def as_text(numbers: Iterable[float]) -> str:
    """One line of the saved file, not one for each."""
    return " ".join(f"{number:.0f}" for number in numbers)


def rows_of(readings: dict[int, Reading], warm_at: int) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """A row for each process and measure, with all its readings, those of the warm-up too; the worst drift of each measure."""
    rows, worst = [], dict.fromkeys(MEASURES, 0.0)
    counted = {number: reading for number, reading in readings.items() if number > warm_at}
    quarter = max(1, len(counted) // 4)
    for process in sorted(set.intersection(*(set(reading) for reading in counted.values()))):
        for measure in MEASURES:
            values = [reading[process][measure] for reading in counted.values()]
            change = drift(values, list(counted))
            worst[measure] = max(worst[measure], change)
            rows.append(
                {"what": f"{process.rpartition(' ')[0]}, {measure}", "median": statistics.median(values), "min": min(values),
                 "max": max(values), "first quarter": statistics.median(values[:quarter]),
                 "last quarter": statistics.median(values[-quarter:]), "unit": f"drift {100 * change:.3f}% per 100 cycles",
                 "readings": as_text(reading[process][measure] for reading in readings.values() if process in reading)}
            )  # fmt: skip
    return rows, worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cycles", type=int, default=300, help="that count")
    parser.add_argument("--out", type=Path, default=saved_run.RESULTS)
    args = parser.parse_args()
    started = datetime.datetime.now(datetime.UTC)
    progress = Progress(args.cycles)
    cluster = LocalCluster(*OPTIONS, port=free_port()).start()
    try:
        readings, seconds, load = asyncio.run(run(cluster, progress))
    finally:
        cluster.close()
    warm_at = progress.warm_at or 0
    rows, worst = rows_of(readings, warm_at)
    quarter = max(1, len(seconds) // 4)
    times: list[dict[str, Any]] = [
        {"what": "cycles of warm-up", "median": warm_at, "unit": ""},
        {"what": "readings", "median": sum(number > warm_at for number in readings), "unit": "that count"},
    ]
    times += [
        {"what": f"seconds a transition, {which} quarter", "median": statistics.median(part), "unit": "s"}
        for which, part in (("first", seconds[:quarter]), ("last", seconds[-quarter:]))
    ]
    goals = [saved_run.goal(f"drift of {name} per 100 cycles", worst[name], "<= 0.001") for name in MEASURES]
    goals.append(saved_run.goal("failed requests", len(load.failures), "<= 0"))
    saved_run.print_table([{name: value for name, value in row.items() if name != "readings"} for row in rows])
    saved_run.print_table(times)
    times.append({"what": "cycles of the readings", "median": len(readings), "unit": "", "readings": as_text(readings)})
    saved_run.print_table(goals)
    print(
        "saved",
        saved_run.save("cycles", device="cpu", rows=rows + times, goals=goals, started=started, folder=args.out),
    )


if __name__ == "__main__":
    main()
