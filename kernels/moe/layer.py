"""One MoE layer on a GPU: from top-k ids and weights to the reduced output, or to one unsummed row per (token, k).

`ExpertWeights` says where the experts lie: strided slots of an arena and the residency table `expert_slot` on the device, which kernels
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
LARGEST_BOX = 256  # rows or columns that the tensor-memory accelerator takes at once
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


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


@dataclass(frozen=True)
class Stored:
    """One matrix of every slot. arena: one-dimensional; slot s begins at element s * slot_stride + offset."""

    arena: Tensor
    slot_stride: int
    offset: int = 0


@dataclass(eq=False)
class ExpertWeights:
    """Experts of a layer, read in place.

    up, down: [2I, H] and [H, I] of each slot, bfloat16 or float16 (float32 for tests), in one arena or in two; `transposed`: stored as
    [H, 2I] and [I, H]. interleaved: gate and up columns take turns, else all gates come first. expert_slot: int32 [E] on the same
    device, -1: not resident. up_bias [E, 2I], down_bias [E, H]. Raises ValueError, with the argument and what was expected, where they
    do not fit.
    """

    up: Stored
    down: Stored
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
        for name, value in (("hidden", self.hidden), ("inner", self.inner)):
            if value <= 0 or value % 64:
                raise ValueError(f"{name} is {value}, expected a positive multiple of 64")
        for name, arena in (("up.arena", self.up.arena), ("down.arena", self.down.arena)):
            _require(arena.dim() == 1 and arena.is_contiguous(), name, arena, "a contiguous one-dimensional tensor")
            _require(arena.dtype in DTYPES, name, arena, "bfloat16, float16 or float32")
            same = arena.dtype == self.dtype and arena.device == self.device
            _require(same, name, arena, f"{self.dtype} on {self.device}, as up.arena")
        slots = self.expert_slot
        fits = slots.dim() == 1 and slots.dtype == torch.int32 and slots.device == self.device
        _require(fits, "expert_slot", slots, f"int32 [experts] on {self.device}")
        for name, bias, columns in (
            ("up_bias", self.up_bias, 2 * self.inner),
            ("down_bias", self.down_bias, self.hidden),
        ):
            if bias is not None:
                expected = (len(slots), columns)
                fits = tuple(bias.shape) == expected and bias.device == self.device and bias.is_contiguous()
                _require(fits, name, bias, f"contiguous {list(expected)} on {self.device}")

    @property
    def dtype(self) -> torch.dtype:
        return self.up.arena.dtype

    @property
    def device(self) -> torch.device:
        return self.up.arena.device

    def shape(self, top_k: int) -> LayerShape:
        """What plans are chosen by."""
        return LayerShape(
            num_experts=len(self.expert_slot), hidden=self.hidden, inner=self.inner, top_k=top_k,
            dtype=str(self.dtype).removeprefix("torch."), transposed=self.transposed, interleaved=self.interleaved,
        )  # fmt: skip

    def matrices(self, slot: int) -> tuple[Tensor, Tensor]:
        """Views [2I, H] and [H, I] of one slot."""
        sizes = ((self.up, 2 * self.inner, self.hidden), (self.down, self.hidden, self.inner))
        views = []
        for stored, rows, columns in sizes:
            begin = slot * stored.slot_stride + stored.offset
            flat = stored.arena[begin : begin + rows * columns]
            views.append(flat.view(columns, rows).t() if self.transposed else flat.view(rows, columns))
        return views[0], views[1]

    def box(self, stored: Stored, rows: int, columns: int, box: tuple[int, int]) -> Any:
        """A descriptor of [slots, rows, columns] for the tensor-memory accelerator, read in boxes [1, *box]; None where it cannot: it
        wants addresses and strides in multiples of 16 bytes."""
        from triton.tools.tensor_descriptor import TensorDescriptor

        key = (stored is self.up, rows, columns, box)
        if key not in self._descriptors:
            width, first = stored.arena.element_size(), stored.arena[stored.offset :]
            aligned = not (first.data_ptr() % 16 or stored.slot_stride * width % 16 or columns * width % 16)
            slots = (len(first) - rows * columns) // stored.slot_stride + 1
            fits = aligned and max(box) <= LARGEST_BOX
            self._descriptors[key] = (
                TensorDescriptor(first, [slots, rows, columns], [stored.slot_stride, columns, 1], [1, *box])
                if fits
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
        hidden, experts.up.arena, _or(experts.up_bias, hidden), ids, experts.expert_slot, inner, experts.up.slot_stride, experts.up.offset,
        hidden.stride(0), **sizes, **_epilogue(experts), BN=plan.up.columns, BK=plan.up.depth, num_warps=plan.up.warps,
    )  # fmt: skip
    kernels.gemv_down[(tokens, triton.cdiv(experts.hidden, plan.down.columns))](
        inner, experts.down.arena, _or(experts.down_bias, hidden), ids, _or(weights, hidden), experts.expert_slot, output,
        experts.down.slot_stride, experts.down.offset, **sizes, HAS_BIAS=experts.down_bias is not None, SUM=weights is not None,
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
    descriptor = _weight_box(experts, experts.up, 2 * experts.inner, experts.hidden, rows, tile)
    kernels.grouped_up[_grid(bound, experts.inner, tile, hidden)](
        hidden, experts.up.arena, _or(descriptor, hidden), _or(experts.up_bias, hidden), schedule.order, inner, tiles, total,
        experts.up.slot_stride, experts.up.offset, hidden.stride(0), H=experts.hidden, INNER=experts.inner, TOP_K=top_k,
        TRANSPOSED=experts.transposed, **_epilogue(experts), **_constants(tile, descriptor is not None),
    )  # fmt: skip
    return inner


def down_product(inner: Tensor, experts: ExpertWeights, schedule: Schedule, tile: Tile) -> Tensor:
    """[pairs, I] in the schedule's order -> [pairs, H] by pair."""
    from flexpert.kernels.moe import gemm_kernels as kernels

    rows = inner.new_empty(len(inner), experts.hidden)
    tiles, total, bound = schedule.of(tile.rows)
    descriptor = _weight_box(experts, experts.down, experts.hidden, experts.inner, tile.columns, tile)
    packed = _row_box(inner, tile) if tile.packed else None
    kernels.grouped_down[_grid(bound, experts.hidden, tile, inner)](
        inner, _or(packed, inner), experts.down.arena, _or(descriptor, inner), _or(experts.down_bias, inner), schedule.order, rows,
        tiles, total, experts.down.slot_stride, experts.down.offset, H=experts.hidden, INNER=experts.inner, TRANSPOSED=experts.transposed,
        HAS_BIAS=experts.down_bias is not None, PACKED=packed is not None, **_constants(tile, descriptor is not None),
    )  # fmt: skip
    return rows


def _row_box(rows: Tensor, tile: Tile) -> Any:
    """Rows in the schedule's order, for the tensor-memory accelerator."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    aligned = not (rows.data_ptr() % 16 or rows.shape[1] * rows.element_size() % 16)
    return TensorDescriptor.from_tensor(rows, [tile.rows, tile.depth]) if aligned else None


def _weight_box(experts: ExpertWeights, stored: Stored, rows: int, columns: int, box_rows: int, tile: Tile) -> Any:
    if not tile.tma:
        return None
    if experts.transposed:
        return experts.box(stored, columns, rows, (tile.depth, box_rows))
    return experts.box(stored, rows, columns, (box_rows, tile.depth))


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
    device = experts.device
    fits = hidden.dim() == 2 and hidden.shape[1] == experts.hidden and hidden.stride(1) == 1
    fits = fits and hidden.dtype == experts.dtype and hidden.device == device
    _require(
        fits,
        "hidden",
        hidden,
        f"{experts.dtype} [tokens, {experts.hidden}] on {device}, its last dimension contiguous",
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
