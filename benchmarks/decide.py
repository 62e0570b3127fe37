"""How long one decision takes, by workers: all signals on, windows full, in the three courses that cost most.

python benchmarks/decide.py
"""

from __future__ import annotations

import argparse
import datetime
import gc
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import saved_run

from flexpert.controller.policy.decide import decide
from flexpert.controller.policy.types import (
    Measured,
    Observation,
    PolicyConfig,
    Reading,
    SignalConfig,
    SloConfig,
    State,
    TrafficReading,
    WorkerReading,
    WorkersConfig,
)

SIGNALS = (
    SignalConfig(type="slo", name="slo"),
    SignalConfig(type="kv_utilization", name="kv_utilization", target=0.8),
    SignalConfig(type="queue_time", name="queue_time", target=1.0),
    SignalConfig(type="tokens_per_second", name="tokens_per_second", prefill=8000.0, decode=800.0),
    SignalConfig(type="prometheus", name="depth", target=10.0),
    SignalConfig(type="schedule", name="office"),
    SignalConfig(type="forecast", name="day"),
)
COURSES = {"steady": 0.9, "grows": 1.3, "shrinks": 0.05}  # share of all loads
WARM_S = 900.0  # longer than every window, so that they are full


def seen(now_s: float, count: int, share: float) -> Observation:
    """`count` workers of which one is silent, at a share of what they can do, with a little unrest so that windows keep many steps."""
    share *= 1.0 + 0.01 * ((now_s * 7919.0) % 1.0)
    workers = tuple(
        WorkerReading(
            worker_id=f"worker-{index}",
            age_s=0.5 if index or count == 1 else None,
            running=int(30 * share),
            kv_used_tokens=int(100_000 * 0.8 * share),
            kv_capacity_tokens=100_000,
            prefill_tokens_per_s=8000.0 * share,
            decode_tokens_per_s=800.0 * share,
            longest_context_tokens=4000,
            max_running=256,
        )
        for index in range(count)
    )
    traffic = TrafficReading(
        age_s=0.5,
        requests_per_s=count * share,
        prompt_tokens_per_s=8000.0 * share * count,
        output_tokens_per_s=800.0 * share * count,
        live=int(30 * share * count),
        queue_s=0.01,
        ttft_s=0.1,
        tpot_s=0.01,
        met=1000,
        since_s=now_s - 60.0,
    )
    readings = {
        "depth": Reading(value=9.0 * count * share, age_s=1.0),
        "office": Reading(age_s=1.0, low=1),
        "day": Reading(value=0.0, age_s=1.0),
    }
    join = Measured(mean_s=20.0, p95_s=30.0, count=9)
    return Observation(now_s=now_s, workers=workers, traffic=traffic, readings=readings, join_s=join, devices=2 * count)


def policy(count: int) -> PolicyConfig:
    """Advisory: every tick is decided anew, none waits for an order."""
    return PolicyConfig(
        workers=WorkersConfig(min=1, max=2 * count),
        slo=SloConfig(ttft_s=0.5, tpot_s=0.05),
        signals=SIGNALS,
        mode="Advisory",
    )


def measure(count: int, course: str, repeat: int) -> dict[str, Any]:
    config, state, now_s = policy(count), State(), 1e9
    few = replace(config, workers=WorkersConfig(min=1, max=20))
    while now_s < 1e9 + WARM_S:
        _, state = decide(seen(now_s, 10, COURSES[course]), state, few)
        now_s += config.interval_s
    scale = count / 10.0
    steps = {
        name: tuple(replace(step, value=step.value * scale) for step in getattr(state, name))
        for name in ("peaks", "dips", "loads", "trend")
    }
    state = replace(state, **steps)
    observations = [seen(now_s + tick * config.interval_s, count, COURSES[course]) for tick in range(repeat)]
    times_ms = []
    reason = ""
    gc.collect()
    for observation in observations:
        start = time.perf_counter()
        decision, state = decide(observation, state, config)
        times_ms.append((time.perf_counter() - start) * 1e3)
        reason = decision.reason.value
    ordered = sorted(times_ms)
    return {
        "workers": count,
        "course": course,
        "reason": reason,
        "median_ms": round(statistics.median(ordered), 4),
        "p99_ms": round(ordered[int(0.99 * (len(ordered) - 1))], 4),
        "worst_ms": round(ordered[-1], 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeat", type=int, default=200)
    parser.add_argument("--out", type=Path, default=saved_run.RESULTS)
    options = parser.parse_args()
    started = datetime.datetime.now(datetime.UTC)
    rows = [measure(count, course, options.repeat) for count in (1, 10, 100, 1000) for course in COURSES]
    saved_run.print_table(rows)
    thousand = [row for row in rows if row["workers"] == 1000]
    goals = [
        saved_run.goal(
            "decide with 1,000 workers, ms, median of the slowest course",
            max(row["median_ms"] for row in thousand),
            "<= 1",
        ),
    ]
    saved_run.print_table(goals)
    print("saved", saved_run.save("decide", device="cpu", rows=rows, goals=goals, started=started, folder=options.out))


if __name__ == "__main__":
    main()
