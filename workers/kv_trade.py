"""Books of a KV arena that grows and shrinks while it is used, and takes KV that another worker computed.

Pure, as `workers.kv_books`, whose rules hold here too: nothing of this takes memory from a running slot, and a slot's record says no more
than what it holds. Called by `workers.scheduler` between two steps.
"""

from __future__ import annotations

from collections.abc import Sequence

from flexpert.hbm.ops import Claim
from flexpert.workers.kv_books import KvBooks


class TradingKvBooks(KvBooks):
    def add_granules(self, granules: Sequence[int]) -> None:
        """The arena has grown by these ids."""
        self._free.give(granules)
        self.total_granules += len(granules)

    def remove_granules(self, count: int) -> list[int]:
        """Up to `count` granules leave the arena: free ones, then those of donors, least recently used first; never a running slot's.

        The operations that unmap them must be carried out before the arena gives them back.
        """
        count = min(count, self.available_granules)
        removed = self._take_granules(count, after=None) if count > 0 else []
        assert removed is not None, "available granules could not be reclaimed"
        self.total_granules -= len(removed)
        return removed

    def import_tokens(self, request_id: str, slot: int | None, first: int, tokens: Sequence[int]) -> int | None:
        """Make room for KV that comes from another worker: tokens [first, first + len(tokens)) of a request, in the donor `slot` that took
        what stands before them (None: there is nothing before). Free granules and those of other donors are used, nobody gives way.

        Returns the slot, or None where there is no room or the donor is not what it was. Then carry out the operations, write the KV, and
        call `imported`.
        """
        if slot is not None:
            held = self._slots[slot]
            mine = slot in self._donors and held.owner == request_id and held.committed == first
            if not mine or not self._can_take_over(held, first):
                return None
        end = first + len(tokens)
        have = 0 if slot is None else len(self._slots[slot].granules)
        if (first and slot is None) or end > self.geometry.max_context_tokens:
            return None
        if self.geometry.granules_for(end) - have > len(self._free) + self._reclaimable(keep=slot):
            return None
        if slot is None:
            fresh = self._fresh_slot()
            if fresh is None:
                return None
            held = fresh
            self._ops.append(Claim(held.index, "", 0))
            held.owner, held.committed = request_id, 0
            self._donors[held.index] = None
        granules = self._take_granules(
            self.geometry.granules_for(end) - len(held.granules),
            after=held.granules[-1] if held.granules else None,
            keep=held,
        )
        if granules is None:
            if not held.committed:
                self._drop(held)
            return None
        self._map(held, granules)
        return held.index

    def imported(self, slot: int, tokens: Sequence[int]) -> None:
        """The KV of these tokens lies in the slot now, behind those that it held."""
        held = self._slots[slot]
        held.committed += len(tokens)
        self._index.extend(slot, tokens)
        self._ops.append(Claim(slot, held.owner, held.committed))

    def _reclaimable(self, *, keep: int | None) -> int:
        """Granules that donors other than `keep` would free."""
        mine = set() if keep is None else set(self._slots[keep].granules)
        return self.available_granules - len(self._free) - sum(granule not in self._pins for granule in mine)
