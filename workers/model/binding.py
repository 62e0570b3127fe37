"""Puts weights that lie in segments into transformers' module tree, without copying a byte.

Parameters and persistent buffers become views of the dense segment; rotary buffers, which no checkpoint holds, are computed; tied
parameters are tied last. An experts module loses its 3-D parameters and calls a `LayerExperts`, whose slabs come and go with the epochs
of a group (`workers.ep`); where all experts' segments are given to `bind`, all are installed at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from flexpert.kernels import ExpertSlabs, SlabPart, experts_forward
from flexpert.kernels.registration import activation, up_name
from flexpert.workers.model.kv_layout import KvLayout
from flexpert.workers.model.layout import DENSE, ExpertLayer, WeightLayout, all_experts, held_groups, is_experts
from flexpert.workers.model.loading import compact
from flexpert.workers.model.planning import GRANULE_BYTES, lay_out, slab_matrices
from flexpert.workers.model.servable import ServableModel, kv_layout


class Elsewhere(Protocol):
    """Computes experts of which some lie on other ranks."""

    def forward(self, layer: int, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """[tokens, H], [tokens, k] expert ids, [tokens, k] weights -> [tokens, H]"""


class LayerExperts:
    """What an experts module calls. The runner sets `slabs` and `elsewhere` (None: all experts are here), and in each step `real_tokens`:
    padding rows behind them get zeros and touch no expert."""

    def __init__(self, index: int, layer: ExpertLayer, module: nn.Module) -> None:
        self.index, self.layer = index, layer
        self.slabs: ExpertSlabs | None = None
        self.elsewhere: Elsewhere | None = None
        self.real_tokens: int | None = None
        self._activate = activation(module)
        self._biases = [getattr(module, f"{name}_bias", None) for name in slab_matrices(module)]

    def __call__(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        real = self.real_tokens
        if real is None or real >= len(hidden):
            return self._compute(hidden, top_k_index, top_k_weights)
        result = torch.zeros_like(hidden)
        result[:real] = self._compute(hidden[:real], top_k_index[:real], top_k_weights[:real])
        return result

    def _compute(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        if self.elsewhere is not None:
            return self.elsewhere.forward(self.index, hidden, top_k_index, top_k_weights)
        if self.slabs is None:
            raise RuntimeError("no experts are installed: call ModelRunner.use() before the first step")
        return experts_forward(hidden, top_k_index, top_k_weights, self.slabs)

    def take_computed(self) -> np.ndarray:
        """int64 [experts]: how many tokens each expert computed here since the last call. A GPU does not count."""
        result = np.zeros(self.layer.num_experts, dtype=np.int64)
        if self.slabs is not None:
            here = self.slabs.row_of >= 0
            result[here] = self.slabs.computed[self.slabs.row_of[here]]
            self.slabs.computed = np.zeros_like(self.slabs.computed)
        return result

    def slabs_in(self, arena: Tensor, *, slot_stride: int, slots: Sequence[int], experts: Sequence[int]) -> ExpertSlabs:
        """Slabs of `experts` of this layer, which lie in `slots` of an arena of the model's dtype."""
        size, layer = arena.dtype.itemsize, self.layer
        return ExpertSlabs(
            arena=arena,
            slot_stride=slot_stride,
            slots=slots,
            parts={matrix.name: SlabPart(matrix.offset_bytes // size, matrix.shape) for matrix in layer.matrices},
            transposed=layer.transposed,
            activate=self._activate,
            up_bias=self._biases[0],
            down_bias=self._biases[1],
            experts=experts,
            num_experts=layer.num_experts,
        )


@dataclass(frozen=True)
class BoundModel:
    """A model ready to run: its tree, and how each layer attends. Holds the segments' memory alive."""

    servable: ServableModel
    layout: WeightLayout
    model: PreTrainedModel
    dtype: torch.dtype
    device: torch.device
    kv: KvLayout
    experts: tuple[LayerExperts, ...]


def bind(
    servable: ServableModel, manifest: bytes, segments: Mapping[str, Tensor], *, device: str | torch.device = "cpu"
) -> BoundModel:
    """segments: uint8 tensors on `device` of a plan of the same model: "dense", and either no slab group (experts are installed with
    `ModelRunner.use`) or all, copied together unless they lie back to back. Raises ValueError where they do not fit the model."""
    layout = WeightLayout.from_manifest(manifest)
    expected_bytes = layout.segment_bytes()
    if not any(is_experts(name) for name in segments):
        expected_bytes = {DENSE: layout.dense_bytes}
    for name, nbytes in expected_bytes.items():
        found = segments.get(name)
        if found is None or found.dtype != torch.uint8 or found.numel() < nbytes:
            what = "nothing" if found is None else f"{found.numel()} of {found.dtype}"
            raise ValueError(f"segment {name!r} has {what}, expected {nbytes} bytes")
    device, dtype = torch.device(device), getattr(torch, layout.dtype)
    model = servable.build(dtype)
    expected = lay_out(model, servable.experts, dtype, GRANULE_BYTES)
    if (layout.dense, layout.experts) != (expected.dense, expected.experts):
        raise ValueError(
            f"the weights are laid out for another model than {servable.architecture} of {servable.model_dir}; load them again"
        )
    _bind_dense(model, layout, segments[DENSE])
    experts = tuple(_take_experts(model, i, layer) for i, layer in enumerate(layout.experts))
    _compute_rotary_buffers(model, device)
    model.tie_weights()
    _require_bound(model)
    bound = BoundModel(servable, layout, model, dtype, device, kv_layout(servable, dtype), experts)
    if len(expected_bytes) > 1:
        memory = compact([segments[name][:nbytes] for name, nbytes in expected_bytes.items() if is_experts(name)])
        for layer, slabs in zip(experts, held_slabs(bound, all_experts(layout), memory), strict=True):
            layer.slabs = slabs
    return bound


def held_slabs(bound: BoundModel, held: Sequence[Sequence[int]], memory: Tensor) -> tuple[ExpertSlabs | None, ...]:
    """[layer] -> slabs of the experts held[layer], None for none, as views of `memory`: uint8 on the model's device, the segments
    `expert_segments(layout, held)` back to back. Raises ValueError where memory and placement do not fit the layout."""
    layout = bound.layout
    groups = held_groups(layout, held)
    if (
        memory.dtype != torch.uint8
        or memory.device.type != bound.device.type
        or memory.numel() != len(groups) * layout.group_bytes
    ):
        raise ValueError(
            f"memory of {memory.numel()} {memory.dtype} on {memory.device} for {len(groups)} slab groups of {layout.group_bytes} bytes "
            f"on {bound.device}"
        )
    arena, stride = memory.view(bound.dtype), layout.slot_bytes // bound.dtype.itemsize
    result: list[ExpertSlabs | None] = []
    slot = 0
    for layer, chosen in zip(bound.experts, held, strict=True):
        slots = range(slot, slot + len(chosen))
        result.append(
            layer.slabs_in(arena, slot_stride=stride, slots=slots, experts=sorted(chosen)) if chosen else None
        )
        slot += len(chosen)
    return tuple(result)


def _bind_dense(model: PreTrainedModel, layout: WeightLayout, segment: Tensor) -> None:
    for name, tensor in layout.dense.items():
        dtype = getattr(torch, tensor.dtype)
        count = 1
        for size in tensor.shape:
            count *= size
        view = (
            segment[tensor.offset_bytes : tensor.offset_bytes + count * dtype.itemsize].view(dtype).view(tensor.shape)
        )
        path, _, leaf = name.rpartition(".")
        owner = model.get_submodule(path)
        if leaf in owner._parameters:
            owner._parameters[leaf] = nn.Parameter(view, requires_grad=False)
        else:
            owner._buffers[leaf] = view


def _take_experts(model: PreTrainedModel, index: int, layer: ExpertLayer) -> LayerExperts:
    module = model.get_submodule(layer.module)
    for name in (up_name(module), "down_proj"):
        module._parameters[name] = None
    experts = LayerExperts(index, layer, module)
    module.flexpert_experts = experts
    return experts


def _compute_rotary_buffers(model: PreTrainedModel, device: torch.device) -> None:
    """A second instance of the module, made on the host from the same configuration, has the right values."""
    for module in model.modules():
        if any(name.endswith("inv_freq") for name in module._buffers):
            made = type(module)(module.config)
            for name, buffer in made._buffers.items():
                module._buffers[name] = None if buffer is None else buffer.to(device)


def _require_bound(model: PreTrainedModel) -> None:
    left = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
    if left:
        raise ValueError(
            f"{len(left)} tensors of {type(model).__name__} got no weights, among them {left[0]}; load the weights again"
        )
