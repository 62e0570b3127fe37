"""Tiny random checkpoints of each family, the reference that transformers computes, and a worker's model side to compare with it.

Weights are scaled so that logits have a standard deviation of at least 1 and routing is real. Used by the tests of kernels and workers.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from flexpert.workers.model import bind, check_servable, kv_token_bytes, load_into, make_buffers, plan_weights
from flexpert.workers.runner import ModelRunner
from flexpert.workers.step import Row

VOCAB = 96
_COMMON = dict(
    vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
    bos_token_id=None, eos_token_id=1, pad_token_id=None,
)  # fmt: skip
_MLA = dict(
    q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=12, num_key_value_heads=4
)
_GROUPED = dict(
    moe_intermediate_size=24,
    intermediate_size=40,
    num_experts_per_tok=3,
    first_k_dense_replace=1,
    n_group=2,
    topk_group=1,
)

# Windows are shorter than the prompts; Qwen2-MoE has shared experts behind a gate; the DeepSeeks have latents and a dense first layer.
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": dict(intermediate_size=24, num_local_experts=4, num_experts_per_tok=2, sliding_window=20),
    "qwen2_moe": dict(
        moe_intermediate_size=16, shared_expert_intermediate_size=24, intermediate_size=40, num_experts=6, num_experts_per_tok=2,
        use_sliding_window=True, sliding_window=20, max_window_layers=1,
    ),
    "qwen3_moe": dict(
        moe_intermediate_size=24, intermediate_size=40, num_experts=8, num_experts_per_tok=2, head_dim=16, norm_topk_prob=True,
    ),
    "olmoe": dict(intermediate_size=24, num_experts=8, num_experts_per_tok=4, num_key_value_heads=4),
    "deepseek_v2": dict(
        **_MLA, **_GROUPED, n_routed_experts=8, n_shared_experts=2, topk_method="group_limited_greedy", routed_scaling_factor=1.5,
    ),
    "deepseek_v3": dict(**_MLA, **_GROUPED, n_routed_experts=8, n_shared_experts=1),
    "glm4_moe": dict(**_GROUPED, n_routed_experts=8, n_shared_experts=1, head_dim=8, use_qk_norm=True),
    "gpt_oss": dict(intermediate_size=24, num_local_experts=4, num_experts_per_tok=2, head_dim=16, sliding_window=20),
}  # fmt: skip


def make_model(family: str, *, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random model in float32, with logits spread by at least 1."""
    torch.manual_seed(seed)
    fields = {**_COMMON, **FAMILIES.get(family, {}), **changes}
    config = AutoConfig.for_model(family, **fields)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=1.5 * parameter.shape[-1] ** -0.5)
            elif "norm" in name:
                parameter.uniform_(0.7, 1.3)
            else:
                parameter.normal_(std=0.5)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.uniform_(-0.2, 0.2)
        spread = model(torch.arange(VOCAB)[None] % model.config.vocab_size).logits.std().item()
        model.get_output_embeddings().weight.mul_(max(1.0, 1.5 / spread))
    return model


def save_fused(model: PreTrainedModel, model_dir: Path) -> None:
    """A checkpoint whose tensors have the names and shapes of the module tree (experts stacked in 3-D)."""
    model_dir.mkdir(parents=True, exist_ok=True)
    model.config.save_pretrained(model_dir)
    tied = set(model.all_tied_weights_keys)
    save_file(
        {name: tensor.contiguous() for name, tensor in model.state_dict().items() if name not in tied},
        model_dir / "model.safetensors",
    )
    config = json.loads((model_dir / "config.json").read_text())
    (model_dir / "config.json").write_text(json.dumps({**config, "architectures": [type(model).__name__]}))


def load_runner(
    model_dir: Path,
    *,
    dtype: str = "float32",
    device: str = "cpu",
    slots: int = 8,
    max_context_tokens: int = 512,
    poison: bool = True,
) -> ModelRunner:
    """The whole way from a directory to a runner, with KV memory that holds NaN wherever nothing was written."""
    servable = check_servable(model_dir)
    plan = plan_weights(servable, dtype)
    segments = make_buffers(plan, device=device)
    load_into(plan, segments)
    bound = bind(servable, plan.manifest, segments, device=device)
    kv = torch.zeros(slots, max_context_tokens * kv_token_bytes(servable, dtype), dtype=torch.uint8, device=device)
    if poison:
        kv.view(getattr(torch, dtype)).fill_(float("nan"))
    return ModelRunner(bound, kv)


@dataclasses.dataclass
class Request:
    """A request of a test: its tokens grow as they are chosen."""

    name: str
    slot: int
    tokens: list[int]
    computed: int = 0

    def row(self, num_tokens: int | None = None, *, all_logits: bool = False) -> Row:
        """The next num_tokens tokens (all that are left); asks for a token where they reach the end."""
        end = len(self.tokens) if num_tokens is None else min(len(self.tokens), self.computed + num_tokens)
        row = Row(
            self.name,
            self.slot,
            self.computed,
            tuple(self.tokens[self.computed : end]),
            end == len(self.tokens),
            all_logits,
        )
        self.computed = end
        return row


def greedy(
    runner: ModelRunner, requests: Sequence[Request], new_tokens: int, *, chunk: int | None = None
) -> dict[str, Tensor]:
    """Run requests together until each has new_tokens more; returns the logits of each request's output tokens."""
    logits: dict[str, list[torch.Tensor]] = {request.name: [] for request in requests}
    while live := [request for request in requests if len(logits[request.name]) < new_tokens]:
        rows = [request.row(chunk) for request in live]
        result = runner.forward(rows)
        picked = iter(result)
        for request, row in zip(live, rows, strict=True):
            if row.sample:
                logits[request.name].append(next(picked))
                request.tokens.append(int(logits[request.name][-1].argmax()))
    return {name: torch.stack(rows) for name, rows in logits.items()}


Tensor = torch.Tensor


def reference_greedy(model: PreTrainedModel, prompt: Sequence[int], new_tokens: int) -> tuple[list[int], Tensor]:
    """Tokens and logits of transformers alone, without a cache: each token from the whole sequence."""
    tokens = list(prompt)
    with torch.inference_mode():
        out = model(torch.tensor([tokens]), use_cache=True)
        rows, cache = [out.logits[0, -1]], out.past_key_values
        for _ in range(new_tokens - 1):
            tokens.append(int(rows[-1].argmax()))
            out = model(torch.tensor([tokens[-1:]]), past_key_values=cache, use_cache=True)
            rows.append(out.logits[0, -1])
        tokens.append(int(rows[-1].argmax()))
    return tokens[len(prompt) :], torch.stack(rows)
