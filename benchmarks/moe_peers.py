"""The peers of moe_layer.py: other ways to compute the same MoE layer on the same weights' shape, each behind one callable.

A peer is made once for a shape, with its own random weights in several sets. It prepares a set's inputs, in the form it wants them and
untimed, and returns the call to be timed. One that cannot be made or run here raises; the benchmark writes down what it said.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from flexpert.kernels.moe import ExpertWeights

Call = Callable[[], object]
BATCHED_BYTES = 6 << 30  # transformers' batched_mm copies an expert for each pair: not beyond this


@dataclass(frozen=True)
class Shape:
    """A layer of a published model. resident: the first so many of its experts are here."""

    name: str
    family: str
    experts: int
    hidden: int
    inner: int
    top_k: int
    resident: int

    @property
    def gpt_oss(self) -> bool:
        return self.family == "gpt_oss"

    @property
    def expert_bytes(self) -> int:
        return 3 * self.hidden * self.inner * 2


SHAPES = (
    Shape("Qwen3-30B-A3B", "qwen3_moe", 128, 2048, 768, 8, 128),
    Shape("OLMoE-1B-7B", "olmoe", 64, 2048, 1024, 8, 64),
    Shape("Mixtral-8x7B", "mixtral", 8, 4096, 14336, 2, 8),
    Shape("DeepSeek-V3, one rank of 8", "deepseek_v3", 256, 7168, 2048, 8, 32),
    Shape("gpt-oss-120b", "gpt_oss", 128, 2880, 2880, 4, 128),
)


def local(ids: Tensor, weights: Tensor, shape: Shape) -> tuple[Tensor, Tensor]:
    """Ids as transformers wants them under expert parallelism: absent ones are the number of experts, with weight 0."""
    if shape.resident == shape.experts:
        return ids, weights
    absent = ids >= shape.resident
    return ids.masked_fill(absent, shape.resident), weights.masked_fill(absent, 0)


def random_sets(shape: Shape, sets: int) -> list[tuple[Tensor, Tensor]]:
    """[resident, 2I, H] and [resident, H, I] in bfloat16, transposed where the family stores them so."""
    found = []
    for _ in range(sets):
        up = torch.empty(shape.resident, 2 * shape.inner, shape.hidden, dtype=torch.bfloat16, device="cuda")
        down = torch.empty(shape.resident, shape.hidden, shape.inner, dtype=torch.bfloat16, device="cuda")
        for matrix in (up, down):
            for expert in matrix:
                expert.normal_(0, shape.hidden**-0.5)
        found.append(
            (up.transpose(1, 2).contiguous(), down.transpose(1, 2).contiguous()) if shape.gpt_oss else (up, down)
        )
    return found


class TransformersPeer:
    """The experts module of the family with one of transformers' own implementations."""

    def __init__(self, shape: Shape, sets: list[tuple[Tensor, Tensor]], implementation: str) -> None:
        self.shape, self.implementation = shape, implementation
        self.capturable = implementation != "eager"
        self.modules = [_module(shape, up, down, implementation) for up, down in sets]
        self._inputs: dict[int, tuple[Tensor, ...]] = {}

    def runs(self, tokens: int) -> bool:
        if self.implementation == "eager" and self.shape.resident < self.shape.experts:
            return False  # it indexes by ids, so absent experts end the process's CUDA context
        if self.implementation == "batched_mm":
            return tokens * self.shape.top_k * self.shape.expert_bytes <= BATCHED_BYTES
        return True

    def prepare(self, number: int, hidden: Tensor, ids: Tensor, weights: Tensor) -> None:
        self._inputs[number] = (hidden, *local(ids, weights, self.shape))

    def call(self, number: int) -> Call:
        return partial(self.modules[number], *self._inputs[number])


class RawGroupedMm:
    """Only the two products of torch.nn.functional.grouped_mm, on rows that were sorted beforehand; no activation, no sum."""

    capturable = True

    def __init__(self, shape: Shape, sets: list[tuple[Tensor, Tensor]]) -> None:
        self.shape = shape
        self.sets = [pair if shape.gpt_oss else tuple(matrix.transpose(1, 2) for matrix in pair) for pair in sets]
        self._inputs: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def runs(self, tokens: int) -> bool:
        return True

    def prepare(self, number: int, hidden: Tensor, ids: Tensor, weights: Tensor) -> None:
        flat = ids.reshape(-1)
        flat = flat[flat < self.shape.resident]
        ends = torch.bincount(flat, minlength=self.shape.resident).cumsum(0).int()
        rows = torch.randn(max(len(flat), 1), self.shape.hidden, device="cuda").bfloat16()
        inner = torch.randn(max(len(flat), 1), self.shape.inner, device="cuda").bfloat16()
        self._inputs[number] = (rows, inner, ends)

    def call(self, number: int) -> Call:
        rows, inner, ends = self._inputs[number]
        up, down = self.sets[number]

        def run() -> object:
            torch.nn.functional.grouped_mm(rows, up, offs=ends)
            return torch.nn.functional.grouped_mm(inner, down, offs=ends)

        return run


class VllmPeer:
    """vLLM's own Triton kernels with the configuration that it ships for the device and shape, where it ships one."""

    capturable = True

    def __init__(self, shape: Shape, sets: list[tuple[Tensor, Tensor]]) -> None:
        from vllm.model_executor.layers.fused_moe import config, fused_moe
        from vllm.model_executor.layers.fused_moe.activation import MoEActivation

        self.shape, self.fused_experts = shape, fused_moe.fused_experts
        # vLLM keeps gpt-oss's matrices with the inner dimension last
        self.sets = [tuple(m.transpose(1, 2).contiguous() for m in pair) if shape.gpt_oss else pair for pair in sets]
        self.options: dict[str, Any] = _vllm_experts(shape)
        if shape.gpt_oss:
            biases = [
                torch.zeros(shape.resident, n, dtype=torch.bfloat16, device="cuda")
                for n in (2 * shape.inner, shape.hidden)
            ]
            self.options |= {
                "activation": MoEActivation.SWIGLUOAI,
                "quant_config": config.biased_moe_quant_config(*biases),
            }
        self.tuned = fused_moe.get_moe_configs(shape.resident, shape.inner, None) is not None
        self._inputs: dict[int, tuple[Tensor, ...]] = {}

    def runs(self, tokens: int) -> bool:
        return True

    def prepare(self, number: int, hidden: Tensor, ids: Tensor, weights: Tensor) -> None:
        self._inputs[number] = (hidden, *self.sets[number], weights, ids.int())

    def call(self, number: int) -> Call:
        return partial(self.fused_experts, *self._inputs[number], **self.options)


def _vllm_experts(shape: Shape) -> dict[str, Any]:
    """How vLLM is told which of the experts are here."""
    if shape.resident == shape.experts:
        return {"global_num_experts": shape.experts}
    places = torch.full((shape.experts,), -1, dtype=torch.int32, device="cuda")
    places[: shape.resident] = torch.arange(shape.resident, device="cuda")
    return {"global_num_experts": shape.experts, "expert_map": places}


class VllmFp8Peer:
    """The same with weights in fp8 and scales for blocks of 128 x 128; rows are quantised in groups of 128 columns."""

    def __init__(self, shape: Shape, layers: list[ExpertWeights]) -> None:
        from vllm.model_executor.layers.fused_moe import config, fused_moe

        self.fused_experts = fused_moe.fused_experts
        self.sets = [_fp8_tensors(layer) for layer in layers]
        self.tuned = fused_moe.get_moe_configs(shape.resident, shape.inner, "fp8_w8a8", 128, 128) is not None
        self._inputs: dict[int, tuple[Tensor, ...]] = {}
        self.options: list[dict[str, Any]] = []
        for _, _, up_scale, down_scale in self.sets:
            quant = config.fp8_w8a8_moe_quant_config(up_scale, down_scale, block_shape=[128, 128])
            self.options.append({**_vllm_experts(shape), "quant_config": quant})

    def prepare(self, number: int, hidden: Tensor, ids: Tensor, weights: Tensor) -> None:
        self._inputs[number] = (hidden, *self.sets[number][:2], weights, ids.int())

    def call(self, number: int) -> Call:
        return partial(self.fused_experts, *self._inputs[number], **self.options[number])


def _fp8_tensors(layer: ExpertWeights) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """[resident, 2I, H], [resident, H, I] and their scales, copied together."""
    slots = [slot for slot in layer.expert_slot.tolist() if slot >= 0]
    sizes = ((2 * layer.inner, layer.hidden), (layer.hidden, layer.inner))
    weights, scales = [], []
    for (rows, columns), stored, scale in zip(
        sizes, (layer.up, layer.down), (layer.up_scale, layer.down_scale), strict=True
    ):
        assert scale is not None
        blocks = (rows // 128, columns // 128)
        weights.append(torch.stack([stored.of_slot(slot, rows * columns).view(rows, columns) for slot in slots]))
        scales.append(torch.stack([scale.of_slot(slot, blocks[0] * blocks[1]).view(blocks) for slot in slots]))
    return weights[0], weights[1], scales[0], scales[1]


def _module(shape: Shape, up: Tensor, down: Tensor, implementation: str) -> nn.Module:
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    # The experts of Qwen3, OLMoE, Mixtral and DeepSeek are the same code under four names.
    config = SimpleNamespace(
        num_experts=shape.resident, num_local_experts=shape.resident, hidden_size=shape.hidden, moe_intermediate_size=shape.inner,
        intermediate_size=shape.inner, hidden_act="silu", swiglu_alpha=1.702, swiglu_limit=7.0, _experts_implementation=implementation,
    )  # fmt: skip
    with torch.device("meta"):
        module = (GptOssExperts if shape.gpt_oss else Qwen3MoeExperts)(config)
    module.gate_up_proj, module.down_proj = (
        nn.Parameter(up, requires_grad=False),
        nn.Parameter(down, requires_grad=False),
    )
    if shape.gpt_oss:
        zeros = [
            torch.zeros(shape.resident, n, dtype=torch.bfloat16, device="cuda") for n in (2 * shape.inner, shape.hidden)
        ]
        module.gate_up_proj_bias, module.down_proj_bias = (nn.Parameter(bias, requires_grad=False) for bias in zeros)
    if shape.resident < shape.experts:
        module._is_expert_parallel = True
    return module


PEERS: dict[str, Callable[[Shape, list[tuple[Tensor, Tensor]]], Any]] = {
    "vllm": VllmPeer,
    "grouped_mm": RawGroupedMm,
    "transformers grouped_mm": lambda shape, sets: TransformersPeer(shape, sets, "grouped_mm"),
    "transformers batched_mm": lambda shape, sets: TransformersPeer(shape, sets, "batched_mm"),
    "transformers eager": lambda shape, sets: TransformersPeer(shape, sets, "eager"),
}
