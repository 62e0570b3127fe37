"""The Triton MoE layer on a GPU: bits, graphs, sizes that an interpreter cannot try, and transformers' own models as oracle."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from tests.families import make_model
from torch import Tensor, nn

from flexpert.kernels import register
from flexpert.kernels.moe import ExpertWeights, LayerShape, Plan, Stored, forward_reference, moe_forward
from flexpert.kernels.moe.plan import Tile, table_of
from flexpert.kernels.moe.timing import routing
from flexpert.kernels.moe.tuner import random_weights

pytestmark = pytest.mark.gpu

SHAPE = LayerShape(num_experts=64, hidden=2048, inner=1024, top_k=8)


@pytest.fixture(scope="module")
def experts() -> ExpertWeights:
    return random_weights(SHAPE, sets=1)[0]


def batch(tokens: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(seed)
    ids, weights = routing(tokens, SHAPE.num_experts, SHAPE.top_k, skew=0, seed=seed, device="cuda")
    return torch.randn(tokens, SHAPE.hidden, device="cuda").bfloat16(), ids, weights


def torch_loop(hidden: Tensor, ids: Tensor, weights: Tensor, experts: ExpertWeights) -> Tensor:
    """bfloat16 throughout, expert by expert."""
    output = torch.zeros_like(hidden)
    for expert, slot in enumerate(experts.expert_slot.tolist()):
        tokens, place = torch.where(ids == expert)
        up, down = experts.matrices(slot)
        gate, value = (hidden[tokens] @ up.T).chunk(2, dim=1)
        rows = (torch.nn.functional.silu(gate) * value) @ down.T
        output.index_add_(0, tokens, (rows * weights[tokens, place, None]).bfloat16())
    return output


@pytest.mark.parametrize("tokens", [1, 5, 33, 300, 2049])
def test_error_is_at_most_twice_that_of_a_torch_loop(tokens: int, experts: ExpertWeights) -> None:
    given = batch(tokens)
    expected = forward_reference(*given, experts)
    worst = (torch_loop(*given, experts).float() - expected).abs().max()
    assert (moe_forward(*given, experts).float() - expected).abs().max() <= 2 * worst


TAILS = Plan(
    "grouped",
    Tile(128, 128, 64, 8, 4, 8, tma=True, tail=True),
    Tile(128, 256, 64, 8, 4, 8, tma=True, packed=True, tail=True),
)
LOW_TAILS = Plan(
    "grouped",
    Tile(64, 128, 64, 8, 4, 8, tma=True, tail=True),
    Tile(64, 128, 64, 4, 4, 8, tma=True, packed=True, tail=True),
)
FLAT = Plan(
    "grouped",
    Tile(128, 128, 64, 8, 4, 8, tma=True, programs=1, flat=True),
    Tile(128, 256, 64, 8, 4, 8, tma=True, packed=True, programs=1, flat=True),
)
SWAPPED = Plan("grouped", Tile(16, 64, 128, 4, 4, swap=True, tma=True), Tile(16, 128, 128, 4, 3, swap=True, tma=True))


@pytest.mark.parametrize(
    ("tokens", "plan"),
    [(3, None), (64, None), (1500, None), (64, SWAPPED), (1500, TAILS), (700, LOW_TAILS), (1500, FLAT)],
    ids=["3", "64", "1500", "swapped", "tails", "low tails", "flat"],
)
def test_a_hundred_runs_have_the_same_bits(tokens: int, plan: Plan | None, experts: ExpertWeights) -> None:
    """And so has every order of the tokens: a row's tile is full in one and the last, half empty one in another."""
    hidden, ids, weights = batch(tokens)
    first = moe_forward(hidden, ids, weights, experts, plan)
    expected = forward_reference(hidden, ids, weights, experts)
    assert float((first.float() - expected).norm()) < 0.01 * float(expected.norm())
    assert all(torch.equal(moe_forward(hidden, ids, weights, experts, plan), first) for _ in range(100))
    for seed in range(5):
        turned = torch.randperm(tokens, generator=torch.Generator().manual_seed(seed)).cuda()
        assert torch.equal(moe_forward(hidden[turned], ids[turned], weights[turned], experts, plan), first[turned])


@pytest.mark.parametrize("tokens", [4, 96, 700])
def test_one_capture_serves_every_routing(tokens: int, experts: ExpertWeights) -> None:
    """A hundred routings, among them all to one expert, half of the experts empty, repeated ids and padding; no host synchronisation."""
    hidden, ids, weights = batch(tokens)
    moe_forward(hidden, ids, weights, experts)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        moe_forward(hidden, ids, weights, experts)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = moe_forward(hidden, ids, weights, experts)
    for seed in range(100):
        other = batch(tokens, seed)
        kind = seed % 5
        if kind == 1:
            other[1].fill_(seed % SHAPE.num_experts)
        elif kind == 2:
            other[1].remainder_(SHAPE.num_experts // 2)
        elif kind == 3:
            other[1][:, 1] = other[1][:, 0]
        elif kind == 4:
            other[1][tokens // 2 :] = -1
        for held, new in zip((hidden, ids, weights), other, strict=True):
            held.copy_(new)
        output.fill_(float("nan"))
        graph.replay()
        expected = forward_reference(*other, experts)
        torch.testing.assert_close(output.float(), expected, rtol=2e-2, atol=2e-2 * float(expected.abs().max()))


def test_weights_move_under_a_captured_graph(experts: ExpertWeights) -> None:
    slab = experts.up.slot_stride
    arena = torch.cat([experts.up.arena, torch.full((slab,), float("nan"), device="cuda").bfloat16()])
    offset = experts.down.offset
    moved = ExpertWeights(
        Stored(arena, slab), Stored(arena, slab, offset), experts.expert_slot.clone(), SHAPE.hidden, SHAPE.inner
    )
    given = batch(96)
    moe_forward(*given, moved)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = moe_forward(*given, moved)
    graph.replay()
    before, free = output.clone(), SHAPE.num_experts
    for expert in (0, 17, 63):
        slot = int(moved.expert_slot[expert])
        arena[free * slab :][:slab] = arena[slot * slab :][:slab]
        arena[slot * slab :][:slab] = float("nan")
        moved.expert_slot[expert], free = free, slot
        graph.replay()
        assert torch.equal(output, before)


def shape_of(key: str) -> LayerShape:
    """The shape whose key it is."""
    numbers = [int(number) for number in re.findall(r"(?:^e|-h|-i|-k)(\d+)", key)]
    sizes = dict(zip(("num_experts", "hidden", "inner", "top_k"), numbers, strict=True))
    flags = {flag: f"-{flag}" in key for flag in ("transposed", "interleaved", "quantize_rows")}
    shape = LayerShape(**sizes, **flags, dtype="float8_e4m3fn" if "float8" in key else "bfloat16")
    assert shape.key == key
    return shape


def test_tuned_plans_of_this_device_are_right() -> None:
    """Every plan of the package's table, with a dozen experts at hand."""
    table = table_of(torch.cuda.get_device_name())
    if not table:
        pytest.skip("no table for this device")
    for key, entries in table.items():
        shape = shape_of(key)
        experts = random_weights(shape, sets=1, resident=12 if shape.num_experts > 12 else None)[0]
        for tokens, plan in entries:
            count = min(tokens, 700) - 3 * (tokens > 8)
            ids, weights = routing(count, shape.num_experts, shape.top_k, skew=0, seed=tokens, device="cuda")
            ids[0, 0] = 3
            hidden = torch.randn(count, shape.hidden, device="cuda").bfloat16()
            expected = forward_reference(hidden, ids, weights, experts, plan.quantize)
            found = moe_forward(hidden, ids, weights, experts, plan).float()
            far = float((found - expected).norm() / expected.norm())
            assert far < (0.03 if plan.quantize else 0.01), (key, tokens, plan, far)
        del experts


def test_slots_beyond_two_billion_elements_are_read() -> None:
    hidden, inner = 4096, 14336
    slab = 3 * hidden * inner
    slots = (1 << 31) // slab + 2
    arena = torch.empty(slots * slab, dtype=torch.bfloat16, device="cuda")
    arena[-slab:].normal_(0, hidden**-0.5)
    table = torch.tensor([slots - 1], dtype=torch.int32, device="cuda")
    experts = ExpertWeights(Stored(arena, slab), Stored(arena, slab, 2 * hidden * inner), table, hidden, inner)
    for tokens in (1, 40, 300):
        x = torch.randn(tokens, hidden, device="cuda").bfloat16()
        ids, weights = torch.zeros(tokens, 1, dtype=torch.int64, device="cuda"), torch.ones(tokens, 1, device="cuda")
        expected = forward_reference(x, ids, weights, experts)
        torch.testing.assert_close(
            moe_forward(x, ids, weights, experts).float(), expected, rtol=2e-2, atol=2e-2 * float(expected.abs().max())
        )


def _experts(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if hasattr(module, "down_proj") and hasattr(module, "num_experts")]


WIDE = {"hidden_size": 128, "moe_intermediate_size": 64, "intermediate_size": 64}


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "olmoe", "gpt_oss"])
def test_transformers_models_give_the_same_logits(family: str) -> None:
    """With the routing of the reference: in bfloat16 a near tie between two experts may fall either way."""
    reference = make_model(family, **WIDE).to("cuda", torch.bfloat16)
    reference.set_experts_implementation("eager")
    model = copy.deepcopy(reference)
    model.set_experts_implementation(register())
    routings: list[tuple[Tensor, ...]] = []
    for module in _experts(reference):
        module.register_forward_pre_hook(lambda _, given: routings.append(given[1:]))
    for module in _experts(model):
        module.register_forward_pre_hook(lambda _, given: (given[0], *routings.pop(0)))
    tokens = torch.arange(40, device="cuda")[None]
    with torch.inference_mode():
        expected, found = reference(tokens).logits.float(), model(tokens).logits.float()
    torch.testing.assert_close(found, expected, rtol=5e-2, atol=5e-2 * float(expected.abs().max()))
    assert not routings
    assert all(module.flexpert_experts.func is moe_forward for module in _experts(model))


def quantised_experts(block: nn.Module) -> tuple[nn.Module, nn.Module]:
    """transformers' own fp8 experts with the weights of `block`, and a copy of `block` with those weights back in bfloat16."""
    from transformers import FineGrainedFP8Config
    from transformers.integrations.finegrained_fp8 import replace_with_fp8_linear

    holder = nn.Module()
    holder.mlp = nn.Module()
    holder.mlp.experts, holder.config = copy.deepcopy(block), block.config
    replace_with_fp8_linear(holder, quantization_config=FineGrainedFP8Config())
    quantised, widened = holder.mlp.experts.to_empty(device="cuda"), copy.deepcopy(block)
    for name in ("gate_up_proj", "down_proj"):
        weights = getattr(block, name).detach().float().unflatten(1, (-1, 128)).unflatten(3, (-1, 128))
        scale = weights.abs().amax((2, 4), keepdim=True) / 448
        stored = (weights / scale).to(torch.float8_e4m3fn)
        getattr(quantised, name).data.copy_(stored.flatten(3).flatten(1, 2))
        getattr(quantised, f"{name}_scale_inv").data.copy_(scale[:, :, 0, :, 0])
        getattr(widened, name).data.copy_((stored.float() * scale).flatten(3).flatten(1, 2))
    return quantised, widened


def test_transformers_fp8_experts_are_read_in_place() -> None:
    model = make_model("qwen3_moe", hidden_size=256, moe_intermediate_size=128).to("cuda", torch.bfloat16)
    block = model.model.layers[0].mlp.experts
    block.config._experts_implementation = "eager"
    nn.init.normal_(block.gate_up_proj, 0, 0.06)
    nn.init.normal_(block.down_proj, 0, 0.09)
    quantised, widened = quantised_experts(block)
    quantised.config = copy.deepcopy(block.config)
    quantised.config._experts_implementation = register()
    for tokens in (1, 300):
        hidden = torch.randn(tokens, 256, device="cuda").bfloat16()
        ids, weights = routing(tokens, block.num_experts, 2, skew=0, seed=0, device="cuda")
        with torch.inference_mode():
            found, expected = quantised(hidden, ids, weights).float(), widened(hidden, ids, weights).float()
        assert float((found - expected).norm()) < 0.06 * float(expected.norm())  # rows are rounded to fp8 twice
    assert quantised.flexpert_experts.func is moe_forward
