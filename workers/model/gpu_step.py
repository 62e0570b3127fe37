"""One step on a GPU as transformers sees it. Everything a decode step reads is in device tensors, so that it can be captured in a CUDA
graph.

Requests of one new token each (decode) and longer ones may be mixed; the tensors are made from `packing.PackedStep` by one copy.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flexpert.kernels import attention_gpu
from flexpert.workers.model.interfaces import AttentionCall, CacheProtocol
from flexpert.workers.model.kv_layout import KvViews
from flexpert.workers.model.packing import PackedStep


@dataclass(frozen=True)
class StepTensors:
    """A step on the device. Per token: token_ids, slots, positions; per request: slot_of, starts, counts (int64); begins [requests +
    1] int32.

    The host knows only the shape: how many tokens, requests, the most new tokens of a request and `groups`, the requests [first, end) that
    have equally many new tokens.
    """

    token_ids: Tensor
    slots: Tensor
    positions: Tensor
    slot_of: Tensor
    starts: Tensor
    begins: Tensor
    max_query: int
    max_keys: int
    groups: tuple[tuple[int, int, int], ...]

    @classmethod
    def of(cls, packed: PackedStep, device: torch.device) -> StepTensors:
        """Any mix of requests."""
        tokens, requests = packed.num_tokens, len(packed.slots)
        host = np.concatenate(
            [packed.token_ids[:tokens], packed.slots.repeat(packed.counts), packed.positions[:tokens], packed.slots, packed.starts,
             packed.first_rows, [tokens]]
        )  # fmt: skip
        sizes = [tokens, tokens, tokens, requests, requests, requests + 1]
        token_ids, slots, positions, slot_of, starts, begins = torch.from_numpy(host).to(device).split(sizes)
        return cls(
            token_ids=token_ids,
            slots=slots,
            positions=positions,
            slot_of=slot_of,
            starts=starts,
            begins=begins.int(),
            max_query=int(packed.counts.max()),
            max_keys=int((packed.starts + packed.counts).max()),
            groups=_equal_runs(packed.counts),
        )

    @classmethod
    def decode(cls, rows: Tensor, *, max_keys: int) -> StepTensors:
        """rows: int64 [3, requests] of token ids, slots and positions, one new token each; later values of `rows` are seen, nothing is
        copied."""
        token_ids, slots, positions = rows
        requests = rows.shape[1]
        begins = torch.arange(requests + 1, dtype=torch.int32, device=rows.device)
        return cls(token_ids, slots, positions, slots, positions, begins, 1, max_keys, ((0, requests, 1),))


def _equal_runs(counts: np.ndarray) -> tuple[tuple[int, int, int], ...]:
    """(first, end, count) of the runs of requests with equally many new tokens."""
    edges = [0, *(np.flatnonzero(np.diff(counts)) + 1).tolist(), len(counts)]
    return tuple((a, b, int(counts[a])) for a, b in pairwise(edges))


class ArenaOnDevice:
    """Views of the KV arena for flash attention: [tokens of all slots, kv_heads, dim], possible where slots are whole tokens apart."""

    def __init__(self, views: KvViews, kv: Tensor) -> None:
        self.views = views
        layout = views.layout
        self.contiguous = kv.stride(0) % layout.token_bytes == 0
        self.slot_tokens = kv.stride(0) // layout.token_bytes
        self.keys = [self._flat(one) for one in views.keys] if self.contiguous else []
        self.values = [self._flat(one) for one in views.values] if self.contiguous else []

    def _flat(self, view: Tensor) -> Tensor:
        slots, capacity, heads, dim = view.shape
        tokens = (slots - 1) * self.slot_tokens + capacity
        return view.as_strided((tokens, heads, dim), view.stride()[1:], view.storage_offset())

    def flash_fits(self, layer: int, *, latent: bool) -> bool:
        shape, dtype = self.views.layout.layers[layer], self.views.layout.dtype
        fits = attention_gpu.flash_fits(key_dim=shape.key_dim, value_dim=shape.value_dim, dtype=dtype)
        return self.contiguous and not latent and fits


class GpuStep(CacheProtocol):
    """Made anew for each step, or once for each captured graph."""

    def __init__(self, tensors: StepTensors, arena: ArenaOnDevice) -> None:
        self._tensors, self._arena = tensors, arena
        counts = tensors.begins.diff()
        self._keys_used = tensors.starts.int() + counts
        begins = (tensors.slot_of * arena.slot_tokens).int()
        self._key_begins = torch.cat([begins, begins[-1:] + self._keys_used[-1:]])

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        views, place = self._arena.views, (self._tensors.slots, self._tensors.positions)
        views.keys[layer_idx].index_put_(place, key[0].transpose(0, 1).to(views.layout.dtype))
        views.values[layer_idx].index_put_(place, value[0].transpose(0, 1).to(views.layout.dtype))
        return key, value

    def attend(self, call: AttentionCall) -> Tensor:
        latent = hasattr(call.module, "expand_kv")
        if call.softcap is None and self._arena.flash_fits(call.layer, latent=latent):
            return self._flash(call)
        return self._masked(call, latent=latent)

    def _flash(self, call: AttentionCall) -> Tensor:
        output = attention_gpu.flash(
            call.query[0].transpose(0, 1),
            self._arena.keys[call.layer],
            self._arena.values[call.layer],
            query_begins=self._tensors.begins,
            key_begins=self._key_begins,
            keys_used=self._keys_used,
            max_query=self._tensors.max_query,
            max_keys=self._tensors.max_keys,
            scaling=call.scaling,
            window=call.window,
            sinks=call.sinks,
        )
        return output.unsqueeze(0)

    def _masked(self, call: AttentionCall, *, latent: bool) -> Tensor:
        """Requests with equally many new tokens together; gathers all their keys up to the longest of the step."""
        tensors, views = self._tensors, self._arena.views
        outputs, row = [], 0
        for first, end, count in tensors.groups:
            requests = end - first
            query = call.query[0, :, row : row + requests * count].unflatten(1, (requests, count)).transpose(0, 1)
            row += requests * count
            last = self._keys_used[first:end, None].long() - 1
            position = torch.arange(tensors.max_keys, device=last.device).minimum(last)
            place = (tensors.slot_of[first:end, None], position)
            keys = views.keys[call.layer][place].transpose(1, 2)
            values = views.values[call.layer][place].transpose(1, 2)
            if latent:
                keys, values = call.module.expand_kv(keys, values)
            attended = attention_gpu.masked(
                query,
                keys,
                values,
                starts=tensors.starts[first:end],
                scaling=call.scaling,
                window=call.window,
                sinks=call.sinks,
                softcap=call.softcap,
            )
            outputs.append(attended.transpose(1, 2).flatten(0, 1))
        return torch.cat(outputs).unsqueeze(0)
