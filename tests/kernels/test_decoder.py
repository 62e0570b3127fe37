"""The passes between a decoder layer's products, against their references and transformers' own modules; interpreted without a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.families import make_model
from torch import Tensor

from flexpert.kernels.decoder import (
    HeadShape,
    Routing,
    add_rms_norm,
    add_rms_norm_reference,
    rotate_and_store,
    rotate_and_store_reference,
    route_top_k,
    route_top_k_reference,
)

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"


def random(*sizes: int, seed: int = 0) -> Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def assert_close(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("columns", [64, 100])
@pytest.mark.parametrize("added", [False, True])
def test_norm_matches_the_reference(columns: int, added: bool) -> None:
    wide = random(5, 2 * columns)
    rows, delta = wide[:, :columns], wide[:, columns:] if added else None
    weight = random(columns, seed=1)
    assert_close(add_rms_norm(rows, weight, 1e-6, delta), add_rms_norm_reference(rows, weight, 1e-6, delta))


def test_norm_is_that_of_transformers() -> None:
    norm = make_model("qwen3_moe").model.norm.to(DEVICE)
    rows = random(3, len(norm.weight)) * 4
    assert_close(add_rms_norm(rows, norm.weight.detach(), norm.variance_epsilon)[0], norm(rows).detach())


SHAPES = {
    "whole heads": HeadShape(heads=4, kv_heads=2, dim=32, rotated=32),
    "a part of each": HeadShape(heads=3, kv_heads=3, dim=48, rotated=24),
    "none": HeadShape(heads=2, kv_heads=1, dim=16, rotated=0),
}


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_rotation_and_store_match_the_reference(shape: HeadShape, normed: bool) -> None:
    tokens = 5
    packed = random(tokens, shape.packed + 8)[:, : shape.packed]
    angles = random(tokens, 2 * max(shape.rotated, 2))
    cos, sin = angles[:, : max(shape.rotated, 2)].cos(), angles[:, : max(shape.rotated, 2)].sin()
    norms = (random(shape.dim, seed=2), random(shape.dim, seed=3), 1e-5) if normed else None
    kv_rows = torch.tensor([7, 2, -1, 0, 11], device=DEVICE)
    arenas = [torch.full((12, 3, 2, shape.kv_heads, shape.dim), float("nan"), device=DEVICE) for _ in range(2)]
    found, expected = (
        function(packed, shape, cos, sin, arena[:, 1, 0], arena[:, 1, 1], kv_rows, norms)
        for function, arena in zip((rotate_and_store, rotate_and_store_reference), arenas, strict=True)
    )
    assert_close(found, expected)
    torch.testing.assert_close(arenas[0], arenas[1], rtol=1e-5, atol=1e-6, equal_nan=True)
    assert int((~arenas[0].isnan()).any(-1).sum()) == 4 * 2 * shape.kv_heads


def test_rotation_is_that_of_transformers() -> None:
    """Qwen3-MoE's queries and keys, normalised and rotated by its own modules."""
    from transformers.models.qwen3_moe.modeling_qwen3_moe import apply_rotary_pos_emb

    model = make_model("qwen3_moe").to(DEVICE)
    layer, config = model.model.layers[0].self_attn, model.config
    shape = HeadShape(
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        dim=layer.head_dim,
        rotated=layer.head_dim,
    )
    hidden = random(6, config.hidden_size)
    with torch.no_grad():
        parts = [layer.q_proj(hidden), layer.k_proj(hidden), layer.v_proj(hidden)]
        positions = torch.tensor([[0, 1, 5, 9, 100, 101]], device=DEVICE)
        cos, sin = model.model.rotary_emb(hidden[None], positions)
        heads = [part.unflatten(1, (-1, shape.dim)) for part in parts]
        q, k = apply_rotary_pos_emb(
            layer.q_norm(heads[0])[None].transpose(1, 2), layer.k_norm(heads[1])[None].transpose(1, 2), cos, sin
        )
    keys, values = (torch.zeros(6, shape.kv_heads, shape.dim, device=DEVICE) for _ in range(2))
    norms = (layer.q_norm.weight.detach(), layer.k_norm.weight.detach(), layer.q_norm.variance_epsilon)
    found = rotate_and_store(
        torch.cat(parts, 1), shape, cos[0], sin[0], keys, values, torch.arange(6, device=DEVICE), norms
    )
    assert_close(found, q[0].transpose(0, 1))
    assert_close(keys, k[0].transpose(0, 1))
    assert_close(values, heads[2])


ROUTINGS = {
    "softmax": Routing(top_k=3),
    "normalised": Routing(top_k=4, normalise=True),
    "top_k_softmax": Routing(top_k=4, scoring="top_k_softmax"),
    "sigmoid": Routing(top_k=2, scoring="sigmoid", normalise=True, factor=2.5),
    "groups": Routing(top_k=4, scoring="sigmoid", normalise=True, factor=2.5, groups=4, kept_groups=2),
}


@pytest.mark.parametrize("routing", ROUTINGS.values(), ids=ROUTINGS)
def test_routing_matches_the_reference(routing: Routing) -> None:
    logits = random(7, 24)
    correction = random(24, seed=5) * 0.3 if routing.scoring == "sigmoid" else None
    assert_close(route_top_k(logits, routing, correction), route_top_k_reference(logits, routing, correction))


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "olmoe", "gpt_oss", "deepseek_v3"])
def test_routing_is_that_of_transformers(family: str) -> None:
    model = make_model(family).to(DEVICE)
    config = model.config
    blocks = [getattr(layer.mlp, "gate", getattr(layer.mlp, "router", None)) for layer in model.model.layers]
    router = next(block for block in blocks if block is not None and hasattr(block, "top_k"))
    routing = {
        "qwen3_moe": Routing(top_k=router.top_k, normalise=bool(getattr(config, "norm_topk_prob", False))),
        "mixtral": Routing(top_k=router.top_k, normalise=True),
        "olmoe": Routing(top_k=router.top_k, normalise=bool(getattr(config, "norm_topk_prob", False))),
        "gpt_oss": Routing(top_k=router.top_k, scoring="top_k_softmax"),
    }.get(family)
    correction = None
    if routing is None:
        routing = Routing(
            top_k=router.top_k, scoring="sigmoid", normalise=router.norm_topk_prob, factor=router.routed_scaling_factor,
            groups=router.num_group, kept_groups=router.topk_group,
        )  # fmt: skip
        correction = router.e_score_correction_bias
    with torch.no_grad():
        logits, weights, ids = router(random(9, config.hidden_size))
    found_ids, found_weights = route_top_k(logits, routing, correction)
    by_expert = [torch.zeros(9, logits.shape[1], device=DEVICE) for _ in range(2)]
    by_expert[0].scatter_(1, ids, weights.float())
    by_expert[1].scatter_(1, found_ids.long(), found_weights.float())
    assert_close(by_expert[1], by_expert[0])


def test_equal_scores_and_nan_give_experts_that_exist() -> None:
    logits = torch.zeros(3, 6, device=DEVICE)
    logits[1, 2] = float("nan")
    logits[2] = float("-inf")
    logits[2, 4] = 1.0
    ids, weights = route_top_k(logits, Routing(top_k=4))
    assert ids[0].tolist() == [0, 1, 2, 3]
    assert_close(weights[0], torch.full((4,), 1 / 6, device=DEVICE))
    assert ids[2, 0] == 4
    for row in ids.tolist():
        assert len(set(row)) == 4
        assert all(0 <= expert < 6 for expert in row)
    assert weights[1].isnan().any()


def test_no_tokens_give_no_rows() -> None:
    shape = SHAPES["whole heads"]
    empty = torch.zeros(0, shape.packed, device=DEVICE)
    angles, kv = torch.zeros(0, 32, device=DEVICE), torch.zeros(4, 2, 32, device=DEVICE)
    assert rotate_and_store(
        empty, shape, angles, angles, kv, kv, torch.zeros(0, dtype=torch.int64, device=DEVICE)
    ).shape == (0, 4, 32)
    assert add_rms_norm(empty, empty.new_ones(shape.packed), 1e-6)[0].shape == empty.shape
    assert route_top_k(torch.zeros(0, 8, device=DEVICE), Routing(top_k=2))[0].shape == (0, 2)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (
            lambda: Routing(top_k=2, scoring="none"),
            "scoring is 'none', expected one of softmax, top_k_softmax, sigmoid",
        ),
        (lambda: Routing(top_k=2, groups=2, kept_groups=3), "kept_groups is 3, expected 1 to groups, 2"),
        (
            lambda: route_top_k(torch.zeros(1, 2), Routing(top_k=3)),
            r"logits is .*\[1, 2\].*expected \[tokens, 3 or more\]",
        ),
        (
            lambda: route_top_k(torch.zeros(1, 4), Routing(top_k=3, scoring="sigmoid")),
            "correction is None, expected one",
        ),
        (lambda: add_rms_norm(torch.zeros(2, 4), torch.zeros(3), 1e-6), r"weight is .*\[3\].*expected \[4\]"),
        (
            lambda: add_rms_norm(torch.zeros(2, 4), torch.zeros(4), 1e-6, torch.zeros(3, 4)),
            r"delta is .*expected .*\[2, 4\]",
        ),
    ],
)
def test_what_does_not_fit_is_refused(call: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        call()
