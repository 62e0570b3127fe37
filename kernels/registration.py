"""Makes transformers' experts modules run on flexpert's kernels.

`register()` adds the experts implementation "flexpert"; a model built with `experts_implementation="flexpert"` then calls
`run_experts`. Modules that the binder prepared carry their slabs. The kernels also work alone, without a cluster: on a GPU a module's own
3-D parameters are read in place by the Triton kernels, where its activation, dtype and sizes are ones they have, fp8 with block scales
among them; otherwise, and on the CPU, the parameters are copied into slabs once.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from flexpert.kernels.experts import ExpertSlabs, SlabPart, experts_forward
from flexpert.kernels.moe import Activation, ExpertWeights, Stored, moe_forward
from flexpert.kernels.moe.weights import FP8, SCALE_BLOCK

IMPLEMENTATION = "flexpert"
HALVES = (torch.bfloat16, torch.float16)


def register() -> str:
    """Register the experts implementation and return its name. Idempotent."""
    from transformers.integrations.finegrained_fp8 import FP8ExpertsInterface
    from transformers.integrations.moe import ExpertsInterface

    for interface in (ExpertsInterface, FP8ExpertsInterface):
        interface.register(IMPLEMENTATION, run_experts)
    return IMPLEMENTATION


def run_experts(module: nn.Module, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """[tokens, H] -> [tokens, H], without gradients; what transformers calls in place of an experts module's forward. Raises ValueError
    for experts that the kernels do not have."""
    with torch.no_grad():
        experts = getattr(module, "flexpert_experts", None)
        made_of = getattr(experts, "made_of", None)  # None: the binder's, which knows when they change
        if experts is None or (made_of is not None and made_of != _state_of(module)):
            experts = module.flexpert_experts = _computation(module)
            experts.made_of = _state_of(module)
        return experts(hidden, top_k_index, top_k_weights)


def _state_of(module: nn.Module) -> tuple[object, ...]:
    """Another one once the parameters were moved, converted, replaced or written to."""
    found: list[object] = []
    for parameter in module.parameters():
        version = 0 if parameter.is_inference() else parameter._version
        found += [parameter.data_ptr(), parameter.dtype, parameter.device, version]
    return tuple(found)


def _computation(module: nn.Module):  # type: ignore[no-untyped-def]
    if getattr(module, "has_post_expert_norm", False):
        raise ValueError(
            f"{type(module).__name__} normalises each expert's rows, expected experts without; choose another experts_implementation"
        )
    weights = triton_weights(module)
    if weights is not None:
        return partial(moe_forward, experts=weights)
    stored = getattr(module, up_name(module))
    if stored.dtype not in (*HALVES, torch.float32):
        blocks = getattr(module, "block_size", None)
        raise ValueError(
            f"experts in {stored.dtype} on {stored.device} with scales in blocks of {blocks}, expected float8_e4m3fn on a GPU in blocks "
            f"of {SCALE_BLOCK} x {SCALE_BLOCK} with float32 scales, sizes in multiples of {SCALE_BLOCK} and a gated activation; load the "
            "model dequantised or choose another experts_implementation"
        )
    return partial(experts_forward, slabs=_slabs_of_parameters(module))


def up_name(module: nn.Module) -> str:
    """The name of an experts module's first matrix."""
    return "gate_up_proj" if module.has_gate else "up_proj"


def activation(module: nn.Module):  # type: ignore[no-untyped-def]
    """What turns the first product's rows into the second's."""
    return module._apply_gate if module.has_gate else module.act_fn


def triton_weights(module: nn.Module) -> ExpertWeights | None:
    """The module's parameters as the Triton kernels read them, in place; None where they cannot. Rows are quantised where the checkpoint's
    scheme does so."""
    act = _triton_activation(module)
    up, down = getattr(module, up_name(module)).detach(), module.down_proj.detach()
    transposed = getattr(module, "is_transposed", False)
    inner, hidden = (down.shape[1], down.shape[2]) if transposed else (down.shape[2], down.shape[1])
    scales = [_block_scales(module, name) for name in (up_name(module), "down_proj")]
    scaled, unit = up.dtype == FP8, SCALE_BLOCK if up.dtype == FP8 else 64
    in_place = up.is_cuda and up.is_contiguous() and down.is_contiguous() and up.dtype == down.dtype
    known = None not in scales if scaled else up.dtype in HALVES
    if act is None or not in_place or not known or hidden % unit or inner % unit:
        return None
    return ExpertWeights(
        Stored(up.view(-1), up[0].numel()),
        Stored(down.view(-1), down[0].numel()),
        torch.arange(len(up), dtype=torch.int32, device=up.device),
        hidden,
        inner,
        act,
        transposed,
        act.name == "clamped",
        getattr(module, f"{up_name(module)}_bias", None),
        getattr(module, "down_proj_bias", None),
        up_scale=scales[0],
        down_scale=scales[1],
        quantize_rows=scaled and getattr(module, "activation_scheme", None) == "dynamic",
    )


def _block_scales(module: nn.Module, name: str) -> Stored | None:
    """Where the scales of a matrix lie, if they are float32 for blocks of 128 x 128."""
    scale = getattr(module, f"{name}_scale_inv", None)
    blocks = getattr(module, "block_size", None)
    if scale is None or scale.dtype != torch.float32 or blocks is None or tuple(blocks) != (SCALE_BLOCK, SCALE_BLOCK):
        return None
    return Stored(scale.detach().contiguous().view(-1), scale[0].numel())


def _triton_activation(module: nn.Module) -> Activation | None:
    """By what the module computes on a few numbers, so that no family's name is asked; None where the kernels have nothing like it."""
    if not module.has_gate:
        return None
    generator = torch.Generator().manual_seed(0)
    probe = torch.cat([torch.randn(64, 32, generator=generator) * scale for scale in (1, 30, 1000)])
    probe = probe.to(module.down_proj.device)
    found = module._apply_gate(probe)
    chunked, turns = probe.chunk(2, dim=1), (probe[:, ::2], probe[:, 1::2])
    clamped = Activation("clamped", getattr(module, "limit", None) or 7.0, getattr(module, "alpha", None) or 1.702)
    for act, (gate, up) in ((Activation(), chunked), (Activation("gelu_tanh"), chunked), (clamped, turns)):
        if torch.allclose(act(gate, up), found, rtol=1e-4, atol=1e-5):
            return act
    return None


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
