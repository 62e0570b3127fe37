"""Books of a KV arena that grows and shrinks while it is used, and takes KV that another worker computed.

Each time it changes its size it is tidied: what a donor holds in pieces is copied to one run of granules, and the granules that leave
are the highest ones, those below being given to the donors that held them. So neither the arena nor a slot falls into more pieces from
one change to the next, and the manager gets back what lies together.

Pure, as `workers.kv_books`, whose rules hold here too: nothing of this takes memory from a running slot, and a slot's record says no more
than what it holds. Called by `workers.scheduler` between two steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from heapq import nlargest

from flexpert.hbm.granules import runs_of
from flexpert.hbm.ops import Claim
from flexpert.workers.kv_books import KvBooks
from flexpert.workers.kv_slots import Slot
from flexpert.workers.step import CopyTokens

MOVED_BYTES = 16 << 20  # what tidying copies at a time, between two steps: a few milliseconds


class TradingKvBooks(KvBooks):
    def add_granules(self, granules: Sequence[int]) -> None:
        """The arena has grown by these ids. There is room now: donors in pieces are put together."""
        self._free.give(granules)
        self.total_granules += len(granules)
        self._put_together(MOVED_BYTES // self.geometry.granule_bytes)

    def remove_granules(self, count: int) -> list[int]:
        """Up to `count` granules leave the arena: those of donors, least recently used first, if the free ones are not enough; never a
        running slot's. Of what is free then, or can be by moving donors, the highest ids go.

        The operations that unmap them must be carried out before the arena gives them back.
        """
        count = min(count, self.available_granules)
        if count <= 0:
            return []
        reclaimed = self._reclaim(count)
        assert reclaimed, "available granules could not be reclaimed"
        self._clear_above(self._lowest_to_leave(count))
        removed = self._free.take_highest(count)
        self.total_granules -= count
        return removed

    # Tidying

    def _lowest_to_leave(self, count: int) -> int:
        """The lowest of the `count` highest ids that no running slot holds."""
        held = (granule for index in self._donors for granule in self._slots[index].granules)
        return nlargest(count, {*self._free, *(granule for granule in held if granule not in self._pins)})[-1]

    def _put_together(self, most: int) -> None:
        """Move donors that lie in pieces, while there are runs for them. What is used most lately stays longest, so it comes first."""
        moved = True
        while moved:  # one that has moved leaves room
            moved = False
            for donor in [self._slots[index] for index in reversed(self._donors)]:
                count = self.geometry.granules_for(donor.committed)
                if count > most or sum(1 for _ in runs_of(donor.granules)) < 2:
                    continue
                if self._movable(donor) and self._free.lowest_run(count) is not None:
                    self._move(donor, self._free.take(count, room=count))
                    most -= count
                    moved = True

    def _clear_above(self, lowest: int) -> None:
        """Move donors that hold granules from `lowest` on below it, as far as there are runs for them."""
        most = MOVED_BYTES // self.geometry.granule_bytes
        moved = True
        while moved:
            moved = False
            for donor in [self._slots[index] for index in self._donors]:
                count = self.geometry.granules_for(donor.committed)
                if count > most or max(donor.granules) < lowest or not self._movable(donor):
                    continue
                begin = self._free.lowest_run(count)
                if begin is not None and begin + count <= lowest:
                    self._move(donor, self._free.take(count, after=begin - 1))
                    most -= count
                    moved = True

    def _movable(self, donor: Slot) -> bool:
        """Nobody shares its first granules, and there is a slot to move to."""
        return bool(self._free_slots) and self._shared_granules(donor) == 0

    def _move(self, donor: Slot, granules: list[int]) -> None:
        """A donor's KV, copied to these granules, in another slot: a worker that dies meanwhile leaves one of the two, or both."""
        slot = self._slots[self._free_slots.pop()]
        self._map(slot, granules)
        self._ops.append(CopyTokens(donor.index, slot.index, 0, donor.committed))
        self._ops.append(Claim(slot.index, donor.owner, donor.committed))
        slot.owner, slot.committed = donor.owner, donor.committed
        self._index.move(donor.index, slot.index)
        if self._restored.get(donor.owner) == donor.index:
            self._restored[donor.owner] = slot.index
        order = [(slot.index, index) if index == donor.index else (index,) for index in self._donors]
        self._donors = dict.fromkeys(index for entry in order for index in entry)
        self._drop(donor)

    # From other workers

    def import_tokens(self, request_id: str, slot: int | None, first: int, tokens: Sequence[int]) -> int | None:
        """Make room for KV that comes from another worker: tokens [first, first + len(tokens)) of a request, in the donor `slot` that took
        what stands before them (None: there is nothing before). Free granules and those of other donors are used, nobody gives way.

        Returns the slot, or None where there is no room or the donor is not what it was. Then carry out the operations, write the KV, and
        call `imported`.
        """
        if slot is not None:
            slot = self._where(request_id, slot, first)
            if slot is None or not self._can_take_over(self._slots[slot], first):
                return None
            held = self._slots[slot]
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

    def _where(self, request_id: str, slot: int, first: int) -> int | None:
        """The donor with the request's first tokens: `slot`, unless it was moved."""
        for index in (slot, *self._donors):
            held = self._slots[index]
            if index in self._donors and held.owner == request_id and held.committed == first:
                return index
        return None

    def _reclaimable(self, *, keep: int | None) -> int:
        """Granules that donors other than `keep` would free."""
        mine = set() if keep is None else set(self._slots[keep].granules)
        return self.available_granules - len(self._free) - sum(granule not in self._pins for granule in mine)
