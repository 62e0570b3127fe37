"""One step on the CPU as transformers sees it: a cache that writes new keys and values into the arena, an attention that reads from it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flexpert.kernels import AttentionPlan, PackedRequests, attend
from flexpert.workers.model.interfaces import AttentionCall, CacheProtocol
from flexpert.workers.model.kv_layout import KvViews
from flexpert.workers.model.packing import PackedStep


class CpuStep(CacheProtocol):
    """Made anew for each step. Plans are made on first use and shared by the layers of one geometry."""

    def __init__(self, packed: PackedStep, views: KvViews, row_group: int) -> None:
        self._views = views
        self._requests = PackedRequests(
            first_row=packed.first_rows,
            num_new=packed.counts,
            start=packed.starts,
            kv_row=packed.slots * views.slot_rows,
            kv_row_step=views.token_rows,
            padded_tokens=len(packed.token_ids),
        )
        self._row_group = row_group
        self._plans: dict[tuple[int, int, int | None], AttentionPlan] = {}
        self._num_tokens = packed.num_tokens
        self._positions = torch.from_numpy(packed.positions[: packed.num_tokens])
        self._slots = torch.from_numpy(packed.slots.repeat(packed.counts))

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write the step's keys and values; padding tokens write nothing. Returns its inputs: `attend` reads the arena."""
        views, tokens = self._views, self._num_tokens
        views.keys[layer_idx][self._slots, self._positions] = key[0].transpose(0, 1)[:tokens].to(views.layout.dtype)
        views.values[layer_idx][self._slots, self._positions] = value[0].transpose(0, 1)[:tokens].to(views.layout.dtype)
        return key, value

    def plan(self, heads: int, kv_heads: int, window: int | None) -> AttentionPlan:
        geometry = (heads, kv_heads, window)
        if geometry not in self._plans:
            self._plans[geometry] = AttentionPlan(
                self._requests, heads=heads, kv_heads=kv_heads, window=window, row_group=self._row_group
            )
        return self._plans[geometry]

    def attend(self, call: AttentionCall) -> Tensor:
        query = call.query[0]
        plan = self.plan(query.shape[0], call.key.shape[1], call.window)
        read = _Reader(self._views, call.layer, call.module if hasattr(call.module, "expand_kv") else None)
        attended = attend(query, read, plan, scaling=call.scaling, sinks=call.sinks, softcap=call.softcap)
        return attended.unsqueeze(0)


class _Reader:
    """Keys and values of arena rows, one tensor for each KV head; latents are expanded by the layer's own module."""

    def __init__(self, views: KvViews, layer: int, expanding: nn.Module | None) -> None:
        self._rows, self._first_row = views.kv_rows[layer], views.first_row[layer]
        self._shape = views.layout.layers[layer]
        self._values_begin = (
            views.layout.value_offsets[layer] - views.layout.key_offsets[layer]
        ) // views.layout.dtype.itemsize
        self._expanding = expanding

    def __call__(self, rows: Tensor) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        shape = self._shape
        both = self._rows.index_select(0, rows + self._first_row if self._first_row else rows)
        keys, values = both[:, : shape.heads * shape.key_dim], both[:, self._values_begin :]
        if self._expanding is None:
            both_float = (keys.float(), values.float())
            return both_float[0].split(shape.key_dim, dim=1), both_float[1].split(shape.value_dim, dim=1)
        expanded_keys, expanded_values = self._expanding.expand_kv(keys[None, None], values[None, None])
        return expanded_keys[0].float().unbind(0), expanded_values[0].float().unbind(0)
