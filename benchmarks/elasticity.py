"""A cluster that grows and shrinks at random while it serves, against the same cluster left alone.

    python benchmarks/elasticity.py                                   # 2,000 requests, 50 transitions over 1 to 4 workers
    python benchmarks/elasticity.py --requests 120 --transitions 6    # the short form

Every job (a prompt with its sampling parameters, greedy or seeded, streamed or not) is first answered by a fixed cluster. Then
`clients` clients repeat the jobs without a pause while the cluster is scaled to random sizes and random workers are drained,
middle ranks among them. An answer counts only if its text, its end and its number of tokens are those of the first time. Afterwards
the deployment is stopped and started at twice the size: what a cold join is compared with.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import itertools
import json
import random
import socket
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import elasticity_rows as rows
import httpx
import saved_run
from local_cluster import API_KEY, Admin, LocalCluster

SENTENCE = (
    "the kernel module returns a pointer to device memory when import fails and the table of contents names each file"
)
WORDS = SENTENCE.split()


@dataclass(frozen=True)
class Job:
    prompt: str
    max_tokens: int
    temperature: float
    seed: int
    stream: bool

    def body(self, model: str) -> dict[str, Any]:
        body = {
            "model": model,
            "prompt": self.prompt,
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "top_p": 0.95 if self.temperature else 1,
            "seed": self.seed,
            "stream": self.stream,
        }
        return body | ({"stream_options": {"include_usage": True}} if self.stream else {})


@dataclass
class Load:
    """What the clients saw. token_times_s: when each streamed piece came; gaps_s: (when, seconds since the piece before)."""

    finished: int = 0
    failures: list[str] = field(default_factory=list)
    different: list[str] = field(default_factory=list)
    pieces: list[tuple[float, float]] = field(default_factory=list)
    tokens: list[tuple[float, int]] = field(default_factory=list)


def make_jobs(count: int, seed: int) -> list[Job]:
    pick = random.Random(seed)
    return [
        Job(
            prompt=f"{i} " + " ".join(pick.choices(WORDS, k=pick.choice((4, 12, 40, 100)))),
            max_tokens=pick.choice((4, 12, 24, 48)),
            temperature=pick.choice((0, 0.8)),
            seed=pick.randrange(1 << 31),
            stream=pick.random() < 0.6,
        )
        for i in range(count)
    ]


async def answer(http: httpx.AsyncClient, model: str, job: Job, load: Load | None = None) -> tuple[str, str, int]:
    """(text, finish reason, completion tokens). Raises what went wrong."""
    if not job.stream:
        reply = (await http.post("/v1/completions", json=job.body(model))).raise_for_status().json()
        choice, usage = reply["choices"][0], reply["usage"]
        return choice["text"], choice["finish_reason"], usage["completion_tokens"]
    text, reason, tokens, last_s = "", "", -1, None
    async with http.stream("POST", "/v1/completions", json=job.body(model)) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                raise RuntimeError(f"error in the stream: {event['error']}")
            now_s = time.monotonic()
            if event.get("usage"):
                tokens = event["usage"]["completion_tokens"]
            for choice in event["choices"]:
                text += choice["text"]
                reason = choice["finish_reason"] or reason
                if load is not None and choice["text"]:
                    if last_s is not None:
                        load.pieces.append((now_s, now_s - last_s))
                    last_s = now_s
    return text, reason, tokens


async def reference(url: str, model: str, jobs: list[Job]) -> list[tuple[str, str, int]]:
    limit = asyncio.Semaphore(16)
    async with client(url) as http:

        async def one(job: Job) -> tuple[str, str, int]:
            async with limit:
                return await answer(http, model, job)

        return list(await asyncio.gather(*map(one, jobs)))


def client(url: str) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=128, max_keepalive_connections=128)
    return httpx.AsyncClient(
        base_url=url, headers={"authorization": f"Bearer {API_KEY}"}, timeout=httpx.Timeout(120), limits=limits
    )


async def serve_load(
    url: str,
    model: str,
    jobs: list[Job],
    expected: list[tuple[str, str, int]],
    load: Load,
    stop: asyncio.Event,
    clients: int,
) -> None:
    turn = itertools.count()

    async def one(http: httpx.AsyncClient) -> None:
        while not stop.is_set():
            i = next(turn) % len(jobs)
            began_s = time.monotonic()
            try:
                found = await answer(http, model, jobs[i], load)
            except Exception as error:
                load.failures.append(f"job {i}: {type(error).__name__}: {error}")
                continue
            load.tokens.append((time.monotonic(), found[2]))
            if found != expected[i]:
                load.different.append(
                    f"job {i} after {time.monotonic() - began_s:.2f} s: {found} expected {expected[i]}"
                )
            load.finished += 1

    async with client(url) as http:
        await asyncio.gather(*(one(http) for _ in range(clients)))


async def disturb(admin: Admin, load: Load, args: argparse.Namespace, stop: asyncio.Event) -> list[dict[str, Any]]:
    """Random transitions until there were enough of them and enough requests; a few requests end between any two."""
    pick = random.Random(args.seed)
    found: list[dict[str, Any]] = []
    number = 0
    while number < args.transitions or load.finished < args.requests:
        goal = load.finished + max(2, args.requests // (2 * max(args.transitions, 1)))
        while load.finished + len(load.failures) < goal:
            await asyncio.sleep(0.02)
        if number >= args.transitions:
            continue
        number += 1
        status = await admin.status()
        serving = sorted(member["worker_id"] for member in status["workers"])
        request_id = f"elasticity-{args.seed}-{number}"
        began_s = time.monotonic()
        if len(serving) > 1 and pick.random() < 0.3:
            leaver = pick.choice(serving)
            what, begun = f"drain {leaver}", await admin.drain(leaver, request_id)
        else:
            size = pick.choice([n for n in range(1, args.max_workers + 1) if n != len(serving)])
            what, begun = f"{len(serving)} -> {size}", await admin.scale(size, request_id)
        ended = await admin.finished(begun["transition_id"])
        row = {"what": what, "state": ended["state"], "seconds": round(time.monotonic() - began_s, 3)}
        row |= {"began_s": began_s, "ended_s": time.monotonic(), "reason": ended.get("reason", "")}
        row |= {name: ended.get(name) for name in ("kind", "moved_bytes", "total_bytes")}
        found.append(row)
        print(f"{number}: {what}: {ended['state']} after {row['seconds']} s, {load.finished} requests", flush=True)
    stop.set()
    return found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def measure(
    cluster: LocalCluster, args: argparse.Namespace
) -> tuple[Load, list[dict[str, Any]], list[dict[str, Any]]]:
    jobs = make_jobs(args.jobs, args.seed)
    async with client(cluster.url) as http:
        model = (await http.get("/v1/models")).raise_for_status().json()["data"][0]["id"]
    expected = await reference(cluster.url, model, jobs)
    print(f"{len(jobs)} jobs answered by a fixed cluster", flush=True)
    load, stop, admin = Load(), asyncio.Event(), Admin(cluster)
    try:
        serving = asyncio.create_task(serve_load(cluster.url, model, jobs, expected, load, stop, args.clients))
        try:
            transitions = await disturb(admin, load, args, stop)
        finally:
            stop.set()
            await serving
        events = await admin.events()
    finally:
        await admin.close()
    return load, transitions, events


def rows_of(
    load: Load, transitions: list[dict[str, Any]], events: list[dict[str, Any]], restart: dict[str, float]
) -> list[dict[str, Any]]:
    done = [row["seconds"] for row in transitions if row["state"] == "done"]
    return [
        {"what": "requests finished", "median": load.finished, "unit": "requests"},
        {"what": "requests failed", "median": len(load.failures), "unit": "requests"},
        {"what": "answers that differ", "median": len(load.different), "unit": "requests"},
        *rows.summary("transition, whole", done, "s"),
        *rows.summary("commit pause", [1e3 * pause for pause in rows.commit_pauses_s(events)], "ms"),
        *rows.summary("gap between streamed pieces", [1e3 * gap for _, gap in load.pieces], "ms"),
        *rows.join_rows(events),
        *({"what": what, "median": seconds, "unit": "s"} for what, seconds in restart.items()),
    ]


def compare_with_restart(options: list[str], args: argparse.Namespace) -> dict[str, float]:
    """The same deployment from 1 to 2 workers without a standby: by a cold join, and by stopping and starting it at the new size."""
    common = ["--standby", "0", "--max-workers", str(args.max_workers), *options]
    cluster = LocalCluster("--workers", "1", *common, port=free_port()).start()

    async def join() -> float:
        admin = Admin(cluster)
        try:
            began_s = time.monotonic()
            begun = await admin.scale(2, "cold-join")
            ended = await admin.finished(begun["transition_id"])
            assert ended["state"] == "done", ended
            return time.monotonic() - began_s
        finally:
            await admin.close()

    try:
        cold_join_s = asyncio.run(join())
        began_s = time.monotonic()
        cluster.stop()
        cluster.options = ("--workers", "2", *common)
        cluster.start()
        restart_s = time.monotonic() - began_s
    finally:
        cluster.close()
    return {"cold join, 1 -> 2, no standby": cold_join_s, "cold restart, 1 -> 2": restart_s}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=2000, help="at least so many under transitions")
    parser.add_argument("--transitions", type=int, default=50)
    parser.add_argument("--jobs", type=int, default=200, help="different requests")
    parser.add_argument("--clients", type=int, default=12)
    parser.add_argument("--workers", type=int, default=2, help="at launch; transitions go below it too")
    parser.add_argument("--max-workers", type=int, default=4)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--no-restart", action="store_true", help="leave the comparison with a cold restart out")
    parser.add_argument("--out", type=Path, default=saved_run.RESULTS)
    args = parser.parse_args()
    started = datetime.datetime.now(datetime.UTC)
    options = ["--workers", str(args.workers), "--standby", "1", "--max-workers", str(args.max_workers)]
    memory = ["--memory", "512MiB"]
    cluster = LocalCluster(*options, *memory, port=free_port()).start()
    try:
        load, transitions, events = asyncio.run(measure(cluster, args))
    finally:
        cluster.close()
    restart = {} if args.no_restart else compare_with_restart(memory, args)
    cold_join_s, restart_s = tuple(restart.values()) or (None, None)
    table = rows_of(load, transitions, events, restart)
    gaps_s = [gap for _, gap in load.pieces]
    goals = rows.goals(
        failed=len(load.failures),
        different=len(load.different),
        finished=load.finished,
        requests=args.requests,
        done=sum(row["state"] == "done" for row in transitions),
        transitions=args.transitions,
        events=events,
        step_s=statistics.median(gaps_s) if gaps_s else 0.0,
        disturbed=rows.disturbance(load.pieces, [(row["began_s"], row["ended_s"]) for row in transitions]),
        restart_s=restart_s,
        cold_join_s=cold_join_s,
    )
    for row in transitions:
        del row["began_s"], row["ended_s"]
    saved_run.print_table(table)
    for problem in [*load.failures[:5], *load.different[:5]]:
        print(problem)
    saved_run.print_table(goals)
    path = saved_run.save(
        "elasticity", device="cpu", rows=table + transitions, goals=goals, started=started, folder=args.out
    )
    print("saved", path)
    exact = {
        "failed requests",
        "answers that differ from a fixed cluster's",
        "requests under transitions",
        "transitions done",
    }
    raise SystemExit(0 if all(goal["met"] for goal in goals if goal["name"] in exact) else 1)


if __name__ == "__main__":
    main()
