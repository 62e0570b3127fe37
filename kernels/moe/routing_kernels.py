"""Triton kernels that turn top-k ids into a schedule (`flexpert.kernels.moe.routing`): counts, a stable order by expert, tiles.

All sums are of integers, so every run gives the same schedule. Up to SMALL_PAIRS pairs one kernel does it: each expert's program reads
all ids, which are few, and finds its own place among them. Beyond, three kernels over chunks: count, place, sort.
"""

from __future__ import annotations

import triton
import triton.language as tl

SMALL_PAIRS = 4096
CHUNK = 1024


@triton.jit
def _tiles_of_size(expert, slot, present, all_experts, tiles, total, begin, count, E: tl.constexpr, SIZE: tl.constexpr):
    needed = (present + SIZE - 1) // SIZE
    first = tl.sum(tl.where(all_experts < expert, needed, 0))
    if expert == E - 1:
        tl.store(total, tl.sum(needed))
    if slot >= 0:
        own = (count + SIZE - 1) // SIZE
        start = 0
        while start < own:
            tile = start + tl.arange(0, 16)
            at = tiles + (first + tile) * 4
            inside = tile < own
            tl.store(at, tl.full((16,), 0, tl.int32) + expert, mask=inside)
            tl.store(at + 1, tl.full((16,), 0, tl.int32) + slot, mask=inside)
            tl.store(at + 2, begin + tile * SIZE, mask=inside)
            tl.store(at + 3, tl.full((16,), 0, tl.int32) + begin + count, mask=inside)
            start += 16


@triton.jit
def _expert_tiles(
    expert, counts, all_experts, slot_of, tiles, totals, begin, count, pairs, E: tl.constexpr, SIZES: tl.constexpr
):  # fmt: skip
    """Write the tiles of one expert for every block size: (expert, slot, first row, end of its rows) each. A size's tiles begin behind the
    bounds of those before (`routing.tile_bounds`), found here from `pairs`, so that no number of tokens needs kernels of its own."""
    slots = tl.load(slot_of + all_experts, mask=all_experts < E, other=-1)
    present = tl.where(slots >= 0, counts, 0)
    slot = tl.load(slot_of + expert)
    start = 0
    for index in tl.static_range(len(SIZES)):
        _tiles_of_size(
            expert, slot, present, all_experts, tiles + start * 4, totals + index, begin, count, E, SIZES[index]
        )  # fmt: skip
        start += (pairs + tl.minimum(pairs, E) * (SIZES[index] - 1)) // SIZES[index]


@triton.jit
def route_small(
    ids, slot_of, order, tiles, totals, pairs,
    E: tl.constexpr, BINS: tl.constexpr, BLOCK: tl.constexpr, SIZES: tl.constexpr,
):  # fmt: skip
    """Grid (E,). ids [pairs] -> order [pairs] stably by expert, tiles, totals [len(SIZES)]. Ids outside 0..E-1 are left out."""
    expert = tl.program_id(0)
    pair = tl.arange(0, BLOCK)
    chosen = tl.load(ids + pair, mask=pair < pairs, other=E).to(tl.int32)
    chosen = tl.where((chosen < 0) | (chosen > E), E, chosen)
    all_experts = tl.arange(0, BINS)
    counts = tl.histogram(chosen, BINS)
    counts = tl.where(all_experts < E, counts, 0)
    begin = tl.sum(tl.where(all_experts < expert, counts, 0))
    mine = chosen == expert
    rank = tl.cumsum(mine.to(tl.int32), 0) - 1
    tl.store(order + begin + rank, pair, mask=mine)
    count = tl.sum(mine.to(tl.int32))
    _expert_tiles(expert, counts, all_experts, slot_of, tiles, totals, begin, count, pairs, E, SIZES)


@triton.jit
def _chunk_ids(ids, chunk, pairs, E: tl.constexpr, CHUNK_SIZE: tl.constexpr):
    pair = chunk * CHUNK_SIZE + tl.arange(0, CHUNK_SIZE)
    chosen = tl.load(ids + pair, mask=pair < pairs, other=E).to(tl.int32)
    return tl.where((chosen < 0) | (chosen > E), E, chosen)


@triton.jit
def count_chunks(ids, histogram, pairs, E: tl.constexpr, BINS: tl.constexpr, CHUNK_SIZE: tl.constexpr):
    """Grid (chunks,). histogram [chunks, BINS]: pairs of each expert in each chunk; bin E counts those left out."""
    chunk = tl.program_id(0)
    counts = tl.histogram(_chunk_ids(ids, chunk, pairs, E, CHUNK_SIZE), BINS)
    tl.store(histogram + chunk * BINS + tl.arange(0, BINS), counts)


@triton.jit
def place_chunks(
    histogram, base, slot_of, tiles, totals, chunks, pairs,
    E: tl.constexpr, BINS: tl.constexpr, CHUNKS: tl.constexpr, SIZES: tl.constexpr,
):  # fmt: skip
    """Grid (E,). base [chunks, BINS]: where the pairs of each expert of each chunk begin in the order; and the tiles."""
    expert = tl.program_id(0)
    all_experts = tl.arange(0, BINS)
    counts = tl.zeros((BINS,), tl.int32)
    start = 0
    while start < chunks:
        chunk = start + tl.arange(0, 16)
        at = histogram + chunk[:, None] * BINS + all_experts[None, :]
        counts += tl.sum(tl.load(at, mask=(chunk < chunks)[:, None], other=0), 0)
        start += 16
    counts = tl.where(all_experts < E, counts, 0)
    begin = tl.sum(tl.where(all_experts < expert, counts, 0))
    chunk = tl.arange(0, CHUNKS)
    own = tl.load(histogram + chunk * BINS + expert, mask=chunk < chunks, other=0)
    tl.store(base + chunk * BINS + expert, begin + tl.cumsum(own, 0) - own, mask=chunk < chunks)
    _expert_tiles(expert, counts, all_experts, slot_of, tiles, totals, begin, tl.sum(own), pairs, E, SIZES)


@triton.jit
def sort_chunks(ids, histogram, base, order, pairs, E: tl.constexpr, BINS: tl.constexpr, CHUNK_SIZE: tl.constexpr):
    """Grid (chunks,). Sorts each chunk by (expert, pair) and writes it where `base` says."""
    chunk = tl.program_id(0)
    key = _chunk_ids(ids, chunk, pairs, E, CHUNK_SIZE) * CHUNK_SIZE + tl.arange(0, CHUNK_SIZE)
    key = tl.sort(key)
    expert = key // CHUNK_SIZE
    bins = tl.arange(0, BINS)
    counts = tl.load(histogram + chunk * BINS + bins)
    before = tl.cumsum(counts, 0) - counts
    rank = tl.arange(0, CHUNK_SIZE) - tl.gather(before, expert, 0)
    kept = expert < E
    place = tl.load(base + chunk * BINS + expert, mask=kept, other=0) + rank
    tl.store(order + place, chunk * CHUNK_SIZE + key % CHUNK_SIZE, mask=kept)
