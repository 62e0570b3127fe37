"""One line makes a transformers model run on the kernels, without a cluster."""

from __future__ import annotations

import copy

import pytest
import torch
from tests.families import make_model

from flexpert.kernels import register
from flexpert.kernels.moe import Activation
from flexpert.kernels.registration import _triton_activation, run_experts


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_a_registered_model_gives_the_same_logits(family: str) -> None:
    reference = make_model(family)
    model = copy.deepcopy(reference)
    model.set_experts_implementation(register())
    tokens = torch.arange(40)[None]
    with torch.inference_mode():
        torch.testing.assert_close(model(tokens).logits, reference(tokens).logits, rtol=1e-4, atol=1e-4)
    assert all(hasattr(layer.mlp.experts, "flexpert_experts") for layer in model.model.layers)


def test_experts_in_fp8_are_refused_where_the_kernels_do_not_run() -> None:
    from transformers import FineGrainedFP8Config
    from transformers.integrations.finegrained_fp8 import replace_with_fp8_linear

    model = make_model("qwen3_moe")
    model.set_experts_implementation(register())
    replace_with_fp8_linear(model, quantization_config=FineGrainedFP8Config())
    experts = model.model.layers[0].mlp.experts.to_empty(device="cpu")
    hidden = torch.zeros(2, model.config.hidden_size)
    ids, weights = torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1)
    with pytest.raises(
        ValueError, match=r"experts in torch.float8_e4m3fn on cpu with scales .*expected float8_e4m3fn on a GPU"
    ):
        experts(hidden, ids, weights)


def test_experts_with_a_norm_of_their_own_are_refused() -> None:
    experts = make_model("qwen3_moe").model.layers[0].mlp.experts
    experts.has_post_expert_norm = True
    with pytest.raises(ValueError, match="Qwen3MoeExperts normalises each expert's rows, expected experts without"):
        run_experts(experts, torch.zeros(1, 1), torch.zeros(1, 1), torch.zeros(1, 1))


@pytest.mark.parametrize(
    ("family", "expected"), [("qwen3_moe", Activation()), ("mixtral", Activation()), ("gpt_oss", Activation("clamped"))]
)
def test_activations_are_found_by_what_they_compute(family: str, expected: Activation) -> None:
    layer = make_model(family).model.layers[0].mlp
    found = _triton_activation(layer.experts)
    assert found is not None
    assert found.name == expected.name


def test_a_clamp_far_out_is_not_taken_for_none() -> None:
    experts = make_model("qwen3_moe").model.layers[0].mlp.experts

    def clamped(both: torch.Tensor) -> torch.Tensor:
        gate, up = both.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate.clamp(max=200)) * up.clamp(-200, 200)

    experts._apply_gate = clamped
    assert _triton_activation(experts) is None


@pytest.mark.parametrize("change", ["written", "replaced", "converted"])
def test_changed_parameters_are_seen(change: str) -> None:
    model = make_model("qwen3_moe")
    model.set_experts_implementation(register())
    tokens = torch.arange(8)[None]
    experts = [layer.mlp.experts for layer in model.model.layers]
    with torch.no_grad():
        model(tokens)
        for module in experts:
            if change == "written":
                module.down_proj.mul_(2)
            elif change == "replaced":
                module.down_proj = torch.nn.Parameter(module.down_proj * 2)
        if change == "converted":
            model.to(torch.float64).to(torch.float32)
        reference = copy.deepcopy(model)
        for layer in reference.model.layers:
            vars(layer.mlp.experts).pop("flexpert_experts")
        reference.set_experts_implementation("eager")
        torch.testing.assert_close(model(tokens).logits, reference(tokens).logits, rtol=1e-4, atol=1e-4)
