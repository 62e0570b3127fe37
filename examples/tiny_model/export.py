"""Turns trained weights into a transformers checkpoint, and proves that it computes the same."""

from pathlib import Path

import torch
from model import Shape, TinyModel
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

MAX_SHARD = "12MB"


def transformers_model(shape: Shape, bos: int, end: int, pad: int) -> PreTrainedModel:
    """An untrained transformers model of this shape, float32."""
    common = dict(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=shape.context,
        rms_norm_eps=shape.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        tie_word_embeddings=True,
        bos_token_id=bos,
        eos_token_id=end,
        pad_token_id=pad,
        attention_bias=False,
    )
    if not shape.experts:
        return Qwen3ForCausalLM(Qwen3Config(intermediate_size=shape.width, **common))
    experts = dict(
        num_experts=shape.experts,
        num_experts_per_tok=shape.top_k,
        moe_intermediate_size=shape.expert_width,
        intermediate_size=shape.width,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        mlp_only_layers=[],
    )
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**experts, **common))


def transformers_names(model: TinyModel) -> dict[str, Tensor]:
    """The weights under the names, and in the layout, of the transformers module tree."""
    shape, weights = model.shape, {}
    for name, value in model.state_dict().items():
        value = value.detach().float().cpu()
        if ".mlp." in name and shape.experts:
            layer, kind = name.split(".mlp.")[0], name.split(".")[-2]
            prefix, split = f"model.{layer}.mlp", (shape.experts, shape.expert_width, shape.hidden)
            if kind == "router":
                weights[f"{prefix}.gate.weight"] = value
            elif kind == "gate_proj":
                up = model.state_dict()[name.replace("gate_proj", "up_proj")].detach().float().cpu()
                weights[f"{prefix}.experts.gate_up_proj"] = torch.cat((value.view(split), up.view(split)), dim=1)
            elif kind == "down_proj":
                by_expert = value.view(shape.hidden, shape.experts, shape.expert_width)
                weights[f"{prefix}.experts.down_proj"] = by_expert.permute(1, 0, 2).contiguous()
        else:
            weights[f"model.{name}"] = value
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    return weights


def save(model: TinyModel, folder: Path, tokenizer_folder: Path) -> float:
    """Writes the checkpoint (bfloat16) and the tokenizer; gives the largest difference of a logit to the trained model.

    The difference is taken in float32 on the CPU between the model reloaded from `folder` and `model` with its
    weights rounded to bfloat16. Raises RuntimeError if it is not rounding error.
    """
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    ids = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    exported = transformers_model(model.shape, *ids)
    exported.load_state_dict(transformers_names(model), strict=True)
    exported.generation_config = GenerationConfig(
        bos_token_id=ids[0],
        eos_token_id=[ids[1]],
        pad_token_id=ids[2],
        do_sample=True,
        temperature=0.8,
        top_p=0.95,
        max_new_tokens=256,
    )
    exported.to(torch.bfloat16).save_pretrained(folder, max_shard_size=MAX_SHARD)
    for file in tokenizer_folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())

    rounded = TinyModel(model.shape)
    rounded.load_state_dict(
        {name: value.detach().to(torch.bfloat16).float().cpu() for name, value in model.state_dict().items()}
    )
    tokens = torch.randint(len(ids), model.shape.vocab, (2, 256), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = rounded(tokens)[0]
        theirs = load(folder, "cpu")(tokens).logits
    difference = (ours - theirs).abs().max().item()
    if difference > 1e-3 * max(1.0, ours.abs().max().item()):
        raise RuntimeError(f"export: the reloaded checkpoint's logits differ by {difference} from the trained model's")
    return difference


def load(folder: Path, device: str) -> PreTrainedModel:
    """The checkpoint in float32, its experts computed by transformers' reference loop."""
    return (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager")
        .to(device)
        .eval()
    )
