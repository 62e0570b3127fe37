"""Makes transformers' experts modules run on flexpert's kernels.

`register()` adds the experts implementation "flexpert"; a model built with `experts_implementation="flexpert"` then calls
`run_experts`. Modules that the binder prepared carry their slabs; any other module's own 3-D parameters are used as slabs, so that
the kernels also work alone, without a cluster.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from flexpert.kernels.experts import ExpertSlabs, SlabPart, experts_forward

IMPLEMENTATION = "flexpert"


def register() -> str:
    """Register the experts implementation and return its name. Idempotent."""
    from transformers.integrations.moe import ExpertsInterface

    ExpertsInterface.register(IMPLEMENTATION, run_experts)
    return IMPLEMENTATION


def run_experts(module: nn.Module, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """[tokens, H] -> [tokens, H], without gradients; what transformers calls in place of an experts module's forward."""
    with torch.no_grad():
        if getattr(module, "flexpert_experts", None) is None:
            module.flexpert_experts = partial(experts_forward, slabs=_slabs_of_parameters(module))
        return module.flexpert_experts(hidden, top_k_index, top_k_weights)


def up_name(module: nn.Module) -> str:
    """The name of an experts module's first matrix."""
    return "gate_up_proj" if module.has_gate else "up_proj"


def activation(module: nn.Module):  # type: ignore[no-untyped-def]
    """What turns the first product's rows into the second's."""
    return module._apply_gate if module.has_gate else module.act_fn


def _slabs_of_parameters(module: nn.Module) -> ExpertSlabs:
    """Gate, up and down copied into one arena, once."""
    up, down = getattr(module, up_name(module)).detach(), module.down_proj.detach()
    arena = torch.cat([up.flatten(1), down.flatten(1)], dim=1)
    parts = {
        up_name(module): SlabPart(0, (up.shape[1], up.shape[2])),
        "down_proj": SlabPart(up[0].numel(), (down.shape[1], down.shape[2])),
    }
    return ExpertSlabs(
        arena=arena.view(-1),
        slot_stride=arena.shape[1],
        slots=range(len(up)),
        parts=parts,
        transposed=module.is_transposed,
        activate=activation(module),
        up_bias=getattr(module, f"{up_name(module)}_bias", None),
        down_bias=getattr(module, "down_proj_bias", None),
    )
