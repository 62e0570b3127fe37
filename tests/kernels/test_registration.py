"""One line makes a transformers model run on the kernels, without a cluster."""

from __future__ import annotations

import copy

import pytest
import torch
from tests.families import make_model

from flexpert.kernels import register


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_a_registered_model_gives_the_same_logits(family: str) -> None:
    reference = make_model(family)
    model = copy.deepcopy(reference)
    model.set_experts_implementation(register())
    tokens = torch.arange(40)[None]
    with torch.inference_mode():
        torch.testing.assert_close(model(tokens).logits, reference(tokens).logits, rtol=1e-4, atol=1e-4)
    assert all(hasattr(layer.mlp.experts, "flexpert_experts") for layer in model.model.layers)
