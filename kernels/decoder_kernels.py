"""Triton kernels between a decoder layer's matrix products, each one pass over its rows: normalisation, rotation and KV store, routing."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _normalised(values, weight, eps, COLUMNS: tl.constexpr, dtype: tl.constexpr):
    """float32 [.., columns] -> in dtype, divided by its root mean square and rounded before it is weighted, as transformers does."""
    scale = tl.rsqrt(tl.sum(values * values, 0) / COLUMNS + eps)
    return (values * scale).to(dtype) * weight


@triton.jit
def rms_norm_rows(
    rows, delta, weight, output, total, row_stride, delta_stride, eps, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, ADD: tl.constexpr
):  # fmt: skip
    """Grid (rows,). With ADD, total = rows + delta, in the rows' dtype, and output is its norm."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    kept = column < COLUMNS
    dtype = output.dtype.element_ty
    values = tl.load(rows + row * row_stride + column, mask=kept, other=0.0)
    if ADD:
        values += tl.load(delta + row * delta_stride + column, mask=kept, other=0.0)
        tl.store(total + row * COLUMNS + column, values, mask=kept)
    weighted = _normalised(
        values.to(tl.float32), tl.load(weight + column, mask=kept, other=0.0).to(dtype), eps, COLUMNS, dtype
    )
    tl.store(output + row * COLUMNS + column, weighted, mask=kept)


@triton.jit
def _rotate(
    source, target, weight, cos, sin, eps, DIM: tl.constexpr, ROTATED: tl.constexpr, BLOCK: tl.constexpr, HALF: tl.constexpr,
    NORM: tl.constexpr, store,
):  # fmt: skip
    """One head: normalised, its first ROTATED columns rotated in pairs half of them apart. Written where `store`."""
    dtype = target.dtype.element_ty
    column = tl.arange(0, BLOCK)
    kept = column < DIM
    head = tl.load(source + column, mask=kept, other=0.0).to(tl.float32)
    pair = tl.arange(0, HALF)
    known = pair < ROTATED // 2
    first = tl.load(source + pair, mask=known, other=0.0).to(tl.float32)
    second = tl.load(source + ROTATED // 2 + pair, mask=known, other=0.0).to(tl.float32)
    if NORM:
        scale = tl.rsqrt(tl.sum(head * head, 0) / DIM + eps)
        head = ((head * scale).to(dtype) * tl.load(weight + column, mask=kept, other=0.0).to(dtype)).to(tl.float32)
        w_first = tl.load(weight + pair, mask=known, other=0.0).to(dtype)
        w_second = tl.load(weight + ROTATED // 2 + pair, mask=known, other=0.0).to(dtype)
        first = ((first * scale).to(dtype) * w_first).to(tl.float32)
        second = ((second * scale).to(dtype) * w_second).to(tl.float32)
    c = tl.load(cos + pair, mask=known, other=0.0).to(tl.float32)
    s = tl.load(sin + pair, mask=known, other=0.0).to(tl.float32)
    tl.store(target + pair, (first * c - second * s).to(dtype), mask=known & store)
    tl.store(target + ROTATED // 2 + pair, (second * c + first * s).to(dtype), mask=known & store)
    tl.store(target + column, head.to(dtype), mask=kept & (column >= ROTATED) & store)


@triton.jit
def rotate_and_store(
    packed, query, keys, values, kv_rows, query_weight, key_weight, cos, sin, packed_stride, key_stride, key_head_stride,
    value_stride, value_head_stride, angle_stride, eps,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, ROTATED: tl.constexpr, BLOCK: tl.constexpr, HALF: tl.constexpr,
    NORM: tl.constexpr,
):  # fmt: skip
    """Grid (tokens, HEADS + 2 KV_HEADS). A token without a row in the arena (-1) stores nothing there."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    source = packed + token * packed_stride + head * DIM
    c, s = cos + token * angle_stride, sin + token * angle_stride
    if head < HEADS:
        target = query + (token * HEADS + head) * DIM
        _rotate(source, target, query_weight, c, s, eps, DIM, ROTATED, BLOCK, HALF, NORM, True)
    else:
        row = tl.load(kv_rows + token)
        there = row >= 0
        row = tl.where(there, row, 0)
        if head < HEADS + KV_HEADS:
            target = keys + row * key_stride + (head - HEADS).to(tl.int64) * key_head_stride
            _rotate(source, target, key_weight, c, s, eps, DIM, ROTATED, BLOCK, HALF, NORM, there)
        else:
            column = tl.arange(0, BLOCK)
            target = values + row * value_stride + (head - HEADS - KV_HEADS).to(tl.int64) * value_head_stride
            value = tl.load(source + column, mask=column < DIM, other=0.0)
            tl.store(target + column, value.to(values.dtype.element_ty), mask=(column < DIM) & there)


@triton.jit
def _best_groups(choice, EXPERTS: tl.constexpr, BLOCK: tl.constexpr, GROUPS: tl.constexpr, KEPT_GROUPS: tl.constexpr):
    """choice [BLOCK], -inf beyond EXPERTS and outside the KEPT_GROUPS groups with the largest sums of their two best."""
    expert = tl.arange(0, BLOCK)
    group_of = expert // (EXPERTS // GROUPS)
    group = tl.arange(0, GROUPS)
    inside = (group_of[None, :] == group[:, None]) & (expert < EXPERTS)[None, :]
    scores = tl.where(inside, choice[None, :], float("-inf"))
    best = tl.max(scores, 1)
    at = tl.argmax(scores, 1)
    second = tl.max(tl.where(expert[None, :] == at[:, None], float("-inf"), scores), 1)
    sums = best + second
    chosen = tl.zeros((GROUPS,), tl.int32)
    for _ in tl.static_range(KEPT_GROUPS):
        chosen = tl.where(group == tl.argmax(sums, 0), 1, chosen)
        sums = tl.where(chosen > 0, float("-inf"), sums)
    mine = tl.sum(tl.where(inside, chosen[:, None], 0), 0)
    return tl.where(mine > 0, choice, float("-inf"))


@triton.jit
def top_k_rows(
    logits, correction, ids, weights, logits_stride, factor,
    EXPERTS: tl.constexpr, BLOCK: tl.constexpr, TOP_K: tl.constexpr, SLOTS: tl.constexpr, SCORING: tl.constexpr, NORMALISE: tl.constexpr,
    GROUPS: tl.constexpr, KEPT_GROUPS: tl.constexpr,
):  # fmt: skip
    """Grid (tokens,). ids int32 and weights [tokens, TOP_K], best first; of equal scores the expert of the lowest number."""
    token = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, BLOCK)
    known = expert < EXPERTS
    logit = tl.load(logits + token * logits_stride + expert, mask=known, other=float("-inf")).to(tl.float32)
    if SCORING == "sigmoid":
        score = tl.sigmoid(logit)
        choice = tl.where(known, score + tl.load(correction + expert, mask=known, other=0.0), float("-inf"))
        if GROUPS > 1:
            choice = _best_groups(choice, EXPERTS, BLOCK, GROUPS, KEPT_GROUPS)
    elif SCORING == "softmax":
        grown = tl.exp(logit - tl.max(logit, 0))
        score = grown / tl.sum(grown, 0)
        choice = tl.where(known, score, float("-inf"))
    else:
        score = logit
        choice = logit
    choice = tl.where(choice == choice, choice, float("-inf"))  # NaN is never the best, so ids stay those of experts
    slot = tl.arange(0, SLOTS)
    found = tl.full((SLOTS,), float("-inf"), tl.float32)
    places = tl.zeros((SLOTS,), tl.int32)
    taken = tl.zeros((BLOCK,), tl.int32)
    for k in tl.static_range(TOP_K):
        best = tl.argmax(tl.where(taken > 0, float("-inf"), choice), 0)
        # With nothing left above -inf, argmax repeats itself: the first expert not taken yet.
        best = tl.where(tl.sum(tl.where(expert == best, taken, 0), 0) > 0, tl.argmax(1 - taken, 0), best)
        taken = tl.where(expert == best, 1, taken)
        found = tl.where(slot == k, tl.sum(tl.where(expert == best, score, 0.0), 0), found)
        places = tl.where(slot == k, best, places)
    if SCORING == "top_k_softmax":
        grown = tl.exp(found - tl.max(found, 0))
        weight = grown / tl.sum(grown, 0)
    else:
        weight = tl.where(slot < TOP_K, found, 0.0)
        if NORMALISE:
            weight = weight / (tl.sum(weight, 0) + (1e-20 if SCORING == "sigmoid" else 0.0))
        weight = weight * factor
    at = token * TOP_K + slot
    tl.store(ids + at, places, mask=slot < TOP_K)
    tl.store(weights + at, weight.to(weights.dtype.element_ty), mask=slot < TOP_K)
