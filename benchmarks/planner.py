"""How long the placement planner takes, and how many bytes its plans move: a table and a saved run.

    python benchmarks/planner.py [--repeat 15] [--out benchmarks/results]

The shape is the largest that is aimed at: 58 layers of 256 experts, up to 64 ranks. A change is planned from a placement that the
planner made and that earlier changes left behind, without and with a measured load (log-normal, sigma 1). "least" is a bound from below on
the slabs that any balanced placement must move: what is lacking where ranks keep what they hold up to their share, counted layer by layer,
or over all layers together, whichever is more. "imbalance" is the load of a layer's busiest rank over the mean; "imbalance_fresh" that
of a placement from nothing.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import random
import statistics
import time
from collections import Counter
from pathlib import Path
from typing import Any

import saved_run

from flexpert.controller.planner import Holders, Plan, groups_held, plan

LAYERS, EXPERTS, RANKS = 58, 256, 64
CHANGES: dict[str, tuple[list[int], list[int]]] = {
    "1 -> 64": ([1], list(range(64))),
    "32 -> 64": ([16, 32], list(range(64))),
    "63 -> 64": ([64, 63], list(range(64))),
    "48 -> 64": ([64, 48], list(range(64))),
    "33 -> 47": ([32, 33], list(range(47))),
    "64 -> 63, a middle rank leaves": ([48, 64], [rank for rank in range(64) if rank != 31]),
    "64 -> 48": ([32, 64], list(range(48))),
    "64 -> 32, every other leaves": ([63, 64], list(range(0, 64, 2))),
    "64 -> 63, one dies, its device too": ([64], [rank for rank in range(64) if rank != 7]),
}


def workers(ranks: list[int]) -> list[tuple[str, int]]:
    return [(f"worker-{rank}", LAYERS * EXPERTS) for rank in ranks]


def least_moves(holders: Holders, before: list[int], after: list[int]) -> int:
    """No placement with equal counts (to within one) in each layer and over all moves fewer."""
    table = []
    for layer in holders:
        counted = Counter(ranks[0] for ranks in layer)
        table.append([counted[before.index(rank)] if rank in before else 0 for rank in after])
    by_layer = sum(lacking(EXPERTS, have) for have in table)
    return max(by_layer, lacking(LAYERS * EXPERTS, [sum(column) for column in zip(*table, strict=True)]))


def lacking(slabs: int, have: list[int]) -> int:
    """slabs minus what can stay, when slabs % ranks of the ranks may hold one more than the others."""
    low, more = divmod(slabs, len(have))
    shares = [low] * (len(have) - more) + [low + 1] * more
    return slabs - sum(min(a, b) for a, b in zip(sorted(have), shares, strict=True))


def imbalance(found: Plan, load: list[list[float]] | None) -> float:
    """Mean over the layers of the busiest rank's load over the mean rank's; 1 is even."""
    ratios = []
    for number, layer in enumerate(found.holders):
        carried = [0.0] * len(found.members)
        for expert, ranks in enumerate(layer):
            for rank in ranks:
                carried[rank] += (load[number][expert] if load else 1.0) / len(ranks)
        ratios.append(max(carried) / statistics.fmean(carried))
    return statistics.fmean(ratios)


def measure(name: str, *, measured: bool, repeat: int) -> dict[str, Any]:
    history, after = CHANGES[name]
    rng = random.Random(0)
    load = [[rng.lognormvariate(0, 1) for _ in range(EXPERTS)] for _ in range(LAYERS)] if measured else None
    shape: dict[str, Any] = {"layers": LAYERS, "experts": EXPERTS, "load": load}
    found = plan(members=workers(list(range(history[0]))), held={}, **shape)
    for count in history[1:]:
        held = groups_held(found.holders, found.members)
        found = plan(members=workers(list(range(count))), held=held, **shape)
    lost = "worker-7" if "dies" in name else ""
    times_ms = []
    for _ in range(repeat):
        gc.collect()
        start = time.perf_counter()
        held = {
            worker: groups for worker, groups in groups_held(found.holders, found.members).items() if worker != lost
        }
        result = plan(members=workers(after), held=held, **shape)
        times_ms.append((time.perf_counter() - start) * 1e3)
    asked: dict[str, int] = {}
    for sources in result.fetches.values():
        for source, groups in sources.items():
            if source is not None:
                asked[source] = asked.get(source, 0) + len(groups)
    least = least_moves(found.holders, list(range(history[-1])), after)
    return {
        "change": name,
        "load": "measured" if measured else "none",
        "median_ms": round(statistics.median(times_ms), 2),
        "worst_ms": round(max(times_ms), 2),
        "moved": result.moved_groups,
        "least": least,
        "ratio": round(result.moved_groups / least, 4),
        "busiest_source": round(max(asked.values()) / statistics.fmean(asked.values()), 3) if asked else 0.0,
        "imbalance": round(imbalance(result, load), 3),
        "imbalance_fresh": round(imbalance(plan(members=workers(after), held={}, **shape), load), 3),
    }


def measure_random(changes: int) -> dict[str, Any]:
    """Up to 12 of 64 ranks leave and join at each change: the hardest for the odd groups of a layer, of which a rank has one or none."""
    rng = random.Random(0)
    shape: dict[str, Any] = {"layers": LAYERS, "experts": EXPERTS}
    now = sorted(rng.sample(range(RANKS), 48))
    found = plan(members=workers(now), held={}, **shape)
    times_ms, moved, least = [], 0, 0
    for _ in range(changes):
        after = sorted(set(now) ^ set(rng.sample(range(RANKS), rng.randint(1, 12))))
        gc.collect()
        start = time.perf_counter()
        result = plan(members=workers(after), held=groups_held(found.holders, found.members), **shape)
        times_ms.append((time.perf_counter() - start) * 1e3)
        moved += result.moved_groups
        least += least_moves(found.holders, now, after)
        found, now = result, after
    return {
        "change": f"{changes} random changes",
        "load": "none",
        "median_ms": round(statistics.median(times_ms), 2),
        "worst_ms": round(max(times_ms), 2),
        "moved": moved,
        "least": least,
        "ratio": round(moved / least, 4),
        "busiest_source": 0.0,
        "imbalance": 0.0,
        "imbalance_fresh": 0.0,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeat", type=int, default=15)
    parser.add_argument("--out", type=Path, default=saved_run.RESULTS)
    options = parser.parse_args()
    started = datetime.datetime.now(datetime.UTC)
    rows = [measure(name, measured=measured, repeat=options.repeat) for measured in (False, True) for name in CHANGES]
    rows.append(measure_random(100))
    saved_run.print_table(rows)
    goals = [
        saved_run.goal("plan, ms, median of the slowest change", max(row["median_ms"] for row in rows), "<= 20"),
        saved_run.goal("moved over the least, worst change", max(row["ratio"] for row in rows), "<= 1.05"),
        saved_run.goal(
            "busiest source over the mean, worst change", max(row["busiest_source"] for row in rows), "<= 1.2"
        ),
    ]
    saved_run.print_table(goals)
    print("saved", saved_run.save("planner", device="cpu", rows=rows, goals=goals, started=started, folder=options.out))


if __name__ == "__main__":
    main()
