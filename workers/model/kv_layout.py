"""How the KV of one token lies in memory: all layers together, so that a granule holds a few dozen tokens of every layer.

A token's bytes are, layer after layer, its keys [heads, key_dim] and its values [heads, value_dim] (a latent and a rotary key where the
model caches those), each piece at a multiple of 16 bytes. Token t of slot s begins at byte s * slot_bytes + t * token_bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd

import torch
from torch import Tensor

from flexpert.workers.model.layout import aligned

ALIGNMENT_BYTES = 16


@dataclass(frozen=True)
class KvLayer:
    """What one layer keeps of a token: heads * key_dim and heads * value_dim numbers."""

    heads: int
    key_dim: int
    value_dim: int


@dataclass(frozen=True)
class KvLayout:
    """Byte offsets of each layer's keys and values within a token."""

    dtype: torch.dtype
    key_offsets: tuple[int, ...]
    value_offsets: tuple[int, ...]
    token_bytes: int
    layers: tuple[KvLayer, ...]

    @classmethod
    def of(cls, layers: Sequence[KvLayer], dtype: torch.dtype) -> KvLayout:
        keys, values, end = [], [], 0
        for layer in layers:
            keys.append(end)
            end = aligned(end + layer.heads * layer.key_dim * dtype.itemsize, ALIGNMENT_BYTES)
            values.append(end)
            end = aligned(end + layer.heads * layer.value_dim * dtype.itemsize, ALIGNMENT_BYTES)
        return cls(dtype, tuple(keys), tuple(values), end, tuple(layers))


class KvViews:
    """Strided views of a KV tensor, made once. kv: uint8 [slots, slot_bytes], rows contiguous.

    keys[l], values[l]: [slots, capacity_tokens, heads, dim]. kv_rows[l]: [rows, width], rows of one layer's keys and values together;
    position p of slot s is row first_row[l] + slot_rows * s + token_rows * p. Where all layers are alike and rows of their width divide
    slots and tokens, it is one contiguous tensor for all layers: gathering from such a tensor was measured four times as fast.
    Elsewhere the rows overlap. For reading only.
    """

    def __init__(self, kv: Tensor, layout: KvLayout) -> None:
        slots, slot_bytes = kv.shape
        size = layout.dtype.itemsize
        if kv.dtype != torch.uint8 or kv.stride(1) != 1 or kv.stride(0) % size or kv.data_ptr() % size:
            raise ValueError(
                f"KV tensor of {kv.dtype}, strides {kv.stride()}; expected contiguous uint8 rows a multiple of {size} bytes apart"
            )
        self.layout = layout
        self.capacity_tokens = slot_bytes // layout.token_bytes
        if self.capacity_tokens == 0:
            raise ValueError(f"a slot of {slot_bytes} bytes holds no token of {layout.token_bytes} bytes")
        slot_stride = kv.stride(0)
        total_bytes = ((slots - 1) * slot_stride + slot_bytes) // size * size
        flat = kv.as_strided((total_bytes,), (1,)).view(layout.dtype)
        base = flat.storage_offset()
        step = _common_row_bytes(layout, slot_stride) or gcd(slot_stride, layout.token_bytes)
        self.slot_rows, self.token_rows = slot_stride // step, layout.token_bytes // step
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.kv_rows: list[Tensor] = []
        self.first_row: list[int] = []
        contiguous = _common_row_bytes(layout, slot_stride) is not None
        for layer, key, value in zip(layout.layers, layout.key_offsets, layout.value_offsets, strict=True):
            strides = (slot_stride // size, layout.token_bytes // size)
            shape = (slots, self.capacity_tokens, layer.heads)
            self.keys.append(flat.as_strided((*shape, layer.key_dim), (*strides, layer.key_dim, 1), base + key // size))
            self.values.append(
                flat.as_strided((*shape, layer.value_dim), (*strides, layer.value_dim, 1), base + value // size)
            )
            width = (value - key) // size + layer.heads * layer.value_dim
            begin = 0 if contiguous else key // size
            rows = (len(flat) - begin - width) * size // step + 1
            self.kv_rows.append(flat.as_strided((rows, width), (step // size, 1), base + begin))
            self.first_row.append(key // step if contiguous else 0)


def _common_row_bytes(layout: KvLayout, slot_stride: int) -> int | None:
    """The bytes of a layer's keys and values of one token, if all layers, tokens and slots begin at multiples of it and leave no gaps."""
    ends = [*layout.key_offsets[1:], layout.token_bytes]
    widths = {end - begin for begin, end in zip(layout.key_offsets, ends, strict=True)}
    values = {value - key for key, value in zip(layout.key_offsets, layout.value_offsets, strict=True)}
    layer = layout.layers[0]
    exact = layer.heads * layer.value_dim * layout.dtype.itemsize + min(values)
    width = widths.pop()
    return width if not widths and len(values) == 1 and width == exact and slot_stride % width == 0 else None
