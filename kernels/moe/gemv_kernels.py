"""Triton kernels for one to a few tokens: no schedule, each (token, k) reads its expert's weights by itself.

Two launches for the whole layer. With so few rows all time goes into reading weights, so the products are plain sums on vector units with
many loads in flight; the second kernel owns (token, columns) and adds the token's experts in top-k order.
"""

from __future__ import annotations

import triton
import triton.language as tl

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
    matrix,
    n,
    vector,
    N: tl.constexpr,
    K: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    kept,
):
    """[BN]: rows n of the stored matrix times the vector [K]."""
    total = tl.zeros((BN, BK), tl.float32)
    for start in tl.static_range(0, K, BK):
        k = start + tl.arange(0, BK)
        inside = k < K
        x = tl.load(vector + k, mask=inside, other=0.0).to(tl.float32)
        at = matrix + (
            k[None, :].to(tl.int64) * N + n[:, None] if TRANSPOSED else n[:, None].to(tl.int64) * K + k[None, :]
        )
        w = tl.load(at, mask=kept[:, None] & inside[None, :], other=0.0)
        total += w.to(tl.float32) * x[None, :]
    return tl.sum(total, 1)


@triton.jit
def gemv_up(
    hidden, arena, bias, ids, expert_slot, inner, slot_stride, offset, hidden_stride,
    E: tl.constexpr, H: tl.constexpr, INNER: tl.constexpr, TOP_K: tl.constexpr,
    INTERLEAVED: tl.constexpr, TRANSPOSED: tl.constexpr, HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr, LIMIT: tl.constexpr, ALPHA: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Grid (pairs, columns / BN). inner [pairs, INNER], by pair; rows of absent experts stay unwritten."""
    pair = tl.program_id(0)
    expert, slot = _slot_of(ids, expert_slot, pair, E)
    if slot < 0:
        return
    column = tl.program_id(1) * BN + tl.arange(0, BN)
    kept = column < INNER
    gate_row = 2 * column if INTERLEAVED else column
    up_row = 2 * column + 1 if INTERLEAVED else column + INNER
    matrix = arena + slot * slot_stride + offset
    vector = hidden + (pair // TOP_K).to(tl.int64) * hidden_stride
    gate = _dot(matrix, gate_row, vector, 2 * INNER, H, BN, BK, TRANSPOSED, kept)
    up = _dot(matrix, up_row, vector, 2 * INNER, H, BN, BK, TRANSPOSED, kept)
    if HAS_BIAS:
        gate += tl.load(bias + expert * (2 * INNER) + gate_row, mask=kept, other=0.0).to(tl.float32)
        up += tl.load(bias + expert * (2 * INNER) + up_row, mask=kept, other=0.0).to(tl.float32)
    result = _activate(gate, up, ACTIVATION, LIMIT, ALPHA)
    tl.store(inner + pair.to(tl.int64) * INNER + column, result.to(inner.dtype.element_ty), mask=kept)


@triton.jit
def gemv_down(
    inner, arena, bias, ids, weights, expert_slot, output, slot_stride, offset,
    E: tl.constexpr, H: tl.constexpr, INNER: tl.constexpr, TOP_K: tl.constexpr,
    TRANSPOSED: tl.constexpr, HAS_BIAS: tl.constexpr, SUM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Grid (tokens, columns / BN). output [tokens, H] summed in top-k order, or [pairs, H] unweighted where not SUM."""
    token = tl.program_id(0)
    column = tl.program_id(1) * BN + tl.arange(0, BN)
    kept = column < H
    total = tl.zeros((BN,), tl.float32)
    for k in tl.static_range(TOP_K):
        pair = token * TOP_K + k
        expert, slot = _slot_of(ids, expert_slot, pair, E)
        resident = slot >= 0
        matrix = arena + tl.where(resident, slot, 0) * slot_stride + offset
        row = _dot(matrix, column, inner + pair.to(tl.int64) * INNER, H, INNER, BN, BK, TRANSPOSED, kept & resident)
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
