"""Finds the best plan of a shape at each token count, on the GPU at hand, and writes the table that `choose_plan` reads.

The candidates are few, chosen by the number of rows an expert gets, and compiled beforehand by many processes at once. Both products are
timed apart, in captured graphs over rotated weights; then the best schedule-free pair against the best grouped ones, as whole layers.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flexpert.kernels.moe.candidates import GEMV, GEMV_FP8, Candidates, heights
from flexpert.kernels.moe.layer import Rows, _gemv, down_product, forward_reference, moe_forward, quantize, up_product
from flexpert.kernels.moe.plan import GemvTile, LayerShape, Plan, Tile, read_table
from flexpert.kernels.moe.routing import route
from flexpert.kernels.moe.timing import graph_time, routing
from flexpert.kernels.moe.weights import SCALE_BLOCK, Activation, ExpertWeights, Stored

log = logging.getLogger(__name__)

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
SETS = 4
GIVE_UP = 1.3  # a candidate so much slower than the best in a first look is not looked at again
GEMV_TOKENS = 16
GEMV_BASE = GemvTile(8, 256, 4)  # of the second product while the first is sought
MOST_PROCESSES = 16  # each holds a CUDA context
CHECKED_TOKENS = 1024  # a layer's plan is compared with the reference on no more
TOLERANCE = {False: 0.02, True: 0.05}  # of the norm; rows as they come, rows in fp8


def random_weights(
    shape: LayerShape, *, sets: int, device: str = "cuda", resident: int | None = None
) -> list[ExpertWeights]:
    """Layers of random experts one after the other in an arena; only the first `resident` experts of each have a slot."""
    slab = 3 * shape.hidden * shape.inner
    count = shape.num_experts if resident is None else resident
    arena = torch.empty(sets * count * slab, dtype=getattr(torch, shape.dtype), device=device)
    for piece in arena.split(1 << 28):
        noise = torch.randn(piece.shape, dtype=torch.bfloat16, device=device)
        piece.copy_(noise if shape.scaled else noise * shape.hidden**-0.5)
    blocks = slab // SCALE_BLOCK**2
    scales = torch.full((sets * count * blocks,), shape.hidden**-0.5, device=device) if shape.scaled else None
    biased = shape.interleaved
    found = []
    for number in range(sets):
        table = torch.full((shape.num_experts,), -1, dtype=torch.int32, device=device)
        table[:count] = torch.arange(count, device=device) + number * count
        columns = (2 * shape.inner, shape.hidden)
        biases = [torch.zeros(shape.num_experts, n, dtype=arena.dtype, device=device) for n in columns]
        layer = ExpertWeights(
            Stored(arena, slab), Stored(arena, slab, slab // 3 * 2), table, shape.hidden, shape.inner, transposed=shape.transposed,
            activation=Activation("clamped" if biased else "silu"), interleaved=shape.interleaved, quantize_rows=shape.quantize_rows,
            up_bias=biases[0] if biased else None, down_bias=biases[1] if biased else None,
            up_scale=None if scales is None else Stored(scales, blocks),
            down_scale=None if scales is None else Stored(scales, blocks, blocks // 3 * 2),
        )  # fmt: skip
        found.append(layer)
    return found


def products_of(shape: LayerShape) -> list[tuple[bool, Candidates, Candidates]]:
    """(rows are quantised, candidates of the first product, of the second)."""
    ways = (False, True) if shape.quantize_rows else (False,)
    return [(way, *(Candidates(halves, shape.scaled, way) for halves in (True, False))) for way in ways]  # type: ignore[misc]


def compile_all(shape: LayerShape, processes: int | None = None) -> None:
    """Compile every candidate of a shape, by many processes; the compiler's cache on disk keeps them."""
    jobs: list[tuple[str, bool, Any]] = [("gemv", False, tile) for tile in _gemv_tiles(shape)]
    for quantized, up, down in products_of(shape):
        for name, candidates in (("up", up), ("down", down)):
            jobs += [(name, quantized, tile) for rows in candidates.heights for tile in candidates.of(rows)]
    processes = processes or max(1, min(len(jobs), (os.cpu_count() or 2) - 1, MOST_PROCESSES))
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        list(pool.map(_compile, [shape] * processes, [jobs[i::processes] for i in range(processes)]))


def _gemv_tiles(shape: LayerShape) -> list[GemvTile]:
    return GEMV_FP8 if shape.scaled else GEMV


def _compile(shape: LayerShape, jobs: list[tuple[str, bool, Any]]) -> None:
    experts = random_weights(shape, sets=1, resident=1)[0]
    hidden = torch.zeros(1, shape.hidden, dtype=torch.bfloat16, device="cuda")
    ids, weights = routing(1, shape.num_experts, shape.top_k, skew=0, seed=0, device="cuda")
    schedule = route(ids, experts.expert_slot)
    inner = hidden.new_zeros(shape.top_k, shape.inner)
    for name, quantized, tile in jobs:
        try:
            if name == "gemv":
                _gemv(hidden, ids, weights, experts, Plan("gemv", tile, tile), torch.empty_like(hidden))
            elif name == "up":
                up_product(_rows(hidden, quantized), shape.top_k, experts, schedule, tile)
            else:
                down_product(_rows(inner, quantized), experts, schedule, tile, hidden.dtype)
        except Exception as error:  # a tile that this compiler or device does not take is no candidate
            log.warning("%s %s: %s", name, tile, (str(error).splitlines() or [""])[0])
    torch.cuda.synchronize()


def _rows(values: Tensor, quantized: bool) -> Rows:
    return quantize(values) if quantized else Rows(values)


@dataclass
class Tuner:
    """Times candidates of one shape."""

    shape: LayerShape
    experts: list[ExpertWeights]

    def plan(self, tokens: int) -> tuple[Plan, float]:
        """The best plan found, and the seconds of a whole layer."""
        inputs = [self._inputs(tokens, seed) for seed in range(len(self.experts))]
        plans = [self._grouped_plan(inputs, *products) for products in products_of(self.shape)]
        if tokens <= GEMV_TOKENS:
            plans += self._gemv_plans(inputs)
        layer = [(self._time(plan, inputs), plan) for plan in plans if self._is_right(plan, inputs[0])]
        if not layer:
            raise RuntimeError(f"{self.shape.key}, {tokens} tokens: no plan gave the reference's output on this device")
        seconds, plan = min(layer, key=lambda found: found[0])
        return plan, seconds

    def _is_right(self, plan: Plan, given: tuple[Tensor, Tensor, Tensor]) -> bool:
        """Whether the layer comes out as its reference; said where not: a tile may be miscompiled and fast."""
        hidden, ids, weights = (tensor[:CHECKED_TOKENS] for tensor in given)
        if not bool((self.experts[0].expert_slot[ids] >= 0).any()):
            return True
        expected = forward_reference(hidden, ids, weights, self.experts[0], plan.quantize)
        far = float(
            (moe_forward(hidden, ids, weights, self.experts[0], plan).float() - expected).norm() / expected.norm()
        )
        if not far <= TOLERANCE[plan.quantize]:
            log.warning("%s: off by %.3f of the reference's norm; left out", plan, far)
        return far <= TOLERANCE[plan.quantize]

    def _grouped_plan(
        self, inputs: Sequence[tuple[Tensor, Tensor, Tensor]], quantized: bool, first: Candidates, second: Candidates
    ) -> Plan:
        """The best tile of each product."""
        shape, experts, sets = self.shape, self.experts, range(len(inputs))
        schedules = [route(ids, layer.expert_slot) for (_, ids, _), layer in zip(inputs, experts, strict=True)]
        pairs = len(inputs[0][0]) * shape.top_k
        rows = [_rows(hidden, quantized) for hidden, _, _ in inputs]
        inner = [_rows(torch.randn(pairs, shape.inner, device="cuda").bfloat16(), quantized) for _ in inputs]

        def up(tile: Tile) -> list[Any]:
            return [lambda i=i: up_product(rows[i], shape.top_k, experts[i], schedules[i], tile) for i in sets]

        def down(tile: Tile) -> list[Any]:
            return [lambda i=i: down_product(inner[i], experts[i], schedules[i], tile, torch.bfloat16) for i in sets]

        sizes = heights(pairs / shape.num_experts)
        best = []
        for candidates, calls in ((first, up), (second, down)):
            usable = [size for size in sizes if size in candidates.heights] or candidates.heights[:1]
            best.append(self._best([tile for size in usable for tile in candidates.of(size)], calls))
        return Plan("grouped", best[0], best[1], quantized)

    def _inputs(self, tokens: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        ids, weights = routing(tokens, self.shape.num_experts, self.shape.top_k, skew=0, seed=seed, device="cuda")
        return torch.randn(tokens, self.shape.hidden, device="cuda").bfloat16(), ids, weights

    def _gemv_plans(self, inputs: Sequence[tuple[Tensor, Tensor, Tensor]]) -> list[Plan]:
        """The best of both products, found one after the other: the first with a fixed second."""
        tiles = _gemv_tiles(self.shape)
        first = min(tiles, key=lambda tile: self._tried(Plan("gemv", tile, GEMV_BASE), inputs))
        second = min(tiles, key=lambda tile: self._tried(Plan("gemv", first, tile), inputs))
        plan = Plan("gemv", first, second)
        return [plan] if self._tried(plan, inputs) < math.inf else []

    def _tried(self, plan: Plan, inputs: Sequence[tuple[Tensor, Tensor, Tensor]]) -> float:
        """Seconds; infinitely many where it does not run, which was said when it was compiled."""
        try:
            return self._time(plan, inputs)
        except Exception:
            torch.cuda.synchronize()
            return math.inf

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
        if not looks:
            raise RuntimeError(f"{self.shape.key}: no tile of a product runs on this device; the log says why")
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
    """Add shapes to a table, or replace their entries of the same token counts. Raises ValueError where the file is no table."""
    read_table(path)
    known = json.loads(path.read_text())["shapes"] if path.exists() else {}
    for key, entries in shapes.items():
        merged = {entry["tokens"]: entry for entry in [*known.get(key, []), *entries]}
        known[key] = [merged[tokens] for tokens in sorted(merged)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"versions": versions, "shapes": known}, indent=1) + "\n")
