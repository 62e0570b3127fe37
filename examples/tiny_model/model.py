"""The model in plain PyTorch, for training only: the mathematics of transformers' Qwen3MoeForCausalLM and
Qwen3ForCausalLM.

All experts of a layer are computed for every token as one wide feed-forward whose columns are scaled by the
routing weights, zero for the experts that were not chosen. For experts this small that is faster on a GPU than
gathering rows, it compiles into one graph without data-dependent shapes, and it is the same sum: w_e * (h_e @ D_e)
= (w_e * h_e) @ D_e.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Shape:
    """The hyperparameters; `experts` 0 is the dense baseline, whose feed-forward is as wide as the chosen experts
    together."""

    vocab: int = 4096
    hidden: int = 256
    layers: int = 6
    heads: int = 8
    kv_heads: int = 2
    head_dim: int = 32
    experts: int = 16
    top_k: int = 2
    expert_width: int = 128
    context: int = 2048
    rope_theta: float = 10000.0
    norm_eps: float = 1e-6

    @property
    def width(self) -> int:
        """Columns of the feed-forward: all experts side by side."""
        return self.expert_width * (self.experts or self.top_k)


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return self.weight.to(x.dtype) * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


def rotary_tables(shape: Shape, length: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """cos and sin, [length, head_dim], float32, in the half-split layout that transformers uses."""
    exponents = torch.arange(0, shape.head_dim, 2, device=device).float() / shape.head_dim
    angles = torch.outer(torch.arange(length, device=device).float(), shape.rope_theta**-exponents).repeat(1, 2)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class Attention(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.q_proj = nn.Linear(shape.hidden, shape.heads * shape.head_dim, bias=False)
        self.k_proj = nn.Linear(shape.hidden, shape.kv_heads * shape.head_dim, bias=False)
        self.v_proj = nn.Linear(shape.hidden, shape.kv_heads * shape.head_dim, bias=False)
        self.o_proj = nn.Linear(shape.heads * shape.head_dim, shape.hidden, bias=False)
        self.q_norm = RMSNorm(shape.head_dim, shape.norm_eps)
        self.k_norm = RMSNorm(shape.head_dim, shape.norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        rows, length, _ = x.shape
        by_head = (rows, length, -1, self.shape.head_dim)
        q = rotate(self.q_norm(self.q_proj(x).view(by_head)).transpose(1, 2), cos, sin)
        k = rotate(self.k_norm(self.k_proj(x).view(by_head)).transpose(1, 2), cos, sin)
        v = self.v_proj(x).view(by_head).transpose(1, 2)
        group = self.shape.heads // self.shape.kv_heads
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(mixed.transpose(1, 2).reshape(rows, length, -1))


class FeedForward(nn.Module):
    """The experts of one layer side by side, or the dense feed-forward."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.router = nn.Linear(shape.hidden, shape.experts, bias=False) if shape.experts else None
        self.gate_proj = nn.Linear(shape.hidden, shape.width, bias=False)
        self.up_proj = nn.Linear(shape.hidden, shape.width, bias=False)
        self.down_proj = nn.Linear(shape.width, shape.hidden, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Output [rows, length, hidden]; chosen experts as a mask [rows, length, experts]; the balance loss, a
        scalar."""
        inner = F.silu(self.gate_proj(x)) * self.up_proj(x)
        if self.router is None:
            return self.down_proj(inner), x.new_zeros(*x.shape[:2], 0), x.new_zeros(())
        probabilities = self.router(x).float().softmax(-1)
        top, chosen = probabilities.topk(self.shape.top_k, dim=-1)
        weights = torch.zeros_like(probabilities).scatter(-1, chosen, top / top.sum(-1, keepdim=True))
        used = torch.zeros_like(probabilities).scatter(-1, chosen, 1.0)
        inner = inner.view(*x.shape[:2], self.shape.experts, -1) * weights.to(inner.dtype).unsqueeze(-1)
        # Switch Transformer (Fedus et al. 2022), eq. 4, over the whole batch: 1 when balanced, `experts` when
        # collapsed.
        balance = (used.mean((0, 1)) * probabilities.mean((0, 1))).sum() * self.shape.experts / self.shape.top_k
        return self.down_proj(inner.flatten(2)), used, balance


class Layer(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(shape.hidden, shape.norm_eps)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = RMSNorm(shape.hidden, shape.norm_eps)
        self.mlp = FeedForward(shape)


class TinyModel(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embed_tokens = nn.Embedding(shape.vocab, shape.hidden)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.norm = RMSNorm(shape.hidden, shape.norm_eps)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                std = 0.02 if "embed" in name or "router" in name else 0.5 * shape.hidden**-0.5
                deep = (2 * shape.layers) ** -0.5 if "o_proj" in name or "down_proj" in name else 1.0
                nn.init.normal_(parameter, std=std * deep)

    def forward(self, tokens: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
        """tokens [rows, length] -> logits [rows, length, vocab], per layer the mask of chosen experts, the summed
        balance loss."""
        cos, sin = rotary_tables(self.shape, tokens.shape[1], tokens.device)
        x = self.embed_tokens(tokens)
        if torch.is_autocast_enabled(tokens.device.type):
            x = x.to(torch.bfloat16)
        cos, sin = cos.to(x.dtype), sin.to(x.dtype)
        used, balance = [], x.new_zeros((), dtype=torch.float32)
        for layer in self.layers:
            x = x + layer.self_attn(layer.input_layernorm(x), cos, sin)
            out, layer_used, layer_balance = layer.mlp(layer.post_attention_layernorm(x))
            x = x + out
            used.append(layer_used)
            balance = balance + layer_balance
        return F.linear(self.norm(x), self.embed_tokens.weight), used, balance
