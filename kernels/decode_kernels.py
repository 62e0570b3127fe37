"""Triton kernels of decode attention: pieces of each request's keys attended apart, then merged.

A request's visible keys are cut into pieces of equal length, at most PIECE keys each: how many depends on that request alone, so its
bits do not depend on what shares the step. A unit of work is (piece, KV head, block of its query heads); programs take units in turn,
so that one long request does not keep the others waiting, and a grid whose size the host knows serves every mixture of lengths.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _pieces(lengths, requests, BATCH: tl.constexpr, PIECE: tl.constexpr, WINDOW: tl.constexpr):
    """How many pieces each request of the batch has, [BATCH]."""
    request = tl.arange(0, BATCH)
    length = tl.load(lengths + request, mask=request < requests, other=0)
    if WINDOW > 0:
        length = tl.minimum(length, WINDOW)
    return (length + PIECE - 1) // PIECE


@triton.jit
def _span(
    piece, count, ends, lengths, BATCH: tl.constexpr, WINDOW: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """(request, first key, end) of a piece."""
    request = tl.arange(0, BATCH)
    mine = tl.sum((ends <= piece).to(tl.int32), 0)
    pieces = tl.sum(tl.where(request == mine, count, 0), 0)
    number = piece - tl.sum(tl.where(request < mine, count, 0), 0)
    length = tl.load(lengths + mine)
    skipped = tl.maximum(length - WINDOW, 0) if WINDOW > 0 else 0
    share = (length - skipped + pieces - 1) // pieces
    share = (share + BLOCK - 1) // BLOCK * BLOCK
    begin = skipped + number * share
    return mine, begin, tl.minimum(begin + share, length)


@triton.jit
def _scores(
    query, query_rest, keys, row, kept, key_stride, dim, rest, scaling,
    DIM: tl.constexpr, KEY_DIM: tl.constexpr, REST: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """float32 [heads, BLOCK] of keys [BLOCK], -inf where not kept; and the keys' first DIM columns."""
    at = keys + row[:, None] * key_stride
    main = tl.load(at + dim[None, :], mask=kept[:, None] & (dim < KEY_DIM)[None, :], other=0.0)
    score = tl.dot(query, tl.trans(main))
    if REST > 0:
        more = tl.load(at + DIM + rest[None, :], mask=kept[:, None] & (DIM + rest < KEY_DIM)[None, :], other=0.0)
        score += tl.dot(query_rest, tl.trans(more))
    score *= scaling
    if SOFTCAP > 0:
        score = SOFTCAP * (2 * tl.sigmoid(2 * score / SOFTCAP) - 1)
    return tl.where(kept[None, :], score, float("-inf")), main


@triton.jit
def attend_pieces(
    query, keys, values, first_rows, lengths, partial, logsumexp, requests, scaling,
    query_stride, query_head_stride, key_stride, key_head_stride, value_stride, value_head_stride,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, BATCH: tl.constexpr, PIECE: tl.constexpr, WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr, KEY_DIM: tl.constexpr, DIM: tl.constexpr, REST: tl.constexpr, VALUE_DIM: tl.constexpr, VALUES: tl.constexpr,
    SHARED: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Grid (programs,). partial float32 [pieces * KV_HEADS * GROUP, VALUE_DIM], each row a softmax over its piece alone, and its logsumexp.
    DIM + REST: columns of a key, KEY_DIM of them real; VALUES: those of a value, padded. SHARED: a value is the key's first DIM columns."""
    BLOCKS: tl.constexpr = (GROUP + HEADS - 1) // HEADS
    count = _pieces(lengths, requests, BATCH, PIECE, WINDOW)
    ends = tl.cumsum(count, 0)
    units = tl.sum(count, 0) * KV_HEADS * BLOCKS
    dim, rest, column = tl.arange(0, DIM), tl.arange(0, REST if REST > 0 else 16), tl.arange(0, VALUES)
    unit = tl.program_id(0)
    while unit < units:
        piece = unit // (KV_HEADS * BLOCKS)
        inside = unit % (KV_HEADS * BLOCKS)
        kv_head = inside // BLOCKS
        mine, begin, end = _span(piece, count, ends, lengths, BATCH, WINDOW, BLOCK)
        head = inside % BLOCKS * HEADS + tl.arange(0, HEADS)
        known = head < GROUP
        head_of_all = kv_head * GROUP + head
        at = query + mine.to(tl.int64) * query_stride + head_of_all[:, None].to(tl.int64) * query_head_stride
        q = tl.load(at + dim[None, :], mask=known[:, None] & (dim < KEY_DIM)[None, :], other=0.0)
        q_rest = q
        if REST > 0:
            q_rest = tl.load(at + DIM + rest[None, :], mask=known[:, None] & (DIM + rest < KEY_DIM)[None, :], other=0.0)
        first = tl.load(first_rows + mine).to(tl.int64)
        key_base = keys + kv_head.to(tl.int64) * key_head_stride
        value_base = values + kv_head.to(tl.int64) * value_head_stride
        most = tl.full((HEADS,), float("-inf"), tl.float32)
        weight = tl.zeros((HEADS,), tl.float32)
        total = tl.zeros((HEADS, VALUES), tl.float32)
        for start in tl.range(begin, end, BLOCK, num_stages=STAGES):
            position = start + tl.arange(0, BLOCK)
            kept = position < end
            row = first + position
            score, value = _scores(
                q, q_rest, key_base, row, kept, key_stride, dim, rest, scaling, DIM, KEY_DIM, REST, SOFTCAP
            )
            if not SHARED:
                at_value = value_base + row[:, None] * value_stride + column[None, :]
                value = tl.load(at_value, mask=kept[:, None] & (column < VALUE_DIM)[None, :], other=0.0)
            now = tl.maximum(most, tl.max(score, 1))
            shrink = tl.exp(most - now)
            p = tl.exp(score - now[:, None])
            weight = weight * shrink + tl.sum(p, 1)
            total = tl.dot(p.to(value.dtype), value, total * shrink[:, None])
            most = now
        place = (piece * KV_HEADS * GROUP + head_of_all).to(tl.int64)
        at_partial = partial + place[:, None] * VALUE_DIM + column[None, :]
        tl.store(at_partial, total / weight[:, None], mask=known[:, None] & (column < VALUE_DIM)[None, :])
        tl.store(logsumexp + place, most + tl.log(weight), mask=known)
        unit += tl.num_programs(0)


@triton.jit
def merge_pieces(
    partial, logsumexp, lengths, sinks, output, requests,
    HEADS: tl.constexpr, BATCH: tl.constexpr, PIECE: tl.constexpr, WINDOW: tl.constexpr, VALUE_DIM: tl.constexpr, VALUES: tl.constexpr,
    HAS_SINKS: tl.constexpr,
):  # fmt: skip
    """Grid (requests, heads). The pieces in order, each weighted by what it holds of the whole softmax; a sink is one more logit without a
    value. A request without keys gives zeros."""
    mine, head = tl.program_id(0), tl.program_id(1)
    request = tl.arange(0, BATCH)
    count = _pieces(lengths, requests, BATCH, PIECE, WINDOW)
    first = tl.sum(tl.where(request < mine, count, 0), 0)
    pieces = tl.sum(tl.where(request == mine, count, 0), 0)
    column = tl.arange(0, VALUES)
    most = tl.load(sinks + head).to(tl.float32) if HAS_SINKS else float("-inf")
    weight = 1.0 if HAS_SINKS else 0.0
    total = tl.zeros((VALUES,), tl.float32)
    for number in tl.range(0, pieces):
        place = ((first + number) * HEADS + head).to(tl.int64)
        size = tl.load(logsumexp + place)
        now = tl.maximum(most, size)
        shrink, grow = tl.exp(most - now), tl.exp(size - now)
        row = tl.load(partial + place * VALUE_DIM + column, mask=column < VALUE_DIM, other=0.0)
        total = total * shrink + row * grow
        weight = weight * shrink + grow
        most = now
    result = tl.where(pieces > 0, total / weight, 0.0)
    at = output + (mine.to(tl.int64) * HEADS + head) * VALUE_DIM + column
    tl.store(at, result.to(output.dtype.element_ty), mask=column < VALUE_DIM)
