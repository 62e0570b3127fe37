"""One MoE layer on a GPU: from top-k ids and weights to the reduced output, or to one unsummed row per (token, k).

All work is launched without a host synchronisation and without a launch that depends on the routing. `forward_reference` is the same in
a few lines of PyTorch, for tests and other machines.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from flexpert.kernels.arguments import require
from flexpert.kernels.device import multiprocessors, on_its_device
from flexpert.kernels.moe.plan import TAIL_ROWS, GemvTile, Plan, Tile, choose_plan, table_of
from flexpert.kernels.moe.routing import Schedule, route
from flexpert.kernels.moe.weights import FP8, FP8_MAX, SCALE_BLOCK, SMALLEST, ExpertWeights, Stored

SUM_COLUMNS = 1024
ROW_DTYPES = (torch.bfloat16, torch.float16, torch.float32)  # the last for tests


class Rows(NamedTuple):
    """values [rows, columns]; where they are fp8, scale: float32 [rows, columns / 128], by which groups of 128 columns are multiplied."""

    values: Tensor
    scale: Tensor | None = None


@on_its_device
def moe_forward(
    hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor, experts: ExpertWeights, plan: Plan | None = None
) -> Tensor:
    """[tokens, H], ids [tokens, k], weights [tokens, k] -> [tokens, H], of hidden's dtype. Pairs whose expert is not resident, and ids
    outside 0..E-1, count as zero. Raises ValueError for shapes, dtypes or devices that do not fit."""
    _check(hidden, top_k_index, experts)
    if top_k_weights.shape != top_k_index.shape or top_k_weights.device != hidden.device:
        require(False, "top_k_weights", top_k_weights, f"{list(top_k_index.shape)} on {hidden.device}")
    ids, output = top_k_index.contiguous(), torch.empty_like(hidden, memory_format=torch.contiguous_format)
    if not len(hidden):
        return output
    plan = plan or plan_for(hidden, experts, top_k_index.shape[1])
    weights = top_k_weights.contiguous()
    if plan.kind == "gemv":
        _gemv(hidden, ids, weights, experts, plan, output)
    else:
        sum_rows(_grouped(hidden, ids, experts, plan), ids, weights, experts, output)
    return output


@on_its_device
def moe_rows(hidden: Tensor, top_k_index: Tensor, experts: ExpertWeights, plan: Plan | None = None) -> Tensor:
    """One unweighted row for each (token, k), [tokens, k, H], for the home rank to sum; of absent experts unwritten. With the same plan
    `moe_forward` sums these very rows, weighted, in top-k order."""
    _check(hidden, top_k_index, experts)
    tokens, top_k = top_k_index.shape
    if not tokens:
        return hidden.new_empty(0, top_k, experts.hidden)
    plan = plan or plan_for(hidden, experts, top_k)
    ids = top_k_index.contiguous()
    if plan.kind == "gemv":
        rows = hidden.new_empty(tokens * top_k, experts.hidden)
        _gemv(hidden, ids, None, experts, plan, rows)
    else:
        rows = _grouped(hidden, ids, experts, plan)
    return rows.view(tokens, top_k, experts.hidden)


def sum_rows(rows: Tensor, ids: Tensor, weights: Tensor, experts: ExpertWeights, output: Tensor) -> None:
    """rows [pairs, H] -> output [tokens, H], weighted, in top-k order."""
    import triton

    from flexpert.kernels.moe import gemm_kernels as kernels

    tokens, top_k = ids.shape
    width, hidden = min(SUM_COLUMNS, triton.next_power_of_2(experts.hidden)), experts.hidden
    kernels.weighted_sum[(tokens, triton.cdiv(hidden, width))](
        rows, ids, weights, experts.expert_slot, output, H=hidden, E=len(experts.expert_slot), TOP_K=top_k, BLOCK=width,
        num_warps=4,
    )  # fmt: skip


def plan_for(hidden: Tensor, experts: ExpertWeights, top_k: int) -> Plan:
    """From the device's table."""
    name = torch.cuda.get_device_name(hidden.device) if hidden.is_cuda else "cpu"
    return choose_plan(len(hidden), experts.shape(top_k), table_of(name))


def forward_reference(
    hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor, experts: ExpertWeights, quantize: bool = False
) -> Tensor:
    """The same, expert by expert in float32 and summed in float32. quantize: with the rows of both products rounded to fp8."""
    rounded = quantize_reference if quantize else lambda rows: rows
    output = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
    for expert, slot in enumerate(experts.expert_slot.tolist()):
        tokens, place = torch.where(top_k_index == expert)
        if slot < 0 or not len(tokens):
            continue
        up, down = (matrix.float() for matrix in experts.matrices(slot))
        both = rounded(hidden[tokens].float()) @ up.T + _bias_of(experts.up_bias, expert)
        gate, value = (both[:, ::2], both[:, 1::2]) if experts.interleaved else both.chunk(2, dim=1)
        rows = rounded(experts.activation(gate, value)) @ down.T + _bias_of(experts.down_bias, expert)
        output.index_add_(0, tokens, rows * top_k_weights[tokens, place, None].float())
    return output


def quantize_reference(rows: Tensor) -> Tensor:
    """float32 [rows, columns], rounded to fp8 and back."""
    groups = rows.unflatten(1, (-1, SCALE_BLOCK))
    scale = groups.abs().amax(2, keepdim=True).clamp(min=SMALLEST) / FP8_MAX
    return ((groups / scale).to(FP8).float() * scale).flatten(1)


def quantize(rows: Tensor) -> Rows:
    """[rows, columns], the last dimension contiguous and a multiple of 128 -> fp8 and scales."""
    import triton

    from flexpert.kernels.moe import fp8_kernels as kernels

    count, columns = rows.shape
    values, scale = (
        rows.new_empty(count, columns, dtype=FP8),
        rows.new_empty(count, columns // SCALE_BLOCK, dtype=torch.float32),
    )
    groups = triton.next_power_of_2(columns // SCALE_BLOCK)
    kernels.quantize_rows[(count,)](rows, values, scale, rows.stride(0), COLUMNS=columns, GROUPS=groups, num_warps=4)
    return Rows(values, scale)


def _bias_of(bias: Tensor | None, expert: int) -> Tensor | float:
    return 0.0 if bias is None else bias[expert].float()


def _gemv(
    hidden: Tensor, ids: Tensor, weights: Tensor | None, experts: ExpertWeights, plan: Plan, output: Tensor
) -> None:
    import triton

    from flexpert.kernels.moe import gemv_kernels as kernels

    assert isinstance(plan.up, GemvTile)
    assert isinstance(plan.down, GemvTile)
    for part in (plan.up, plan.down):
        if experts.scaled and SCALE_BLOCK % part.columns:
            raise ValueError(
                f"a tile of {part.columns} columns, expected a divisor of {SCALE_BLOCK} for weights in fp8"
            )
    tokens, top_k = ids.shape
    inner = hidden.new_empty(tokens * top_k, experts.inner)
    sizes = {
        "E": len(experts.expert_slot),
        "H": experts.hidden,
        "INNER": experts.inner,
        "TOP_K": top_k,
        "TRANSPOSED": experts.transposed,
        "SCALED": experts.scaled,
    }
    up, down = _strides(experts.up, experts.up_scale), _strides(experts.down, experts.down_scale)
    kernels.gemv_up[(tokens * top_k, triton.cdiv(experts.inner, plan.up.columns))](
        hidden, experts.up.arena, _scales(experts.up_scale, hidden), _or(experts.up_bias, hidden), ids, experts.expert_slot, inner, *up,
        hidden.stride(0), **sizes, **_epilogue(experts), BN=plan.up.columns, BK=plan.up.depth, num_warps=plan.up.warps,
    )  # fmt: skip
    kernels.gemv_down[(tokens, triton.cdiv(experts.hidden, plan.down.columns))](
        inner, experts.down.arena, _scales(experts.down_scale, hidden), _or(experts.down_bias, hidden), ids, _or(weights, hidden),
        experts.expert_slot, output, *down, **sizes, HAS_BIAS=experts.down_bias is not None, SUM=weights is not None,
        BN=plan.down.columns, BK=plan.down.depth, num_warps=plan.down.warps,
    )  # fmt: skip


def _grouped(hidden: Tensor, ids: Tensor, experts: ExpertWeights, plan: Plan) -> Tensor:
    """Rows [pairs, H] by pair; of absent experts unwritten."""
    assert isinstance(plan.up, Tile)
    assert isinstance(plan.down, Tile)
    schedule = route(ids, experts.expert_slot)
    rows = quantize(hidden) if plan.quantize else Rows(hidden)
    inner = up_product(rows, ids.shape[1], experts, schedule, plan.up)
    return down_product(inner, experts, schedule, plan.down, hidden.dtype)


def up_product(hidden: Rows, top_k: int, experts: ExpertWeights, schedule: Schedule, tile: Tile) -> Rows:
    """[tokens, H] -> activated rows [pairs, I] in the schedule's order, in fp8 where hidden is."""
    from flexpert.kernels.moe import gemm_kernels as kernels

    values, pairs = hidden.values, len(schedule.order)
    _check_tile(tile, experts, hidden)
    if hidden.scale is not None and tile.columns != SCALE_BLOCK:
        raise ValueError(f"a tile of {tile.columns} columns, expected {SCALE_BLOCK} for rows in fp8")
    inner = values.new_empty(pairs, experts.inner)
    scale = None if hidden.scale is None else hidden.scale.new_empty(pairs, experts.inner // SCALE_BLOCK)
    tiles, total, bound = schedule.of(tile.rows)
    joint = not (tile.swap or experts.scaled)
    descriptor = experts.up_box(tile.columns, tile.depth, joint) if tile.tma else None
    kernels.grouped_up[_grid(bound, experts.inner, tile, values)](
        values, _or(hidden.scale, values), experts.up.arena, _or(descriptor, values), _scales(experts.up_scale, values),
        _or(experts.up_bias, values), schedule.order, inner, _or(scale, values), tiles, total,
        *_strides(experts.up, experts.up_scale), values.stride(0), H=experts.hidden, INNER=experts.inner, TOP_K=top_k,
        TRANSPOSED=experts.transposed, SCALED=experts.scaled, SCALED_ROWS=scale is not None, **_epilogue(experts),
        **_constants(tile, descriptor is not None),
    )  # fmt: skip
    return Rows(inner, scale)


def down_product(inner: Rows, experts: ExpertWeights, schedule: Schedule, tile: Tile, dtype: torch.dtype) -> Tensor:
    """[pairs, I] in the schedule's order -> [pairs, H] by pair, of that dtype."""
    from flexpert.kernels.moe import gemm_kernels as kernels

    values = inner.values
    _check_tile(tile, experts, inner)
    rows = values.new_empty(len(values), experts.hidden, dtype=dtype)
    tiles, total, bound = schedule.of(tile.rows)
    descriptor = experts.down_box(tile.columns, tile.depth) if tile.tma else None
    packed = _row_box(values, tile) if tile.packed else None
    kernels.grouped_down[_grid(bound, experts.hidden, tile, values)](
        values, _or(inner.scale, values), _or(packed, values), experts.down.arena, _or(descriptor, values),
        _scales(experts.down_scale, values), _or(experts.down_bias, values), schedule.order, rows, tiles, total,
        *_strides(experts.down, experts.down_scale), H=experts.hidden, INNER=experts.inner, TRANSPOSED=experts.transposed,
        HAS_BIAS=experts.down_bias is not None, SCALED=experts.scaled, SCALED_ROWS=inner.scale is not None,
        PACKED=packed is not None, **_constants(tile, descriptor is not None),
    )  # fmt: skip
    return rows


def _check_tile(tile: Tile, experts: ExpertWeights, rows: Rows) -> None:
    if tile.flat and (tile.tail or not tile.programs):
        raise ValueError(
            f"a flat tile with {tile.programs} programs and tail {tile.tail}, expected programs and no tail"
        )
    if experts.scaled and SCALE_BLOCK % tile.depth:
        raise ValueError(f"a tile of depth {tile.depth}, expected a divisor of {SCALE_BLOCK} for weights in fp8")
    if rows.scale is not None and not experts.quantize_rows:
        raise ValueError("a plan that quantises rows, expected one that does not: the weights' quantize_rows is False")


def _row_box(rows: Tensor, tile: Tile) -> Any:
    """Rows in the schedule's order, for the tensor-memory accelerator."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    aligned = not (rows.data_ptr() % 16 or rows.shape[1] * rows.element_size() % 16)
    return TensorDescriptor.from_tensor(rows, [tile.rows, tile.depth]) if aligned else None


def _grid(bound: int, columns: int, tile: Tile, like: Tensor) -> tuple[int]:
    work = bound * -(-columns // tile.columns)
    if not tile.programs:
        return (work,)
    return (min(work, tile.programs * multiprocessors(like.device)),)


def _constants(tile: Tile, tma: bool) -> dict[str, Any]:
    return {
        "BM": tile.rows, "BN": tile.columns, "BK": tile.depth, "STAGES": tile.stages, "GROUP": tile.group, "SWAP": tile.swap, "TMA": tma,
        "TAIL": tile.tail and tile.rows >= TAIL_ROWS, "PERSISTENT": tile.programs > 0, "FLAT": tile.flat, "num_warps": tile.warps,
    }  # fmt: skip


def _epilogue(experts: ExpertWeights) -> dict[str, Any]:
    act = experts.activation
    return {
        "INTERLEAVED": experts.interleaved, "HAS_BIAS": experts.up_bias is not None,
        "ACTIVATION": act.name, "LIMIT": act.limit, "ALPHA": act.alpha,
    }  # fmt: skip


def _strides(stored: Stored, scale: Stored | None) -> tuple[int, int, int, int]:
    return stored.slot_stride, stored.offset, scale.slot_stride if scale else 0, scale.offset if scale else 0


def _scales(scale: Stored | None, stand_in: Tensor) -> Tensor:
    return stand_in if scale is None else scale.arena


def _or(value: Any, stand_in: Tensor) -> Any:
    """Kernels take a pointer also where they read nothing."""
    return stand_in if value is None else value


def _check(hidden: Tensor, top_k_index: Tensor, experts: ExpertWeights) -> None:
    device = experts.device
    fits = hidden.dim() == 2 and hidden.shape[1] == experts.hidden and hidden.stride(1) == 1
    known = hidden.dtype in ROW_DTYPES if experts.scaled else hidden.dtype == experts.dtype
    wanted = "bfloat16 or float16" if experts.scaled else experts.dtype
    expected = f"{wanted} [tokens, {experts.hidden}] on {device}, its last dimension contiguous"
    require(fits and known and hidden.device == device, "hidden", hidden, expected)
    fits = (
        top_k_index.dim() == 2 and len(top_k_index) == len(hidden) and top_k_index.dtype in (torch.int32, torch.int64)
    )
    require(
        fits and top_k_index.device == device,
        "top_k_index",
        top_k_index,
        f"int32 or int64 [{len(hidden)}, k] on {device}",
    )
