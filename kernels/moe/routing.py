"""From top-k ids to a schedule of tiles on the device, without a host synchronisation.

A *pair* is (token, k), numbered token * k + k'. The schedule holds the pairs in order of their experts, stable in the pair's number, and
for each of several block sizes the tiles: up to that many neighbouring rows of one expert. Experts without a slot get no tiles and
ids outside 0..E-1 (padding) no place in the order, so no product touches them. Everything is sized by bounds that the host knows, so
one capture serves every routing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flexpert.kernels.moe.plan import BLOCK_SIZES


@dataclass(frozen=True)
class Schedule:
    """order: int32 [pairs], as many valid as have an expert. tiles: int32 [sum of bounds, 4] of (expert, slot, first row, end of the
    expert's rows), for each block size after the other. totals: int32 [block sizes], how many are valid. Rows are places in `order`."""

    order: Tensor
    tiles: Tensor
    totals: Tensor
    bounds: tuple[int, ...]

    def of(self, block_size: int) -> tuple[Tensor, Tensor, int]:
        """(tiles, total as a tensor of one, bound of the total) of one block size."""
        index = BLOCK_SIZES.index(block_size)
        first = sum(self.bounds[:index])
        return self.tiles[first : first + self.bounds[index]], self.totals[index : index + 1], self.bounds[index]


def tile_bounds(pairs: int, num_experts: int) -> tuple[int, ...]:
    """The most tiles that any routing can need, for each block size."""
    hit = min(pairs, num_experts)
    return tuple((pairs + hit * (size - 1)) // size for size in BLOCK_SIZES)


def route(top_k_index: Tensor, expert_slot: Tensor) -> Schedule:
    """top_k_index: integers [tokens, k] on a GPU; expert_slot: int32 [E], -1 where an expert is not resident."""
    import triton

    from flexpert.kernels.moe import routing_kernels as kernels

    pairs, num_experts = top_k_index.numel(), len(expert_slot)
    ids = top_k_index.reshape(-1)
    bounds = tile_bounds(pairs, num_experts)
    order, tiles, totals = _buffers(pairs, bounds, ids.device)
    sizes = {"E": num_experts, "BINS": triton.next_power_of_2(num_experts + 1), "SIZES": BLOCK_SIZES}
    if pairs <= kernels.SMALL_PAIRS:
        block = max(16, triton.next_power_of_2(pairs))
        kernels.route_small[(num_experts,)](
            ids,
            expert_slot,
            order,
            tiles,
            totals,
            pairs,
            BLOCK=block,
            num_warps=4 if block <= 1024 else 16,
            **sizes,
        )
        return Schedule(order, tiles, totals, bounds)
    chunks = triton.cdiv(pairs, kernels.CHUNK)
    histogram, base = torch.empty((2, chunks, sizes["BINS"]), dtype=torch.int32, device=ids.device)
    chunked = {"E": num_experts, "BINS": sizes["BINS"], "CHUNK_SIZE": kernels.CHUNK}
    kernels.count_chunks[(chunks,)](ids, histogram, pairs, **chunked)
    kernels.place_chunks[(num_experts,)](
        histogram,
        base,
        expert_slot,
        tiles,
        totals,
        chunks,
        pairs,
        CHUNKS=triton.next_power_of_2(chunks),
        **sizes,
    )
    kernels.sort_chunks[(chunks,)](ids, histogram, base, order, pairs, **chunked)
    return Schedule(order, tiles, totals, bounds)


def route_reference(top_k_index: Tensor, expert_slot: Tensor) -> Schedule:
    """The same in PyTorch, for tests; waits for the device."""
    ids, num_experts = top_k_index.reshape(-1).tolist(), len(expert_slot)
    rows = [[pair for pair, expert in enumerate(ids) if expert == e] for e in range(num_experts)]
    bounds = tile_bounds(len(ids), num_experts)
    order, tiles, totals = _buffers(len(ids), bounds, expert_slot.device)
    placed = [pair for of_expert in rows for pair in of_expert]
    order[: len(placed)] = torch.tensor(placed, dtype=torch.int32)
    for index, size in enumerate(BLOCK_SIZES):
        found, begin = [], 0
        for expert, slot in enumerate(expert_slot.tolist()):
            end = begin + len(rows[expert])
            found += [(expert, slot, row, end) for row in range(begin, end, size) if slot >= 0]
            begin = end
        tiles[sum(bounds[:index]) :][: len(found)] = torch.tensor(found, dtype=torch.int32).view(-1, 4)
        totals[index] = len(found)
    return Schedule(order, tiles, totals, bounds)


def _buffers(pairs: int, bounds: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """One allocation for all three, tiles first for their alignment."""
    tiles = 4 * sum(bounds)
    memory = torch.empty(tiles + len(bounds) + pairs, dtype=torch.int32, device=device)
    return memory[tiles + len(bounds) :], memory[:tiles].view(-1, 4), memory[tiles : tiles + len(bounds)]
