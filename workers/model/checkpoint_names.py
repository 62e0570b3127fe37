"""How transformers names and shapes the tensors of a checkpoint: all use of its private functions, and nothing else.

Works on transformers 5.17 and 5.23 (`tests/workers/model/test_checkpoint_names.py`). Called by `planning` and `binding`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    build_glob_alternation,
    dot_natural_key,
    rename_source_key,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

# Chains of operations whose result is the stored bytes in another order of whole tensors: nothing to compute.
_STACKED = ("MergeModulelist",)
_STACKED_PARTS = ("MergeModulelist", "Concatenate")


@dataclass(frozen=True)
class Target:
    """Where a checkpoint tensor belongs: a name of the module tree's state; for one expert's matrix also which expert, and which of
    `parts` equal pieces of it, in order. operations: set where the tensor would have to be rearranged, which is not done."""

    name: str
    expert: int | None = None
    part: int = 0
    parts: int = 1
    operations: tuple[str, ...] = ()


def causal_lm_class(config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    """The class that AutoModelForCausalLM would take, None where there is none."""
    found = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    return found[0] if isinstance(found, tuple) else found


def build_on_meta(config: PreTrainedConfig, dtype: torch.dtype, *, attention: str, experts: str) -> PreTrainedModel:
    """The module tree without memory, its parameters of the dtypes that from_pretrained would give them."""
    model_class = causal_lm_class(config)
    if model_class is None:
        raise ValueError(f"{type(config).__name__} has no causal language model")
    with torch.device("meta"):
        model = model_class._from_config(
            config, dtype=dtype, attn_implementation=attention, experts_implementation=experts
        )
    return model.eval().requires_grad_(False)


def state_dtypes(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """The dtype of each parameter and persistent buffer, with the modules that transformers keeps in float32."""
    plan = model._get_dtype_plan(dtype)
    kept: dict[str, torch.dtype] = {}
    if plan:
        alternation, pattern_of_group, _ = build_glob_alternation(list(plan))
        for name in model.state_dict():
            found = alternation.search(name)
            if found is not None and found.lastgroup is not None:
                kept[name] = plan[pattern_of_group[found.lastgroup]]
    return {name: kept.get(name, tensor.dtype) for name, tensor in model.state_dict().items()}


def tied_names(model: PreTrainedModel) -> dict[str, str]:
    """Parameter -> the parameter it shares its memory with; empty where the configuration ties nothing."""
    return dict(model.all_tied_weights_keys)


def may_be_absent(model: PreTrainedModel, name: str) -> bool:
    """The checkpoint need not have this tensor."""
    return _matches(model._keys_to_ignore_on_load_missing, name)


def may_be_left_over(model: PreTrainedModel, name: str) -> bool:
    """The checkpoint may have this tensor although the model does not (extra prediction layers, old rotary buffers)."""
    old_buffers = (r"rotary_emb\.inv_freq", r"(^|\.)position_ids$")
    return _matches(model._keys_to_ignore_on_load_unexpected, name) or _matches(old_buffers, name)


def _matches(patterns: Iterable[str] | None, name: str) -> bool:
    return any(re.search(pattern, name) for pattern in patterns or ())


def targets(model: PreTrainedModel, keys: Iterable[str]) -> dict[str, Target]:
    """For each tensor name of a checkpoint its place in the module tree; a name that means nothing to the model maps to itself."""
    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    state = model.state_dict()
    result = {}
    for key in sorted(keys, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, state)
        if name not in state and key in state:
            name, pattern = key, None
        result[key] = Target(name) if pattern is None else _converted(key, name, pattern, renamings, converters)
    return result


def _converted(
    key: str, name: str, pattern: str, renamings: list[WeightRenaming], converters: list[WeightConverter]
) -> Target:
    converter = next(one for one in converters if pattern in one.source_patterns)
    operations = tuple(type(operation).__name__ for operation in converter.operations)
    sources = converter.source_patterns
    stacked = operations == _STACKED and len(sources) == 1
    in_parts = operations == _STACKED_PARTS and converter.operations[1].dim == 1
    if not (stacked or in_parts) or converter.operations[0].dim != 0 or len(converter.target_patterns) != 1:
        return Target(name, operations=operations)
    for renaming in renamings:
        key, _ = renaming.rename_source_key(key)
    found = re.search(pattern.replace("*.", r"(\d+)\."), key)
    if found is None:
        return Target(name, operations=operations)
    return Target(name, expert=int(found.group(1)), part=sources.index(pattern), parts=len(sources))


def experts_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules whose forward transformers dispatches to a registered experts implementation, by their path."""
    marks = ("has_gate", "has_bias", "is_transposed", "is_concatenated")
    return {name: module for name, module in model.named_modules() if all(hasattr(module, mark) for mark in marks)}
