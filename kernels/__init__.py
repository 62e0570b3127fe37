"""Attention and experts on tensors: every kernel with its PyTorch reference, batch-invariant on the CPU.

Nothing here knows of workers, requests or checkpoints. Importing this package imports torch, but not transformers.
"""

from flexpert.kernels.attention import AttentionPlan, PackedRequests, attend
from flexpert.kernels.experts import ExpertSlabs, SlabPart, expert_rows, experts_forward, take_rows, weighted_sum
from flexpert.kernels.registration import register, run_experts

__all__ = [
    "AttentionPlan",
    "ExpertSlabs",
    "PackedRequests",
    "SlabPart",
    "attend",
    "expert_rows",
    "experts_forward",
    "register",
    "run_experts",
    "take_rows",
    "weighted_sum",
]
