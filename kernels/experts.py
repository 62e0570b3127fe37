"""The experts of one MoE layer, read in place from an arena of slabs: reference on the CPU, plain torch on a GPU.

An expert's weights lie in a slot of the arena (`ExpertSlabs`), of all experts of a layer or of some; which slot is data. `expert_rows`
computes one unsummed row for each pair (row, expert), wherever the row comes from; `weighted_sum` adds the rows of a token in top-k
order. So placement and batch composition change no bit of a token's result on the CPU: every expert's rows are padded to multiples of a
number at which a matrix product's row does not depend on the rows beside it (`flexpert.kernels.row_groups`).

Called through `flexpert.kernels.registration` by the experts modules of transformers, and by `workers.ep`, which brings rows of other
ranks. Knows nothing of models, checkpoints or ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from flexpert.kernels.row_groups import SAFE_ROWS, row_group

# How many rows of every expert the one batched product may take, and the rows' worth of time of one expert's product of its own.
_BATCHED_HEIGHTS = {
    group: np.array([height for height in (0, 4, 8, 16, 32) if height % group == 0])[:, None]
    for group in (4, 8, SAFE_ROWS)
}
_SEPARATE_PRODUCT_ROWS = 40
_ELEMENTWISE_ROWS = (
    64  # total rows are padded to a multiple of this, so that element-wise operations cover whole vectors
)


@dataclass(frozen=True)
class SlabPart:
    """One matrix of a slab: where it begins, in elements, and its shape as the checkpoint has it."""

    offset: int
    shape: tuple[int, int]


@dataclass
class ExpertSlabs:
    """Experts of one layer: all of them, or those that lie here.

    arena: one-dimensional, of the weights' dtype; slot s begins at element s * slot_stride. slots[i] is the slot of expert experts[i]
    (of expert i where `experts` is None: then all are here); the slots are neighbours, in any order. num_experts: of the layer, needed
    with `experts`. parts: "gate_up_proj" [2I, H] (or "up_proj" [I, H] without a gate) and "down_proj" [H, I]; transposed: stored as
    [H, 2I] and [I, H]. activate: [..., 2I] -> [..., I], row by row (the module's own gate). up_bias, down_bias: [E, 2I] and [E, H]
    of all experts of the layer, in their order.
    """

    arena: Tensor
    slot_stride: int
    slots: Sequence[int]
    parts: Mapping[str, SlabPart]
    transposed: bool
    activate: Callable[[Tensor], Tensor]
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    experts: Sequence[int] | None = None
    num_experts: int = 0
    up: Tensor = field(init=False)  # [slots, H, 2I] view of the arena in slot order
    down: Tensor = field(init=False)  # [slots, I, H]
    row_of: np.ndarray = field(init=False)  # [E] expert -> place in slot order, -1 where it is not here
    computed: np.ndarray = field(init=False)  # [slots] pairs that each expert has computed on the CPU, in slot order
    position: Tensor | None = field(init=False)  # the same on the arena's device; None where place and expert are equal

    def __post_init__(self) -> None:
        first = min(self.slots)
        if sorted(self.slots) != list(range(first, first + len(self.slots))):
            raise ValueError(f"the slots of a layer must be neighbours, found {sorted(self.slots)}")
        experts = np.arange(len(self.slots)) if self.experts is None else np.asarray(self.experts, dtype=np.int64)
        self.num_experts = self.num_experts or len(experts)
        if (
            len(experts) != len(self.slots)
            or len(np.unique(experts)) != len(experts)
            or experts.max() >= self.num_experts
        ):
            raise ValueError(f"{len(self.slots)} slots for experts {experts.tolist()} of {self.num_experts}")
        in_slot_order = experts[np.argsort(np.asarray(self.slots))]
        self.computed = np.zeros(len(experts), dtype=np.int64)
        self.row_of = np.full(self.num_experts, -1, dtype=np.int64)
        self.row_of[in_slot_order] = np.arange(len(experts))
        self.up = self._matrices("gate_up_proj" if "gate_up_proj" in self.parts else "up_proj", first)
        self.down = self._matrices("down_proj", first)
        self.position = None
        if not np.array_equal(in_slot_order, np.arange(self.num_experts)):
            self.position = torch.from_numpy(self.row_of).to(self.arena.device)
            chosen = torch.from_numpy(in_slot_order).to(self.arena.device)
            self.up_bias = None if self.up_bias is None else self.up_bias[chosen]
            self.down_bias = None if self.down_bias is None else self.down_bias[chosen]

    @cached_property
    def row_group(self) -> int:
        """Rows of an expert are padded to multiples of this on the CPU."""
        if self.arena.dtype != torch.float32:
            return SAFE_ROWS
        return row_group((matrix.shape[1], matrix.shape[2], self.transposed) for matrix in (self.up, self.down))

    def _matrices(self, name: str, first_slot: int) -> Tensor:
        part = self.parts[name]
        view = self.arena.as_strided(
            (len(self.slots), *part.shape),
            (self.slot_stride, part.shape[1], 1),
            self.arena.storage_offset() + first_slot * self.slot_stride + part.offset,
        )
        return view if self.transposed else view.transpose(1, 2)


def experts_forward(hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor, slabs: ExpertSlabs) -> Tensor:
    """[tokens, H], [tokens, k] expert ids, [tokens, k] weights -> [tokens, H] of hidden's dtype. All picked experts must be here."""
    place = top_k_index if slabs.position is None else slabs.position[top_k_index]
    rows = expert_rows(hidden.to(slabs.arena.dtype), None, place.reshape(-1), slabs)
    return weighted_sum(rows.view(*top_k_index.shape, hidden.shape[1]), top_k_weights, hidden.dtype)


def weighted_sum(rows: Tensor, top_k_weights: Tensor, dtype: torch.dtype) -> Tensor:
    """[tokens, k, H] unweighted rows, [tokens, k] -> [tokens, H], added in top-k order. The only place where rows are summed."""
    return (rows * top_k_weights.unsqueeze(-1)).sum(1).to(dtype)


def expert_rows(hidden: Tensor, source: Tensor | None, place: Tensor, slabs: ExpertSlabs) -> Tensor:
    """The unweighted result [pairs, H] of each pair: row source[i] of `hidden` [rows, H] through the expert at place[i] in slot order.

    hidden: of the arena's dtype. source, place: int64 [pairs]; None: every row has equally many pairs, row after row.
    """
    if not len(place):
        return hidden.new_empty(0, hidden.shape[1])
    compute = _cpu_rows if hidden.device.type == "cpu" else grouped_rows
    return compute(hidden, source, place, slabs)


def _cpu_rows(hidden: Tensor, source: Tensor | None, place: Tensor, slabs: ExpertSlabs) -> Tensor:
    """Gathered rows lie in two parts: the first few of every expert, for one batched product, and those beyond, expert by expert."""
    group, experts = slabs.row_group, len(slabs.slots)
    ids = place.numpy()
    counts = np.bincount(ids, minlength=experts)
    slabs.computed += counts
    padded = -(-counts // group) * group
    height = _batched_height(padded, group)
    together = height * experts
    beyond = np.maximum(padded - height, 0)
    begin = together + np.cumsum(beyond) - beyond
    order = np.argsort(ids, kind="stable")
    sorted_ids = ids[order]
    rank = np.arange(len(ids)) - (np.cumsum(counts) - counts)[sorted_ids]  # among the rows of its expert
    gathered_at = np.empty_like(ids)  # of each pair
    gathered_at[order] = np.where(rank < height, sorted_ids * height + rank, begin[sorted_ids] + rank - height)
    total = together + int(beyond.sum())
    taken = np.zeros(-(-total // _ELEMENTWISE_ROWS) * _ELEMENTWISE_ROWS, dtype=np.int64)
    taken[gathered_at] = np.arange(len(ids)) // (len(ids) // len(hidden)) if source is None else source.numpy()
    gathered = take_rows(hidden, taken)
    runs = [(int(e), int(begin[e]), int(begin[e] + beyond[e])) for e in np.flatnonzero(beyond)]
    inner = _multiply(gathered, slabs.up, slabs.up_bias, together, runs)
    result = _multiply(slabs.activate(inner), slabs.down, slabs.down_bias, together, runs)
    return result.index_select(0, torch.from_numpy(gathered_at))


def take_rows(rows: Tensor, index: np.ndarray) -> Tensor:
    """rows[index] on the CPU, by numpy, which was measured faster than index_select; dtypes that numpy lacks as bytes."""
    if rows.dtype != torch.bfloat16:
        return torch.from_numpy(rows.numpy().take(index, axis=0))
    return torch.from_numpy(rows.view(torch.uint8).numpy().take(index, axis=0)).view(rows.dtype)


def _batched_height(padded: np.ndarray, group: int) -> int:
    """How many rows of every expert to compute in one batched product: a multiple of `group` that costs least, 0 for none."""
    heights = _BATCHED_HEIGHTS[group]
    beyond = padded - heights
    np.maximum(beyond, 0, out=beyond)
    cost = beyond.sum(1) + (beyond > 0).sum(1) * _SEPARATE_PRODUCT_ROWS + heights[:, 0] * len(padded)
    return int(heights[cost.argmin(), 0])


def _multiply(
    rows: Tensor, matrices: Tensor, bias: Tensor | None, together: int, runs: list[tuple[int, int, int]]
) -> Tensor:
    """rows [:together] are equally many of every expert, the rest as `runs` (expert, first row, end) says."""
    result = rows.new_empty(len(rows), matrices.shape[2])
    if together:
        shape = (len(matrices), together // len(matrices))
        first = result[:together].unflatten(0, shape)
        torch.bmm(rows[:together].unflatten(0, shape), matrices, out=first)
        if bias is not None:
            first += bias.unsqueeze(1)
    for expert, begin, end in runs:
        torch.mm(rows[begin:end], matrices[expert], out=result[begin:end])
        if bias is not None:
            result[begin:end] += bias[expert]
    return result


def grouped_rows(hidden: Tensor, source: Tensor | None, place: Tensor, slabs: ExpertSlabs) -> Tensor:
    """The same by two grouped products over rows sorted by expert: no host synchronisation, no atomics, so capturable and deterministic."""
    ids, order = torch.sort(place, stable=True)
    experts = torch.arange(len(slabs.slots), device=ids.device, dtype=ids.dtype)
    ends = torch.searchsorted(ids, experts, right=True, out_int32=True)
    taken = order // (len(order) // len(hidden)) if source is None else source.index_select(0, order)
    inner = _grouped_mm(hidden.index_select(0, taken), slabs.up, ends)
    if slabs.up_bias is not None:
        inner = inner + slabs.up_bias.index_select(0, ids)
    result = _grouped_mm(slabs.activate(inner).contiguous(), slabs.down, ends)
    if slabs.down_bias is not None:
        result = result + slabs.down_bias.index_select(0, ids)
    gathered_at = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    return result.index_select(0, gathered_at)


def _grouped_mm(rows: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    grouped = getattr(torch.nn.functional, "grouped_mm", None) or torch._grouped_mm
    return grouped(rows, matrices, offs=ends)
