"""What is taken from transformers' private functions, pinned: these tests fail first when a new version changes them."""

from __future__ import annotations

import pytest
import torch
from tests.families import FAMILIES, make_model

from flexpert.workers.model import checkpoint_names as names
from flexpert.workers.model.checkpoint_names import Target
from flexpert.workers.model.interfaces import IMPLEMENTATION, register_all


def on_meta(family: str, dtype: torch.dtype = torch.float32, **changes: object):
    register_all()
    config = make_model(family, **changes).config
    return names.build_on_meta(config, dtype, attention=IMPLEMENTATION, experts=IMPLEMENTATION)


STORED = {
    "mixtral": ("model.layers.0.block_sparse_moe.experts.3.{}.weight", ("w1", "w3", "w2")),
    "qwen3_moe": ("model.layers.0.mlp.experts.3.{}.weight", ("gate_proj", "up_proj", "down_proj")),
    "deepseek_v3": ("model.layers.1.mlp.experts.3.{}.weight", ("gate_proj", "up_proj", "down_proj")),
}


@pytest.mark.parametrize("family", STORED)
def test_an_experts_matrices_are_recognised(family: str) -> None:
    pattern, (gate, up, down) = STORED[family]
    keys = [pattern.format(part) for part in (gate, up, down)]
    found = names.targets(on_meta(family), keys)
    module = keys[0].replace("block_sparse_moe", "mlp").partition(".3.")[0]
    assert [found[key] for key in keys] == [
        Target(f"{module}.gate_up_proj", expert=3, part=0, parts=2),
        Target(f"{module}.gate_up_proj", expert=3, part=1, parts=2),
        Target(f"{module}.down_proj", expert=3),
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_names_of_the_module_tree_stay(family: str) -> None:
    model = on_meta(family)
    found = names.targets(model, model.state_dict())
    assert all(found[name] == Target(name) for name in model.state_dict())


def test_a_name_of_nothing_maps_to_itself() -> None:
    assert names.targets(on_meta("olmoe"), ["model.surprise"])["model.surprise"] == Target("model.surprise")


def test_what_transformers_keeps_in_float32_is_kept() -> None:
    model = on_meta("deepseek_v3", torch.bfloat16)
    dtypes = names.state_dtypes(model, torch.bfloat16)
    kept = {name for name, dtype in dtypes.items() if dtype == torch.float32}
    assert kept == {"model.layers.1.mlp.gate.e_score_correction_bias"}


def test_experts_and_tied_parameters_are_found() -> None:
    model = on_meta("deepseek_v2", tie_word_embeddings=True)
    assert set(names.experts_modules(model)) == {"model.layers.1.mlp.experts"}
    assert names.tied_names(model) == {"lm_head.weight": "model.embed_tokens.weight"}
    assert all(parameter.is_meta for parameter in model.parameters())
