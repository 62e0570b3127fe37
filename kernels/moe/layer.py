"""One MoE layer on a GPU: from top-k ids and weights to the reduced output, or to one unsummed row per (token, k).

`ExpertWeights` says where the experts lie: a strided arena of slots and the residency table `expert_slot` on the device, which kernels
read at every call, so weights may move between slots under a captured graph. All work is launched without a host synchronisation and
without a launch that depends on the routing. `forward_reference` is the same in a few lines of PyTorch, for tests and other machines.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from flexpert.kernels.moe.plan import GemvTile, LayerShape, Plan, Tile, choose_plan, table_of
from flexpert.kernels.moe.routing import Schedule, route

SUM_COLUMNS = 1024
BOX = 256  # the most rows or columns that the tensor-memory accelerator takes at once


@dataclass(frozen=True)
class Activation:
    """ "silu" and "gelu_tanh": act(gate) * up. "clamped": gpt-oss's, with its limit and alpha."""

    name: str = "silu"
    limit: float = 7.0
    alpha: float = 1.702

    def __call__(self, gate: Tensor, up: Tensor) -> Tensor:
        """float32 [.., I] x 2 -> [.., I]: the reference."""
        if self.name == "clamped":
            gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
            return gate * torch.sigmoid(gate * self.alpha) * (up + 1)
        act = (
            torch.nn.functional.silu(gate)
            if self.name == "silu"
            else torch.nn.functional.gelu(gate, approximate="tanh")
        )
        return act * up


@dataclass(eq=False)
class ExpertWeights:
    """Experts of a layer in an arena.

    arena: one-dimensional, bfloat16 or float16 (float32 for tests); slot s begins at element s * slot_stride, and in it the matrices
    at up_offset, [2I, H], and down_offset, [H, I]; `transposed`: stored as [H, 2I] and [I, H]. interleaved: gate and up columns take turns,
    else all gates come first. expert_slot: int32 [E] on the arena's device, -1: not resident. up_bias [E, 2I], down_bias [E, H].
    Raises ValueError, with the argument and what was expected, where they do not fit.
    """

    arena: Tensor
    slot_stride: int
    up_offset: int
    down_offset: int
    expert_slot: Tensor
    hidden: int
    inner: int
    activation: Activation = Activation()
    transposed: bool = False
    interleaved: bool = False
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    _descriptors: dict[tuple[Any, ...], Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        _require(
            self.arena.dim() == 1 and self.arena.is_contiguous(),
            "arena",
            self.arena,
            "a contiguous one-dimensional tensor",
        )
        _require(
            self.arena.dtype in (torch.bfloat16, torch.float16, torch.float32),
            "arena",
            self.arena,
            "bfloat16, float16 or float32",
        )
        on_device = self.expert_slot.device == self.arena.device
        fits = self.expert_slot.dim() == 1 and self.expert_slot.dtype == torch.int32 and on_device
        _require(fits, "expert_slot", self.expert_slot, f"int32 [experts] on {self.arena.device}")
        for name, value in (("hidden", self.hidden), ("inner", self.inner)):
            if value <= 0 or value % 64:
                raise ValueError(f"{name} is {value}, expected a positive multiple of 64")
        for name, bias, columns in (
            ("up_bias", self.up_bias, 2 * self.inner),
            ("down_bias", self.down_bias, self.hidden),
        ):
            expected = (len(self.expert_slot), columns)
            if bias is not None:
                fits = tuple(bias.shape) == expected and bias.device == self.arena.device and bias.is_contiguous()
                _require(fits, name, bias, f"contiguous {list(expected)} on {self.arena.device}")

    def shape(self, top_k: int) -> LayerShape:
        """What plans are chosen by."""
        return LayerShape(
            num_experts=len(self.expert_slot), hidden=self.hidden, inner=self.inner, top_k=top_k,
            dtype=str(self.arena.dtype).removeprefix("torch."), transposed=self.transposed, interleaved=self.interleaved,
        )  # fmt: skip

    def matrices(self, slot: int) -> tuple[Tensor, Tensor]:
        """Views [2I, H] and [H, I] of one slot."""
        begin = slot * self.slot_stride
        sizes = ((2 * self.inner, self.hidden), (self.hidden, self.inner))
        stored = []
        for offset, (rows, columns) in zip((self.up_offset, self.down_offset), sizes, strict=True):
            flat = self.arena[begin + offset : begin + offset + rows * columns]
            stored.append(flat.view(columns, rows).t() if self.transposed else flat.view(rows, columns))
        return stored[0], stored[1]

    def descriptor(self, offset: int, rows: int, columns: int, box: tuple[int, int]) -> Any:
        """For the tensor-memory accelerator: [slots, rows, columns] as stored, read in boxes [1, *box]; None where it cannot read them."""
        from triton.tools.tensor_descriptor import TensorDescriptor

        key = (offset, rows, columns, box)
        if key not in self._descriptors:
            width = self.arena.element_size()
            starts = self.arena.data_ptr() + offset * width
            aligned = not (starts % 16 or self.slot_stride * width % 16 or columns * width % 16)
            slots = (self.arena.numel() - offset - rows * columns) // self.slot_stride + 1
            self._descriptors[key] = (
                TensorDescriptor(self.arena[offset:], [slots, rows, columns], [self.slot_stride, columns, 1], [1, *box])
                if aligned and max(box) <= BOX
                else None
            )
        return self._descriptors[key]


def moe_forward(
    hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor, experts: ExpertWeights, plan: Plan | None = None
) -> Tensor:
    """[tokens, H], ids [tokens, k], weights [tokens, k] -> [tokens, H], of hidden's dtype. Pairs whose expert is not resident, and ids
    outside 0..E-1, count as zero. Raises ValueError for shapes, dtypes or devices that do not fit."""
    _check(hidden, top_k_index, experts)
    if top_k_weights.shape != top_k_index.shape or top_k_weights.device != hidden.device:
        _require(False, "top_k_weights", top_k_weights, f"{list(top_k_index.shape)} on {hidden.device}")
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


def moe_rows(hidden: Tensor, top_k_index: Tensor, experts: ExpertWeights, plan: Plan | None = None) -> Tensor:
    """One unweighted row for each (token, k), [tokens, k, H], for the home rank to sum; of absent experts unwritten. With the same plan,
    `moe_forward` gives these rows weighted and summed in top-k order, bit for bit."""
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


def forward_reference(hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor, experts: ExpertWeights) -> Tensor:
    """The same, expert by expert in float32 and summed in float32."""
    output = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
    for expert, slot in enumerate(experts.expert_slot.tolist()):
        tokens, place = torch.where(top_k_index == expert)
        if slot < 0 or not len(tokens):
            continue
        up, down = (matrix.float() for matrix in experts.matrices(slot))
        both = hidden[tokens].float() @ up.T + (0 if experts.up_bias is None else experts.up_bias[expert].float())
        gate, value = (both[:, ::2], both[:, 1::2]) if experts.interleaved else both.chunk(2, dim=1)
        rows = experts.activation(gate, value) @ down.T + (
            0 if experts.down_bias is None else experts.down_bias[expert].float()
        )
        output.index_add_(0, tokens, rows * top_k_weights[tokens, place, None].float())
    return output


def _gemv(
    hidden: Tensor, ids: Tensor, weights: Tensor | None, experts: ExpertWeights, plan: Plan, output: Tensor
) -> None:
    import triton

    from flexpert.kernels.moe import gemv_kernels as kernels

    assert isinstance(plan.up, GemvTile)
    assert isinstance(plan.down, GemvTile)
    tokens, top_k = ids.shape
    inner = hidden.new_empty(tokens * top_k, experts.inner)
    sizes = {
        "E": len(experts.expert_slot),
        "H": experts.hidden,
        "INNER": experts.inner,
        "TOP_K": top_k,
        "TRANSPOSED": experts.transposed,
    }
    kernels.gemv_up[(tokens * top_k, triton.cdiv(experts.inner, plan.up.columns))](
        hidden, experts.arena, _or(experts.up_bias, hidden), ids, experts.expert_slot, inner, experts.slot_stride, experts.up_offset,
        hidden.stride(0), **sizes, **_epilogue(experts), BN=plan.up.columns, BK=plan.up.depth, num_warps=plan.up.warps,
    )  # fmt: skip
    kernels.gemv_down[(tokens, triton.cdiv(experts.hidden, plan.down.columns))](
        inner, experts.arena, _or(experts.down_bias, hidden), ids, _or(weights, hidden), experts.expert_slot, output, experts.slot_stride,
        experts.down_offset, **sizes, HAS_BIAS=experts.down_bias is not None, SUM=weights is not None,
        BN=plan.down.columns, BK=plan.down.depth, num_warps=plan.down.warps,
    )  # fmt: skip


def _grouped(hidden: Tensor, ids: Tensor, experts: ExpertWeights, plan: Plan) -> Tensor:
    """Rows [pairs, H] by pair; of absent experts unwritten."""
    assert isinstance(plan.up, Tile)
    assert isinstance(plan.down, Tile)
    schedule = route(ids, experts.expert_slot)
    inner = up_product(hidden, ids.shape[1], experts, schedule, plan.up)
    return down_product(inner, experts, schedule, plan.down)


def up_product(hidden: Tensor, top_k: int, experts: ExpertWeights, schedule: Schedule, tile: Tile) -> Tensor:
    """[tokens, H] -> activated rows [pairs, I] in the schedule's order."""
    from flexpert.kernels.moe import gemm_kernels as kernels

    inner = hidden.new_empty(len(schedule.order), experts.inner)
    tiles, total, bound = schedule.of(tile.rows)
    rows = tile.columns * (2 if experts.interleaved else 1)
    descriptor = _weight_box(experts, experts.up_offset, 2 * experts.inner, experts.hidden, rows, tile)
    kernels.grouped_up[_grid(bound, experts.inner, tile, hidden)](
        hidden, experts.arena, _or(descriptor, experts.arena), _or(experts.up_bias, hidden), schedule.order, inner, tiles, total,
        experts.slot_stride, experts.up_offset, hidden.stride(0), H=experts.hidden, INNER=experts.inner, TOP_K=top_k,
        TRANSPOSED=experts.transposed, **_epilogue(experts), **_constants(tile, descriptor is not None),
    )  # fmt: skip
    return inner


def down_product(inner: Tensor, experts: ExpertWeights, schedule: Schedule, tile: Tile) -> Tensor:
    """[pairs, I] in the schedule's order -> [pairs, H] by pair."""
    from flexpert.kernels.moe import gemm_kernels as kernels

    rows = inner.new_empty(len(inner), experts.hidden)
    tiles, total, bound = schedule.of(tile.rows)
    descriptor = _weight_box(experts, experts.down_offset, experts.hidden, experts.inner, tile.columns, tile)
    packed = _row_box(inner, tile) if tile.packed else None
    kernels.grouped_down[_grid(bound, experts.hidden, tile, inner)](
        inner, _or(packed, inner), experts.arena, _or(descriptor, experts.arena), _or(experts.down_bias, inner), schedule.order, rows,
        tiles, total, experts.slot_stride, experts.down_offset, H=experts.hidden, INNER=experts.inner, TRANSPOSED=experts.transposed,
        HAS_BIAS=experts.down_bias is not None, PACKED=packed is not None, **_constants(tile, descriptor is not None),
    )  # fmt: skip
    return rows


def _row_box(rows: Tensor, tile: Tile) -> Any:
    """Rows in the schedule's order, for the tensor-memory accelerator."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    aligned = not (rows.data_ptr() % 16 or rows.shape[1] * rows.element_size() % 16)
    return TensorDescriptor.from_tensor(rows, [tile.rows, tile.depth]) if aligned else None


def _weight_box(experts: ExpertWeights, offset: int, rows: int, columns: int, box_rows: int, tile: Tile) -> Any:
    if not tile.tma:
        return None
    if experts.transposed:
        return experts.descriptor(offset, columns, rows, (tile.depth, box_rows))
    return experts.descriptor(offset, rows, columns, (box_rows, tile.depth))


def _grid(bound: int, columns: int, tile: Tile, like: Tensor) -> tuple[int]:
    work = bound * -(-columns // tile.columns)
    if not tile.programs:
        return (work,)
    return (min(work, tile.programs * torch.cuda.get_device_properties(like.device).multi_processor_count),)


def _constants(tile: Tile, tma: bool) -> dict[str, Any]:
    return {
        "BM": tile.rows, "BN": tile.columns, "BK": tile.depth, "STAGES": tile.stages, "GROUP": tile.group, "SWAP": tile.swap, "TMA": tma,
        "TAIL": tile.tail, "PERSISTENT": tile.programs > 0, "num_warps": tile.warps,
    }  # fmt: skip


def _epilogue(experts: ExpertWeights) -> dict[str, Any]:
    act = experts.activation
    return {
        "INTERLEAVED": experts.interleaved, "HAS_BIAS": experts.up_bias is not None,
        "ACTIVATION": act.name, "LIMIT": act.limit, "ALPHA": act.alpha,
    }  # fmt: skip


def _or(value: Any, stand_in: Tensor) -> Any:
    """Kernels take a pointer also where they read nothing."""
    return stand_in if value is None else value


def _check(hidden: Tensor, top_k_index: Tensor, experts: ExpertWeights) -> None:
    device = experts.arena.device
    fits = hidden.dim() == 2 and hidden.shape[1] == experts.hidden and hidden.stride(1) == 1
    fits = fits and hidden.dtype == experts.arena.dtype and hidden.device == device
    _require(
        fits,
        "hidden",
        hidden,
        f"{experts.arena.dtype} [tokens, {experts.hidden}] on {device}, its last dimension contiguous",
    )
    fits = (
        top_k_index.dim() == 2 and len(top_k_index) == len(hidden) and top_k_index.dtype in (torch.int32, torch.int64)
    )
    _require(
        fits and top_k_index.device == device,
        "top_k_index",
        top_k_index,
        f"int32 or int64 [{len(hidden)}, k] on {device}",
    )


def _require(fits: bool, name: str, found: Tensor, expected: str) -> None:
    if not fits:
        raise ValueError(f"{name} is {found.dtype} {list(found.shape)} on {found.device}, expected {expected}")
