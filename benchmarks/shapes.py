"""Models of real shapes with random weights, written as checkpoints once and served like any other."""

from __future__ import annotations

from pathlib import Path

SHAPES: dict[str, dict[str, object]] = {
    "olmoe-1b-7b": {
        "architectures": ["OlmoeForCausalLM"],
        "model_type": "olmoe",
        "hidden_size": 2048,
        "intermediate_size": 1024,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 16,
        "max_position_embeddings": 4096,
        "vocab_size": 50304,
        "norm_topk_prob": False,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "eos_token_id": 50279,
        "bos_token_id": None,
        "pad_token_id": 1,
    },
}


def write_checkpoint(shape: str, folder: Path, *, device: str, num_layers: int | None = None) -> Path:
    """A bfloat16 checkpoint of SHAPES[shape] with transformers' own random weights (seed 0) under `folder`."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = dict(SHAPES[shape])
    model_type = str(fields.pop("model_type"))
    if num_layers is not None:
        fields["num_hidden_layers"] = num_layers
    config = AutoConfig.for_model(model_type, **fields)
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    target = folder / shape
    model.save_pretrained(target, max_shard_size="4GB")
    return target


def write_tokenizer(model_dir: Path, *, words: list[str]) -> None:
    """A tokenizer for a checkpoint without one: `words`, and as many made-up ones as the vocabulary has room for."""
    import json

    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab_size = json.loads((model_dir / "config.json").read_text())["vocab_size"]
    names = [*words, "unknown", *(f"token{number}" for number in range(vocab_size))]
    vocab = {name: number for number, name in enumerate(names[:vocab_size])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="unknown"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(model_dir)
