"""One MoE layer on a GPU, from top-k ids to reduced output: flexpert's kernels beside every peer, in one process and one run.

    python benchmarks/moe_layer.py                         # five shapes, 1 to 16384 tokens, uniform and Zipf routing
    python benchmarks/moe_layer.py --shapes Qwen3-30B-A3B --tokens 1,64,4096

Times are of calls in a captured graph that is replayed (transformers' eager loop cannot be captured: launched as it is), over four
sets of weights and routings in turn, so that the L2 cache flatters no one; median, p10 and p90. The floor of a cell is
max(flops / dense rate, bytes / copy rate), both rates measured at the start: 8192^3 and 4096^3 products, a copy of 1 GiB (the faster of
the driver's and a kernel's) counted as read and written. Bytes are those of the experts that the routing hits, of the tokens in and out,
and of one row for each (token, k), written and read. "products" compares only the two products, sorted rows given: with torch's grouped_mm,
which leaves the activation out.
"""

from __future__ import annotations

import argparse
import datetime
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import saved_run
import torch
from moe_peers import PEERS, SHAPES, Shape
from torch import Tensor

from flexpert.kernels.moe import layer
from flexpert.kernels.moe.plan import LayerShape
from flexpert.kernels.moe.routing import route
from flexpert.kernels.moe.timing import Spread, eager_time, graph_time, routing
from flexpert.kernels.moe.tuner import TOKENS, random_weights

SETS = 4
MOST_DIFFERENCE = 0.05  # of the largest value: a peer that computes something else is not timed
SKEWS = {"uniform": 0.0, "zipf": 1.0}
AGAIN = ("vllm", "grouped_mm", "transformers grouped_mm")  # timed with skewed routing too
SMALL = ("Qwen3-30B-A3B", "OLMoE-1B-7B")
LARGE = ("Mixtral-8x7B", "DeepSeek-V3, one rank of 8")
Inputs = list[tuple[Tensor, Tensor, Tensor]]


def rates() -> tuple[float, float]:
    """(bytes/s of a copy, bf16 flop/s of the best square product) of this device."""
    source = torch.zeros(1 << 28, dtype=torch.float32, device="cuda")
    target = torch.empty_like(source)
    ways = (lambda: target.copy_(source), lambda: torch.neg(source, out=target))  # the driver's copy, a kernel's
    copy = min(graph_time([way] * 4, replays=10).median for way in ways)
    dense = 0.0
    for size in (4096, 8192):
        a, b = (torch.randn(size, size, device="cuda").bfloat16() for _ in range(2))
        dense = max(dense, 2 * size**3 / graph_time([lambda a=a, b=b: a @ b] * 4, replays=10).median)
    return 2 * source.nbytes / copy, dense


def inputs_of(shape: Shape, tokens: int, skew: float) -> Inputs:
    """For each set: hidden, ids, weights, with at least one expert that is here."""
    found: Inputs = []
    seed = 0
    while len(found) < SETS:
        ids, weights = routing(tokens, shape.experts, shape.top_k, skew=skew, seed=seed, device="cuda")
        seed += 1
        if skew:  # the popular experts are anywhere, not the first ones
            ids = torch.randperm(shape.experts, generator=torch.Generator().manual_seed(0)).cuda()[ids]
        if bool((ids < shape.resident).any()):
            found.append((torch.randn(tokens, shape.hidden, device="cuda").bfloat16(), ids, weights))
    return found


def floor_of(shape: Shape, inputs: Inputs, copy: float, dense: float) -> dict[str, float]:
    """Mean over the sets: expert bytes, flops, and the least time in seconds."""
    cells = []
    for hidden, ids, _ in inputs:
        here = ids[ids < shape.resident]
        expert_bytes = len(here.unique()) * shape.expert_bytes
        moved = expert_bytes + 2 * hidden.nbytes + 2 * here.numel() * shape.hidden * 2
        flops = here.numel() * shape.expert_bytes
        cells.append((expert_bytes, flops, max(flops / dense, moved / copy)))
    means = [statistics.fmean(column) for column in zip(*cells, strict=True)]
    return dict(zip(("expert_bytes", "flops", "floor_s"), means, strict=True))


def replays_for(seconds: float) -> int:
    """About a tenth of a second of work: 8 to 60 replays."""
    return max(8, min(60, int(0.12 / (seconds * SETS))))


def timed(calls: Sequence[Callable[[], object]], capturable: bool) -> Spread:
    if not capturable:
        return eager_time(calls, replays=3)
    first = graph_time(calls, replays=2).median
    return graph_time(calls, replays=replays_for(first))


class ShapeRun:
    """All that is timed of one shape."""

    def __init__(self, shape: Shape, copy: float, dense: float, peers: Sequence[str]) -> None:
        self.shape, self.copy, self.dense = shape, copy, dense
        known = LayerShape(
            num_experts=shape.experts, hidden=shape.hidden, inner=shape.inner, top_k=shape.top_k, transposed=shape.gpt_oss,
            interleaved=shape.gpt_oss,
        )  # fmt: skip
        self.experts = random_weights(known, sets=SETS, resident=shape.resident)
        sets = [
            tuple(torch.stack([e.matrices(int(s))[m] for s in e.expert_slot.tolist() if s >= 0]) for m in (0, 1))
            for e in self.experts
        ]
        if shape.gpt_oss:
            sets = [tuple(matrix.transpose(1, 2).contiguous() for matrix in pair) for pair in sets]
        self.peers: dict[str, Any] = {}
        self.notes: dict[str, str] = {}
        for name in peers:
            try:
                self.peers[name] = PEERS[name](shape, sets)
            except Exception as error:
                self.notes[name] = said(error)

    def cell(self, tokens: int, routing_name: str) -> dict[str, Any]:
        inputs = inputs_of(self.shape, tokens, SKEWS[routing_name])
        row: dict[str, Any] = {
            "shape": self.shape.name,
            "tokens": tokens,
            "routing": routing_name,
            **floor_of(self.shape, inputs, self.copy, self.dense),
        }
        own = timed([lambda i=i: layer.moe_forward(*inputs[i], self.experts[i]) for i in range(SETS)], True)
        row |= {"flexpert_s": own.median, "p10_s": own.p10, "p90_s": own.p90, "of_floor": row["floor_s"] / own.median}
        row["plan"] = layer.plan_for(inputs[0][0], self.experts[0], self.shape.top_k).to_json()
        row["products_s"] = self._products(inputs)
        row["peers_s"], row["not_run"] = {}, dict(self.notes)
        reference = layer.moe_forward(*inputs[0], self.experts[0]).float()
        for name, peer in self.peers.items():
            if not peer.runs(tokens) or (routing_name == "zipf" and name not in AGAIN):
                continue
            try:
                row["peers_s"][name] = self._peer(name, peer, inputs, reference, row)
            except Exception as error:
                row["not_run"][name] = said(error)
        return row

    def _peer(self, name: str, peer: Any, inputs: Inputs, reference: Tensor, row: dict[str, Any]) -> float:
        for number, given in enumerate(inputs):
            peer.prepare(number, *given)
        calls = [peer.call(i) for i in range(SETS)]
        result = calls[0]()
        if hasattr(peer, "tuned"):
            row.setdefault("tuned", {})[name] = peer.tuned
        if name != "grouped_mm":
            far = float((result.float() - reference).abs().max() / reference.abs().max())
            row.setdefault("differs", {})[name] = round(far, 4)
            if not far < MOST_DIFFERENCE:
                raise ValueError(f"its output differs by {far:.3f} of the largest value")
        try:
            return timed(calls, peer.capturable).median
        except RuntimeError:
            torch.cuda.synchronize()
            row.setdefault("not_captured", []).append(name)
            return timed(calls, False).median

    def _products(self, inputs: Inputs) -> float:
        """Both products without routing and sum; the whole layer of a plan without a schedule."""
        plan = layer.plan_for(inputs[0][0], self.experts[0], self.shape.top_k)
        if plan.kind == "gemv":
            return timed([lambda i=i: layer.moe_forward(*inputs[i], self.experts[i]) for i in range(SETS)], True).median
        schedules = [route(ids, e.expert_slot) for (_, ids, _), e in zip(inputs, self.experts, strict=True)]

        def call(i: int) -> object:
            inner = layer.up_product(layer.Rows(inputs[i][0]), self.shape.top_k, self.experts[i], schedules[i], plan.up)
            return layer.down_product(inner, self.experts[i], schedules[i], plan.down, torch.bfloat16)

        return timed([lambda i=i: call(i) for i in range(SETS)], True).median


def said(error: Exception) -> str:
    """Kind and first line."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200] if str(error).strip() else ''}"


def goals(rows: list[dict[str, Any]], copy: float, dense: float) -> list[dict[str, Any]]:
    """Every line that must be shown, over the cells that it speaks of: always the worst of them."""
    found: list[dict[str, Any]] = []

    def worst(name: str, bound: str, value: Callable[[dict[str, Any]], float | None], **where: Any) -> None:
        cells = [row for row in rows if all(_matches(row, key, wanted) for key, wanted in where.items())]
        values = [number for number in map(value, cells) if number is not None]
        if values:
            found.append(saved_run.goal(name, (min if bound.startswith(">") else max)(values), bound))
        elif cells:  # the peer did not run, or not in a graph
            found.append({"name": name, "value": None, "bound": bound, "met": False})

    def over(peer: str, own: str = "flexpert_s") -> Callable[[dict[str, Any]], float | None]:
        """Only of cells whose peer ran in a graph, as flexpert did."""
        return lambda row: (
            row["peers_s"][peer] / row[own]
            if peer in row["peers_s"] and peer not in row.get("not_captured", ())
            else None
        )

    def bandwidth(row: dict[str, Any]) -> float:
        return row["expert_bytes"] / row["flexpert_s"] / copy

    def rate(row: dict[str, Any]) -> float:
        return row["flops"] / row["flexpert_s"] / dense

    def rows_each(low: float, high: float) -> Callable[[dict[str, Any]], bool]:
        return lambda row: low <= row["tokens"] * _top_k(row) / _experts(row) <= high

    peer = "transformers grouped_mm"
    for shape in SMALL:
        worst(f"{shape}: over transformers grouped_mm", ">= 1.5", over(peer), shape=shape)
    for shape in LARGE:
        worst(f"{shape}: over transformers grouped_mm", ">= 1.2", over(peer), shape=shape)
    for shape in (s.name for s in SHAPES):
        worst(f"{shape}: over transformers grouped_mm, <= 8 tokens", ">= 2", over(peer), shape=shape, tokens=(1, 8))
        raw = over("grouped_mm", "products_s")
        worst(
            f"{shape}: products over grouped_mm, <= 64 rows an expert",
            ">= 1.3",
            raw,
            shape=shape,
            rows=rows_each(0, 64),
        )
        worst(
            f"{shape}: products over grouped_mm, 256 rows an expert", ">= 1", raw, shape=shape, rows=rows_each(256, 256)
        )
        worst(
            f"{shape}: products over grouped_mm, >= 1024 rows an expert",
            ">= 0.95",
            raw,
            shape=shape,
            rows=rows_each(1024, 1e9),
        )
        worst(f"{shape}: over vLLM fused_experts", ">= 0.98", over("vllm"), shape=shape)
    for shape in SMALL:
        worst(f"{shape}: over vLLM, <= 8 tokens", ">= 1.3", over("vllm"), shape=shape, tokens=(1, 8))
        worst(f"{shape}: over vLLM, 1k-16k tokens", ">= 1.2", over("vllm"), shape=shape, tokens=(1024, 16384))
        for low, high, bound in ((1, 1, 0.45), (4, 8, 0.65), (16, 32, 0.80), (64, 256, 0.88)):
            worst(
                f"{shape}: share of copy rate, {low}-{high} tokens",
                f">= {bound}",
                bandwidth,
                shape=shape,
                tokens=(low, high),
                routing="uniform",
            )
        worst(f"{shape}: share of dense rate, 8k-16k tokens", ">= 0.6", rate, shape=shape, tokens=(8192, 16384))
    for shape in (s.name for s in SHAPES):
        worst(
            f"{shape}: share of floor, 512-1024 tokens",
            ">= 0.75",
            lambda row: row["of_floor"],
            shape=shape,
            tokens=(512, 1024),
        )
        worst(
            f"{shape}: share of floor, 2k-4k tokens",
            ">= 0.6",
            lambda row: row["of_floor"],
            shape=shape,
            tokens=(2048, 4096),
        )
    for shape in LARGE:
        worst(
            f"{shape}: share of copy rate, 1 token", ">= 0.8", bandwidth, shape=shape, tokens=(1, 1), routing="uniform"
        )
        worst(
            f"{shape}: share of copy rate, 8-128 tokens",
            ">= 0.92",
            bandwidth,
            shape=shape,
            tokens=(8, 128),
            routing="uniform",
        )
    worst(
        "Mixtral-8x7B: share of dense rate, >= 4k tokens", ">= 0.75", rate, shape="Mixtral-8x7B", tokens=(4096, 1 << 20)
    )
    times = {(row["shape"], row["routing"]): row["flexpert_s"] for row in rows if row["tokens"] == 16384}
    for shape in (s.name for s in SHAPES):
        if (shape, "zipf") in times and (shape, "uniform") in times:
            found.append(
                saved_run.goal(
                    f"{shape}: Zipf over uniform, 16k tokens", times[shape, "zipf"] / times[shape, "uniform"], "<= 1.15"
                )
            )
    return found


def _matches(row: dict[str, Any], key: str, wanted: Any) -> bool:
    if key == "rows":
        return bool(wanted(row))
    if isinstance(wanted, tuple):
        return bool(wanted[0] <= row[key] <= wanted[1])
    return bool(row[key] == wanted)


def _top_k(row: dict[str, Any]) -> int:
    return next(shape.top_k for shape in SHAPES if shape.name == row["shape"])


def _experts(row: dict[str, Any]) -> int:
    return next(shape.experts for shape in SHAPES if shape.name == row["shape"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shapes", default=";".join(shape.name for shape in SHAPES), help="names, separated by semicolons"
    )
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)))
    parser.add_argument("--peers", default=",".join(PEERS))
    parser.add_argument("--out", type=Path, default=saved_run.RESULTS)
    options = parser.parse_args()
    started = datetime.datetime.now(datetime.UTC)
    copy, dense = rates()
    print(f"copy {copy / 1e12:.2f} TB/s, dense {dense / 1e12:.0f} TFLOP/s", flush=True)
    rows: list[dict[str, Any]] = [{"shape": "rates", "copy_bytes_per_s": copy, "dense_flop_per_s": dense}]
    cells: list[dict[str, Any]] = []
    for shape in (shape for shape in SHAPES if shape.name in options.shapes.split(";")):
        with torch.inference_mode():
            run = ShapeRun(shape, copy, dense, options.peers.split(","))
            for name in SKEWS:
                for tokens in map(int, options.tokens.split(",")):
                    cells.append(run.cell(tokens, name))
                    _show(cells[-1])
            saved_run.save(
                "moe_layer",
                device="cuda",
                rows=rows + cells,
                goals=goals(cells, copy, dense),
                started=started,
                folder=options.out,
            )
        del run
        torch.cuda.empty_cache()


def _show(row: dict[str, Any]) -> None:
    peers = ", ".join(f"{name} {seconds / row['flexpert_s']:.2f}x" for name, seconds in row["peers_s"].items())
    print(
        f"{row['shape']}, {row['routing']}, {row['tokens']}: {row['flexpert_s'] * 1e6:.1f} us, {row['of_floor']:.2f} of floor; {peers}; "
        f"{row.get('differs', '')} {row['not_run'] or ''} {row.get('not_captured', '')}",
        flush=True,
    )


if __name__ == "__main__":
    main()
