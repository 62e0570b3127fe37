"""Ranks on a GPU in bf16: the grouped products over rows of several ranks, and graphs that come and go with the epochs.

Ranks are threads with the same stream. Bits are those of a single worker where its products have as many rows of every expert; in
general another number of rows may take another kernel, so logits are compared with what bf16 costs.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.families import FAMILIES, VOCAB, make_model
from tests.workers.ep.world import World, random_holders, sole_holders

from flexpert.workers.model import all_experts
from flexpert.workers.step import Row

pytestmark = pytest.mark.gpu
ALIGNED = {"deepseek_v2": dict(v_head_dim=16), "deepseek_v3": dict(v_head_dim=16)}


def make_world(family: str, folder: Path) -> World:
    make_model(family, **ALIGNED.get(family, {})).to(torch.bfloat16).save_pretrained(folder)
    return World(folder, dtype="bfloat16", device="cuda")


def rows(rank: int, lengths: list[int]) -> list[Row]:
    tokens = [tuple((n * 7 + rank * 5 + slot) % VOCAB for n in range(length)) for slot, length in enumerate(lengths)]
    return [Row(f"r{rank}-{slot}", slot, 0, one, True, True) for slot, one in enumerate(tokens)]


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_ranks_have_the_logits_of_a_single_worker(family: str, size: int, tmp_path: Path) -> None:
    world = make_world(family, tmp_path)
    for seed in range(2):
        group = world.group(random_holders(world.layout, size, seed=seed), size=size)
        step = [rows(rank, [3, 40, 1][: (rank + seed) % 4]) for rank in range(size)]
        found = group.forward(step)
        for rank in range(size):
            if step[rank]:
                expected = world.single.forward(step[rank])
                # a near tie of experts may flip in bf16: compare the bulk, not the worst
                assert (found[rank] - expected).abs().median() <= 0.02 * expected.std()
                assert (found[rank].argmax(-1) == expected.argmax(-1)).float().mean() >= 0.9


def test_one_holder_of_everything_has_equal_bits(tmp_path: Path) -> None:
    """Then it computes the very products that a single worker computes."""
    world = make_world("qwen3_moe", tmp_path)
    for holder in (0, 1):
        group = world.group(sole_holders(world.layout, 2, holder), size=2)
        found = group.forward([rows(0, [3, 40, 1]), []])
        assert torch.equal(found[0], world.single.forward(rows(0, [3, 40, 1])))


def test_graphs_are_captured_anew_with_the_experts_in_use(tmp_path: Path) -> None:
    """A decode step alone, in a group, and alone again with experts in other memory."""
    world = make_world("qwen3_moe", tmp_path)
    runner = world._runner()
    held = all_experts(world.layout)
    decode = [Row("a", 0, 3, (9,), True)]

    def run_alone() -> torch.Tensor:
        runner.use(world.experts(runner, held), None)
        runner.forward(rows(0, [3]))
        return runner.forward(decode)

    first = run_alone()
    world._idle.insert(0, runner)
    group = world.group(sole_holders(world.layout, 2, 1), size=2)
    apart = group.forward([decode, []])[0]
    torch.testing.assert_close(apart, first, rtol=0.05, atol=0.15)
    for layer in group.runners[1].bound.experts:
        layer.slabs = None
    assert torch.equal(run_alone(), first)
