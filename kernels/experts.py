"""The experts of one MoE layer, read in place from an arena of slabs: reference on the CPU, plain torch on a GPU.

An expert's weights lie in a slot of the arena (`ExpertSlabs`); which slot is data. All kernels here return one weighted sum of the
unsummed rows of each (token, k) in top-k order, so that placement and batch composition change no bit of a token's result on the CPU:
every expert's rows are padded to multiples of a number at which a matrix product's row does not depend on the rows beside it
(`flexpert.kernels.row_groups`).

Called through `flexpert.kernels.registration` by the experts modules of transformers. Knows nothing of models or checkpoints.
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
    """The experts of one layer.

    arena: one-dimensional, of the weights' dtype; slot s begins at element s * slot_stride. slots[e] is expert e's slot; the slots of a
    layer are neighbours, in any order. parts: "gate_up_proj" [2I, H] (or "up_proj" [I, H] without a gate) and "down_proj" [H, I];
    transposed: stored as [H, 2I] and [I, H]. activate: [..., 2I] -> [..., I], row by row (the module's own gate).
    up_bias, down_bias: [E, 2I] and [E, H] in expert order.
    """

    arena: Tensor
    slot_stride: int
    slots: Sequence[int]
    parts: Mapping[str, SlabPart]
    transposed: bool
    activate: Callable[[Tensor], Tensor]
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    up: Tensor = field(init=False)  # [E, H, 2I] view of the arena in slot order
    down: Tensor = field(init=False)  # [E, I, H]
    position: Tensor | None = field(init=False)  # expert -> place in slot order; None where they are equal

    def __post_init__(self) -> None:
        first = min(self.slots)
        if sorted(self.slots) != list(range(first, first + len(self.slots))):
            raise ValueError(f"the slots of a layer must be neighbours, found {sorted(self.slots)}")
        order = np.argsort(np.asarray(self.slots))
        self.up = self._matrices("gate_up_proj" if "gate_up_proj" in self.parts else "up_proj", first)
        self.down = self._matrices("down_proj", first)
        device = self.arena.device
        in_order = list(order) == list(range(len(order)))
        self.position = None if in_order else torch.from_numpy(np.argsort(order)).to(device)
        if not in_order:
            by_slot = torch.from_numpy(order).to(device)
            self.up_bias = None if self.up_bias is None else self.up_bias[by_slot]
            self.down_bias = None if self.down_bias is None else self.down_bias[by_slot]

    @property
    def num_experts(self) -> int:
        return len(self.slots)

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
    """[tokens, H], [tokens, k] expert ids, [tokens, k] weights -> [tokens, H] of hidden's dtype."""
    compute = _cpu_rows if hidden.device.type == "cpu" else grouped_rows
    expert = top_k_index if slabs.position is None else slabs.position[top_k_index]
    rows = compute(hidden.to(slabs.arena.dtype), expert, slabs)
    return (rows * top_k_weights.unsqueeze(-1)).sum(1).to(hidden.dtype)


def _cpu_rows(hidden: Tensor, expert: Tensor, slabs: ExpertSlabs) -> Tensor:
    """The unweighted result of each (token, k): [tokens, k, H].

    Gathered rows lie in two parts: the first few of every expert, which one batched product takes, and those beyond, expert by expert.
    """
    tokens, top_k = expert.shape
    group = slabs.row_group
    ids = expert.reshape(-1).numpy()
    counts = np.bincount(ids, minlength=slabs.num_experts)
    padded = -(-counts // group) * group
    height = _batched_height(padded, group)
    together = height * slabs.num_experts
    beyond = np.maximum(padded - height, 0)
    begin = together + np.cumsum(beyond) - beyond
    order = np.argsort(ids, kind="stable")
    sorted_ids = ids[order]
    rank = np.arange(len(ids)) - (np.cumsum(counts) - counts)[sorted_ids]  # among the rows of its expert
    placed = np.where(rank < height, sorted_ids * height + rank, begin[sorted_ids] + rank - height)
    place = np.empty_like(ids)  # of each (token, k) among the gathered rows
    place[order] = placed
    total = together + int(beyond.sum())
    source = np.zeros(-(-total // _ELEMENTWISE_ROWS) * _ELEMENTWISE_ROWS, dtype=np.int64)
    source[place] = np.arange(len(ids)) // top_k
    gathered = torch.from_numpy(hidden.numpy().take(source, axis=0))
    runs = [(int(e), int(begin[e]), int(begin[e] + beyond[e])) for e in np.flatnonzero(beyond)]
    inner = _multiply(gathered, slabs.up, slabs.up_bias, together, runs)
    result = _multiply(slabs.activate(inner), slabs.down, slabs.down_bias, together, runs)
    return result.index_select(0, torch.from_numpy(place)).view(tokens, top_k, -1)


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


def grouped_rows(hidden: Tensor, expert: Tensor, slabs: ExpertSlabs) -> Tensor:
    """The same by two grouped products over rows sorted by expert: no host synchronisation, no atomics, so capturable and deterministic."""
    tokens, top_k = expert.shape
    ids, order = torch.sort(expert.reshape(-1), stable=True)
    experts = torch.arange(slabs.num_experts, device=ids.device, dtype=ids.dtype)
    ends = torch.searchsorted(ids, experts, right=True, out_int32=True)
    inner = _grouped_mm(hidden.index_select(0, order // top_k), slabs.up, ends)
    if slabs.up_bias is not None:
        inner = inner + slabs.up_bias.index_select(0, ids)
    result = _grouped_mm(slabs.activate(inner).contiguous(), slabs.down, ends)
    if slabs.down_bias is not None:
        result = result + slabs.down_bias.index_select(0, ids)
    place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    return result.index_select(0, place).view(tokens, top_k, -1)


def _grouped_mm(rows: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    grouped = getattr(torch.nn.functional, "grouped_mm", None) or torch._grouped_mm
    return grouped(rows, matrices, offs=ends)
