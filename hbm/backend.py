"""The small interface between granules and real memory: create, export, import, reserve, map, unmap.

`host.HostBackend` implements it with one sealed memfd and mmap; a CUDA backend implements it with the driver's virtual
memory calls. The manager creates, exports and discards; clients and the loader helper import, reserve and map.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from flexpert.hbm.granules import Extent, joined


@dataclass(frozen=True, slots=True)
class Range:
    """A reserved, contiguous virtual address range."""

    address: int
    nbytes: int


class Pool(Protocol):
    """The physical memory of all granules of a pool, as this process can reach it."""

    def export(self, *, writable: bool) -> int:
        """A new file descriptor that another process can import; the caller closes it."""

    def discard(self, extent: Extent) -> None:
        """Give the memory of these granules back to the machine; they read as zeros afterwards."""

    def close(self) -> None:
        """Let go of the pool. Mappings made from it stay valid."""


class Backend(Protocol):
    """One kind of device memory."""

    granule_bytes: int

    def create(self, num_granules: int) -> Pool:
        """A new pool; memory is taken when it is first touched, or now, as the device has it."""

    def import_(self, descriptor: int, *, writable: bool) -> Pool:
        """The pool behind an exported descriptor; takes the descriptor over."""

    def reserve(self, nbytes: int) -> Range:
        """Address space without memory: it reads as zeros, writing there faults."""

    def map(self, target: Range, offset_bytes: int, pool: Pool, extent: Extent, *, populate: bool = False) -> None:
        """Back a part of a range with neighbouring granules, in one call. Writable as the pool was imported. populate:
        first use will not fault.
        """

    def unmap(self, target: Range, offset_bytes: int, nbytes: int) -> None:
        """Take the backing of a part of a range away: it reads as zeros again."""

    def release(self, target: Range) -> None:
        """Give the address range back."""


def map_back_to_back(backend: Backend, pool: Pool, extents: Sequence[Extent], *, populate: bool = False) -> Range:
    """A new range with these granules in this order, in as few calls as neighbours allow."""
    target = backend.reserve(sum(extent.length for extent in extents) * backend.granule_bytes)
    offset = 0
    try:
        for run in joined(extents):
            backend.map(target, offset, pool, run, populate=populate)
            offset += run.length * backend.granule_bytes
    except BaseException:
        backend.release(target)
        raise
    return target
