"""Finds out how a module tree attends by running two tokens through it on the meta device: no memory, no arithmetic.

The probe stands where the cache, the attention and the experts stand when the model serves, and refuses what those could not do: state
beside the keys and values of attention, masks that are neither causal nor a causal window, arguments it does not know.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flexpert.workers.model.checkpoint_names import experts_modules
from flexpert.workers.model.interfaces import STEP, AttentionCall, CacheProtocol, MaskTag, unknown_arguments
from flexpert.workers.model.kv_layout import KvLayer

_TOKENS = 2


class ProbeRefusal(Exception):
    """Why the tree cannot be served; the text completes "<model> cannot be served: "."""


@dataclass(frozen=True)
class AttentionLayer:
    """How one layer attends. latent: keys and values are expanded from what is cached (MLA) by the module's `expand_kv`."""

    cached: KvLayer
    heads: int
    key_heads: int
    key_dim: int
    value_dim: int
    window: int | None
    sinks: bool
    latent: bool


@dataclass(frozen=True)
class Routing:
    """What an experts module is given: rows of `width` numbers, each for at most top_k experts."""

    width: int
    top_k: int


@dataclass(frozen=True)
class Probed:
    """What a tree does with a token. experts: the modules in the order in which a token meets them."""

    attention: tuple[AttentionLayer, ...]
    experts: tuple[str, ...]
    routing: Routing


def probe(model: nn.Module) -> Probed:
    """Raises ProbeRefusal; whatever else the tree raises means that its configuration is inconsistent."""
    step = ProbeStep()
    called: dict[str, Routing] = {}
    modules = experts_modules(model)
    for name, module in modules.items():
        module.flexpert_experts = _recorder(name, called)
    tokens = torch.zeros(1, _TOKENS, dtype=torch.long, device="meta")
    positions = torch.zeros(1, _TOKENS, dtype=torch.long, device="meta")
    with torch.inference_mode(), torch.device("meta"):
        model(input_ids=tokens, position_ids=positions, past_key_values=step, use_cache=True, **{STEP: step})
    if not called:
        raise ProbeRefusal(
            "none of its layers has experts that flexpert can compute, so it is no mixture of experts that can be served"
        )
    layers = len(step.layers)
    if not layers or sorted(step.layers) != list(range(layers)) or sorted(step.cached) != list(range(layers)):
        raise ProbeRefusal(
            f"its layers {sorted(step.cached)} cache keys and values and its layers {sorted(step.layers)} attend; each must do both"
        )
    widths = {routing.width for routing in called.values()}
    if len(widths) > 1:
        raise ProbeRefusal(f"its experts take rows of different widths, {sorted(widths)}")
    routing = Routing(widths.pop(), max(routing.top_k for routing in called.values()))
    return Probed(tuple(step.layers[i] for i in range(layers)), tuple(called), routing)


def _recorder(name: str, called: dict[str, Routing]):  # type: ignore[no-untyped-def]
    def record(hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        if name in called:
            raise ProbeRefusal(f"a token meets its experts {name!r} twice")
        called[name] = Routing(hidden.shape[-1], top_k_index.shape[-1])
        return torch.empty_like(hidden)

    return record


class ProbeStep(CacheProtocol):
    """Records instead of computing."""

    def __init__(self) -> None:
        self.cached: dict[int, KvLayer] = {}
        self.layers: dict[int, AttentionLayer] = {}
        self._masks: set[int] = set()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise ProbeRefusal(
            "it keeps state that is not the keys and values of attention "
            f"(recurrent, convolutional or an index: it asks its cache for {name!r})"
        )

    def __bool__(self) -> bool:
        return True

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if layer_idx in self.cached:
            raise ProbeRefusal(f"layer {layer_idx} caches keys and values twice")
        if key.dim() != 4 or key.shape[:3] != value.shape[:3] or key.shape[2] != _TOKENS:
            raise ProbeRefusal(
                f"layer {layer_idx} caches tensors of shapes {tuple(key.shape)} and {tuple(value.shape)}"
            )
        self.cached[layer_idx] = KvLayer(key.shape[1], key.shape[3], value.shape[3])
        return key, value

    def note_mask(self, mask: MaskTag, unknown: dict[str, Any]) -> None:
        names = unknown_arguments(unknown)
        if names:
            raise ProbeRefusal(f"its attention takes {', '.join(names)}, which flexpert does not know")
        if not isinstance(mask, MaskTag):
            raise ProbeRefusal(f"its attention mask is a {type(mask).__name__} of its own")
        if id(mask) not in self._masks:
            self._masks.add(id(mask))
            _require_causal_window(mask)

    def attend(self, call: AttentionCall) -> Tensor:
        if call.layer in self.layers or call.layer not in self.cached:
            raise ProbeRefusal(f"layer {call.layer} attends twice, or to keys and values of another layer")
        cached = self.cached[call.layer]
        _, heads, tokens, _ = call.query.shape
        latent = hasattr(call.module, "expand_kv")
        as_cached = (
            call.key.shape[1] == cached.heads
            and call.key.shape[3] == cached.key_dim
            and call.value.shape[3] == cached.value_dim
        )
        if not latent and not as_cached:
            raise ProbeRefusal(f"layer {call.layer} changes keys and values between cache and attention")
        self.layers[call.layer] = AttentionLayer(
            cached=cached,
            heads=heads,
            key_heads=call.key.shape[1],
            key_dim=call.key.shape[3],
            value_dim=call.value.shape[3],
            window=call.window,
            sinks=call.sinks is not None,
            latent=latent,
        )
        return call.query.new_empty(1, tokens, heads, call.value.shape[3])


def _require_causal_window(mask: MaskTag) -> None:
    """The mask's own function must say what its tag says, at the places where other kinds of masks differ."""
    size = mask.window or 4
    for query in (0, 1, size - 1, size, size + 1, 2 * size, 2 * size + 1):
        for key in (0, 1, query - size, query - size + 1, query, query + 1):
            expected = key <= query and (mask.window is None or key > query - mask.window)
            if key >= 0 and _visible(mask, query, key) != expected:
                raise ProbeRefusal("its attention mask is neither causal nor a causal sliding window")


def _visible(mask: MaskTag, query: int, key: int) -> bool:
    if mask.function is None:
        raise ProbeRefusal("its attention mask has no function")
    zero = torch.zeros((), dtype=torch.long, device="cpu")
    return bool(mask.function(zero, zero, zero + query, zero + key))
