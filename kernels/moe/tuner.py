"""Finds the best plan of a shape at each token count, on the GPU at hand, and writes the table that `choose_plan` reads.

The candidates are few, chosen by the number of rows an expert gets, and compiled beforehand by many processes at once. Both products are
timed apart, in captured graphs over rotated weights; then the best schedule-free pair against the best grouped ones, as whole layers.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flexpert.kernels.moe.layer import Activation, ExpertWeights, Stored, _gemv, down_product, moe_forward, up_product
from flexpert.kernels.moe.plan import GemvTile, LayerShape, Plan, Tile, heuristic
from flexpert.kernels.moe.routing import BLOCK_SIZES, route
from flexpert.kernels.moe.timing import graph_time, routing

log = logging.getLogger(__name__)

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
SETS = 4
GIVE_UP = 1.3  # a candidate so much slower than the best in a first look is not looked at again
SHARED_MEMORY_BYTES = 227 * 1024
GEMV_TOKENS = 16


@dataclass(frozen=True)
class Candidates:
    """Tiles worth a try for one product; `halves`: its columns are gate and up, so a tile has twice the weights."""

    halves: bool

    def of(self, rows: int) -> list[Tile]:
        """Those of one height."""
        found = self._streaming(rows) if rows <= 64 else []
        if rows >= 64:
            found += self._dense(rows)
        return [tile for tile in found if self._bytes(tile) <= SHARED_MEMORY_BYTES]

    def _streaming(self, rows: int) -> list[Tile]:
        scale = 1 if self.halves else 2
        found = []
        for swap, tma in itertools.product((False, True), (False, True)):
            for columns, depth, stages in ((32, 128, 4), (32, 256, 3), (64, 64, 4), (64, 128, 3), (64, 128, 4)):
                if not swap or columns * scale >= 64:
                    found.append(Tile(rows, columns * scale, depth, 4, stages, 1, swap, tma))
            found.append(Tile(rows, 128 * scale, 64, 8, 4, 1, swap, tma))
        return found

    def _dense(self, rows: int) -> list[Tile]:
        wide = 128 if self.halves else 256
        sizes = [(wide, 64, 8, 3), (wide, 64, 8, 4), (wide // 2, 64, 8, 3), (wide // 2, 64, 4, 3)]
        if rows == 64:
            sizes = [(wide, 64, 8, 4), (wide // 2, 64, 4, 4), (wide, 64, 4, 3)]
        packings = (False,) if self.halves else (False, True)
        found = []
        for (columns, depth, warps, stages), packed, tail in itertools.product(sizes, packings, (False, True)):
            found.append(Tile(rows, columns, depth, warps, stages, 8, tma=True, packed=packed, tail=tail))
        best = Tile(rows, wide, 64, 8, 4, 8, tma=True, packed=not self.halves, tail=True)
        found += [
            replace(best, group=4),
            replace(best, group=16),
            replace(best, group=32),
            replace(best, tail=False, group=16),
        ]
        found += [replace(best, programs=1), replace(best, tma=False, packed=False)]
        return list(dict.fromkeys(found))

    def _bytes(self, tile: Tile) -> int:
        return (tile.rows + tile.columns * (2 if self.halves else 1)) * tile.depth * 2 * tile.stages


UP, DOWN = Candidates(halves=True), Candidates(halves=False)
GEMV_SIZES = (
    (4, 512, 4),
    (8, 512, 4),
    (4, 1024, 4),
    (4, 1024, 8),
    (2, 512, 2),
    (2, 1024, 2),
    (2, 1024, 4),
    (1, 1024, 2),
    (1, 1024, 4),
)
GEMV = [GemvTile(c, d, w) for c, d, w in GEMV_SIZES]


def heights(rows: float) -> tuple[int, ...]:
    """Block heights worth a try where an expert gets so many rows on average."""
    return tuple(
        size for size in BLOCK_SIZES if size / 2.5 <= max(rows, 8) <= size * 6 or (size == 128 and rows > 64)
    ) or (16,)


def random_weights(
    shape: LayerShape, *, sets: int, device: str = "cuda", resident: int | None = None
) -> list[ExpertWeights]:
    """Layers of random experts one after the other in an arena; only the first `resident` experts of each have a slot."""
    slab = 3 * shape.hidden * shape.inner
    count = shape.num_experts if resident is None else resident
    arena = torch.empty(sets * count * slab, dtype=getattr(torch, shape.dtype), device=device)
    for piece in arena.split(1 << 28):
        piece.normal_(0, shape.hidden**-0.5)
    biased = shape.interleaved
    found = []
    for number in range(sets):
        table = torch.full((shape.num_experts,), -1, dtype=torch.int32, device=device)
        table[:count] = torch.arange(count, device=device) + number * count
        bias = [
            torch.zeros(shape.num_experts, n, dtype=arena.dtype, device=device) for n in (2 * shape.inner, shape.hidden)
        ]
        found.append(
            ExpertWeights(
                Stored(arena, slab), Stored(arena, slab, 2 * shape.hidden * shape.inner), table, shape.hidden, shape.inner,
                Activation("clamped" if biased else "silu"), shape.transposed, shape.interleaved, *(bias if biased else ()),
            )
        )  # fmt: skip
    return found


def compile_all(shape: LayerShape, processes: int | None = None) -> None:
    """Compile every candidate of a shape, by many processes; the compiler's cache on disk keeps them."""
    jobs: list[tuple[str, Any]] = [("gemv", tile) for tile in GEMV]
    for name, candidates in (("up", UP), ("down", DOWN)):
        jobs += [(name, tile) for rows in BLOCK_SIZES for tile in candidates.of(rows)]
    processes = processes or max(1, min(len(jobs), (os.cpu_count() or 2) - 1))
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        list(pool.map(_compile, [shape] * processes, [jobs[i::processes] for i in range(processes)]))


def _compile(shape: LayerShape, jobs: list[tuple[str, Any]]) -> None:
    experts = random_weights(shape, sets=1, resident=1)[0]
    hidden = torch.zeros(1, shape.hidden, dtype=experts.dtype, device="cuda")
    ids, weights = routing(1, shape.num_experts, shape.top_k, skew=0, seed=0, device="cuda")
    schedule = route(ids, experts.expert_slot)
    inner = hidden.new_zeros(shape.top_k, shape.inner)
    for name, tile in jobs:
        try:
            if name == "gemv":
                _gemv(hidden, ids, weights, experts, Plan("gemv", tile, tile), torch.empty_like(hidden))
            elif name == "up":
                up_product(hidden, shape.top_k, experts, schedule, tile)
            else:
                down_product(inner, experts, schedule, tile)
        except Exception as error:  # a tile that this compiler or device does not take is no candidate
            log.warning("%s %s: %s", name, tile, (str(error).splitlines() or [""])[0])
    torch.cuda.synchronize()


@dataclass
class Tuner:
    """Times candidates of one shape."""

    shape: LayerShape
    experts: list[ExpertWeights]

    def plan(self, tokens: int) -> tuple[Plan, float]:
        """The best plan found, and the seconds of a whole layer."""
        shape = self.shape
        inputs = [self._inputs(tokens, seed) for seed in range(len(self.experts))]
        schedules = [route(ids, layer.expert_slot) for (_, ids, _), layer in zip(inputs, self.experts, strict=True)]
        inner = [torch.randn(tokens * shape.top_k, shape.inner, device="cuda").to(x.dtype) for x, _, _ in inputs]
        rows = heights(tokens * shape.top_k / shape.num_experts)

        def up(tile: Tile) -> list[Any]:
            return [
                lambda i=i: up_product(inputs[i][0], shape.top_k, self.experts[i], schedules[i], tile)
                for i in range(len(inputs))
            ]

        def down(tile: Tile) -> list[Any]:
            return [lambda i=i: down_product(inner[i], self.experts[i], schedules[i], tile) for i in range(len(inputs))]

        best_up = self._best([tile for r in rows for tile in UP.of(r)], up)
        best_down = self._best([tile for r in rows for tile in DOWN.of(r)], down)
        plans = [Plan("grouped", best_up, best_down)]
        if tokens <= GEMV_TOKENS:
            plans += self._gemv_plans(inputs)
        layer = [(self._time(plan, inputs), plan) for plan in plans]
        seconds, plan = min(layer, key=lambda found: found[0])
        return plan, seconds

    def _inputs(self, tokens: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        ids, weights = routing(tokens, self.shape.num_experts, self.shape.top_k, skew=0, seed=seed, device="cuda")
        return torch.randn(tokens, self.shape.hidden, device="cuda").to(self.experts[0].dtype), ids, weights

    def _gemv_plans(self, inputs: Sequence[tuple[Tensor, Tensor, Tensor]]) -> list[Plan]:
        """The best of both products, found one after the other: the first with a fixed second."""
        base = heuristic(1, self.shape).down
        first = min(GEMV, key=lambda tile: self._time(Plan("gemv", tile, base), inputs))
        second = min(GEMV, key=lambda tile: self._time(Plan("gemv", first, tile), inputs))
        return [Plan("gemv", first, second)]

    def _time(self, plan: Plan, inputs: Sequence[tuple[Tensor, Tensor, Tensor]]) -> float:
        calls = [
            partial(moe_forward, *given, experts, plan) for given, experts in zip(inputs, self.experts, strict=True)
        ]
        return graph_time(calls, replays=5).median

    def _best(self, tiles: Iterable[Tile], calls: Any) -> Tile:
        looks = []
        for tile in tiles:
            try:
                looks.append((graph_time(calls(tile), replays=2).median, tile))
            except Exception:  # said when it was compiled
                torch.cuda.synchronize()
        fastest = min(seconds for seconds, _ in looks)
        kept = [tile for seconds, tile in sorted(looks, key=lambda look: look[0]) if seconds <= fastest * GIVE_UP][:8]
        return min(kept, key=lambda tile: graph_time(calls(tile), replays=8).median)


def tune(
    shape: LayerShape, tokens: Iterable[int] = TOKENS, *, resident: int | None = None, say: Any = print
) -> list[dict[str, Any]]:
    """The shape's entries of a table, found with the first `resident` experts at hand."""
    compile_all(shape)
    tuner = Tuner(shape, random_weights(shape, sets=SETS, resident=resident))
    entries = []
    for count in tokens:
        plan, seconds = tuner.plan(count)
        entries.append({"tokens": count, "plan": plan.to_json(), "seconds": round(seconds, 9)})
        say(f"{shape.key}: {count} tokens {seconds * 1e6:.1f} us {plan}")
    return entries


def write_table(path: Path, shapes: dict[str, list[dict[str, Any]]], versions: dict[str, str]) -> None:
    """Add or replace shapes of a table."""
    known = json.loads(path.read_text())["shapes"] if path.exists() else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"versions": versions, "shapes": {**known, **shapes}}, indent=1) + "\n")
