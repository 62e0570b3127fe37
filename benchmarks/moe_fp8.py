"""The MoE layer with weights in fp8 on a GPU: rows as they come (W8A16) or quantised too (W8A8), beside bf16 and vLLM's fp8 experts.

    python benchmarks/moe_fp8.py
    python benchmarks/moe_fp8.py --shapes Qwen3-30B-A3B --tokens 1,64,4096

Timed as in moe_layer.py, all in one run. "w8a16" never quantises rows; "w8a8" may where its plan gains by it, and "vllm" (its own
`fused_experts` with the configuration that it ships) always does. Scales are one for each block of 128 x 128 weights, and for
128 columns of a row. differs: the norm of the difference to float32 arithmetic on the same quantised weights, over the norm.
"""

from __future__ import annotations

import argparse
import datetime
from pathlib import Path
from typing import Any

import saved_run
import torch
from moe_layer import SETS, inputs_of, rates, said, timed
from moe_peers import SHAPES, Shape, VllmFp8Peer

from flexpert.kernels.moe import forward_reference, moe_forward
from flexpert.kernels.moe.layer import plan_for
from flexpert.kernels.moe.plan import LayerShape
from flexpert.kernels.moe.tuner import TOKENS, random_weights
from flexpert.kernels.moe.weights import ExpertWeights

NAMES = ("Qwen3-30B-A3B", "Mixtral-8x7B", "DeepSeek-V3, one rank of 8")
KINDS = {
    "bf16": {},
    "w8a16": {"dtype": "float8_e4m3fn"},
    "w8a8": {"dtype": "float8_e4m3fn", "quantize_rows": True},
}
MOST_REFERENCE_TOKENS = 4096


class ShapeRun:
    """The kinds of one shape. Weights differ between bf16 and fp8; the fp8 kinds and vLLM share theirs."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        sizes = {"num_experts": shape.experts, "hidden": shape.hidden, "inner": shape.inner, "top_k": shape.top_k}
        self.kinds: dict[str, list[ExpertWeights]] = {}
        for kind, fields in KINDS.items():
            if kind == "w8a8":
                self.kinds[kind] = [_quantizing(layer) for layer in self.kinds["w8a16"]]
            else:
                self.kinds[kind] = random_weights(LayerShape(**sizes, **fields), sets=SETS, resident=shape.resident)
        self.note: str | None = None
        try:
            self.vllm: Any = VllmFp8Peer(shape, self.kinds["w8a16"])
        except Exception as error:
            self.vllm, self.note = None, said(error)

    def cell(self, tokens: int) -> dict[str, Any]:
        inputs = inputs_of(self.shape, tokens, 0.0)
        row: dict[str, Any] = {"shape": self.shape.name, "tokens": tokens, "seconds": {}, "differs": {}, "plan": {}}
        expected = None
        if tokens <= MOST_REFERENCE_TOKENS:
            expected = forward_reference(*inputs[0], self.kinds["w8a16"][0])
        for kind, layers in self.kinds.items():
            calls = [lambda i=i, layers=layers: moe_forward(*inputs[i], layers[i]) for i in range(SETS)]
            row["seconds"][kind] = timed(calls, True).median
            row["plan"][kind] = plan_for(inputs[0][0], layers[0], self.shape.top_k).to_json()
            if kind != "bf16" and expected is not None:
                row["differs"][kind] = _far(calls[0](), expected)
        if self.vllm is not None:
            for number, given in enumerate(inputs):
                self.vllm.prepare(number, *given)
            calls = [self.vllm.call(i) for i in range(SETS)]
            row["vllm_tuned"] = self.vllm.tuned
            try:
                row["seconds"]["vllm"] = timed(calls, True).median
                if expected is not None:
                    row["differs"]["vllm"] = _far(calls[0](), expected)
            except Exception as error:
                torch.cuda.synchronize()
                self.vllm, self.note = None, said(error)
        row["not_run"] = self.note
        return row


def _quantizing(layer: ExpertWeights) -> ExpertWeights:
    return ExpertWeights(
        layer.up, layer.down, layer.expert_slot, layer.hidden, layer.inner, up_scale=layer.up_scale, down_scale=layer.down_scale,
        quantize_rows=True,
    )  # fmt: skip


def _far(found: Any, expected: torch.Tensor) -> float:
    return round(float((found.float() - expected).norm() / expected.norm()), 5)


def goals(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The worst cell of each."""
    found = []

    def worst(name: str, bound: str, kind: str, peer: str, shape: str, low: int, high: int) -> None:
        values = [
            row["seconds"][peer] / row["seconds"][kind]
            for row in rows
            if row["shape"] == shape and low <= row["tokens"] <= high and peer in row["seconds"]
        ]
        if values:
            found.append(saved_run.goal(f"{shape}: {name}", min(values), bound))

    for shape, bound in (("Qwen3-30B-A3B", ">= 1.6"), ("Mixtral-8x7B", ">= 1.75")):
        worst("w8a16 over bf16, 8-64 tokens", bound, "w8a16", "bf16", shape, 8, 64)
    for shape in NAMES:
        worst("w8a8 over bf16, 16k tokens", ">= 1.3", "w8a8", "bf16", shape, 16384, 16384)
        worst("w8a8 over vLLM's fp8", ">= 0.98", "w8a8", "vllm", shape, 1, 1 << 20)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=";".join(NAMES), help="names, separated by semicolons")
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)))
    parser.add_argument("--out", type=Path, default=saved_run.RESULTS)
    options = parser.parse_args()
    started = datetime.datetime.now(datetime.UTC)
    copy, dense = rates()
    first = {"shape": "rates", "copy_bytes_per_s": copy, "dense_flop_per_s": dense}
    cells: list[dict[str, Any]] = []
    for shape in (shape for shape in SHAPES if shape.name in options.shapes.split(";")):
        with torch.inference_mode():
            run = ShapeRun(shape)
            for tokens in map(int, options.tokens.split(",")):
                cells.append(run.cell(tokens))
                row = cells[-1]
                times = ", ".join(f"{kind} {seconds * 1e6:.1f}" for kind, seconds in row["seconds"].items())
                print(f"{shape.name}, {tokens}: {times} us; {row['differs']} {row['not_run'] or ''}", flush=True)
        saved_run.save(
            "moe_fp8", device="cuda", rows=[first, *cells], goals=goals(cells), started=started, folder=options.out
        )
        del run
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
