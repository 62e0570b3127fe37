"""Attention of one new token of each request over its keys and values in the arena, where they lie, for GPUs.

Two launches, sized by what the host knows, so one CUDA graph serves every mixture of lengths; no host synchronisation, no atomics. A
request's result depends on its own query, keys and length only, bit for bit. Strides are 64-bit and any. GQA, latent attention with
absorbed projections (values are the keys' first columns), sinks, windows and a soft cap on the logits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from flexpert.kernels.arguments import require
from flexpert.kernels.device import multiprocessors, on_its_device

PIECE = 512  # keys of a request that are attended together, at most
MIN_COLUMNS = 16  # what tensor cores take


@dataclass(frozen=True)
class Tile:
    """Of one program: query heads of a KV head, keys at a time. programs: per multiprocessor."""

    heads: int
    keys: int
    warps: int
    stages: int
    programs: int


class Scratch:
    """Where the pieces of one step lie: float32 [rows, columns] and [rows]. rows: pieces x heads."""

    def __init__(self, *, requests: int, tokens: int, heads: int, value_dim: int, device: torch.device | str) -> None:
        """For up to that many requests with that many keys together."""
        pieces = requests + tokens // PIECE
        self.partial = torch.empty(pieces * heads, value_dim, dtype=torch.float32, device=device)
        self.logsumexp = torch.empty(pieces * heads, dtype=torch.float32, device=device)

    def holds(self, *, requests: int, heads: int, value_dim: int) -> bool:
        """At least one piece of each request; how many keys there are only the device knows."""
        return self.logsumexp.numel() >= requests * heads and self.partial.shape[1] == value_dim


@on_its_device
def decode_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    first_rows: Tensor,
    lengths: Tensor,
    scaling: float,
    scratch: Scratch,
    window: int | None = None,
    sinks: Tensor | None = None,
    softcap: float | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """query [requests, heads, key_dim] -> [requests, heads, value_dim], of query's dtype.

    keys [arena tokens, kv_heads, key_dim], values [arena tokens, kv_heads, value_dim], their last dimension contiguous; query heads of one
    KV head are neighbours. first_rows: int64 [requests], the arena row of each request's first token; lengths: int32 [requests], its keys
    with the new one's, 0: no request here, the result is zeros. scratch: made for at least these requests and the keys they can have.
    Raises ValueError, with the argument and what was expected, where they do not fit.
    """
    import triton

    from flexpert.kernels import decode_kernels as kernels

    _check(query, keys, values, first_rows, lengths, sinks)
    requests, heads, key_dim = query.shape
    kv_heads, value_dim = values.shape[1:]
    if not scratch.holds(requests=requests, heads=heads, value_dim=value_dim):
        rows = f"{scratch.logsumexp.numel()} rows of {scratch.partial.shape[1]} columns"
        raise ValueError(f"scratch has {rows}, expected at least {requests * heads} of {value_dim}")
    output = query.new_empty(requests, heads, value_dim)
    if not requests:
        return output
    group = heads // kv_heads
    dim = _largest_power_of_two(key_dim)
    rest = max(MIN_COLUMNS, triton.next_power_of_2(key_dim - dim)) if key_dim > dim else 0
    shared = values.data_ptr() == keys.data_ptr() and values.stride() == keys.stride() and value_dim == dim
    tile = tile or choose_tile(group, key_dim)
    sizes = {
        "BATCH": triton.next_power_of_2(requests), "PIECE": PIECE, "WINDOW": window or 0, "VALUE_DIM": value_dim,
        "VALUES": max(MIN_COLUMNS, triton.next_power_of_2(value_dim)),
    }  # fmt: skip
    kernels.attend_pieces[(tile.programs * multiprocessors(query.device),)](
        query, keys, values, first_rows, lengths, scratch.partial, scratch.logsumexp, requests, scaling,
        query.stride(0), query.stride(1), keys.stride(0), keys.stride(1), values.stride(0), values.stride(1),
        KV_HEADS=kv_heads, GROUP=group, SOFTCAP=softcap or 0.0, KEY_DIM=key_dim, DIM=max(MIN_COLUMNS, dim), REST=rest, SHARED=shared,
        HEADS=tile.heads, BLOCK=tile.keys, STAGES=tile.stages, num_warps=tile.warps, **sizes,
    )  # fmt: skip
    kernels.merge_pieces[(requests, heads)](
        scratch.partial, scratch.logsumexp, lengths, query if sinks is None else sinks, output, requests,
        HEADS=heads, HAS_SINKS=sinks is not None, num_warps=1 if value_dim <= 128 else 4, **sizes,
    )  # fmt: skip
    return output


def decode_attention_reference(
    query: Tensor, keys: Tensor, values: Tensor, *, first_rows: Tensor, lengths: Tensor, scaling: float,
    window: int | None = None, sinks: Tensor | None = None, softcap: float | None = None,
) -> Tensor:  # fmt: skip
    """The same in float32, request by request."""
    output = torch.zeros(*query.shape[:2], values.shape[2], device=query.device)
    group = query.shape[1] // keys.shape[1]
    for number, (first, length) in enumerate(zip(first_rows.tolist(), lengths.tolist(), strict=True)):
        begin = max(0, length - window) if window else 0
        k, v = (kv[first + begin : first + length].float().repeat_interleave(group, 1) for kv in (keys, values))
        score = torch.einsum("hd,thd->ht", query[number].float(), k) * scaling
        score = score if softcap is None else (score / softcap).tanh() * softcap
        if sinks is not None and length:
            score = torch.cat([score, sinks.float()[:, None]], 1)
        if length:
            output[number] = torch.einsum("ht,thd->hd", score.softmax(1)[:, : len(k)], v)
    return output


def choose_tile(group: int, key_dim: int) -> Tile:
    """heads: a power of two from 16 on, at most 64; wide keys take fewer at a time."""
    heads = min(64, max(16, 1 << (group - 1).bit_length()))
    if key_dim > 256:
        return Tile(heads, 32, 8, 2, 1)
    return Tile(heads, 64, 4, 3, 3 if key_dim <= 128 else 1)


def _largest_power_of_two(number: int) -> int:
    return 1 << int(math.log2(number))


def _check(
    query: Tensor, keys: Tensor, values: Tensor, first_rows: Tensor, lengths: Tensor, sinks: Tensor | None
) -> None:
    device = query.device
    fits = query.dim() == 3 and query.stride(2) == 1
    require(fits, "query", query, "[requests, heads, key_dim], its last dimension contiguous")
    requests, heads, key_dim = query.shape
    for name, kv, dim in (("keys", keys, key_dim), ("values", values, None)):
        fits = kv.dim() == 3 and kv.stride(2) == 1 and kv.dtype == query.dtype and kv.device == device
        fits = (
            fits and heads % kv.shape[1] == 0 and kv.shape[:2] == keys.shape[:2] and (dim is None or kv.shape[2] == dim)
        )
        wanted = f"[arena tokens, a divisor of {heads}, {'value_dim' if dim is None else dim}]"
        require(fits, name, kv, f"{query.dtype} {wanted} on {device}, its last dimension contiguous")
    for name, index, dtype in (("first_rows", first_rows, torch.int64), ("lengths", lengths, torch.int32)):
        fits = tuple(index.shape) == (requests,) and index.dtype == dtype and index.device == device
        require(fits and index.is_contiguous(), name, index, f"contiguous {dtype} [{requests}] on {device}")
    if sinks is not None:
        fits = tuple(sinks.shape) == (heads,) and sinks.device == device and sinks.is_contiguous()
        require(fits, "sinks", sinks, f"contiguous [{heads}] on {device}")
