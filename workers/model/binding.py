"""Puts weights that lie in two segments into transformers' module tree, without copying a byte.

Parameters and persistent buffers become views of the dense segment; an experts module gets its slabs of the experts segment in place of its
3-D parameters; rotary buffers, which no checkpoint holds, are computed; tied parameters are tied last.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from flexpert.kernels import ExpertSlabs, SlabPart, experts_forward
from flexpert.kernels.registration import activation, up_name
from flexpert.workers.model.kv_layout import KvLayout
from flexpert.workers.model.layout import DENSE, EXPERTS, ExpertLayer, WeightLayout
from flexpert.workers.model.planning import GRANULE_BYTES, lay_out, slab_matrices
from flexpert.workers.model.servable import ServableModel, kv_layout


@dataclass
class LayerExperts:
    """What an experts module calls. The runner sets `real_tokens`: padding rows behind them get zeros and touch no expert."""

    slabs: ExpertSlabs
    real_tokens: int | None = None

    def __call__(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        real = self.real_tokens
        if real is None or real >= len(hidden):
            return experts_forward(hidden, top_k_index, top_k_weights, self.slabs)
        result = torch.zeros_like(hidden)
        result[:real] = experts_forward(hidden[:real], top_k_index[:real], top_k_weights[:real], self.slabs)
        return result


@dataclass(frozen=True)
class BoundModel:
    """A model ready to run: its tree, and how each layer attends. Holds the segments' memory alive."""

    servable: ServableModel
    model: PreTrainedModel
    dtype: torch.dtype
    device: torch.device
    kv: KvLayout
    experts: tuple[LayerExperts, ...]


def bind(
    servable: ServableModel, manifest: bytes, segments: Mapping[str, Tensor], *, device: str | torch.device = "cpu"
) -> BoundModel:
    """segments: uint8 tensors on `device`, of a plan of the same model. Raises ValueError where they do not fit the model."""
    layout = WeightLayout.from_manifest(manifest)
    for name, nbytes in ((DENSE, layout.dense_bytes), (EXPERTS, layout.experts_bytes)):
        if segments[name].dtype != torch.uint8 or segments[name].numel() < nbytes:
            raise ValueError(
                f"segment {name!r} has {segments[name].numel()} of {segments[name].dtype}, expected {nbytes} bytes"
            )
    device, dtype = torch.device(device), getattr(torch, layout.dtype)
    model = servable.build(dtype)
    expected = lay_out(model, servable.experts, dtype, GRANULE_BYTES)
    if (layout.dense, layout.experts) != (expected.dense, expected.experts):
        raise ValueError(
            f"the weights are laid out for another model than {servable.architecture} of {servable.model_dir}; load them again"
        )
    _bind_dense(model, layout, segments[DENSE])
    arena = segments[EXPERTS].view(dtype)
    experts = tuple(_bind_experts(model.get_submodule(layer.module), layer, layout, arena) for layer in layout.experts)
    _compute_rotary_buffers(model, device)
    model.tie_weights()
    _require_bound(model)
    return BoundModel(servable, model, dtype, device, kv_layout(servable, dtype), experts)


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


def _bind_experts(module: nn.Module, layer: ExpertLayer, layout: WeightLayout, arena: Tensor) -> LayerExperts:
    size = arena.dtype.itemsize
    biases = [getattr(module, f"{name}_bias", None) for name in slab_matrices(module)]
    slabs = ExpertSlabs(
        arena=arena,
        slot_stride=layout.slot_bytes // size,
        slots=range(layer.first_slot, layer.first_slot + layer.num_experts),
        parts={matrix.name: SlabPart(matrix.offset_bytes // size, matrix.shape) for matrix in layer.matrices},
        transposed=layer.transposed,
        activate=activation(module),
        up_bias=biases[0],
        down_bias=biases[1],
    )
    for name in (up_name(module), "down_proj"):
        module._parameters[name] = None
    experts = LayerExperts(slabs)
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
