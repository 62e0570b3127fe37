"""Weights in fp8 with block scales, rows as they come or quantised: on a GPU where there is one, else interpreted on the CPU, small."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from flexpert.kernels.moe import (
    ExpertWeights,
    LayerShape,
    Plan,
    Stored,
    forward_reference,
    moe_forward,
    moe_rows,
)
from flexpert.kernels.moe.layer import quantize, quantize_reference
from flexpert.kernels.moe.plan import GemvTile, Tile, choose_plan, heuristic

pytestmark = pytest.mark.usefixtures("three_programs")
ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
TOLERANCE = 1e-2 if ON_GPU else 1e-5
HIDDEN, INNER, EXPERTS, TOP_K = 384, 256, 4, 2
FP8 = torch.float8_e4m3fn

GEMV = Plan("gemv", GemvTile(64, 256, 4), GemvTile(128, 128, 4))
GROUPED = Plan("grouped", Tile(16, 64, 128, 4, 2), Tile(32, 256, 64, 4, 2))
SWAPPED = Plan("grouped", Tile(16, 64, 128, 4, 2, swap=True, tma=True), Tile(16, 256, 64, 4, 2, swap=True))
QUANTIZED = Plan(
    "grouped", Tile(64, 128, 128, 8, 3, tma=True, tail=True), Tile(64, 128, 64, 4, 3, 4, tma=True, packed=True), quantize=True
)  # fmt: skip
SWAPPED_QUANTIZED = Plan(
    "grouped", Tile(32, 128, 128, 8, 3, swap=True, tma=True), Tile(16, 256, 64, 4, 3, swap=True), quantize=True
)


@pytest.fixture(autouse=True)
def rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton 3.6's interpreter loses the carry where rounding to fp8 reaches a power of two (31.9 becomes 16): torch rounds there."""
    if ON_GPU:
        return
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def to_fp8_by_torch(values: Any, source: Any, target: Any, rounding: Any) -> Any:
        if str(target) != "fp8e4nv" or str(source) != "fp32":
            return convert(values, source, target, rounding)
        return torch.from_numpy(np.ascontiguousarray(values)).to(FP8).view(torch.uint8).numpy()

    monkeypatch.setattr(interpreter, "_convert_float", to_fp8_by_torch)


def experts_of(*, quantize_rows: bool = True, bias: bool = False) -> ExpertWeights:
    """Blocks of very different magnitude in slots in any order, with gaps of NaN between weights and between scales; expert 1 is absent."""
    generator = torch.Generator().manual_seed(0)
    slots, slab, scales = EXPERTS + 1, 3 * HIDDEN * INNER, 3 * HIDDEN * INNER // 128**2
    stride, scale_stride = slab + 128, scales + 3
    arena = torch.full((slots * stride,), float("nan"))
    scale_arena = torch.full((slots * scale_stride,), float("nan"))
    table = torch.randperm(slots, generator=generator)[:EXPERTS].int()
    table[1] = -1
    for slot in table.tolist():
        if slot >= 0:
            arena[slot * stride :][:slab] = torch.randn(slab, generator=generator) * 50
            exponents = torch.rand(scales, generator=generator) * 2 - 1
            scale_arena[slot * scale_stride :][:scales] = HIDDEN**-0.5 / 50 * 4**exponents
    biases = [torch.randn(EXPERTS, n, generator=generator).to(DEVICE, DTYPE) for n in (2 * INNER, HIDDEN)]
    stored, scaled = arena.to(FP8).to(DEVICE), scale_arena.to(DEVICE)
    up, up_scale = Stored(stored, stride), Stored(scaled, scale_stride)
    down = Stored(stored, stride, 2 * HIDDEN * INNER)
    down_scale = Stored(scaled, scale_stride, 2 * HIDDEN * INNER // 128**2)
    return ExpertWeights(
        up, down, table.to(DEVICE), HIDDEN, INNER, up_bias=biases[0] if bias else None, down_bias=biases[1] if bias else None,
        up_scale=up_scale, down_scale=down_scale, quantize_rows=quantize_rows,
    )  # fmt: skip


def batch(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    hidden = torch.randn(tokens, HIDDEN, generator=generator) * torch.logspace(-2, 2, HIDDEN)
    ids = torch.rand(tokens, EXPERTS, generator=generator).topk(TOP_K).indices
    weights = torch.rand(tokens, TOP_K, generator=generator)
    return hidden.to(DEVICE, DTYPE), ids.to(DEVICE), weights.to(DEVICE)


def assert_close(found: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    torch.testing.assert_close(found.float(), expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("plan", [GEMV, GROUPED, SWAPPED], ids=["gemv", "grouped", "swapped"])
def test_scaled_weights_match_the_reference(plan: Plan, bias: bool) -> None:
    experts = experts_of(bias=bias)
    hidden, ids, weights = batch(7)
    assert_close(moe_forward(hidden, ids, weights, experts, plan), forward_reference(hidden, ids, weights, experts))


@pytest.mark.parametrize("plan", [QUANTIZED, SWAPPED_QUANTIZED], ids=["boxed", "swapped"])
def test_quantised_rows_match_the_reference(plan: Plan) -> None:
    """Activated rows lie near the border between two fp8 numbers now and then: one such step is 1/16 of a number."""
    experts = experts_of()
    hidden, ids, weights = batch(70)
    found = moe_forward(hidden, ids, weights, experts, plan).float()
    expected = forward_reference(hidden, ids, weights, experts, quantize=True)
    assert_close(found, expected, 2e-2)
    exact = forward_reference(hidden, ids, weights, experts)
    assert float((found - expected).norm()) < 0.2 * float(
        (expected - exact).norm()
    )  # most of the rounding is the reference's
    assert float((found - exact).norm()) < 0.05 * float(exact.norm())


def test_rows_of_both_kinds_add_up_to_the_layer() -> None:
    experts = experts_of()
    hidden, ids, weights = batch(4)
    for plan in (GEMV, QUANTIZED):
        rows = moe_rows(hidden, ids, experts, plan)
        there = (experts.expert_slot[ids] >= 0)[..., None]
        total = torch.where(there, weights[..., None] * rows.float(), 0.0).sum(1)
        assert_close(moe_forward(hidden, ids, weights, experts, plan), total)


def test_rows_are_quantised_as_the_reference_does() -> None:
    rows = torch.randn(5, 384, generator=torch.Generator().manual_seed(3)).to(DEVICE) * 30
    rows[1, 128:256] = 0
    rows[2, 7] = float("nan")
    found = quantize(rows)
    assert found.scale is not None
    again = (found.values.float().unflatten(1, (-1, 128)) * found.scale[..., None]).flatten(1)
    expected = quantize_reference(rows)
    others = [0, 1, 3, 4]
    assert torch.equal(found.values.float()[1, 128:256], torch.zeros(128, device=DEVICE))
    close = torch.isclose(again[others], expected[others], rtol=1e-6)
    assert close.float().mean() > 0.999  # the last bit of a division may decide a tie
    assert torch.allclose(again[others], expected[others], rtol=0.13)
    assert again[2, 7].isnan()
    assert not again[2, 128:].isnan().any()


def test_nan_stays_in_its_token() -> None:
    experts = experts_of()
    hidden, ids, weights = batch(6)
    clean = moe_forward(hidden, ids, weights, experts, QUANTIZED)
    hidden[3] = float("nan")
    found = moe_forward(hidden, ids, weights, experts, QUANTIZED)
    others = [0, 1, 2, 4, 5]
    assert torch.equal(found[others], clean[others])
    assert found[3].isnan().all() or not (experts.expert_slot[ids[3]] >= 0).any()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"up_scale": None}, "up_scale is None, expected scales for torch.float8_e4m3fn"),
        (
            {"down_scale": Stored(torch.zeros(9, dtype=torch.int32), 9)},
            r"down_scale.arena is torch.int32 \[9\].*float32",
        ),
        ({"hidden": 320}, "hidden is 320, expected a positive multiple of 128 for torch.float8_e4m3fn"),
        ({"transposed": True}, "transposed or interleaved is True, expected False"),
    ],
)
def test_scales_that_do_not_fit_are_refused(change: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        dataclasses.replace(experts_of(), **change)


def test_plans_that_do_not_fit_are_refused() -> None:
    hidden, ids, weights = batch(3)
    deep = Plan("grouped", Tile(16, 64, 256, 4, 2), GROUPED.down)
    with pytest.raises(ValueError, match="a tile of depth 256, expected a divisor of 128"):
        moe_forward(hidden, ids, weights, experts_of(), deep)
    with pytest.raises(ValueError, match="quantize_rows is False"):
        moe_forward(hidden, ids, weights, experts_of(quantize_rows=False), QUANTIZED)
    wide = Plan("gemv", GemvTile(256, 128, 4), GEMV.down)
    with pytest.raises(ValueError, match="a tile of 256 columns, expected a divisor of 128"):
        moe_forward(hidden, ids, weights, experts_of(), wide)
    narrow = dataclasses.replace(QUANTIZED, up=Tile(64, 64, 128, 4, 3))
    with pytest.raises(ValueError, match="a tile of 64 columns, expected 128 for rows in fp8"):
        moe_forward(hidden, ids, weights, experts_of(), narrow)


@pytest.mark.parametrize("tokens", [1, 8, 64, 1024, 16384])
@pytest.mark.parametrize("quantize_rows", [False, True])
def test_untuned_shapes_have_a_plan_that_fits(tokens: int, quantize_rows: bool) -> None:
    shape = LayerShape(
        num_experts=128, hidden=2048, inner=768, top_k=8, dtype="float8_e4m3fn", quantize_rows=quantize_rows
    )
    plan = choose_plan(tokens, shape, {})
    assert plan == heuristic(tokens, shape)
    assert plan.quantize == (quantize_rows and tokens >= 1024)
    if plan.kind == "grouped":
        assert all(128 % tile.depth == 0 for tile in (plan.up, plan.down))
        assert plan.up.columns == 128 or not plan.quantize
    assert Plan.from_json(plan.to_json()) == plan
