"""Where the experts of a layer lie, as the kernels read them: strided slots of an arena and the residency table.

`expert_slot` lies on the device and is read at every call, so weights may move between slots under a captured graph.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from flexpert.kernels.arguments import require
from flexpert.kernels.moe.plan import LayerShape

LARGEST_BOX = 256  # rows or columns that the tensor-memory accelerator takes at once
FP8 = torch.float8_e4m3fn
DTYPES = (torch.bfloat16, torch.float16, torch.float32, FP8)
FP8_MAX = 448.0  # of float8_e4m3fn
SCALE_BLOCK = 128  # rows and columns of an fp8 weight that share a scale, and columns of a quantised row
SMALLEST = 1e-10  # a quantised group of zeros has a scale too


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

    def of_slot(self, slot: int, size: int) -> Tensor:
        begin = slot * self.slot_stride + self.offset
        return self.arena[begin : begin + size]


@dataclass(eq=False)
class ExpertWeights:
    """Experts of a layer, read in place.

    up, down: [2I, H] and [H, I] of each slot, bfloat16 or float16 (float32 for tests), in one arena or in two; `transposed`: stored as
    [H, 2I] and [I, H]. interleaved: gate and up columns take turns, else all gates come first. expert_slot: int32 [E] on the same
    device, -1: not resident. up_bias [E, 2I], down_bias [E, H].

    float8_e4m3fn takes up_scale and down_scale: float32 [2I / 128, H / 128] and [H / 128, I / 128] of each slot, by which the blocks of
    128 x 128 weights are multiplied. quantize_rows: rows may be quantised to fp8 too, in groups of 128 columns, where a plan gains by
    it (W8A8); else they stay as they come (W8A16). Raises ValueError, with the argument and what was expected, where they do not fit.
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
    up_scale: Stored | None = None
    down_scale: Stored | None = None
    quantize_rows: bool = False
    _descriptors: dict[tuple[Any, ...], Any] = field(default_factory=dict, repr=False, init=False)

    def __post_init__(self) -> None:
        unit = SCALE_BLOCK if self.scaled else 64
        for name, value in (("hidden", self.hidden), ("inner", self.inner)):
            if value <= 0 or value % unit:
                raise ValueError(f"{name} is {value}, expected a positive multiple of {unit} for {self.dtype}")
        for name, arena in (("up.arena", self.up.arena), ("down.arena", self.down.arena)):
            require(arena.dim() == 1 and arena.is_contiguous(), name, arena, "a contiguous one-dimensional tensor")
            require(arena.dtype in DTYPES, name, arena, "bfloat16, float16, float8_e4m3fn or float32")
            same = arena.dtype == self.dtype and arena.device == self.device
            require(same, name, arena, f"{self.dtype} on {self.device}, as up.arena")
        for name, stored, factor in (("up.arena", self.up, 2), ("down.arena", self.down, 1)):
            least = stored.offset + factor * self.inner * self.hidden
            require(len(stored.arena) >= least, name, stored.arena, f"at least {least} elements, one slot's")
        slots = self.expert_slot
        fits = slots.dim() == 1 and len(slots) > 0 and slots.dtype == torch.int32 and slots.device == self.device
        require(fits, "expert_slot", slots, f"int32 [experts] on {self.device}")
        self._check_biases()
        self._check_scales()

    def _check_biases(self) -> None:
        for name, bias, columns in (
            ("up_bias", self.up_bias, 2 * self.inner),
            ("down_bias", self.down_bias, self.hidden),
        ):
            if bias is not None:
                expected = (len(self.expert_slot), columns)
                fits = tuple(bias.shape) == expected and bias.device == self.device and bias.is_contiguous()
                require(fits, name, bias, f"contiguous {list(expected)} on {self.device}")

    def _check_scales(self) -> None:
        for name, scale in (("up_scale", self.up_scale), ("down_scale", self.down_scale)):
            if (scale is not None) != self.scaled:
                found = "None" if scale is None else "given"
                raise ValueError(f"{name} is {found}, expected {'scales' if self.scaled else 'None'} for {self.dtype}")
            if scale is not None:
                arena = scale.arena
                fits = arena.dim() == 1 and arena.is_contiguous() and arena.dtype == torch.float32
                fits = fits and arena.device == self.device
                require(fits, f"{name}.arena", arena, f"contiguous one-dimensional float32 on {self.device}")
        if self.scaled and (self.transposed or self.interleaved):
            raise ValueError(f"transposed or interleaved is True, expected False for {self.dtype}")
        if self.quantize_rows and not self.scaled:
            raise ValueError(f"quantize_rows is True, expected False for {self.dtype}")

    @property
    def dtype(self) -> torch.dtype:
        return self.up.arena.dtype

    @property
    def scaled(self) -> bool:
        return self.dtype == FP8

    @property
    def device(self) -> torch.device:
        return self.up.arena.device

    def shape(self, top_k: int) -> LayerShape:
        """What plans are chosen by."""
        return LayerShape(
            num_experts=len(self.expert_slot), hidden=self.hidden, inner=self.inner, top_k=top_k,
            dtype=str(self.dtype).removeprefix("torch."), transposed=self.transposed, interleaved=self.interleaved,
            quantize_rows=self.quantize_rows,
        )  # fmt: skip

    def matrices(self, slot: int) -> tuple[Tensor, Tensor]:
        """[2I, H] and [H, I] of one slot: views, or float32 where they are scaled."""
        parts = (
            (self.up, self.up_scale, 2 * self.inner, self.hidden),
            (self.down, self.down_scale, self.hidden, self.inner),
        )
        found = []
        for stored, scale, rows, columns in parts:
            flat = stored.of_slot(slot, rows * columns)
            matrix = flat.view(columns, rows).t() if self.transposed else flat.view(rows, columns)
            if scale is not None:
                blocks = (rows // SCALE_BLOCK, columns // SCALE_BLOCK)
                by_block = scale.of_slot(slot, blocks[0] * blocks[1]).view(blocks)
                by_row = by_block.repeat_interleave(SCALE_BLOCK, 0).repeat_interleave(SCALE_BLOCK, 1)
                matrix = matrix.float() * by_row
            found.append(matrix)
        return found[0], found[1]

    def up_box(self, rows: int, depth: int, joint: bool) -> Any:
        """A descriptor that the tensor-memory accelerator reads `rows` columns of gate or of up with, `depth` deep, or of both together
        where joint or interleaved; None where it cannot: it wants addresses and strides in multiples of 16 bytes."""
        if self.interleaved or not joint:
            height = 2 * rows if self.interleaved else rows
            return self._matrix_box(self.up, 2 * self.inner, self.hidden, height, depth)
        if self.transposed:
            return self._box(self.up, (self.hidden, 2, self.inner), (depth, 2, rows))
        return self._box(self.up, (2, self.inner, self.hidden), (2, rows, depth))

    def down_box(self, rows: int, depth: int) -> Any:
        """The same for `rows` columns of the second product."""
        return self._matrix_box(self.down, self.hidden, self.inner, rows, depth)

    def _matrix_box(self, stored: Stored, rows: int, columns: int, box_rows: int, depth: int) -> Any:
        if self.transposed:
            return self._box(stored, (columns, rows), (depth, box_rows))
        return self._box(stored, (rows, columns), (box_rows, depth))

    def _box(self, stored: Stored, sizes: tuple[int, ...], box: tuple[int, ...]) -> Any:
        from triton.tools.tensor_descriptor import TensorDescriptor

        key = (stored.arena.data_ptr(), stored.slot_stride, stored.offset, sizes, box)
        if key not in self._descriptors:
            width, first = stored.arena.element_size(), stored.arena[stored.offset :]
            aligned = not (first.data_ptr() % 16 or stored.slot_stride * width % 16 or sizes[-1] * width % 16)
            strides = [math.prod(sizes[at:]) for at in range(1, len(sizes) + 1)]
            slots = (len(first) - math.prod(sizes)) // stored.slot_stride + 1
            self._descriptors[key] = (
                TensorDescriptor(first, [slots, *sizes], [stored.slot_stride, *strides], [1, *box])
                if aligned and max(box) <= LARGEST_BOX
                else None
            )
        return self._descriptors[key]
