"""Carries out a load plan in this process: for CUDA, and for whoever runs without an HBM manager.

On the host the manager's own helper does this once per node; this one fills the caller's buffers and nothing else.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from operator import attrgetter

import torch
from torch import Tensor

from flexpert.hbm.loading import BlockScale, LoadPlan
from flexpert.workers.model.errors import CheckpointError
from flexpert.workers.model.layout import is_experts
from flexpert.workers.model.planning import STORED_NAMES

_TORCH_DTYPES = {name: dtype for dtype, name in STORED_NAMES.items()} | {
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}


def make_buffers(plan: LoadPlan, *, device: str | torch.device = "cpu") -> dict[str, Tensor]:
    """Plain torch memory for `load_into`, one uint8 tensor a segment; the slab groups lie back to back in the plan's order."""
    groups = {name: nbytes for name, nbytes in plan.segments.items() if is_experts(name)}
    memory = torch.empty(sum(groups.values()), dtype=torch.uint8, device=device)
    buffers = dict(zip(groups, memory.split(list(groups.values())), strict=True))
    for name, nbytes in plan.segments.items():
        if name not in groups:
            buffers[name] = torch.empty(nbytes, dtype=torch.uint8, device=device)
    return buffers


def compact(segments: Sequence[Tensor], *, device: str | torch.device | None = None) -> Tensor:
    """Segments back to back in one uint8 tensor on `device` (None: where they are): a view where they lie so already, else a copy."""
    target = torch.device(device) if device is not None else segments[0].device if segments else torch.device("cpu")
    if not segments:
        return torch.empty(0, dtype=torch.uint8, device=target)
    first, total = segments[0], sum(len(segment) for segment in segments)
    begin, end = first.data_ptr(), first.data_ptr()
    together = (
        first.device == target or target == torch.device(first.device.type)
    ) and begin + total <= first.untyped_storage().data_ptr() + first.untyped_storage().nbytes()
    for segment in segments:
        together = together and segment.data_ptr() == end
        end += len(segment)
    if together:
        return first.as_strided((total,), (1,))
    memory = torch.empty(total, dtype=torch.uint8, device=target)
    for part, segment in zip(memory.split([len(segment) for segment in segments]), segments, strict=True):
        part.copy_(segment)
    return memory


def _scaled(source: Tensor, scale: BlockScale) -> Tensor:
    """float32: the elements, each block of rows and columns multiplied by its factor."""
    matrix = source.float().view(-1, scale.columns)
    with open(scale.file, "rb") as file:
        file.seek(scale.file_offset)
        raw = bytearray(file.read(scale.num_bytes(source.numel())))
    factors = torch.frombuffer(raw, dtype=_TORCH_DTYPES[scale.dtype]).float().view(-1, scale.blocks_per_row)
    by_column = factors.repeat_interleave(scale.block_columns, 1)[:, : scale.columns]
    return (matrix * by_column.repeat_interleave(scale.block_rows, 0)[: len(matrix)]).flatten()


def load_into(
    plan: LoadPlan, buffers: Mapping[str, Tensor], on_progress: Callable[[int, int], None] | None = None
) -> None:
    """Fill uint8 buffers, one for each segment, on any device; bytes that no copy writes become zeros.

    on_progress(done_bytes, total_bytes) counts bytes read. Raises CheckpointError where a file shrank or vanished since it was planned.
    """
    for name, nbytes in plan.segments.items():
        if buffers[name].numel() != nbytes:
            raise ValueError(f"the buffer of segment {name!r} has {buffers[name].numel()} bytes, expected {nbytes}")
        buffers[name].zero_()
    total, done = plan.total_bytes(), 0
    for path, copies in groupby(sorted(plan.copies, key=attrgetter("file", "file_offset")), key=attrgetter("file")):
        try:
            with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
                for copy in copies:
                    dtype = _TORCH_DTYPES[copy.source_dtype]
                    source = torch.frombuffer(mapped, dtype=dtype, count=copy.num_elements, offset=copy.file_offset)
                    end = copy.segment_offset + copy.segment_bytes
                    target = buffers[copy.segment][copy.segment_offset : end].view(_TORCH_DTYPES[copy.dtype])
                    target.copy_(source if copy.scale is None else _scaled(source, copy.scale))
                    del source
                    done += copy.source_bytes
                    if on_progress is not None:
                        on_progress(done, total)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path} cannot be read as planned ({error}); fetch the checkpoint again") from error
