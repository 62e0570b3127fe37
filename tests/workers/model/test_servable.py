"""What cannot be served is refused from its configuration alone, with the reason and what can be served."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.families import FAMILIES, make_model
from transformers import AutoConfig

from flexpert.workers.model import UnservableModelError, check_servable, kv_token_bytes


def write_config(model_dir: Path, family: str, **fields: Any) -> Path:
    config = AutoConfig.for_model(family).to_dict() | {"model_type": family} | fields
    (model_dir / "config.json").write_text(json.dumps(config))
    return model_dir


UNSERVABLE = {
    "not_moe": (dict(family="llama"), "not a mixture of experts"),
    "recurrent": (dict(family="jamba"), "recurrent"),
    "linear_attention": (dict(family="qwen3_next"), "linear_attention"),
    "sparse_index": (dict(family="deepseek_v32"), "(indexed|sparse)_attention"),
    "chunked": (dict(family="llama4_text"), "chunked_attention"),
    "multimodal": (dict(family="qwen3_vl_moe"), "multimodal"),
    "encoder_decoder": (dict(family="switch_transformers"), "no causal language model"),
    "quantised": (dict(family="qwen3_moe", quantization_config={"quant_method": "fp8"}), "quantised.*fp8"),
    "mxfp4": (dict(family="gpt_oss", quantization_config={"quant_method": "mxfp4"}), "quantised.*mxfp4"),
    "unknown_architecture": (dict(family="qwen3_moe", model_type="warp9", architectures=["Warp9ForCausalLM"]), "warp9.*Warp9ForCausalLM"),
    "wrong_value": (dict(family="qwen3_moe", num_attention_heads="many"), "config"),
    "contradiction": (dict(family="qwen3_moe", num_attention_heads=5, num_key_value_heads=3), "config"),
    "more_picked_than_there_are": (dict(family="qwen3_moe", num_experts_per_tok=999), "config.json does not describe"),
    "batch_dependent_rope": (
        dict(family="qwen3_moe", rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}), "dynamic.*change each other",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", UNSERVABLE)
def test_an_unservable_model_is_refused_with_the_reason(case: str, tmp_path: Path) -> None:
    fields, reason = UNSERVABLE[case]
    with pytest.raises(
        UnservableModelError, match=f"(?s)cannot be served: .*{reason}.*flexpert serves .*Mixtral"
    ) as error:
        check_servable(write_config(tmp_path, **fields))
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize("content", [None, "{", "[]", "{}", '{"model_type": 3}'])
def test_a_directory_without_a_readable_config_is_refused(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(UnservableModelError, match=r"config\.json"):
        check_servable(tmp_path)


def test_a_broken_generation_config_is_refused(tmp_path: Path) -> None:
    make_model("olmoe").save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(UnservableModelError, match=r"generation_config\.json"):
        check_servable(tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_described(family: str, tmp_path: Path) -> None:
    model = make_model(family)
    model.config.save_pretrained(tmp_path)
    servable = check_servable(tmp_path)
    assert (servable.family, servable.vocab_size, servable.max_context_tokens) == (family, 96, 512)
    assert servable.eos_token_ids == (1,)
    assert servable.num_layers == 2
    latent = family.startswith("deepseek")
    assert all(layer.latent == latent for layer in servable.attention)
    assert [layer.window for layer in servable.attention] == {
        "mixtral": [20, 20], "qwen2_moe": [20, None], "gpt_oss": [20, None],
    }.get(family, [None, None])  # fmt: skip


def test_kv_bytes_of_a_token_are_those_of_its_layers(tmp_path: Path) -> None:
    make_model("qwen3_moe").config.save_pretrained(tmp_path)
    servable = check_servable(tmp_path)
    assert kv_token_bytes(servable, "float32") == 2 * 2 * 2 * 16 * 4  # layers, keys and values, heads, dim, bytes
    assert kv_token_bytes(servable, "bfloat16") == 2 * 2 * 2 * 16 * 2
    with pytest.raises(ValueError, match="float32, bfloat16"):
        kv_token_bytes(servable, "int3")


def test_latents_are_cached_instead_of_heads(tmp_path: Path) -> None:
    make_model("deepseek_v3").config.save_pretrained(tmp_path)
    assert kv_token_bytes(check_servable(tmp_path), "float32") == 2 * (16 + 8) * 4
