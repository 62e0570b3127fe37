"""flexpert against transformers: same model, same machine, same run.

    python benchmarks/serve.py                                              # CPU, the built-in model, float32
    python benchmarks/serve.py --device cuda --shape olmoe-1b-7b --concurrency 64

Throughput: `concurrency` requests of `input` random tokens arrive at once and end after exactly `output` tokens, greedily.
Systems take turns in every repeat, each in its own process; the table shows medians. transformers runs as `generate` on one
static batch of equal lengths (its best case: no padding, no arrival) and as `generate_batch` (its continuous batching).
Prefixes differ, so prefix reuse gives nothing.

Host work: seconds of a decode step spent in scheduling, memory operations, batch building and emitting, at 64 sequences.
Gateway: time to the first streamed byte over HTTP against the same request on the worker's own stream, one at a time, in turns.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import os
import random
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import saved_run
from peers import PEERS, Peer, Prompts
from transformers import AutoConfig

from flexpert.hbm import ManagerConfig, ensure_manager, stop_manager
from flexpert.workers.framing import open_stream, worker_frames
from flexpert.workers.messages import Hello, SamplingParams, StepOutput, Submit
from flexpert.workers.process import WorkerConfig, WorkerProcess
from flexpert.workers.step import StepPlan, StepTimes
from flexpert.workers.threads import worker_environment

TOKEN = "benchmark"


def random_prompts(count: int, length: int, vocab_size: int, seed: int) -> Prompts:
    rng = random.Random(seed)
    return [[rng.randrange(16, vocab_size) for _ in range(length)] for _ in range(count)]


def greedy(output_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=output_tokens, seed=0, temperature=0.0)


class Collector:
    """Stands where the gateway's stream would: counts tokens, knows when all requests of a round have ended."""

    def __init__(self) -> None:
        self.tokens = 0
        self.host_s: list[float] = []
        self.step_s: list[float] = []
        self._open = 0
        self._done = threading.Event()

    def expect(self, requests: int) -> None:
        self.tokens, self._open = 0, requests
        self._done.clear()

    def take(self, frame: object) -> None:
        if not isinstance(frame, StepOutput):
            if type(frame).__name__ == "Failed":
                raise RuntimeError(f"a request failed: {frame}")
            return
        self.tokens += len(frame.tokens)
        self._open -= len(frame.finished)
        if self._open == 0:
            self._done.set()

    def wait(self) -> None:
        if not self._done.wait(600):
            raise TimeoutError("the round did not end within 600 s")


class FlexpertEngine:
    """A worker on an HBM manager, called without gateway and HTTP."""

    def __init__(self, model_dir: Path, args: argparse.Namespace) -> None:
        self.runtime_dir = Path(tempfile.mkdtemp(prefix="fx-"))
        manager = ensure_manager(ManagerConfig(runtime_dir=self.runtime_dir, budget_bytes=args.memory_gib << 30))
        self.worker = WorkerProcess(
            WorkerConfig(
                worker_id="bench",
                model_dir=model_dir,
                model_id="bench",
                cluster_token=TOKEN,
                address=f"unix:{self.runtime_dir}/worker.sock",
                device=args.device,
                manager_socket=Path(manager.socket_path),
                max_running=max(64, args.concurrency),
                max_batch_tokens=args.max_batch_tokens,
                max_context_tokens=args.max_context,
            )
        )
        self.worker.start()
        self.collector = Collector()
        self.engine = self.worker.engine
        self._round = 0
        self.worker.tap("tap", self.collector.take)

    def __call__(self, prompts: Prompts, output_tokens: int) -> tuple[int, float]:
        began_s = time.perf_counter()
        self._round += 1
        self.collector.expect(len(prompts))
        params = greedy(output_tokens)
        for i, prompt in enumerate(prompts):
            submit = Submit(request_id=f"{self._round}/{i}", prompt_token_ids=prompt, params=params)
            self.engine.submit("tap", submit)
        self.collector.wait()
        return self.collector.tokens, time.perf_counter() - began_s

    def close(self) -> None:
        self.worker.stop()
        stop_manager(self.runtime_dir, "device-0")


def throughput(systems: dict[str, Any], args: argparse.Namespace, vocab_size: int) -> list[dict[str, Any]]:
    rates: dict[str, list[float]] = {name: [] for name in systems}
    seed = 0
    for repeat in range(args.repeats + 1):
        for name, generate in systems.items():
            seed += 1
            prompts = random_prompts(args.concurrency, args.input, vocab_size, seed)
            tokens, whole_s = generate(prompts, args.output)
            expected = args.concurrency * args.output
            assert tokens == expected, f"{name}: found {tokens} tokens, expected {expected}"
            if repeat:
                rates[name].append(tokens / whole_s)
            print(
                f"{'warm-up' if repeat == 0 else f'repeat {repeat}'} {name}: {tokens / whole_s:.0f} output tokens/s",
                flush=True,
            )
    return [
        {
            "what": f"{name}, {args.concurrency} at once, {args.input} in, {args.output} out",
            "median": statistics.median(found),
            "min": min(found),
            "max": max(found),
            "unit": "output tokens/s",
        }
        for name, found in rates.items()
    ]


def host_work(engine: FlexpertEngine, vocab_size: int) -> list[dict[str, Any]]:
    """Host seconds of decode steps at 64 sequences."""
    seen: list[tuple[float, float]] = []

    def note(plan: StepPlan, times: StepTimes) -> None:
        if len(plan.rows) == plan.num_tokens == 64:
            seen.append((times.host_s, times.step_s))

    engine.engine.on_step = note
    engine(random_prompts(64, 16, vocab_size, seed=7), 64)
    engine.engine.on_step = None
    rows = []
    for what, values in (("host work", [host for host, _ in seen]), ("whole step", [step for _, step in seen])):
        ms = sorted(1e3 * value for value in values)
        row = {"what": f"{what} of a decode step, 64 sequences, {len(ms)} steps"}
        rows.append(row | {"median": statistics.median(ms), "min": ms[0], "max": ms[-1], "unit": "ms"})
    return rows


async def first_byte_direct(address: str, prompts: Prompts) -> list[float]:
    reader, writer = await open_stream(address)
    codec = worker_frames()
    writer.write(codec.encode(Hello(cluster_token=TOKEN, gateway_id="bench")))
    found = []
    for i, prompt in enumerate(prompts):
        began_s = time.perf_counter()
        writer.write(
            codec.encode(Submit(request_id=f"direct/{began_s}/{i}", prompt_token_ids=prompt, params=greedy(2)))
        )
        first_s, open_ = None, True
        while open_:
            frame = await codec.read(reader)
            if isinstance(frame, StepOutput):
                first_s = first_s or time.perf_counter() - began_s
                open_ = not frame.finished
        found.append(first_s)
    writer.close()
    return found


async def first_byte_http(url: str, model_id: str, prompts: Prompts) -> list[float]:
    import httpx

    found = []
    async with httpx.AsyncClient(headers={"authorization": f"Bearer {TOKEN}"}, timeout=60) as client:
        for prompt in prompts:
            body = {
                "model": model_id,
                "prompt": prompt,
                "max_tokens": 2,
                "temperature": 0,
                "stream": True,
                "ignore_eos": True,
            }
            began_s = time.perf_counter()
            async with client.stream("POST", f"{url}/v1/completions", json=body) as response:
                response.raise_for_status()
                first_s = None
                async for _ in response.aiter_raw():
                    first_s = first_s or time.perf_counter() - began_s
            found.append(first_s)
    return found


def gateway_rows(engine: FlexpertEngine, model_dir: Path, vocab_size: int) -> list[dict[str, Any]]:
    """Both ways in turns of 20 requests; the gateway runs in its own process as it does in a cluster."""
    import gateway_process

    with gateway_process.serving(model_dir, engine.worker.address, TOKEN) as url:
        direct: list[float] = []
        http: list[float] = []
        for turn in range(11):
            prompts = random_prompts(40, 64, vocab_size, seed=1000 + turn)
            first = asyncio.run(first_byte_direct(engine.worker.address, prompts[:20]))
            second = asyncio.run(first_byte_http(url, "bench", prompts[20:]))
            if turn:
                direct += first
                http += second
    rows = []
    for what, values in (("first token, worker's stream", direct), ("first byte, HTTP", http)):
        ms = sorted(1e3 * value for value in values)
        rows.append(
            {
                "what": f"{what}, {len(ms)} requests",
                "median": statistics.median(ms),
                "min": ms[0],
                "max": ms[-1],
                "unit": "ms",
            }
        )
    return rows


def goals(rows: list[dict[str, Any]], device: str) -> list[dict[str, Any]]:
    def median(start: str) -> float:
        return next(row["median"] for row in rows if row["what"].startswith(start))

    ours = median("flexpert,")
    found = []
    if device == "cpu":
        found.append(
            saved_run.goal(
                "output tokens/s over generate (one static batch)", ours / median("transformers generate,"), ">= 1.2"
            )
        )
        found.append(
            saved_run.goal("output tokens/s over generate_batch", ours / median("transformers generate_batch"), ">= 4")
        )
    else:
        found.append(
            saved_run.goal("output tokens/s over generate_batch", ours / median("transformers generate_batch"), ">= 3")
        )
    found.append(saved_run.goal("host work per decode step at 64 sequences, ms", median("host work"), "<= 1"))
    if any(row["what"].startswith("first byte") for row in rows):
        added_ms = median("first byte") - median("first token")
        found.append(saved_run.goal("first byte added by the gateway, p50, ms", added_ms, "<= 5"))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--model", type=Path, help="checkpoint directory; default: the built-in model")
    parser.add_argument("--shape", choices=["olmoe-1b-7b"], help="random weights of this shape instead of a checkpoint")
    parser.add_argument("--layers", type=int, help="with --shape: so many layers only (a rehearsal)")
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--input", type=int, default=64)
    parser.add_argument("--output", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--max-batch-tokens", type=int, default=2048)
    parser.add_argument("--max-context", type=int)
    parser.add_argument("--memory-gib", type=int, default=4)
    parser.add_argument("--no-gateway", action="store_true")
    parser.add_argument("--out", type=Path, default=saved_run.RESULTS)
    args = parser.parse_args()
    run_as_a_worker()
    started = datetime.datetime.now(datetime.UTC)
    model_dir = choose_model(args)
    peers = {name: Peer(name, model_dir, args.device) for name in PEERS}
    engine = FlexpertEngine(model_dir, args)
    try:
        vocab_size = AutoConfig.from_pretrained(model_dir).vocab_size
        rows = throughput({"flexpert": engine, **peers}, args, vocab_size)
        for peer in peers.values():
            peer.close()
        rows += host_work(engine, vocab_size)
        if not args.no_gateway:
            rows += gateway_rows(engine, model_dir, vocab_size)
    finally:
        engine.close()
    reached = goals(rows, args.device)
    saved_run.print_table(rows)
    saved_run.print_table(reached)
    name = "serve" if args.shape is None else f"serve-{args.shape}"
    print("saved", saved_run.save(name, device=args.device, rows=rows, goals=reached, started=started, folder=args.out))


def run_as_a_worker() -> None:
    """Start again with the environment that a worker has in a cluster; peers are started without it."""
    wanted = worker_environment(threads=len(os.sched_getaffinity(0)))
    if any(os.environ.get(name) != value for name, value in wanted.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | wanted)


def choose_model(args: argparse.Namespace) -> Path:
    if args.shape:
        import shapes

        return shapes.write_checkpoint(args.shape, Path(tempfile.mkdtemp()), device=args.device, num_layers=args.layers)
    return args.model or Path(__file__).parents[1] / "workers" / "builtin_model"


if __name__ == "__main__":
    main()
