"""What lies between the matrix products of a decoder layer, in one pass over its rows each, for GPUs: the residual sum with its
normalisation, rotary positions with the KV store, and the routing of tokens to experts.

No host synchronisation; every launch's size follows from the number of tokens. Each has its PyTorch reference beside it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flexpert.kernels.arguments import require
from flexpert.kernels.device import on_its_device

SCORINGS = ("softmax", "top_k_softmax", "sigmoid")


@dataclass(frozen=True, kw_only=True)
class HeadShape:
    """Heads of a layer's packed projection [tokens, (heads + 2 kv_heads) dim]: queries, keys, values. rotated: the first so many columns of
    a head turn with the position, in pairs half of them apart."""

    heads: int
    kv_heads: int
    dim: int
    rotated: int

    @property
    def packed(self) -> int:
        return (self.heads + 2 * self.kv_heads) * self.dim


@dataclass(frozen=True, kw_only=True)
class Routing:
    """How logits become experts and weights. "softmax": over all, then the best; "top_k_softmax": the best, then softmax over them
    (gpt-oss); "sigmoid": with a correction that counts for the choice only, within the best groups (DeepSeek-V3). normalise: weights sum
    to one."""

    top_k: int
    scoring: str = "softmax"
    normalise: bool = False
    factor: float = 1.0
    groups: int = 1
    kept_groups: int = 1

    def __post_init__(self) -> None:
        if self.scoring not in SCORINGS:
            raise ValueError(f"scoring is {self.scoring!r}, expected one of {', '.join(SCORINGS)}")
        if not 1 <= self.kept_groups <= self.groups:
            raise ValueError(f"kept_groups is {self.kept_groups}, expected 1 to groups, {self.groups}")


@on_its_device
def add_rms_norm(rows: Tensor, weight: Tensor, eps: float, delta: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """rows [tokens, columns], weight [columns] -> (norm, rows), or with delta (norm of the sum, the sum), in the rows' dtype."""
    import triton

    from flexpert.kernels import decoder_kernels as kernels

    columns = rows.shape[-1]
    for name, given in (("rows", rows), ("delta", rows if delta is None else delta)):
        fits = given.dim() == 2 and given.shape == rows.shape and given.stride(1) == 1 and given.dtype == rows.dtype
        require(fits, name, given, f"{rows.dtype} {list(rows.shape)}, its last dimension contiguous")
    require(tuple(weight.shape) == (columns,), "weight", weight, f"[{columns}]")
    output = rows.new_empty(rows.shape)
    total = rows if delta is None else rows.new_empty(rows.shape)
    if len(rows):
        block = triton.next_power_of_2(columns)
        kernels.rms_norm_rows[(len(rows),)](
            rows, rows if delta is None else delta, weight, output, total, rows.stride(0), 0 if delta is None else delta.stride(0), eps,
            COLUMNS=columns, BLOCK=block, ADD=delta is not None, num_warps=8 if block >= 4096 else 4,
        )  # fmt: skip
    return output, total


def add_rms_norm_reference(
    rows: Tensor, weight: Tensor, eps: float, delta: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The same in PyTorch."""
    total = rows if delta is None else rows + delta
    wide = total.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(rows.dtype), total


@on_its_device
def rotate_and_store(
    packed: Tensor, shape: HeadShape, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, kv_rows: Tensor,
    norms: tuple[Tensor, Tensor, float] | None = None,
) -> Tensor:  # fmt: skip
    """packed [tokens, shape.packed] -> queries [tokens, heads, dim]; keys and values go to their rows of the arena.

    cos, sin: [tokens, rotated / 2 or more] of each token's position. keys, values: [arena tokens, kv_heads, dim], any strides, the last
    dimension contiguous; kv_rows: int64 [tokens], -1: nowhere. norms: weights [dim] for queries and keys, normalised head by head, and
    epsilon. Raises ValueError, with the argument and what was expected, where they do not fit.
    """
    import triton

    from flexpert.kernels import decoder_kernels as kernels

    tokens = len(packed)
    fits = packed.dim() == 2 and packed.shape[1] == shape.packed and packed.stride(1) == 1
    require(fits, "packed", packed, f"[tokens, {shape.packed}], its last dimension contiguous")
    for name, kv in (("keys", keys), ("values", values)):
        fits = kv.dim() == 3 and tuple(kv.shape[1:]) == (shape.kv_heads, shape.dim) and kv.stride(2) == 1
        require(fits, name, kv, f"[arena tokens, {shape.kv_heads}, {shape.dim}], its last dimension contiguous")
    for name, angle in (("cos", cos), ("sin", sin)):
        fits = angle.dim() == 2 and len(angle) == tokens and angle.shape[1] >= shape.rotated // 2
        fits = fits and angle.stride() == cos.stride() and angle.stride(1) == 1
        require(fits, name, angle, f"[{tokens}, {shape.rotated // 2} or more], the last dimension contiguous, as cos")
    fits = tuple(kv_rows.shape) == (tokens,) and kv_rows.dtype == torch.int64 and kv_rows.is_contiguous()
    require(fits, "kv_rows", kv_rows, f"contiguous torch.int64 [{tokens}]")
    query = packed.new_empty(tokens, shape.heads, shape.dim)
    if tokens:
        query_weight, key_weight, eps = norms or (packed, packed, 0.0)
        kernels.rotate_and_store[(tokens, shape.heads + 2 * shape.kv_heads)](
            packed, query, keys, values, kv_rows, query_weight, key_weight, cos, sin, packed.stride(0), keys.stride(0), keys.stride(1),
            values.stride(0), values.stride(1), cos.stride(0), eps, HEADS=shape.heads, KV_HEADS=shape.kv_heads, DIM=shape.dim,
            ROTATED=shape.rotated, BLOCK=triton.next_power_of_2(shape.dim), HALF=triton.next_power_of_2(max(1, shape.rotated // 2)),
            NORM=norms is not None, num_warps=1,
        )  # fmt: skip
    return query


def rotate_and_store_reference(
    packed: Tensor, shape: HeadShape, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, kv_rows: Tensor,
    norms: tuple[Tensor, Tensor, float] | None = None,
) -> Tensor:  # fmt: skip
    """The same in PyTorch."""
    q, k, v = packed.unflatten(1, (-1, shape.dim)).split([shape.heads, shape.kv_heads, shape.kv_heads], dim=1)
    if norms is not None:
        q, k = (add_rms_norm_reference(x, weight, norms[2])[0] for x, weight in ((q, norms[0]), (k, norms[1])))
    half = shape.rotated // 2
    c, s = cos[:, None, :half].float(), sin[:, None, :half].float()
    turned = []
    for x in (q, k):
        first, second, rest = x.float().split([half, half, shape.dim - 2 * half], dim=2)
        turned.append(torch.cat([first * c - second * s, second * c + first * s, rest], dim=2).to(packed.dtype))
    there = kv_rows >= 0
    keys[kv_rows[there]], values[kv_rows[there]] = turned[1][there], v[there]
    return turned[0]


@on_its_device
def route_top_k(logits: Tensor, routing: Routing, correction: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """logits [tokens, experts] -> (ids int32, weights of the logits' dtype), both [tokens, top_k], best first; of equal scores the expert
    of the lowest number. correction: float32 [experts], for "sigmoid". A token with NaN has valid ids. Raises ValueError where they do
    not fit."""
    import triton

    from flexpert.kernels import decoder_kernels as kernels

    tokens, experts = logits.shape
    require(logits.stride(1) == 1 and experts >= routing.top_k, "logits", logits, f"[tokens, {routing.top_k} or more]")
    if (correction is not None) != (routing.scoring == "sigmoid"):
        found = "None" if correction is None else "given"
        raise ValueError(
            f'correction is {found}, expected one for "sigmoid" and none else; scoring is {routing.scoring!r}'
        )
    if correction is not None:
        fits = tuple(correction.shape) == (experts,) and experts % routing.groups == 0
        require(fits, "correction", correction, f"[{experts}], a multiple of {routing.groups} groups")
    ids = torch.empty(tokens, routing.top_k, dtype=torch.int32, device=logits.device)
    weights = logits.new_empty(tokens, routing.top_k)
    if tokens:
        block = triton.next_power_of_2(experts)
        kernels.top_k_rows[(tokens,)](
            logits, logits if correction is None else correction, ids, weights, logits.stride(0), routing.factor, EXPERTS=experts,
            BLOCK=block, TOP_K=routing.top_k, SLOTS=triton.next_power_of_2(routing.top_k), SCORING=routing.scoring,
            NORMALISE=routing.normalise, GROUPS=routing.groups, KEPT_GROUPS=routing.kept_groups, num_warps=1 if block <= 128 else 4,
        )  # fmt: skip
    return ids, weights


def route_top_k_reference(logits: Tensor, routing: Routing, correction: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The same in PyTorch, but for the order of equal scores."""
    wide = logits.float()
    score = {"softmax": wide.softmax(1), "sigmoid": wide.sigmoid()}.get(routing.scoring, wide)
    choice = score if correction is None else score + correction
    if routing.groups > 1:
        sums = choice.unflatten(1, (routing.groups, -1)).topk(2, dim=2).values.sum(2)
        kept = torch.zeros_like(sums).scatter(1, sums.topk(routing.kept_groups, dim=1).indices, 1)
        choice = choice.masked_fill(kept.repeat_interleave(logits.shape[1] // routing.groups, 1) == 0, float("-inf"))
    ids = choice.topk(routing.top_k, dim=1).indices
    weights = score.gather(1, ids)
    if routing.scoring == "top_k_softmax":
        weights = weights.softmax(1)
    elif routing.normalise:
        weights = weights / weights.sum(1, keepdim=True)
    return ids.int(), (weights * routing.factor).to(logits.dtype)
