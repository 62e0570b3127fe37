"""Triton kernels of the two products of an expert: gate-up with the activation, and down.

Weights are read in place: the slot of an expert begins at slot * slot_stride of the arena (64-bit), wherever the residency table says. Rows
of a tile belong to one expert and are neighbours in the schedule's order. Every row is computed alike wherever it stands in its
tile, and nothing is added by atomics, so a token's result does not depend on the order of the batch.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flexpert.kernels.moe.fp8_kernels import SCALE_BLOCK, quantize


@triton.jit
def _activate(gate, up, ACTIVATION: tl.constexpr, LIMIT: tl.constexpr, ALPHA: tl.constexpr):
    """float32, element by element. "clamped" is gpt-oss's: (min(max(up, -l), l) + 1) * g * sigmoid(alpha * g), g = min(gate, l)."""
    if ACTIVATION == "silu":
        return gate * tl.sigmoid(gate) * up
    elif ACTIVATION == "gelu_tanh":
        inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
        return gate * tl.sigmoid(2 * inner) * up
    else:
        gate = tl.minimum(gate, LIMIT, propagate_nan=tl.PropagateNan.ALL)
        up = tl.clamp(up, -LIMIT, LIMIT, propagate_nan=tl.PropagateNan.ALL)
        return gate * tl.sigmoid(gate * ALPHA) * (up + 1)


@triton.jit
def _tile(tiles, total, index, COLUMNS: tl.constexpr, GROUP: tl.constexpr):
    """Tile and column block of a program: blocks of GROUP tiles walk all columns together, so that neighbours share weights in L2."""
    count = tl.load(total)
    per_group = GROUP * COLUMNS
    group = index // per_group
    first = group * GROUP
    height = tl.maximum(tl.minimum(count - first, GROUP), 1)
    inside = index % per_group
    tile = first + inside % height
    at = tiles + tile.to(tl.int64) * 4
    valid = index < count * COLUMNS
    expert = tl.load(at, mask=valid, other=0)
    slot = tl.load(at + 1, mask=valid, other=0)
    begin = tl.load(at + 2, mask=valid, other=0)
    end = tl.load(at + 3, mask=valid, other=0)
    return expert, slot, begin, end, inside // height


@triton.jit
def _product(rows, weights, factor, total, SCALED: tl.constexpr, SWAP: tl.constexpr):
    """rows [M, K], weights [N, K]: [M, N] added to total, or [N, M] where swapped; times the factor where scaled."""
    if SCALED:
        weights = weights.to(rows.dtype)
        product = tl.dot(weights, tl.trans(rows)) if SWAP else tl.dot(rows, tl.trans(weights))
        total += product * factor
    elif SWAP:
        total = tl.dot(weights, tl.trans(rows), total)
    else:
        total = tl.dot(rows, tl.trans(weights), total)
    return total


@triton.jit
def _factor(
    weights, slot, row, column, row_scale,
    rows_end, K: tl.constexpr, BN: tl.constexpr, SCALED: tl.constexpr, SCALED_ROWS: tl.constexpr, SWAP: tl.constexpr,
):  # fmt: skip
    """What a product of weights [BN, ..] from (row, column) on is multiplied by, ready to be broadcast; 1 where nothing is scaled."""
    if SCALED:
        _, _, _, _, scales, scale_stride, scale_offset = weights
        at = scales + slot.to(tl.int64) * scale_stride + scale_offset + column // SCALE_BLOCK
        if BN <= SCALE_BLOCK:
            factor = tl.full((1, 1), 1.0, tl.float32) * tl.load(at + row // SCALE_BLOCK * (K // SCALE_BLOCK))
        else:
            n = (row + tl.arange(0, BN)) % rows_end
            by_row = tl.load(at + n // SCALE_BLOCK * (K // SCALE_BLOCK))
            factor = by_row[:, None] if SWAP else by_row[None, :]
        if SCALED_ROWS:
            factor *= row_scale[None, :] if SWAP else row_scale[:, None]
    else:
        factor = 1.0
    return factor


@triton.jit
def _weights(
    weights, slot, row, column,
    rows_end, K: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, TRANSPOSED: tl.constexpr, TMA: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """[BN, BK] of a stored [N, K] (or [K, N] where transposed) from (row, column) on; rows beyond rows_end repeat others."""
    arena, descriptor, slot_stride, offset, _, _, _ = weights
    matrix = arena + slot.to(tl.int64) * slot_stride + offset
    if TMA:
        if TRANSPOSED:
            return tl.trans(descriptor.load([slot, column, row]).reshape(BK, BN))
        return descriptor.load([slot, row, column]).reshape(BN, BK)
    n = (row + tl.arange(0, BN)) % rows_end
    k = column + tl.arange(0, BK)
    if TRANSPOSED:
        at = matrix + k[:, None].to(tl.int64) * rows_end + n[None, :]
        if EVEN_K:
            return tl.trans(tl.load(at))
        return tl.trans(tl.load(at, mask=(k < K)[:, None], other=0.0))
    at = matrix + n[:, None].to(tl.int64) * K + k[None, :]
    if EVEN_K:
        return tl.load(at)
    return tl.load(at, mask=(k < K)[None, :], other=0.0)


@triton.jit
def _pair(weights, slot, row, column, BN: tl.constexpr, BK: tl.constexpr, TRANSPOSED: tl.constexpr):
    """[2 BN, BK]: rows of gate from `row` on and as many of up, by one transfer of a descriptor that has them side by side."""
    if TRANSPOSED:
        return tl.trans(weights[1].load([slot, column, 0, row]).reshape(BK, 2 * BN))
    else:
        return weights[1].load([slot, 0, row, column]).reshape(2 * BN, BK)


@triton.jit
def _store_activated(
    gate, up, bias, inner, place, INNER: tl.constexpr, INTERLEAVED: tl.constexpr, HAS_BIAS: tl.constexpr, SCALED_ROWS: tl.constexpr,
    ACTIVATION: tl.constexpr, LIMIT: tl.constexpr, ALPHA: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """The rest of a tile [BM, BN] of the first product."""
    inner, inner_scale = inner
    expert, _, begin, end, block = place
    row = begin + tl.arange(0, BM)
    column = block * BN + tl.arange(0, BN)
    kept = column < INNER
    if HAS_BIAS:
        at = bias + expert.to(tl.int64) * (2 * INNER)
        gate_column = 2 * column if INTERLEAVED else column
        up_column = 2 * column + 1 if INTERLEAVED else column + INNER
        gate += tl.load(at + gate_column, mask=kept, other=0.0).to(tl.float32)[None, :]
        up += tl.load(at + up_column, mask=kept, other=0.0).to(tl.float32)[None, :]
    result = _activate(gate, up, ACTIVATION, LIMIT, ALPHA)
    if SCALED_ROWS:  # BN is SCALE_BLOCK: the tile holds whole groups
        result, scale = quantize(result)
        tl.store(inner_scale + row.to(tl.int64) * (INNER // SCALE_BLOCK) + block, scale, mask=row < end)
    at = inner + row.to(tl.int64)[:, None] * INNER + column[None, :]
    tl.store(at, result.to(inner.dtype.element_ty), mask=(row < end)[:, None] & kept[None, :])


@triton.jit
def up_tile(
    hidden, weights, bias, order, inner, place,
    H: tl.constexpr, INNER: tl.constexpr, TOP_K: tl.constexpr,
    INTERLEAVED: tl.constexpr, TRANSPOSED: tl.constexpr, HAS_BIAS: tl.constexpr, SCALED: tl.constexpr, SCALED_ROWS: tl.constexpr,
    ACTIVATION: tl.constexpr, LIMIT: tl.constexpr, ALPHA: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, SWAP: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """One tile of activate(hidden W_gate^T, hidden W_up^T): BM rows by BN columns of `inner` [pairs, INNER]."""
    EVEN_K: tl.constexpr = H % BK == 0
    hidden, hidden_scale, hidden_stride = hidden
    _, slot, begin, end, block = place
    row = begin + tl.arange(0, BM)
    pair = tl.load(order + row, mask=row < end, other=0)
    token = (pair // TOP_K).to(tl.int64)
    source = hidden + token[:, None] * hidden_stride
    n = block * BN
    row_scale = tl.full((BM,), 1.0, tl.float32)
    JOINT: tl.constexpr = INTERLEAVED or (TMA and not SCALED and not SWAP)  # gate and up in one product
    if JOINT:
        both = tl.zeros((2 * BN, BM) if SWAP else (BM, 2 * BN), tl.float32)
    else:
        gate = tl.zeros((BN, BM) if SWAP else (BM, BN), tl.float32)
        up = tl.zeros((BN, BM) if SWAP else (BM, BN), tl.float32)
    for k in tl.range(0, H, BK, num_stages=STAGES):
        columns = k + tl.arange(0, BK)
        if EVEN_K:
            x = tl.load(source + columns[None, :])
        else:
            x = tl.load(source + columns[None, :], mask=(columns < H)[None, :], other=0.0)
        if SCALED_ROWS:
            row_scale = tl.load(hidden_scale + token * (H // SCALE_BLOCK) + k // SCALE_BLOCK)
        if INTERLEAVED:
            w = _weights(weights, slot, 2 * n, k, 2 * INNER, H, 2 * BN, BK, TRANSPOSED, TMA, EVEN_K)
            both = _product(x, w, 1.0, both, False, SWAP)
        elif JOINT:
            both = _product(x, _pair(weights, slot, n, k, BN, BK, TRANSPOSED), 1.0, both, False, SWAP)
        else:
            w_gate = _weights(weights, slot, n, k, 2 * INNER, H, BN, BK, TRANSPOSED, TMA, EVEN_K)
            w_up = _weights(weights, slot, INNER + n, k, 2 * INNER, H, BN, BK, TRANSPOSED, TMA, EVEN_K)
            gate_factor = _factor(weights, slot, n, k, row_scale, INNER, H, BN, SCALED, SCALED_ROWS, SWAP)
            up_factor = _factor(weights, slot, INNER + n, k, row_scale, 2 * INNER, H, BN, SCALED, SCALED_ROWS, SWAP)
            gate = _product(x, w_gate, gate_factor, gate, SCALED, SWAP)
            up = _product(x, w_up, up_factor, up, SCALED, SWAP)
    if JOINT:
        if SWAP:
            both = tl.trans(both)
        gate, up = tl.split(both.reshape(BM, BN, 2) if INTERLEAVED else both.reshape(BM, 2, BN).permute(0, 2, 1))
    elif SWAP:
        gate, up = tl.trans(gate), tl.trans(up)
    _store_activated(
        gate, up, bias, inner, place, INNER, INTERLEAVED, HAS_BIAS, SCALED_ROWS, ACTIVATION, LIMIT, ALPHA, BM, BN
    )


@triton.jit
def down_tile(
    inner, packed, weights, bias, order, rows, place,
    H: tl.constexpr, INNER: tl.constexpr, TRANSPOSED: tl.constexpr, HAS_BIAS: tl.constexpr, SCALED: tl.constexpr,
    SCALED_ROWS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, SWAP: tl.constexpr, TMA: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """One tile of inner W_down^T: BM rows, each stored at its pair's place in `rows` [pairs, H], by BN columns."""
    EVEN_K: tl.constexpr = INNER % BK == 0
    inner, inner_scale = inner
    expert, slot, begin, end, block = place
    row = begin + tl.arange(0, BM)
    valid = row < end
    known = tl.where(valid, row, begin).to(tl.int64)
    source = inner + known[:, None] * INNER
    n = block * BN
    row_scale = tl.full((BM,), 1.0, tl.float32)
    result = tl.zeros((BN, BM) if SWAP else (BM, BN), tl.float32)
    for k in tl.range(0, INNER, BK, num_stages=STAGES):
        columns = k + tl.arange(0, BK)
        if PACKED:
            x = packed.load([begin, k])
        elif EVEN_K:
            x = tl.load(source + columns[None, :])
        else:
            x = tl.load(source + columns[None, :], mask=(columns < INNER)[None, :], other=0.0)
        if SCALED_ROWS:
            row_scale = tl.load(inner_scale + known * (INNER // SCALE_BLOCK) + k // SCALE_BLOCK)
        w = _weights(weights, slot, n, k, H, INNER, BN, BK, TRANSPOSED, TMA, EVEN_K)
        factor = _factor(weights, slot, n, k, row_scale, H, INNER, BN, SCALED, SCALED_ROWS, SWAP)
        result = _product(x, w, factor, result, SCALED, SWAP)
    if SWAP:
        result = tl.trans(result)
    column = n + tl.arange(0, BN)
    kept = column < H
    if HAS_BIAS:
        result += tl.load(bias + expert.to(tl.int64) * H + column, mask=kept, other=0.0).to(tl.float32)[None, :]
    pair = tl.load(order + row, mask=valid, other=0)
    at = rows + pair.to(tl.int64)[:, None] * H + column[None, :]
    tl.store(at, result.to(rows.dtype.element_ty), mask=valid[:, None] & kept[None, :])


@triton.jit
def _up_work(
    index, hidden, weights, bias, order, inner, tiles, total,
    H: tl.constexpr, INNER: tl.constexpr, TOP_K: tl.constexpr,
    INTERLEAVED: tl.constexpr, TRANSPOSED: tl.constexpr, HAS_BIAS: tl.constexpr, SCALED: tl.constexpr, SCALED_ROWS: tl.constexpr,
    ACTIVATION: tl.constexpr, LIMIT: tl.constexpr, ALPHA: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, GROUP: tl.constexpr,
    SWAP: tl.constexpr, TMA: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    place = _tile(tiles, total, index, (INNER + BN - 1) // BN, GROUP)
    if TAIL and place[3] - place[2] <= BM // 2:
        up_tile(
            hidden, weights, bias, order, inner, place, H, INNER, TOP_K, INTERLEAVED, TRANSPOSED, HAS_BIAS, SCALED, SCALED_ROWS,
            ACTIVATION, LIMIT, ALPHA, BM // 2, BN, BK, STAGES, SWAP, TMA,
        )  # fmt: skip
    else:
        up_tile(
            hidden, weights, bias, order, inner, place, H, INNER, TOP_K, INTERLEAVED, TRANSPOSED, HAS_BIAS, SCALED, SCALED_ROWS,
            ACTIVATION, LIMIT, ALPHA, BM, BN, BK, STAGES, SWAP, TMA,
        )  # fmt: skip


@triton.jit
def grouped_up(
    hidden, hidden_scale, arena, descriptor, scales, bias, order, inner, inner_scale, tiles, total,
    slot_stride, offset, scale_stride, scale_offset, hidden_stride,
    H: tl.constexpr, INNER: tl.constexpr, TOP_K: tl.constexpr,
    INTERLEAVED: tl.constexpr, TRANSPOSED: tl.constexpr, HAS_BIAS: tl.constexpr, SCALED: tl.constexpr, SCALED_ROWS: tl.constexpr,
    ACTIVATION: tl.constexpr, LIMIT: tl.constexpr, ALPHA: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, GROUP: tl.constexpr,
    SWAP: tl.constexpr, TMA: tl.constexpr, TAIL: tl.constexpr, PERSISTENT: tl.constexpr, FLAT: tl.constexpr,
):  # fmt: skip
    """Grid (tiles' bound x columns,), or as many programs as run at once where persistent. Rows are gathered from `hidden` by their
    pair. TAIL: a tile with at most BM / 2 rows is computed at half the height. FLAT: persistent, in one loop over tiles and their depth."""
    index = tl.program_id(0)
    work = tl.load(total) * ((INNER + BN - 1) // BN)
    hidden = (hidden, hidden_scale, hidden_stride)
    inner = (inner, inner_scale)
    weights = (arena, descriptor, slot_stride, offset, scales, scale_stride, scale_offset)
    if FLAT:
        for at in tl.range(index, work, tl.num_programs(0), flatten=True, num_stages=STAGES):
            place = _tile(tiles, total, at, (INNER + BN - 1) // BN, GROUP)
            up_tile(
                hidden, weights, bias, order, inner, place, H, INNER, TOP_K, INTERLEAVED, TRANSPOSED, HAS_BIAS, SCALED, SCALED_ROWS,
                ACTIVATION, LIMIT, ALPHA, BM, BN, BK, STAGES, SWAP, TMA,
            )  # fmt: skip
    elif PERSISTENT:
        while index < work:
            _up_work(
                index, hidden, weights, bias, order, inner, tiles, total, H, INNER, TOP_K, INTERLEAVED, TRANSPOSED, HAS_BIAS, SCALED,
                SCALED_ROWS, ACTIVATION, LIMIT, ALPHA, BM, BN, BK, STAGES, GROUP, SWAP, TMA, TAIL,
            )  # fmt: skip
            index += tl.num_programs(0)
    elif index < work:
        _up_work(
            index, hidden, weights, bias, order, inner, tiles, total, H, INNER, TOP_K, INTERLEAVED, TRANSPOSED, HAS_BIAS, SCALED,
            SCALED_ROWS, ACTIVATION, LIMIT, ALPHA, BM, BN, BK, STAGES, GROUP, SWAP, TMA, TAIL,
        )  # fmt: skip


@triton.jit
def _down_work(
    index, inner, packed, weights, bias, order, rows, tiles, total,
    H: tl.constexpr, INNER: tl.constexpr, TRANSPOSED: tl.constexpr, HAS_BIAS: tl.constexpr, SCALED: tl.constexpr,
    SCALED_ROWS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, GROUP: tl.constexpr,
    SWAP: tl.constexpr, TMA: tl.constexpr, PACKED: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    place = _tile(tiles, total, index, (H + BN - 1) // BN, GROUP)
    if TAIL and place[3] - place[2] <= BM // 2:
        down_tile(
            inner, packed, weights, bias, order, rows, place, H, INNER, TRANSPOSED, HAS_BIAS, SCALED, SCALED_ROWS,
            BM // 2, BN, BK, STAGES, SWAP, TMA, False,
        )  # fmt: skip
    else:
        down_tile(
            inner, packed, weights, bias, order, rows, place, H, INNER, TRANSPOSED, HAS_BIAS, SCALED, SCALED_ROWS,
            BM, BN, BK, STAGES, SWAP, TMA, PACKED,
        )  # fmt: skip


@triton.jit
def grouped_down(
    inner, inner_scale, packed, arena, descriptor, scales, bias, order, rows, tiles, total,
    slot_stride, offset, scale_stride, scale_offset,
    H: tl.constexpr, INNER: tl.constexpr, TRANSPOSED: tl.constexpr, HAS_BIAS: tl.constexpr, SCALED: tl.constexpr,
    SCALED_ROWS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, GROUP: tl.constexpr,
    SWAP: tl.constexpr, TMA: tl.constexpr, PACKED: tl.constexpr, TAIL: tl.constexpr, PERSISTENT: tl.constexpr, FLAT: tl.constexpr,
):  # fmt: skip
    """Grid and flags as in grouped_up. `inner` lies in the schedule's order, so it can be read through `packed`."""
    index = tl.program_id(0)
    work = tl.load(total) * ((H + BN - 1) // BN)
    inner = (inner, inner_scale)
    weights = (arena, descriptor, slot_stride, offset, scales, scale_stride, scale_offset)
    if FLAT:
        for at in tl.range(index, work, tl.num_programs(0), flatten=True, num_stages=STAGES):
            place = _tile(tiles, total, at, (H + BN - 1) // BN, GROUP)
            down_tile(
                inner, packed, weights, bias, order, rows, place, H, INNER, TRANSPOSED, HAS_BIAS, SCALED, SCALED_ROWS,
                BM, BN, BK, STAGES, SWAP, TMA, PACKED,
            )  # fmt: skip
    elif PERSISTENT:
        while index < work:
            _down_work(
                index, inner, packed, weights, bias, order, rows, tiles, total, H, INNER, TRANSPOSED, HAS_BIAS, SCALED, SCALED_ROWS,
                BM, BN, BK, STAGES, GROUP, SWAP, TMA, PACKED, TAIL,
            )  # fmt: skip
            index += tl.num_programs(0)
    elif index < work:
        _down_work(
            index, inner, packed, weights, bias, order, rows, tiles, total, H, INNER, TRANSPOSED, HAS_BIAS, SCALED, SCALED_ROWS,
            BM, BN, BK, STAGES, GROUP, SWAP, TMA, PACKED, TAIL,
        )  # fmt: skip


@triton.jit
def weighted_sum(
    rows, ids, weights, expert_slot, output, H: tl.constexpr, E: tl.constexpr, TOP_K: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Grid (tokens, columns / BLOCK). output[t] = sum of weights[t, k] * rows[t, k] in top-k order; rows never computed count as 0."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(TOP_K):
        expert = tl.load(ids + token * TOP_K + k)
        known = (expert >= 0) & (expert < E)
        resident = known & (tl.load(expert_slot + tl.where(known, expert, 0)) >= 0)
        weight = tl.load(weights + token * TOP_K + k).to(tl.float32)
        row = tl.load(rows + (token * TOP_K + k) * H + column, mask=(column < H) & resident, other=0.0).to(tl.float32)
        total += tl.where(resident, weight * row, 0.0)
    tl.store(output + token * H + column, total.to(output.dtype.element_ty), mask=column < H)
