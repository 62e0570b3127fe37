"""The tiles that the tuner tries: each is one that the kernels take, on any machine."""

from __future__ import annotations

import pytest

from flexpert.kernels.moe.candidates import GEMV, GEMV_FP8, SHARED_MEMORY_BYTES, Candidates, heights
from flexpert.kernels.moe.routing import BLOCK_SIZES
from flexpert.kernels.moe.weights import LARGEST_BOX, SCALE_BLOCK

KINDS = [
    Candidates(halves, scaled, quantized)
    for halves in (True, False)
    for scaled, quantized in ((False, False), (True, False), (True, True))
]


@pytest.mark.parametrize("candidates", KINDS, ids=str)
def test_every_candidate_is_a_tile_that_the_kernels_take(candidates: Candidates) -> None:
    for rows in candidates.heights:
        tiles = candidates.of(rows)
        assert tiles
        assert len(tiles) == len(set(tiles))
        for tile in tiles:
            assert tile.rows == rows
            assert tile.columns * (2 if candidates.halves else 1) <= 2 * LARGEST_BOX
            element = 1 if candidates.scaled else 2
            staged = tile.columns * (2 if candidates.halves else 1) * tile.depth * element * tile.stages
            assert staged <= SHARED_MEMORY_BYTES
            if candidates.scaled:
                assert SCALE_BLOCK % tile.depth == 0
            if candidates.quantized and candidates.halves:
                assert tile.columns == SCALE_BLOCK


def test_few_enough_to_time_them_all() -> None:
    """At most 150 for a product at a token count, each timed once or twice."""
    for candidates in KINDS:
        for rows in (0.1, 1, 8, 20, 40, 90, 128, 400, 4000):
            assert 1 <= sum(
                len(candidates.of(size)) for size in heights(rows) if size in candidates.heights
            ) <= 150 or (not set(heights(rows)) & set(candidates.heights))
    assert len(GEMV) < len(GEMV_FP8) <= 15


def test_heights_grow_with_the_rows() -> None:
    assert heights(0.5) == (16,)
    assert heights(1000) == (128,)
    found = [heights(rows) for rows in (1, 8, 16, 30, 60, 120, 300)]
    assert [max(sizes) for sizes in found] == sorted(max(sizes) for sizes in found)
    assert set().union(*found) == set(BLOCK_SIZES)
