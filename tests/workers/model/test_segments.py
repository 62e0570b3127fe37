"""Weights in segments: slab groups are chosen by what a rank holds, and lie back to back however they came."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.families import make_model

from flexpert.hbm.loading import LoadPlan, check_plan
from flexpert.workers.model import (
    DENSE,
    WeightLayout,
    all_experts,
    bind,
    check_servable,
    compact,
    expert_segments,
    load_into,
    make_buffers,
    plan_weights,
    select,
    slab_groups,
)
from flexpert.workers.model.layout import slot_size


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """8 experts in each of two layers; with 64 KiB granules 4 of them are a slab group, with 1 KiB a single one."""
    folder = tmp_path_factory.mktemp("qwen3_moe")
    make_model("qwen3_moe").save_pretrained(folder)
    return folder


def make_plan(model_dir: Path, granule_bytes: int = 65536) -> tuple[LoadPlan, WeightLayout]:
    plan = plan_weights(check_servable(model_dir), "float32", granule_bytes=granule_bytes)
    check_plan(plan)
    return plan, WeightLayout.from_manifest(plan.manifest)


def test_every_slab_group_is_a_segment_of_whole_granules(model_dir: Path) -> None:
    plan, layout = make_plan(model_dir)
    assert layout.slots_per_group == 4
    assert list(plan.segments) == [DENSE, "experts:0", "experts:1", "experts:2", "experts:3"]
    assert plan.segments == layout.segment_bytes()
    assert all(nbytes % 65536 == 0 for name, nbytes in plan.segments.items() if name != DENSE)
    assert slab_groups(layout) == (((0, 1, 2, 3), (4, 5, 6, 7)),) * 2


def test_a_placement_names_the_segments_it_holds(model_dir: Path) -> None:
    _, layout = make_plan(model_dir)
    assert expert_segments(layout, [(4, 5, 6, 7), ()]) == ("experts:1",)
    assert expert_segments(layout, [(), (7, 6, 5, 4, 3, 2, 1, 0)]) == ("experts:2", "experts:3")
    assert expert_segments(layout, all_experts(layout)) == tuple(layout.segment_bytes())[1:]


@pytest.mark.parametrize(
    ("held", "complaint"),
    [
        ([(0, 1, 2), ()], r"experts 0 to 3 of layer 0 lie in one slab group.*leaves out \[3\]"),
        ([(), (5,)], "layer 1"),
        ([(0, 1, 2, 8), ()], "experts 0 to 7"),
        ([(0, 0, 1, 2, 3), ()], "experts 0 to 7"),
        ([()], "2 layers"),
    ],
)
def test_a_placement_that_cannot_be_is_refused(model_dir: Path, held: list, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        expert_segments(make_plan(model_dir)[1], held)


def test_a_selected_plan_loads_the_same_bytes(model_dir: Path) -> None:
    plan, layout = make_plan(model_dir, 1024)
    whole = make_buffers(plan)
    load_into(plan, whole)
    names = ("experts:11", DENSE, "experts:2")
    part = select(plan, names)
    check_plan(part)
    assert tuple(part.segments) == names
    assert part.manifest == plan.manifest
    assert part.total_bytes() < plan.total_bytes()
    buffers = make_buffers(part)
    load_into(part, buffers)
    assert all(torch.equal(buffers[name], whole[name]) for name in names)
    assert buffers["experts:2"].data_ptr() == buffers["experts:11"].data_ptr() + layout.group_bytes
    with pytest.raises(ValueError, match="experts:99"):
        select(plan, ["experts:99"])


def test_segments_back_to_back_are_not_copied() -> None:
    memory = torch.arange(40, dtype=torch.uint8)
    parts = memory[4:].split([16, 12, 8])
    joined = compact(parts)
    assert joined.data_ptr() == parts[0].data_ptr()
    assert torch.equal(joined, memory[4:])
    for apart in ([parts[0], parts[2]], [parts[1], parts[0]], [memory[:4].clone(), parts[0]]):
        copied = compact(apart)
        assert torch.equal(copied, torch.cat(apart))
        assert copied.data_ptr() != apart[0].data_ptr()
    assert compact([]).numel() == 0


def test_neighbours_of_different_allocations_are_copied() -> None:
    """The second segment begins where the first one's memory ends, but is no part of it."""
    memory = torch.arange(32, dtype=torch.uint8)
    first, second = torch.frombuffer(memory.numpy()[:16], dtype=torch.uint8), memory[16:]
    joined = compact([first, second])
    assert torch.equal(joined, memory)
    assert joined.data_ptr() != first.data_ptr()


def test_experts_of_all_segments_are_installed_by_bind(model_dir: Path) -> None:
    plan, _ = make_plan(model_dir)
    segments = make_buffers(plan)
    load_into(plan, segments)
    apart = {name: segment.clone() for name, segment in segments.items()}
    servable = check_servable(model_dir)
    for given_segments in (segments, apart):
        bound = bind(servable, plan.manifest, given_segments)
        copied = (
            bound.experts[0].slabs.up.untyped_storage().data_ptr() != segments["experts:0"].untyped_storage().data_ptr()
        )
        assert copied == (given_segments is apart)
    assert all(layer.slabs is None for layer in bind(servable, plan.manifest, {DENSE: segments[DENSE]}).experts)
    del apart["experts:2"]
    with pytest.raises(ValueError, match=r"experts:2.*has nothing"):
        bind(servable, plan.manifest, apart)


@given(
    slab_bytes=st.integers(1, 1 << 21),
    experts=st.lists(st.integers(1, 300), min_size=1, max_size=3),
    granule_bytes=st.sampled_from([1 << 16, 1 << 21]),
)
def test_no_group_reaches_into_the_next_layer(slab_bytes: int, experts: list[int], granule_bytes: int) -> None:
    slot_bytes, group = slot_size(slab_bytes, granule_bytes, experts)
    assert slot_bytes >= slab_bytes
    assert slot_bytes * group % granule_bytes == 0
    assert all(count % group == 0 for count in experts)
