"""What can be wrong with a model directory, as errors that say what was found, what was expected and what to do."""

from __future__ import annotations

SERVABLE = (
    "flexpert serves text decoders with a mixture of experts that transformers implements, keep no state but the keys and values of "
    "attention, and are stored in safetensors, unquantised or in fp8 with scaled blocks, for example Mixtral, Qwen2-MoE, Qwen3-MoE, "
    "OLMoE, DeepSeek-V2, DeepSeek-V3, GLM-4-MoE and gpt-oss (docs/models.md)"
)


class UnservableModelError(Exception):
    """The architecture or its configuration cannot be served, whatever the weights."""

    def __init__(self, model_dir: object, reason: str) -> None:
        super().__init__(f"{model_dir} cannot be served: {reason}. {SERVABLE}.")


class CheckpointError(Exception):
    """The weights on disk are not those of the configuration: a file or tensor is missing, cut off, left over or of another shape."""
