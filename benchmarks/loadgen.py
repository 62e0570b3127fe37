"""How many streaming requests one process of the load generator drives on one core, and how late it is: a table and a saved run.

    python benchmarks/loadgen.py [--rates 500,1000,2000,3000,6000] [--seconds 10] [--realtime] [--out benchmarks/results]

The stub server runs in a process of its own on another core, the generator pinned to one. Every answer is 16 tokens, each a
chunk of its own, the first after 5 ms, the others 5 ms apart: at 2,000 requests a second that is 32,000 chunks a second. Arrivals
are Poisson, so many come at once. "lag" is the generator's own: actual less intended send time. "ttft_over" is what it
measures beyond the stub's 5 ms, "core" how much of its core it used. A generator that cannot keep up must say "degraded": that
is a goal as well. Needs two cores that nothing else uses; --realtime (as root) runs both with real-time priority instead, before
whatever else the machine does.
"""

from __future__ import annotations

import argparse
import datetime
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import saved_run
import uvloop

from flexpert.loadtest.conduct import LoadTest, conduct
from flexpert.loadtest.lengths import Mix, parse_lengths
from flexpert.loadtest.measure import RunResult
from flexpert.loadtest.shapes import arrivals
from flexpert.loadtest.spec import parse_shape
from flexpert.loadtest.target import parse_url

PROMPT_TOKENS, OUTPUT_TOKENS, TTFT_MS, TPOT_MS = 128, 16, 5, 5
GOAL_LAG_MS = 10


def drive(url: str, *, rate: int, seconds: float) -> tuple[RunResult, float]:
    """(result, share of a core that this process used)."""
    shape = parse_shape(f"poisson rate={rate} duration={seconds}")
    mix = Mix(parse_lengths(str(PROMPT_TOKENS), option=""), parse_lengths(str(OUTPUT_TOKENS), option=""))
    test = LoadTest(
        target=parse_url(url),
        words=f"poisson {rate}/s",
        duration_s=seconds,
        schedule=lambda: arrivals(shape, seed=0, mix=mix),
    )
    began_s, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
    result = uvloop.run(conduct(test))
    after = resource.getrusage(resource.RUSAGE_SELF)
    used_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return result, used_s / (time.perf_counter() - began_s)


def row(result: RunResult, share: float, rate: int) -> dict[str, Any]:
    whole, lag = result.whole, result.lag.quantiles_s
    return {
        "rate_per_s": rate,
        "sent": whole.sent,
        "ok_per_s": round(whole.ends["ok"] / result.ended_s, 1),
        "not_ok": whole.sent - whole.ends["ok"],
        "chunks_per_s": round(whole.ends["ok"] * OUTPUT_TOKENS / result.ended_s),
        "lag_p50_ms": ms(lag.p50),
        "lag_p99_ms": ms(lag.p99),
        "lag_max_ms": ms(lag.max),
        "ttft_over_p50_ms": ms(whole.ttft_s.p50, TTFT_MS),
        "ttft_over_p99_ms": ms(whole.ttft_s.p99, TTFT_MS),
        "core": round(share, 2),
        "verdict": "degraded" if result.lag.degraded else "kept up",
    }


def ms(value: float | None, less: float = 0.0) -> float:
    return float("nan") if value is None else round(value * 1e3 - less, 2)


def stub_on(core: int) -> subprocess.Popen[str]:
    """The stub on a core of its own, with the priority of this process. Its first line is its URL."""
    return subprocess.Popen(
        [sys.executable, "-m", "flexpert.loadtest.stub", "--ttft-ms", str(TTFT_MS), "--tpot-ms", str(TPOT_MS)],
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: os.sched_setaffinity(0, {core}),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rates", default="500,1000,2000,3000,6000")
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--realtime", action="store_true")
    parser.add_argument("--out", type=Path, default=saved_run.RESULTS)
    options = parser.parse_args()
    started = datetime.datetime.now(datetime.UTC)
    cores = sorted(os.sched_getaffinity(0))
    if options.realtime:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(10))
    stub = stub_on(cores[-1])
    os.sched_setaffinity(0, {cores[0]})
    try:
        assert stub.stdout is not None
        url = stub.stdout.readline().strip()
        rates = [int(rate) for rate in options.rates.split(",")]
        rows = [row(*drive(url, rate=rate, seconds=options.seconds), rate) for rate in rates]
    finally:
        stub.terminate()
        stub.wait(10)
        os.sched_setaffinity(0, set(cores))
    saved_run.print_table(rows)
    kept = [each for each in rows if each["verdict"] == "kept up" and not each["not_ok"]]
    honest = all((each["lag_p99_ms"] <= GOAL_LAG_MS) == (each["verdict"] == "kept up") for each in rows)
    best = max([0, *(each["rate_per_s"] for each in kept)])
    goals = [
        saved_run.goal("streaming requests/s with p99 lag <= 10 ms on one core", best, ">= 2000"),
        saved_run.goal("rates at which a late generator said degraded, or was not late", float(honest), ">= 1"),
    ]
    saved_run.print_table(goals)
    print("saved", saved_run.save("loadgen", device="cpu", rows=rows, goals=goals, started=started, folder=options.out))


if __name__ == "__main__":
    main()
