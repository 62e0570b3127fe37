"""The Triton MoE layer against its PyTorch reference: on a GPU where there is one, else interpreted on the CPU, small."""

from __future__ import annotations

import dataclasses
import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flexpert.kernels.moe import (
    Activation,
    ExpertWeights,
    Plan,
    Stored,
    forward_reference,
    moe_forward,
    moe_rows,
)
from flexpert.kernels.moe import plan as plans
from flexpert.kernels.moe.plan import GemvTile, LayerShape, Tile, choose_plan, heuristic
from flexpert.kernels.moe.routing import route, route_reference
from flexpert.kernels.moe.tuner import write_table

pytestmark = pytest.mark.usefixtures("three_programs")
ON_GPU = torch.cuda.is_available()
SILU = Activation()
DEVICE = "cuda" if ON_GPU else "cpu"
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
TOLERANCE = 1e-2 if ON_GPU else 1e-5
HIDDEN, INNER, EXPERTS, TOP_K = 128, 64, 5, 3

GEMV = Plan("gemv", GemvTile(128, 64, 4), GemvTile(64, 32, 4))
GROUPED = Plan("grouped", Tile(16, 32, 64, 4, 2), Tile(32, 64, 32, 4, 2, group=2))
BOXED = Plan(
    "grouped", Tile(32, 32, 32, 4, 2, tma=True, tail=True), Tile(64, 64, 32, 4, 2, 4, tma=True, packed=True, tail=True)
)
SWAPPED = Plan("grouped", Tile(16, 64, 64, 4, 2, swap=True), Tile(16, 64, 64, 4, 2, swap=True, tma=True))
FLAT = Plan(
    "grouped",
    Tile(16, 32, 64, 4, 2, 2, programs=1, flat=True),
    Tile(32, 64, 32, 4, 2, tma=True, packed=True, programs=1, flat=True),
)
PLANS = [GEMV, GROUPED, BOXED, SWAPPED, FLAT]
LAYOUTS = {
    "silu": {},
    "gpt-oss": {"transposed": True, "interleaved": True, "bias": True, "activation": Activation("clamped", 1.5, 1.7)},
    "gelu": {"bias": True, "activation": Activation("gelu_tanh")},
}


def experts_of(
    *, transposed: bool = False, interleaved: bool = False, bias: bool = False, activation: Activation = SILU
) -> ExpertWeights:
    """Random experts in slots in any order of an arena with gaps of NaN; expert 1 is not resident."""
    generator = torch.Generator().manual_seed(0)
    slots, slab = EXPERTS + 2, 3 * HIDDEN * INNER
    stride = slab + 64
    arena = torch.full((slots * stride,), float("nan"))
    table = torch.randperm(slots, generator=generator)[:EXPERTS].int()
    table[1] = -1
    for slot in table.tolist():
        if slot >= 0:
            arena[slot * stride :][:slab] = torch.randn(slab, generator=generator) * HIDDEN**-0.5
    biases = [torch.randn(EXPERTS, n, generator=generator).to(DEVICE, DTYPE) for n in (2 * INNER, HIDDEN)]
    arena = arena.to(DEVICE, DTYPE)
    up, down = Stored(arena, stride), Stored(arena, stride, 2 * HIDDEN * INNER)
    return ExpertWeights(
        up, down, table.to(DEVICE), HIDDEN, INNER, activation, transposed, interleaved, *(biases if bias else ())
    )


def batch(tokens: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, HIDDEN, generator=generator)
    ids = torch.rand(tokens, EXPERTS, generator=generator).topk(TOP_K).indices
    weights = torch.rand(tokens, TOP_K, generator=generator)
    return hidden.to(DEVICE, DTYPE), ids.to(DEVICE), weights.to(DEVICE)


def assert_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.float(), expected, rtol=TOLERANCE, atol=TOLERANCE * float(expected.abs().max()))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("plan", PLANS, ids=["gemv", "grouped", "boxed", "swapped", "flat"])
def test_layer_matches_the_reference(layout: str, plan: Plan) -> None:
    experts = experts_of(**LAYOUTS[layout])
    hidden, ids, weights = batch(7)
    ids[2, 1] = -1
    assert_close(moe_forward(hidden, ids, weights, experts, plan), forward_reference(hidden, ids, weights, experts))


@pytest.mark.parametrize("plan", [GEMV, GROUPED], ids=["gemv", "grouped"])
def test_nan_stays_in_its_token_and_order_changes_no_bit(plan: Plan) -> None:
    experts = experts_of()
    hidden, ids, weights = batch(6)
    clean = moe_forward(hidden, ids, weights, experts, plan)
    hidden[3] = float("nan")
    others = [0, 1, 2, 4, 5]
    assert torch.equal(moe_forward(hidden, ids, weights, experts, plan)[others], clean[others])
    turned = torch.tensor([5, 2, 0, 4, 1], device=DEVICE)
    assert torch.equal(moe_forward(hidden[turned], ids[turned], weights[turned], experts, plan), clean[turned])


@pytest.mark.parametrize("plan", [GEMV, BOXED], ids=["gemv", "boxed"])
def test_unsummed_rows_add_up_to_the_layer(plan: Plan) -> None:
    experts = experts_of()
    experts.expert_slot[1] = experts.expert_slot[0]  # a replica of another expert's slot
    hidden, ids, weights = batch(4)
    rows = moe_rows(hidden, ids, experts, plan)
    total = torch.zeros(4, HIDDEN, device=DEVICE)
    for k in range(TOP_K):
        total += weights[:, k, None] * rows[:, k].float()
    assert_close(moe_forward(hidden, ids, weights, experts, plan), total)


def test_weights_may_move_between_slots() -> None:
    experts = experts_of()
    hidden, ids, weights = batch(5)
    before = moe_forward(hidden, ids, weights, experts, GROUPED)
    used = experts.expert_slot.tolist()
    free = next(slot for slot in range(EXPERTS + 2) if slot not in used)
    stride, old = experts.up.slot_stride, used[0]
    arena = experts.up.arena
    arena[free * stride : (free + 1) * stride] = arena[old * stride : (old + 1) * stride].clone()
    arena[old * stride : (old + 1) * stride] = float("nan")
    experts.expert_slot[0] = free
    assert torch.equal(moe_forward(hidden, ids, weights, experts, GROUPED), before)


def test_no_tokens_give_no_rows() -> None:
    hidden, ids, weights = batch(0)
    assert moe_forward(hidden, ids, weights, experts_of()).shape == (0, HIDDEN)
    assert moe_rows(hidden, ids, experts_of()).shape == (0, TOP_K, HIDDEN)


@pytest.mark.parametrize("chunked", [False, True], ids=["one kernel", "chunks"])
@pytest.mark.parametrize("tokens", [1, 37])
def test_schedule_matches_the_reference(tokens: int, chunked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from flexpert.kernels.moe import routing_kernels

    if chunked:
        monkeypatch.setattr(routing_kernels, "SMALL_PAIRS", 0)
        monkeypatch.setattr(routing_kernels, "CHUNK", 32)
    generator = torch.Generator().manual_seed(tokens)
    ids = torch.randint(-1, 6, (tokens, 4), generator=generator).to(DEVICE)
    slots = torch.tensor([3, -1, 0, 7, 1], dtype=torch.int32, device=DEVICE)  # ids 5 and -1 are no experts
    found, expected = route(ids, slots), route_reference(ids, slots)
    assert torch.equal(found.totals, expected.totals)
    placed = int(((ids >= 0) & (ids < 5)).sum())
    assert torch.equal(found.order[:placed], expected.order[:placed])
    for size, total in zip((16, 32, 64, 128), expected.totals.tolist(), strict=True):
        assert torch.equal(found.of(size)[0][:total], expected.of(size)[0][:total])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hidden": 100}, "hidden is 100, expected a positive multiple of 64"),
        ({"inner": 1 << 20}, r"up.arena is .*expected at least \d+ elements, one slot's"),
        ({"expert_slot": torch.zeros(0, dtype=torch.int32)}, r"expert_slot is torch.int32 \[0\]"),
        ({"expert_slot": torch.zeros(5, dtype=torch.int64)}, r"expert_slot is torch.int64 \[5\].*int32"),
        ({"up_bias": torch.zeros(5, 3)}, r"up_bias is .*expected contiguous \[5, 128\]"),
    ],
)
def test_weights_that_do_not_fit_are_refused(change: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        dataclasses.replace(experts_of(), **change)


def test_flat_tiles_have_programs_and_no_half_heights() -> None:
    hidden, ids, weights = batch(2)
    for change in ({"programs": 0}, {"tail": True}):
        broken = dataclasses.replace(FLAT, up=dataclasses.replace(FLAT.up, **change))
        with pytest.raises(ValueError, match=r"a flat tile .* expected programs and no tail"):
            moe_forward(hidden, ids, weights, experts_of(), broken)


def test_inputs_that_do_not_fit_are_refused() -> None:
    experts = experts_of()
    hidden, ids, weights = batch(2)
    with pytest.raises(ValueError, match=r"hidden is .*\[2, 64\].*expected .*\[tokens, 128\]"):
        moe_forward(hidden[:, :64], ids, weights, experts)
    with pytest.raises(ValueError, match=r"top_k_index is torch\.float32"):
        moe_forward(hidden, ids.float(), weights, experts)
    with pytest.raises(ValueError, match=r"top_k_weights is .*\[2, 2\]"):
        moe_forward(hidden, ids, weights[:, :2], experts)


SHAPE = LayerShape(num_experts=128, hidden=2048, inner=768, top_k=8)


def test_the_nearest_tuned_plan_is_chosen() -> None:
    table = {SHAPE.key: [(2, GEMV), (16, GROUPED), (64, BOXED)]}
    assert [choose_plan(tokens, SHAPE, table) for tokens in (0, 1, 5, 6, 31, 33, 200)] == [
        GEMV, GEMV, GEMV, GROUPED, GROUPED, BOXED, BOXED,
    ]  # fmt: skip
    assert choose_plan(64, dataclasses.replace(SHAPE, inner=832), table) == heuristic(64, SHAPE)
    few = {SHAPE.key: [(2, GEMV)]}
    assert choose_plan(8, SHAPE, few) == GEMV
    assert choose_plan(9, SHAPE, few) == heuristic(9, SHAPE)
    assert choose_plan(1 << 20, SHAPE, {SHAPE.key: [(4096, BOXED)]}) == BOXED


def test_tables_in_the_package_can_be_read() -> None:
    paths = sorted(plans.PLANS.glob("*.json"))
    assert paths
    for path in paths:
        for entries in plans.read_table(path).values():
            assert [tokens for tokens, _ in entries] == sorted(tokens for tokens, _ in entries)


def test_own_tables_lie_on_top_of_the_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = tmp_path / "h200.json"
    entry = {"tokens": 1, "plan": GEMV.to_json()}
    table.write_text(json.dumps({"shapes": {"e2-h64-i64-k1-bfloat16": [entry]}}))
    monkeypatch.setenv("FLEXPERT_PLANS", str(tmp_path))
    plans.table_of.cache_clear()
    found = plans.table_of("NVIDIA H200")
    plans.table_of.cache_clear()
    assert found["e2-h64-i64-k1-bfloat16"] == [(1, GEMV)]
    assert SHAPE.key in found


@pytest.mark.parametrize(
    ("shapes", "said"),
    [
        ({"e1": [{"tokens": 1, "plan": {"kind": "magic"}}]}, "magic"),
        ([], "items"),
        ({"e1": [{"tokens": 0, "plan": GEMV.to_json()}]}, "tokens is 0, expected 1 or more"),
        (
            {"e1": [{"tokens": 1, "plan": dataclasses.replace(GROUPED, up=Tile(48, 32, 64, 4, 2)).to_json()}]},
            "a tile of 48 rows, expected one of 16, 32, 64, 128",
        ),
    ],
)
def test_a_broken_table_says_what_to_do(shapes: Any, said: str, tmp_path: Path) -> None:
    path = tmp_path / "h100.json"
    path.write_text(json.dumps({"shapes": shapes}))
    with pytest.raises(ValueError, match=rf"is no table of plans .*{said}.*flexpert kernels tune"):
        plans.read_table(path)
    with pytest.raises(ValueError, match="is no table of plans"):
        write_table(path, {}, {})
    assert plans.read_table(tmp_path / "none.json") == {}


def test_tuned_counts_are_added_to_those_there_are(tmp_path: Path) -> None:
    path = tmp_path / "h100.json"
    for tokens, plan in ((64, GROUPED), (1, GEMV), (64, BOXED)):
        write_table(path, {SHAPE.key: [{"tokens": tokens, "plan": plan.to_json()}]}, {"torch": "2"})
    assert plans.read_table(path) == {SHAPE.key: [(1, GEMV), (64, BOXED)]}


def test_replaced_weights_are_read_through_descriptors_of_their_own() -> None:
    """Plans that read boxes, after others of the same shape were read."""
    experts = experts_of()
    hidden, ids, weights = batch(5)
    moe_forward(hidden, ids, weights, experts, BOXED)
    arena = experts.up.arena * 2
    other = dataclasses.replace(
        experts, up=dataclasses.replace(experts.up, arena=arena), down=dataclasses.replace(experts.down, arena=arena)
    )
    assert_close(moe_forward(hidden, ids, weights, other, BOXED), forward_reference(hidden, ids, weights, other))


def test_no_kernel_of_the_schedule_is_made_for_one_number_of_tokens() -> None:
    from flexpert.kernels.moe import routing_kernels

    constants = {
        "E",
        "BINS",
        "SIZES",
        "BLOCK",
        "CHUNKS",
        "CHUNK_SIZE",
    }  # of these only powers of two depend on the tokens
    for name in ("route_small", "count_chunks", "place_chunks", "sort_chunks"):
        kernel = getattr(routing_kernels, name)
        assert {argument for argument in inspect.signature(kernel.fn).parameters if argument.isupper()} <= constants
