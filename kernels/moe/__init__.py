"""A layer's experts on NVIDIA GPUs in Triton: routing, grouped products read through a residency table, deterministic sum.

Importing this package imports torch, not Triton; its functions import Triton when they first run.
"""

from flexpert.kernels.moe.layer import forward_reference, moe_forward, moe_rows
from flexpert.kernels.moe.plan import LayerShape, Plan, choose_plan
from flexpert.kernels.moe.weights import Activation, ExpertWeights, Stored

__all__ = [
    "Activation",
    "ExpertWeights",
    "LayerShape",
    "Plan",
    "Stored",
    "choose_plan",
    "forward_reference",
    "moe_forward",
    "moe_rows",
]
