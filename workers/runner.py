"""Computes the rows of a step: builds the batch, runs the model, returns the wanted logits.

Experts that lie on other ranks are reached through the exchange that `use` installs; a rank without rows of its own takes part with
`serve`. Called by the engine, on one thread. Knows rows, slots and positions; not requests, sampling or who owns the memory.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from flexpert.kernels.attention import KEY_BLOCK
from flexpert.kernels.row_groups import SAFE_ROWS, row_group
from flexpert.workers.ep import EpochExperts, ExpertExchange
from flexpert.workers.model.binding import BoundModel
from flexpert.workers.model.cpu_step import CpuStep
from flexpert.workers.model.gpu_compute import GpuCompute
from flexpert.workers.model.interfaces import STEP
from flexpert.workers.model.kv_layout import KvViews
from flexpert.workers.model.packing import PackedStep, pack
from flexpert.workers.step import Row

log = logging.getLogger(__name__)

# Rows of the packed step and of the projection to logits. With 32 rows every element-wise operation of torch covers whole
# vectors of 512 bits; the last elements of an odd number would be computed by scalar code, whose sigmoid has other bits.
ROW_MULTIPLE = 32
LOGITS_MULTIPLE = 16
_MAX_INVARIANT_THREADS = 16


class ModelRunner:
    """kv: uint8 [slots, slot_bytes], the KV of token t of slot s at byte t * kv_token_bytes of row s.

    On the CPU a row's logits are the same bits whatever else is in the step; for that the number of torch's threads is lowered to a
    power of two, so that element-wise operations are never cut within a row.
    """

    def __init__(self, bound: BoundModel, kv: Tensor) -> None:
        self.bound = bound
        self.views = KvViews(kv, bound.kv)
        self.kv = kv
        self._gpu: GpuCompute | None = None
        self._experts: EpochExperts | None = None
        self._exchange: ExpertExchange | None = None
        self.last_build_s = 0.0
        self._row_group = SAFE_ROWS
        self._threads = 1
        if bound.device.type == "cpu":
            self._threads = _use_invariant_threads()
            self._row_group = _attention_row_group(bound)
        else:
            self._gpu = GpuCompute(bound, self.views, kv)

    @property
    def kv_token_bytes(self) -> int:
        return self.bound.kv.token_bytes

    @property
    def num_layers(self) -> int:
        return self.bound.servable.num_layers

    def use(self, experts: EpochExperts, exchange: ExpertExchange | None) -> None:
        """From the next step on, compute with these experts; without an exchange they must be all. Between two steps only; what was used
        before may be unmapped afterwards. On a GPU captured graphs are dropped, unless these very experts are in use, and with an exchange
        steps run op by op."""
        if exchange is None and not experts.complete:
            raise ValueError("a rank that holds only some experts needs an exchange with the others")
        if self._experts is experts and self._exchange is exchange:
            return
        self._experts, self._exchange = experts, exchange
        for layer, slabs in zip(self.bound.experts, experts.layers, strict=True):
            layer.slabs, layer.elsewhere = slabs, exchange
        if self._gpu is not None:
            self._gpu.forget_graphs(may_capture=exchange is None)
        else:  # the ranks of a machine share its cores; more threads than cores cost a multiple
            torch.set_num_threads(
                max(1, self._threads // _power_of_two(1 if exchange is None else exchange.ranks_here))
            )

    def serve(self) -> None:
        """A step with no rows of one's own: every layer's exchange, for the rows of the peers. Raises as the transport does."""
        if self._exchange is None:
            raise RuntimeError("serve() is for a rank of a group; this one has no exchange")
        with torch.inference_mode():
            for layer in range(len(self.bound.experts)):
                self._exchange.serve(layer)

    def take_load(self) -> list[np.ndarray]:
        """[layer] -> int64 [experts]: how many of this rank's own tokens picked each expert since the last call. A GPU without an exchange
        does not count."""
        if self._exchange is not None:
            return self._exchange.take_load()
        return [layer.take_computed() for layer in self.bound.experts]

    def forward(self, rows: Sequence[Row]) -> Tensor:
        """Write the KV of the rows' tokens; return float32 logits [wanted, vocab] in row order: of the last token of each row with
        `sample`, of every token of a row with `all_logits`. Raises ValueError for a row that does not fit its slot, and in a group
        what its transport raises."""
        began_s = time.perf_counter()
        multiple = ROW_MULTIPLE if self._gpu is None else 1
        packed = pack(rows, multiple=multiple, capacity_tokens=self.views.capacity_tokens, slots=len(self.kv))
        if self._gpu is not None:
            self.last_build_s = time.perf_counter() - began_s
            with torch.inference_mode():
                return self._gpu.logits(packed)
        step = CpuStep(packed, self.views, self._row_group)
        for layer in self.bound.servable.attention:
            step.plan(layer.heads, layer.key_heads, layer.window)
        for experts in self.bound.experts:
            experts.real_tokens = packed.num_tokens
        self.last_build_s = time.perf_counter() - began_s
        return self._run(packed, step)

    def warm_up(self) -> None:
        """Prepare what would otherwise be prepared while serving: on a GPU the graphs of decode steps. Call before any KV is written."""
        if self._gpu is not None:
            with torch.inference_mode():
                self._gpu.warm_up()

    def _run(self, packed: PackedStep, step: CpuStep) -> Tensor:
        wanted = torch.zeros(max(1, -(-len(packed.wanted) // LOGITS_MULTIPLE)) * LOGITS_MULTIPLE, dtype=torch.long)
        wanted[: len(packed.wanted)] = torch.from_numpy(packed.wanted)
        with torch.inference_mode():
            output = self.bound.model(
                input_ids=torch.from_numpy(packed.token_ids)[None],
                position_ids=torch.from_numpy(packed.positions)[None],
                past_key_values=step,
                use_cache=True,
                logits_to_keep=wanted,
                **{STEP: step},
            )
            logits: Tensor = output.logits[0, : len(packed.wanted)].float()
        return logits


def _attention_row_group(bound: BoundModel) -> int:
    """Of the products of queries with a block of keys and of probabilities with its values."""
    expands_latents = any(hasattr(module, "expand_kv") for module in bound.model.modules())
    if expands_latents or bound.dtype != torch.float32:
        return SAFE_ROWS
    sizes = {(layer.key_dim, layer.value_dim) for layer in bound.kv.layers}
    scores = [(key_dim, KEY_BLOCK, False) for key_dim, _ in sizes]
    return row_group([*scores, *((KEY_BLOCK, value_dim, True) for _, value_dim in sizes)])


def _use_invariant_threads() -> int:
    threads = torch.get_num_threads()
    allowed = 1 << min(threads, _MAX_INVARIANT_THREADS).bit_length() - 1
    if allowed != threads:
        log.info("using %d of %d threads: results are bitwise repeatable with a power of two", allowed, threads)
        torch.set_num_threads(allowed)
    return allowed


def _power_of_two(number: int) -> int:
    """The least that is not below `number`."""
    return 1 << (number - 1).bit_length()
