"""The layout of bound weights in two segments, as values: what a load plan promises and a binder relies on.

"dense": every parameter and buffer that all ranks need, each at a multiple of 64 bytes. "experts": one slab for each
expert of each layer, in slots of one size, layer after layer; slots_per_group of them are whole granules, or nearly
(a slab group, the unit of physical trade).
"""

from __future__ import annotations

import msgspec

VERSION = 1
ALIGNMENT_BYTES = 64
DENSE, EXPERTS = "dense", "experts"
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
    def experts_bytes(self) -> int:
        groups = -(-self.slots // self.slots_per_group)
        return groups * self.slots_per_group * self.slot_bytes

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


def aligned(nbytes: int) -> int:
    """The least multiple of ALIGNMENT_BYTES that is not below nbytes."""
    return -(-nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def slot_size(slab_bytes: int, granule_bytes: int) -> tuple[int, int]:
    """(slot_bytes, slots_per_group): the smallest group, a power of two, whose padding to whole granules wastes at most 2%; the least
    wasteful one where none does. Both are multiples of ALIGNMENT_BYTES."""
    best: tuple[float, int, int] | None = None
    group = 1
    while group <= _MAX_GROUP:
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
