"""What a load is: segments to be made, and which bytes of which files go where. Values and their checks only.

Made by the model side (`workers.model.plan_weights`), sent by `client.HbmClient.load_weights`, carried out by the
helper process `flexpert.hbm.loader`, which exits when it is done.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from flexpert.hbm.errors import LoadError

# safetensors dtype name -> bytes of one element
ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4,
    "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip
CONVERTIBLE_FROM = frozenset({"F64", "F32", "F16", "BF16"})
CONVERTIBLE_TO = frozenset({"F32", "F16", "BF16"})
SCALED_FROM = frozenset({"F8_E4M3", "F8_E5M2"})  # these with scales only
SCALE_DTYPES = frozenset({"F32", "F16", "BF16", "F8_E8M0"})


@dataclass(frozen=True, slots=True)
class BlockScale:
    """Factors of a matrix: one of `dtype` for each block of block_rows x block_columns, row by row from byte `file_offset`
    of `file` on. columns: of the matrix, in elements.
    """

    file: str
    file_offset: int
    dtype: str
    columns: int
    block_rows: int
    block_columns: int

    @property
    def blocks_per_row(self) -> int:
        return -(-self.columns // self.block_columns)

    @property
    def row_bytes(self) -> int:
        """Of the factors of one row of blocks."""
        return self.blocks_per_row * ITEM_BYTES[self.dtype]

    def num_bytes(self, num_elements: int) -> int:
        """Of the factors of so many elements, whole rows."""
        return -(-num_elements // (self.columns * self.block_rows)) * self.row_bytes


@dataclass(frozen=True, slots=True)
class Copy:
    """A contiguous run of elements: `num_elements` of `source_dtype` at byte `file_offset` of `file` (counted from the
    start of the file, header included) become as many of `dtype` at byte `segment_offset` of `segment`. dtypes by their
    safetensors names. scale: the elements are whole rows of a matrix, the first of them the first of a row of blocks, and
    are multiplied by the blocks' factors.
    """

    file: str
    file_offset: int
    num_elements: int
    source_dtype: str
    segment: str
    segment_offset: int
    dtype: str
    scale: BlockScale | None = None

    @property
    def source_bytes(self) -> int:
        return self.num_elements * ITEM_BYTES[self.source_dtype]

    @property
    def segment_bytes(self) -> int:
        return self.num_elements * ITEM_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """Segments (name -> bytes) and the copies that fill them; bytes no copy writes are zeros. The manifest is the
    caller's own.
    """

    segments: Mapping[str, int]
    copies: Sequence[Copy]
    manifest: bytes = b""

    def total_bytes(self) -> int:
        """Bytes read from files, each once."""
        return sum(copy.source_bytes for copy in self.copies)


def peer_plan(path: str, extents: Mapping[str, Sequence[tuple[int, int]]], manifest: bytes = b"") -> LoadPlan:
    """Segments as another manager has them, byte for byte: from what `HbmClient.export_segments` gave there (`path`,
    `extents`: name -> [(file offset, bytes)]). For `load_segments` here.
    """
    copies = []
    for name, parts in extents.items():
        offset = 0
        for file_offset, nbytes in parts:
            copies.append(Copy(path, file_offset, nbytes, "U8", name, offset, "U8"))
            offset += nbytes
    segments = {name: sum(nbytes for _offset, nbytes in parts) for name, parts in extents.items()}
    return LoadPlan(segments, copies, manifest)


def with_absolute_paths(plan: LoadPlan) -> LoadPlan:
    """The helper process runs elsewhere: relative files are meant relative to the caller."""
    files = {copy.file for copy in plan.copies} | {copy.scale.file for copy in plan.copies if copy.scale}
    absolute = {file: os.path.abspath(file) for file in files}
    if all(file == path for file, path in absolute.items()):
        return plan
    copies = []
    for copy in plan.copies:
        scale = copy.scale and replace(copy.scale, file=absolute[copy.scale.file])
        copies.append(replace(copy, file=absolute[copy.file], scale=scale))
    return replace(plan, copies=copies)


def check_plan(plan: LoadPlan) -> None:
    """Raises LoadError naming the first thing that is wrong: sizes, dtypes, targets outside their segment or written
    twice.
    """
    if not plan.segments:
        raise LoadError("the load plan has no segments")
    for name, nbytes in plan.segments.items():
        if nbytes <= 0:
            raise LoadError(f"segment {name!r} has {nbytes} bytes, expected at least 1")
    for copy in plan.copies:
        _check_copy(copy, plan.segments)
    ends: dict[str, Copy] = {}
    for copy in sorted(plan.copies, key=lambda copy: (copy.segment, copy.segment_offset)):
        before = ends.get(copy.segment)
        if before is not None and before.segment_offset + before.segment_bytes > copy.segment_offset:
            raise LoadError(
                f"segment {copy.segment!r} is written twice at byte {copy.segment_offset}: by {before} and {copy}"
            )
        ends[copy.segment] = copy


def _check_copy(copy: Copy, segments: Mapping[str, int]) -> None:
    for dtype in (copy.source_dtype, copy.dtype):
        if dtype not in ITEM_BYTES:
            raise LoadError(f"{copy.file}: dtype {dtype!r} is not known; known are {', '.join(sorted(ITEM_BYTES))}")
    if copy.scale is not None:
        _check_scale(copy, copy.scale)
    elif copy.source_dtype != copy.dtype and not (
        copy.source_dtype in CONVERTIBLE_FROM and copy.dtype in CONVERTIBLE_TO
    ):
        raise LoadError(
            f"{copy.file}: {copy.source_dtype} cannot be converted to {copy.dtype}; "
            f"conversions go from {', '.join(sorted(CONVERTIBLE_FROM))} to {', '.join(sorted(CONVERTIBLE_TO))}"
        )
    if copy.num_elements < 0 or copy.file_offset < 0 or copy.segment_offset < 0:
        raise LoadError(f"negative number in {copy}")
    if copy.segment not in segments:
        raise LoadError(
            f"{copy} writes to a segment that the plan does not have; it has {', '.join(map(repr, segments))}"
        )
    end = copy.segment_offset + copy.segment_bytes
    if end > segments[copy.segment]:
        raise LoadError(
            f"{copy} ends at byte {end} of segment {copy.segment!r}, which has {segments[copy.segment]} bytes"
        )


def _check_scale(copy: Copy, scale: BlockScale) -> None:
    if copy.source_dtype not in SCALED_FROM or copy.dtype not in CONVERTIBLE_TO or scale.dtype not in SCALE_DTYPES:
        raise LoadError(
            f"{copy.file}: {copy.source_dtype} with factors of {scale.dtype} cannot be converted to {copy.dtype}; scaled "
            f"conversions go from {', '.join(sorted(SCALED_FROM))} with {', '.join(sorted(SCALE_DTYPES))} "
            f"to {', '.join(sorted(CONVERTIBLE_TO))}"
        )
    if min(scale.columns, scale.block_rows, scale.block_columns) < 1 or scale.file_offset < 0:
        raise LoadError(f"{copy.file}: {scale} has sizes below 1")
    if copy.num_elements % scale.columns:
        raise LoadError(f"{copy.file}: {copy.num_elements} elements are no whole rows of {scale.columns} columns")
