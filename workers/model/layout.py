"""The layout of bound weights in segments, as values: what a load plan promises and a binder relies on.

"dense": every parameter and buffer that all ranks need, each at a multiple of 64 bytes. "experts:<g>": slab group g, the unit of
physical trade and of placement: slots [g * slots_per_group, (g + 1) * slots_per_group), exactly whole granules, all of one layer. A slot
holds the slab of one expert; slots are of one size and count through all layers. Groups mapped back to back in ascending order keep the
slot stride, and the held experts of each layer are neighbours there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import gcd

import msgspec

VERSION = 2
ALIGNMENT_BYTES = 64
DENSE = "dense"
_EXPERTS = "experts:"
_MAX_GROUP = 64
_GOOD_WASTE = 0.02


class DenseTensor(msgspec.Struct, frozen=True):
    """One tensor of the dense segment; dtype by its torch name."""

    dtype: str
    shape: tuple[int, ...]
    offset_bytes: int


class SlabMatrix(msgspec.Struct, frozen=True):
    """One matrix of a slab, as the checkpoint stores it."""

    name: str
    offset_bytes: int
    shape: tuple[int, int]


class ExpertLayer(msgspec.Struct, frozen=True):
    """The slabs of one experts module: expert e lies in slot first_slot + e. Transposed and interleaved as stored (gpt-oss is both)."""

    module: str
    first_slot: int
    num_experts: int
    matrices: tuple[SlabMatrix, ...]
    transposed: bool
    interleaved: bool


class WeightLayout(msgspec.Struct, frozen=True, kw_only=True):
    """All of it; the manifest of a load plan is this as JSON."""

    version: int
    dtype: str
    dense_bytes: int
    dense: dict[str, DenseTensor]
    slab_bytes: int
    slot_bytes: int
    slots: int
    slots_per_group: int
    experts: tuple[ExpertLayer, ...]

    @property
    def group_bytes(self) -> int:
        return self.slots_per_group * self.slot_bytes

    @property
    def groups(self) -> int:
        return self.slots // self.slots_per_group

    def segment_bytes(self) -> dict[str, int]:
        """All segments, the dense one first and the groups in order."""
        return {DENSE: self.dense_bytes, **{segment_of(group): self.group_bytes for group in range(self.groups)}}

    def to_manifest(self) -> bytes:
        return msgspec.json.encode(self)

    @classmethod
    def from_manifest(cls, manifest: bytes) -> WeightLayout:
        layout = msgspec.json.decode(manifest, type=cls)
        if layout.version != VERSION:
            raise ValueError(
                f"weights are laid out by version {layout.version}, this flexpert reads version {VERSION}; load them again"
            )
        return layout


def segment_of(group: int) -> str:
    """The name of a slab group's segment."""
    return f"{_EXPERTS}{group}"


def is_experts(segment: str) -> bool:
    return segment.startswith(_EXPERTS)


def slab_groups(layout: WeightLayout) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """[layer] -> its slab groups as the experts in them: a placement holds each whole or not at all."""
    size = layout.slots_per_group
    return tuple(
        tuple(tuple(range(first, first + size)) for first in range(0, layer.num_experts, size))
        for layer in layout.experts
    )


def all_experts(layout: WeightLayout) -> tuple[tuple[int, ...], ...]:
    """[layer] -> all its experts: what a group of one holds."""
    return tuple(tuple(range(layer.num_experts)) for layer in layout.experts)


def held_groups(layout: WeightLayout, held: Sequence[Sequence[int]]) -> list[int]:
    """The slab groups of the experts held[layer], ascending. Raises ValueError for a placement that the layout cannot have."""
    if len(held) != len(layout.experts):
        raise ValueError(f"a placement of {len(held)} layers; the model has {len(layout.experts)} layers with experts")
    return [group for i in range(len(held)) for group in _groups_of_layer(layout, i, held[i])]


def expert_segments(layout: WeightLayout, held: Sequence[Sequence[int]]) -> tuple[str, ...]:
    """The segments of the experts held[layer], in the order in which they are mapped back to back. Raises ValueError where a slab group
    is split or an expert does not exist."""
    return tuple(segment_of(group) for group in held_groups(layout, held))


def _groups_of_layer(layout: WeightLayout, index: int, held: Sequence[int]) -> Iterator[int]:
    layer, size, found = layout.experts[index], layout.slots_per_group, set(held)
    if len(found) != len(held) or not found <= set(range(layer.num_experts)):
        raise ValueError(f"layer {index} has experts 0 to {layer.num_experts - 1}; found {sorted(held)}")
    for first in sorted({expert // size * size for expert in found}):
        if missing := [expert for expert in range(first, first + size) if expert not in found]:
            raise ValueError(
                f"experts {first} to {first + size - 1} of layer {index} lie in one slab group, so they are held together; "
                f"the placement leaves out {missing}"
            )
        yield (layer.first_slot + first) // size


def aligned(nbytes: int, multiple_bytes: int = ALIGNMENT_BYTES) -> int:
    """The least multiple of multiple_bytes that is not below nbytes."""
    return -(-nbytes // multiple_bytes) * multiple_bytes


def slot_size(slab_bytes: int, granule_bytes: int, experts: Sequence[int] = ()) -> tuple[int, int]:
    """(slot_bytes, slots_per_group): the smallest group, a power of two, whose padding to whole granules wastes at most 2%; the least
    wasteful one where none does. slot_bytes is a multiple of ALIGNMENT_BYTES; the group divides each number in `experts` (of a layer)."""
    best: tuple[float, int, int] | None = None
    group = 1
    while group <= gcd(_MAX_GROUP, *experts):
        granules = -(-group * slab_bytes // granule_bytes)
        slot_bytes = granules * granule_bytes // group
        waste = slot_bytes / slab_bytes - 1
        if slot_bytes % ALIGNMENT_BYTES == 0 and (best is None or waste < best[0]):
            best = (waste, slot_bytes, group)
            if waste <= _GOOD_WASTE:
                break
        group *= 2
    assert best is not None, f"granules of {granule_bytes} bytes are no multiple of {ALIGNMENT_BYTES}"
    return best[1], best[2]
