"""Where transformers hands over: its attention and its masks, registered as "flexpert".

An attention module's call goes to the step object that the runner passed as `flexpert_step` (and as `past_key_values`); there are three:
`probe.ProbeStep` looks at the tree once, `cpu_step.CpuStep` and `gpu_step.GpuStep` compute. The window of a layer comes with the mask:
the mask function returns a `MaskTag` instead of a mask, since only it has the right window for every family.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from flexpert.kernels import register

IMPLEMENTATION = "flexpert"
STEP = "flexpert_step"
# What an attention module may be passed without a change to what is computed here.
_UNUSED = frozenset(
    {"dropout", "sliding_window", "position_ids", "use_cache", "cache_position", "output_attentions", "is_causal"}
)


@dataclass(frozen=True)
class MaskTag:
    """Stands for a causal mask. window: how many keys a query sees, itself included; None: all."""

    window: int | None
    function: Callable[..., Any] | None = None


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """One layer's attention. query [1, heads, tokens, dim]; key and value as the module made them of what `Step.update` returned."""

    module: nn.Module
    layer: int
    query: Tensor
    key: Tensor
    value: Tensor
    scaling: float
    window: int | None
    sinks: Tensor | None
    softcap: float | None


class Step(Protocol):
    """A step of the runner; also serves as transformers' cache (duck-typed)."""

    def attend(self, call: AttentionCall) -> Tensor:
        """[1, tokens, heads, value_dim]"""

    def note_mask(self, mask: MaskTag, unknown: dict[str, Any]) -> None:
        """Look at what came beside an attention call; the probe refuses what it does not know."""


class CacheProtocol:
    """What transformers asks of a cache when it makes masks: this one has no length, the step knows the positions."""

    is_compileable = False
    is_sliding = ()

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return query_length, 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def note_mask(self, mask: MaskTag, unknown: dict[str, Any]) -> None:
        pass


def register_all() -> None:
    """Register experts, attention and masks with transformers. Idempotent."""
    from transformers import AttentionInterface, AttentionMaskInterface

    register()
    AttentionInterface.register(IMPLEMENTATION, run_attention)
    AttentionMaskInterface.register(IMPLEMENTATION, make_mask)


def make_mask(*, mask_function: Callable[..., Any], local_size: int | None = None, **_: Any) -> MaskTag:
    return MaskTag(local_size, mask_function)


def run_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: MaskTag,
    scaling: float | None = None,
    s_aux: Tensor | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    step: Step = others.pop(STEP)
    step.note_mask(attention_mask, others)
    call = AttentionCall(
        module=module,
        layer=module.layer_idx,
        query=query,
        key=key,
        value=value,
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        window=attention_mask.window,
        sinks=s_aux,
        softcap=softcap,
    )
    return step.attend(call), None


def unknown_arguments(others: dict[str, Any]) -> list[str]:
    """Names of arguments of an attention call that might change its result and that are not understood here."""
    return sorted(
        name for name, value in others.items() if name not in _UNUSED and value is not None and value is not False
    )
