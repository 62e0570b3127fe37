"""A cluster that grows and shrinks at random while it serves, against the same cluster left alone.

    python benchmarks/elasticity.py                                   # 2,000 requests, 50 transitions over 1 to 4 workers
    python benchmarks/elasticity.py --requests 120 --transitions 6    # the short form
    python benchmarks/elasticity.py --device cuda --shape olmoe-1b-7b --sizes 1,2,1   # two GPUs; --share-gpus: both workers on one

Every job (a prompt with its sampling parameters, greedy or seeded, streamed or not) is first answered by a fixed cluster. Then
`clients` clients repeat the jobs without a pause while the cluster is scaled to random sizes and random workers are drained,
middle ranks among them. An answer counts only if its text, its end and its number of tokens are those of the first time. Afterwards
the deployment is stopped and started at twice the size: what a cold join is compared with.

With --shape the model has random weights in bfloat16, where another placement may round differently and so choose another token: answers
are then asked for at full length and must have it, and how many differ is only counted.
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
import tempfile
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
TRANSITION_TIMEOUT_S = 180.0


@dataclass(frozen=True)
class Job:
    prompt: str
    max_tokens: int
    temperature: float
    seed: int
    stream: bool
    ignore_eos: bool = False

    def body(self, model: str) -> dict[str, Any]:
        body = {
            "model": model,
            "prompt": self.prompt,
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "top_p": 0.95 if self.temperature else 1,
            "seed": self.seed,
            "stream": self.stream,
            "ignore_eos": self.ignore_eos,
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


def make_jobs(count: int, seed: int, *, full_length: bool = False) -> list[Job]:
    pick = random.Random(seed)
    return [
        Job(
            prompt=f"{i} " + " ".join(pick.choices(WORDS, k=pick.choice((4, 12, 40, 100)))),
            max_tokens=pick.choice((4, 12, 24, 48)),
            temperature=pick.choice((0, 0.8)),
            seed=pick.randrange(1 << 31),
            stream=pick.random() < 0.6,
            ignore_eos=full_length,
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
            if jobs[i].ignore_eos and found[1:] != ("length", jobs[i].max_tokens):
                load.failures.append(f"job {i}: {found[1:]}, asked for {jobs[i].max_tokens} tokens")
                continue
            if found != expected[i]:
                load.different.append(
                    f"job {i} after {time.monotonic() - began_s:.2f} s: {found} expected {expected[i]}"
                )
            load.finished += 1

    async with client(url) as http:
        await asyncio.gather(*(one(http) for _ in range(clients)))


async def disturb(admin: Admin, load: Load, args: argparse.Namespace, stop: asyncio.Event) -> list[dict[str, Any]]:
    """Random transitions, or those to args.sizes, until there were enough of them and enough requests; a few requests end between any
    two."""
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
        if args.sizes:
            what, begun = (
                f"{len(serving)} -> {args.sizes[number]}",
                await admin.scale(args.sizes[number], request_id),
            )
        elif len(serving) > 1 and pick.random() < 0.3:
            leaver = pick.choice(serving)
            what, begun = f"drain {leaver}", await admin.drain(leaver, request_id)
        else:
            size = pick.choice([n for n in range(1, args.max_workers + 1) if n != len(serving)])
            what, begun = f"{len(serving)} -> {size}", await admin.scale(size, request_id)
        ended = await admin.finished(begun["transition_id"], TRANSITION_TIMEOUT_S)
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
    jobs = make_jobs(args.jobs, args.seed, full_length=args.shape is not None)
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
    parser.add_argument(
        "--sizes", type=sizes, help="these one after the other, like 1,2,1, in place of random transitions"
    )
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--shape", choices=["olmoe-1b-7b"], help="random weights of this shape, not the built-in model")
    parser.add_argument("--layers", type=int, help="with --shape: so many layers only (a rehearsal)")
    parser.add_argument("--memory", default="512MiB", help="of each device; on a GPU of the host's copy of its weights")
    parser.add_argument("--kv-memory", help="the part of it for KV; on a GPU besides")
    parser.add_argument(
        "--share-gpus", action="store_true", help="several workers on one GPU, by gloo in place of NCCL"
    )
    parser.add_argument("--threads", help="of each worker; where all have cores of their own, nobody slows another")
    parser.add_argument("--out", type=Path, default=saved_run.RESULTS)
    args = parser.parse_args()
    if args.sizes:
        args.workers, args.max_workers, args.transitions = args.sizes[0], max(args.sizes), len(args.sizes) - 1
    started = datetime.datetime.now(datetime.UTC)
    options = ["--workers", str(args.workers), "--standby", "1", "--max-workers", str(args.max_workers)]
    memory = ["--memory", args.memory, "--device", args.device]
    with tempfile.TemporaryDirectory() as folder:
        memory += model_options(args, Path(folder))
        cluster = LocalCluster(*options, *memory, port=free_port()).start()
        try:
            load, transitions, events = asyncio.run(measure(cluster, args))
        finally:
            cluster.close()
        report(args, load, transitions, events, memory, started)


def sizes(text: str) -> list[int]:
    found = [int(size) for size in text.split(",")]
    if len(found) < 2 or min(found) < 1:
        raise argparse.ArgumentTypeError("expected at least two sizes, like 1,2,1")
    return found


def model_options(args: argparse.Namespace, folder: Path) -> list[str]:
    found = [] if args.kv_memory is None else ["--kv-memory", args.kv_memory]
    found += ["--share-gpus"] * args.share_gpus
    found += [] if args.threads is None else ["--threads", args.threads]
    if args.shape is None:
        return found
    import shapes

    model_dir = shapes.write_checkpoint(args.shape, folder, device=args.device, num_layers=args.layers)
    shapes.write_tokenizer(model_dir, words=[*map(str, range(args.jobs)), *dict.fromkeys(WORDS)])
    return [*found, "--model", str(model_dir), "--max-context", "512", "--max-running", "32"]


def report(
    args: argparse.Namespace,
    load: Load,
    transitions: list[dict[str, Any]],
    events: list[dict[str, Any]],
    memory: list[str],
    started: datetime.datetime,
) -> None:
    """Print, save, and end the program: 0 where what must be exact is."""
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
    exact = {"failed requests", "requests under transitions", "transitions done"}
    if args.shape is None:
        exact.add("answers that differ from a fixed cluster's")
    else:  # functional only
        goals = [goal for goal in goals if goal["name"] in exact]
    for row in transitions:
        del row["began_s"], row["ended_s"]
    saved_run.print_table(table)
    for problem in [*load.failures[:5], *load.different[:5]]:
        print(problem)
    saved_run.print_table(goals)
    name = "-".join(["elasticity", *([args.shape] if args.shape else []), *(["shared"] if args.share_gpus else [])])
    path = saved_run.save(
        name, device=args.device, rows=table + transitions, goals=goals, started=started, folder=args.out
    )
    print("saved", path)
    raise SystemExit(0 if all(goal["met"] for goal in goals if goal["name"] in exact) else 1)


if __name__ == "__main__":
    main()
