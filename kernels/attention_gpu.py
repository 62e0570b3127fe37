"""Attention on a GPU in plain torch: flash attention over the gaps of the KV arena, and a masked product where it does not fit.

`flash` reads each request's keys and values where they lie: `cu_seqlens_k` gives where they begin and `seqused_k` how many there are,
so that
neither gathering nor a page table is needed, and nothing depends on the host (a decode step can be captured in a CUDA graph). `masked`
gathers and pads; it is for head sizes flash attention does not take, for latents and for tests.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

MAX_FLASH_DIM = 256


def flash_fits(*, key_dim: int, value_dim: int, dtype: torch.dtype) -> bool:
    """Whether torch's flash attention takes these heads."""
    half = dtype in (torch.bfloat16, torch.float16)
    return half and key_dim == value_dim and key_dim % 8 == 0 and key_dim <= MAX_FLASH_DIM


def _flash_operator() -> Any:
    return torch.ops.aten._flash_attention_forward


def flash(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    query_begins: Tensor,
    key_begins: Tensor,
    keys_used: Tensor,
    max_query: int,
    max_keys: int,
    scaling: float,
    window: int | None,
    sinks: Tensor | None,
) -> Tensor:
    """query [tokens, heads, dim] -> [tokens, heads, dim]. keys, values: [arena tokens, kv_heads, dim], any token stride.

    query_begins, key_begins: int32 [requests + 1]; keys_used: int32 [requests], the request's new tokens included; its queries are the
    last of them. A sink is one more logit without a value, so the result shrinks by exp(lse) / (exp(lse) + exp(sink)).
    """
    output, logsumexp, *_ = _flash_operator()(
        query,
        keys,
        values,
        query_begins,
        key_begins,
        # With one query a request, torch swaps heads and queries, and with them the axes of logsumexp: not where that is read.
        max_query if sinks is None else max(2, max_query),
        max_keys,
        0.0,
        True,
        False,
        scale=scaling,
        window_size_left=None if window is None else window - 1,
        window_size_right=None if window is None else 0,
        seqused_k=keys_used,
    )
    if sinks is None:
        return output
    kept = torch.sigmoid(logsumexp.transpose(0, 1) - sinks.float())
    return (output * kept.unsqueeze(-1)).to(query.dtype)


def masked(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    starts: Tensor,
    scaling: float,
    window: int | None,
    sinks: Tensor | None,
    softcap: float | None = None,
) -> Tensor:
    """query [requests, heads, new, dim], keys and values [requests, kv_heads, positions, dim] -> [requests, heads, new, value_dim].

    starts [requests]: the position of each request's first query. Positions a query must not see may hold anything finite.
    """
    requests, heads, new, _ = query.shape
    group = heads // keys.shape[1]
    grouped = query.unflatten(1, (-1, group)).flatten(2, 3)
    scores = torch.matmul(grouped, keys.transpose(2, 3)).float() * scaling
    if softcap is not None:
        scores = (scores / softcap).tanh() * softcap
    position = starts[:, None] + torch.arange(new, device=query.device)
    key = torch.arange(keys.shape[2], device=query.device)
    visible = key <= position[:, :, None]
    if window is not None:
        visible = visible & (key > position[:, :, None] - window)
    scores = scores.unflatten(2, (group, new)).masked_fill(~visible[:, None, None], float("-inf"))
    if sinks is not None:
        column = sinks.float().view(1, -1, group, 1, 1).expand(requests, -1, -1, new, 1)
        scores = torch.cat([scores, column], dim=-1)
    probabilities = scores.softmax(-1)[..., : keys.shape[2]].to(values.dtype)
    return torch.matmul(probabilities.flatten(2, 3), values).unflatten(2, (group, new)).flatten(1, 2)
