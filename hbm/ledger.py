"""Which granule belongs to whom: the pool of free ones, an owner id for each of the others. Pure.

Weight segments and KV arenas own granules; 0 is nobody. Written by `books` and `weight_books`, proved by `audit`.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from flexpert.hbm.granules import Extent, GranulePool


class Ledger:
    """`owner_of[granule]` is the id of its owner."""

    def __init__(self, *, num_granules: int, granule_bytes: int) -> None:
        self.granule_bytes = granule_bytes
        self.pool = GranulePool(num_granules)
        self.owner_of = array("q", bytes(8 * num_granules))
        self._released: list[Extent] = []
        self._last_id = 0

    def new_id(self) -> int:
        """A number that no owner, lease, load or pin of this manager had before."""
        self._last_id += 1
        return self._last_id

    def granules_for(self, nbytes: int) -> int:
        return -(-nbytes // self.granule_bytes)

    def take(self, count: int, owner_id: int) -> tuple[Extent, ...]:
        """Raises ValueError where fewer are free: ask the pool first."""
        extents = self.pool.take(count)
        self.set_owner(extents, owner_id)
        return extents

    def give(self, extents: Sequence[Extent]) -> None:
        """They are free at once; nobody must be granted them before their memory was discarded (`take_released`)."""
        if extents:
            self.set_owner(extents, 0)
            self._released.extend(self.pool.give(extents))

    def set_owner(self, extents: Sequence[Extent], owner_id: int) -> None:
        for extent in extents:
            self.owner_of[extent.start : extent.end] = array("q", [owner_id]) * extent.length

    def belongs_to(self, extent: Extent, owner_id: int) -> bool:
        """Whether all granules of the extent are this owner's; False for what is outside the pool."""
        if extent.length < 1 or extent.start < 0 or extent.end > self.pool.total:
            return False
        return self.owner_of[extent.start : extent.end] == array("q", [owner_id]) * extent.length

    def take_released(self) -> list[Extent]:
        """What became free since the last call."""
        released, self._released = self._released, []
        return released
