"""Runs steps on a GPU: decode steps by replaying CUDA graphs of fixed batch sizes, everything else launched op by op.

A graph of batch size B reads token ids, slots and positions from one device tensor; a smaller batch repeats its first row, which then
writes the
same keys and values twice. Graphs are captured on first use, or all at once by `warm_up`. Layers that flash attention does not take
(latents, odd head sizes) are never captured, since what they gather grows with the longest sequence.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from flexpert.workers.model.binding import BoundModel
from flexpert.workers.model.gpu_step import ArenaOnDevice, GpuStep, StepTensors
from flexpert.workers.model.interfaces import STEP
from flexpert.workers.model.kv_layout import KvViews
from flexpert.workers.model.packing import PackedStep

log = logging.getLogger(__name__)

BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_WARM_RUNS = 2


@dataclass
class _Captured:
    """All that the graph reads and writes is held here: what is freed would be another tensor's memory at the next replay."""

    inputs: StepTensors  # views of `rows`, and what was made before the capture
    rows: Tensor  # int64 [3, B], read by the graph
    logits: Tensor  # float32 [B, vocab], written by it
    graph: torch.cuda.CUDAGraph


class GpuCompute:
    """Logits of packed steps over one KV tensor. `use_graphs` is off for comparison in tests."""

    def __init__(self, bound: BoundModel, views: KvViews, kv: Tensor, *, use_graphs: bool = True) -> None:
        self._bound, self._device = bound, bound.device
        self._arena = ArenaOnDevice(views, kv)
        self._max_keys = views.capacity_tokens
        flash = [self._arena.flash_fits(i, latent=layer.latent) for i, layer in enumerate(bound.servable.attention)]
        self._can_capture = self.captures = use_graphs and self._device.type == "cuda" and all(flash)
        self._graphs: dict[int, _Captured] = {}
        self._pool: tuple[int, int] | None = None
        if self._device.type == "cuda" and not self._arena.contiguous:
            log.warning(
                "slots of %d bytes are no whole number of tokens of %d bytes: attention falls back to the slow path without CUDA graphs",
                kv.stride(0), bound.kv.token_bytes,
            )  # fmt: skip

    def logits(self, packed: PackedStep) -> Tensor:
        """float32 [wanted, vocab]"""
        requests = len(packed.slots)
        if self.captures and packed.num_tokens == requests == len(packed.wanted) and requests <= BATCH_SIZES[-1]:
            rows = np.stack([packed.token_ids[:requests], packed.slots, packed.positions[:requests]])
            return self._replay(rows)
        tensors = StepTensors.of(packed, self._device)
        wanted = torch.from_numpy(packed.wanted).to(self._device)
        return self.run(tensors, wanted)

    def warm_up(self, batch_sizes: Sequence[int] = BATCH_SIZES) -> None:
        """Capture the graphs of these batch sizes now, the largest first so that the others reuse its memory. Writes to position 0 of
        slot 0."""
        for size in sorted(batch_sizes, reverse=True):
            if self.captures and size not in self._graphs:
                self._graphs[size] = self._capture(torch.zeros(3, size, dtype=torch.long, device=self._device))

    def forget_graphs(self, *, may_capture: bool) -> None:
        """Other experts are used from now on. may_capture: no step waits for other ranks."""
        self._graphs.clear()
        self._pool = None
        self.captures = self._can_capture and may_capture

    def run(self, tensors: StepTensors, wanted: Tensor | int) -> Tensor:
        """Logits of `wanted` packed rows (0: of all), launched op by op."""
        step = GpuStep(tensors, self._arena)
        output = self._bound.model(
            input_ids=tensors.token_ids[None],
            position_ids=tensors.positions[None],
            past_key_values=step,
            use_cache=True,
            logits_to_keep=wanted,
            **{STEP: step},
        )
        logits: Tensor = output.logits[0].float()
        return logits

    def _replay(self, rows: np.ndarray) -> Tensor:
        requests = rows.shape[1]
        size = next(size for size in BATCH_SIZES if size >= requests)
        padded = torch.from_numpy(np.concatenate([rows, rows[:, :1].repeat(size - requests, axis=1)], axis=1))
        captured = self._graphs.get(size)
        if captured is None:
            captured = self._graphs[size] = self._capture(padded.to(self._device))
        captured.rows.copy_(padded)
        captured.graph.replay()
        return captured.logits[:requests].clone()

    def _capture(self, rows: Tensor) -> _Captured:
        """Runs the step a few times beside the current stream (libraries set themselves up), then records it."""
        tensors = StepTensors.decode(rows, max_keys=self._max_keys)
        side = torch.cuda.Stream(self._device)
        side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(side):
            for _ in range(_WARM_RUNS):
                self.run(tensors, 0)
        torch.cuda.current_stream(self._device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            logits = self.run(tensors, 0)
        self._pool = self._pool or graph.pool()
        log.info("captured the decode step of %d rows", rows.shape[1])
        return _Captured(tensors, rows, logits, graph)
