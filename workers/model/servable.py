"""Decides from a model directory's configuration whether the model can be served, and says how it attends.

Reads config.json (and generation_config.json), builds the module tree without memory and probes it; never looks at weights.
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from flexpert.workers.model import checkpoint_names
from flexpert.workers.model.errors import UnservableModelError
from flexpert.workers.model.interfaces import IMPLEMENTATION, register_all
from flexpert.workers.model.kv_layout import KvLayout
from flexpert.workers.model.probe import AttentionLayer, ProbeRefusal, Routing, probe

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_CONFIGURATION = ("config.json", "generation_config.json")
# Frequencies that depend on the longest sequence of a batch: a row's result would depend on the rows beside it.
_BATCH_DEPENDENT_ROPE = ("dynamic", "longrope")


@dataclass(frozen=True)
class ServableModel:
    """A model directory that can be served: its sizes, and how each layer attends."""

    model_dir: Path
    config: PreTrainedConfig
    architecture: str
    family: str
    vocab_size: int
    max_context_tokens: int
    eos_token_ids: tuple[int, ...]
    attention: tuple[AttentionLayer, ...]
    experts: tuple[str, ...]
    routing: Routing
    weight_blocks: tuple[int, int] | None = None  # rows and columns of an fp8 matrix that share a factor

    @property
    def num_layers(self) -> int:
        return len(self.attention)

    def build(self, dtype: torch.dtype) -> PreTrainedModel:
        """The module tree on the meta device, wired to flexpert's attention and experts."""
        return _build(self.config, dtype)


def check_servable(model_dir: str | Path) -> ServableModel:
    """Raises UnservableModelError that says why the model cannot be served, and what can be. Remembered while its configuration stays."""
    model_dir = Path(model_dir)
    return _check_servable(model_dir, *(_version(model_dir / name) for name in _CONFIGURATION))


def _version(path: Path) -> tuple[int, ...]:
    """Another one where the file was changed or replaced."""
    try:
        found = path.stat()
    except OSError:
        return ()
    return found.st_ino, found.st_size, found.st_mtime_ns


@lru_cache(maxsize=4)
def _check_servable(model_dir: Path, *_versions: tuple[int, ...]) -> ServableModel:
    config, weight_blocks = _read_config(model_dir)
    try:
        model = _build(config, torch.float32)
        _refuse_unbindable(model)
        probed = probe(model)
    except ProbeRefusal as refusal:
        raise UnservableModelError(model_dir, str(refusal)) from refusal
    except Exception as error:  # whatever a wrong value in the configuration leads to
        reason = f"its config.json does not describe a model that transformers can build and run ({type(error).__name__}: {error})"
        raise UnservableModelError(model_dir, reason) from error
    return ServableModel(
        model_dir=model_dir,
        config=config,
        architecture=type(model).__name__,
        family=config.model_type,
        vocab_size=config.vocab_size,
        max_context_tokens=config.max_position_embeddings,
        eos_token_ids=_eos_token_ids(model_dir, config),
        attention=probed.attention,
        experts=probed.experts,
        routing=probed.routing,
        weight_blocks=weight_blocks,
    )


def kv_layout(servable: ServableModel, dtype: str | torch.dtype) -> KvLayout:
    """How a token's keys and values lie in memory."""
    return KvLayout.of([layer.cached for layer in servable.attention], torch_dtype(dtype))


def kv_token_bytes(servable: ServableModel, dtype: str | torch.dtype) -> int:
    """Bytes that one token's keys and values take, all layers together."""
    return kv_layout(servable, dtype).token_bytes


def torch_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """ "float32" -> torch.float32; raises ValueError naming the choices."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r}: expected one of {', '.join(DTYPES)}")
    return DTYPES[dtype]


def _build(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    register_all()
    return checkpoint_names.build_on_meta(
        copy.deepcopy(config), dtype, attention=IMPLEMENTATION, experts=IMPLEMENTATION
    )


def _read_config(model_dir: Path) -> tuple[PreTrainedConfig, tuple[int, int] | None]:
    """The configuration as of the unquantised model, and the blocks of its quantised weights."""
    path = model_dir / "config.json"
    try:
        fields = json.loads(path.read_text())
    except OSError as error:
        raise UnservableModelError(model_dir, f"{path} cannot be read ({error.strerror or error})") from error
    except ValueError as error:
        raise UnservableModelError(model_dir, f"{path} is not JSON ({error})") from error
    if not isinstance(fields, dict) or not isinstance(fields.get("model_type"), str):
        raise UnservableModelError(model_dir, f"{path} has no model_type")
    weight_blocks = _weight_blocks(model_dir, fields)
    try:
        config = AutoConfig.from_pretrained(model_dir, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # unknown model types and refused values come as many kinds of errors
        architecture = ", ".join(fields.get("architectures") or ()) or "unnamed architecture"
        reason = f"transformers cannot read its configuration (model_type {fields['model_type']!r}, {architecture}): {_first_line(error)}"
        raise UnservableModelError(model_dir, reason) from error
    _refuse_kind(model_dir, config, fields)
    if weight_blocks is not None:
        del config.quantization_config
    return config, weight_blocks


def _weight_blocks(model_dir: Path, fields: dict[str, Any]) -> tuple[int, int] | None:
    """Of weights in fp8 with a factor for each block, which are multiplied as they are loaded. Raises for other kinds."""
    for name in ("quantization_config", "compression_config"):
        given = fields.get(name)
        if not given:
            continue
        method = given.get("quant_method", "unnamed") if isinstance(given, dict) else given
        blocks = given.get("weight_block_size") if isinstance(given, dict) else None
        sizes = tuple(blocks) if isinstance(blocks, list) else ()
        if method == "fp8" and len(sizes) == 2 and all(isinstance(size, int) and size > 0 for size in sizes):
            return (sizes[0], sizes[1])
        raise UnservableModelError(
            model_dir,
            f"its weights are quantised ({name}: {method}, weight_block_size: {blocks}), which is not supported yet; use an unquantised "
            "checkpoint or one in fp8 with a weight_block_size like [128, 128]",
        )
    return None


def _refuse_kind(model_dir: Path, config: PreTrainedConfig, fields: dict[str, object]) -> None:
    """Whole kinds of models, recognised from the configuration alone."""
    parts = sorted(
        name for name in ("vision_config", "audio_config", "text_config") if getattr(config, name, None) is not None
    )
    if parts:
        raise UnservableModelError(
            model_dir, f"{config.model_type!r} is multimodal (its configuration has {', '.join(parts)})"
        )
    if checkpoint_names.causal_lm_class(config) is None:
        raise UnservableModelError(model_dir, f"transformers has no causal language model for {config.model_type!r}")
    states = sorted(
        {
            kind
            for kind in getattr(config, "layer_types", None) or ()
            if kind not in ("full_attention", "sliding_attention")
        }
    )
    if states:
        raise UnservableModelError(
            model_dir, f"it has layers of kinds that keep recurrent, convolutional or other state: {', '.join(states)}"
        )
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = {rope.get("rope_type")} | {part.get("rope_type") for part in rope.values() if isinstance(part, dict)}
    if dependent := [kind for kind in _BATCH_DEPENDENT_ROPE if kind in kinds]:
        raise UnservableModelError(
            model_dir,
            f"rotary embedding {dependent[0]!r} changes with the longest sequence of a batch, so requests would change each other",
        )


def _refuse_unbindable(model: PreTrainedModel) -> None:
    """Besides the checkpoint's tensors a tree may hold only what a rotary embedding computes from the configuration."""
    if not checkpoint_names.experts_modules(model):
        raise ProbeRefusal(
            f"{type(model).__name__} is not a mixture of experts, or has experts that flexpert cannot compute"
        )
    persistent = set(model.state_dict())
    for name, _ in model.named_buffers():
        if name not in persistent and not name.endswith("inv_freq"):
            raise ProbeRefusal(f"its buffer {name!r} is in no checkpoint and flexpert does not know how to compute it")
    for name, module in model.named_modules():
        if held := sorted(key for key, value in vars(module).items() if isinstance(value, torch.Tensor)):
            raise ProbeRefusal(f"its module {name!r} keeps a tensor that is neither parameter nor buffer ({held[0]})")
    for name, module in checkpoint_names.experts_modules(model).items():
        if getattr(module, "has_post_expert_norm", False):
            raise ProbeRefusal(f"its experts {name!r} have a norm of their own behind them")


def _eos_token_ids(model_dir: Path, config: PreTrainedConfig) -> tuple[int, ...]:
    """generation_config.json goes before config.json, as in transformers."""
    found: object = getattr(config, "eos_token_id", None)
    try:
        found = json.loads((model_dir / "generation_config.json").read_text()).get("eos_token_id", found)
    except FileNotFoundError:
        pass
    except (OSError, ValueError, AttributeError) as error:
        raise UnservableModelError(model_dir, f"its generation_config.json cannot be read ({error})") from error
    if found is None:
        return ()
    return tuple(found) if isinstance(found, list) else (int(found),)  # type: ignore[call-overload]


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
