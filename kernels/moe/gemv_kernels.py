"""Triton kernels for one to a few tokens: no schedule, each (token, k) reads its expert's weights by itself.

Two launches for the whole layer. With so few rows all time goes into reading weights, so the products are plain sums on vector units with
many loads in flight; the second kernel owns (token, columns) and adds the token's experts in top-k order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flexpert.kernels.moe.fp8_kernels import SCALE_BLOCK
from flexpert.kernels.moe.gemm_kernels import _activate


@triton.jit
def _slot_of(ids, expert_slot, pair, E: tl.constexpr):
    expert = tl.load(ids + pair).to(tl.int64)
    known = (expert >= 0) & (expert < E)
    expert = tl.where(known, expert, 0)
    slot = tl.load(expert_slot + expert).to(tl.int64)
    return expert, tl.where(known, slot, -1)


@triton.jit
def _dot(
    weights, slot, n, first, vector,
    N: tl.constexpr, K: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, TRANSPOSED: tl.constexpr, SCALED: tl.constexpr, kept,
):  # fmt: skip
    """[BN]: rows n of the stored matrix [N, K] times the vector [K]. first: a row in the block of 128 in which all of n lie."""
    arena, slot_stride, offset, scales, scale_stride, scale_offset = weights
    matrix = arena + slot * slot_stride + offset
    total = tl.zeros((BN, BK), tl.float32)
    for start in tl.static_range(0, K, BK):
        k = start + tl.arange(0, BK)
        inside = k < K
        x = tl.load(vector + k, mask=inside, other=0.0).to(tl.float32)
        if SCALED:
            at = scales + slot * scale_stride + scale_offset + first // SCALE_BLOCK * (K // SCALE_BLOCK)
            x *= tl.load(at + k // SCALE_BLOCK, mask=inside, other=0.0)
        at = matrix + (
            k[None, :].to(tl.int64) * N + n[:, None] if TRANSPOSED else n[:, None].to(tl.int64) * K + k[None, :]
        )
        w = tl.load(at, mask=kept[:, None] & inside[None, :], other=0.0)
        total += w.to(tl.float32) * x[None, :]
    return tl.sum(total, 1)


@triton.jit
def gemv_up(
    hidden, arena, scales, bias, ids, expert_slot, inner, slot_stride, offset, scale_stride, scale_offset, hidden_stride,
    E: tl.constexpr, H: tl.constexpr, INNER: tl.constexpr, TOP_K: tl.constexpr,
    INTERLEAVED: tl.constexpr, TRANSPOSED: tl.constexpr, HAS_BIAS: tl.constexpr, SCALED: tl.constexpr,
    ACTIVATION: tl.constexpr, LIMIT: tl.constexpr, ALPHA: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Grid (pairs, columns / BN). inner [pairs, INNER], by pair; rows of absent experts stay unwritten."""
    pair = tl.program_id(0)
    expert, slot = _slot_of(ids, expert_slot, pair, E)
    if slot < 0:
        return
    first = tl.program_id(1) * BN
    column = first + tl.arange(0, BN)
    kept = column < INNER
    gate_row = 2 * column if INTERLEAVED else column
    up_row = 2 * column + 1 if INTERLEAVED else column + INNER
    weights = (arena, slot_stride, offset, scales, scale_stride, scale_offset)
    vector = hidden + (pair // TOP_K).to(tl.int64) * hidden_stride
    gate = _dot(weights, slot, gate_row, first, vector, 2 * INNER, H, BN, BK, TRANSPOSED, SCALED, kept)
    up = _dot(weights, slot, up_row, INNER + first, vector, 2 * INNER, H, BN, BK, TRANSPOSED, SCALED, kept)
    if HAS_BIAS:
        gate += tl.load(bias + expert * (2 * INNER) + gate_row, mask=kept, other=0.0).to(tl.float32)
        up += tl.load(bias + expert * (2 * INNER) + up_row, mask=kept, other=0.0).to(tl.float32)
    result = _activate(gate, up, ACTIVATION, LIMIT, ALPHA)
    tl.store(inner + pair.to(tl.int64) * INNER + column, result.to(inner.dtype.element_ty), mask=kept)


@triton.jit
def gemv_down(
    inner, arena, scales, bias, ids, weights, expert_slot, output, slot_stride, offset, scale_stride, scale_offset,
    E: tl.constexpr, H: tl.constexpr, INNER: tl.constexpr, TOP_K: tl.constexpr,
    TRANSPOSED: tl.constexpr, HAS_BIAS: tl.constexpr, SCALED: tl.constexpr, SUM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Grid (tokens, columns / BN). output [tokens, H] summed in top-k order, or [pairs, H] unweighted where not SUM."""
    token = tl.program_id(0)
    first = tl.program_id(1) * BN
    column = first + tl.arange(0, BN)
    kept = column < H
    stored = (arena, slot_stride, offset, scales, scale_stride, scale_offset)
    total = tl.zeros((BN,), tl.float32)
    for k in tl.static_range(TOP_K):
        pair = token * TOP_K + k
        expert, slot = _slot_of(ids, expert_slot, pair, E)
        resident = slot >= 0
        here = tl.where(resident, slot, 0)
        vector = inner + pair.to(tl.int64) * INNER
        row = _dot(stored, here, column, first, vector, H, INNER, BN, BK, TRANSPOSED, SCALED, kept & resident)
        if HAS_BIAS:
            row += tl.load(bias + expert * H + column, mask=kept, other=0.0).to(tl.float32)
        rounded = row.to(inner.dtype.element_ty)
        if SUM:
            weight = tl.load(weights + pair).to(tl.float32)
            total += tl.where(resident, weight * rounded.to(tl.float32), 0.0)
        else:
            tl.store(output + pair.to(tl.int64) * H + column, rounded, mask=kept & resident)
    if SUM:
        tl.store(output + token.to(tl.int64) * H + column, total.to(output.dtype.element_ty), mask=kept)
