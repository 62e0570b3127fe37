"""Which granule backs what in a worker's KV arena, and whose KV each slot holds.

The KV of token t of a request lies at bytes [t * kv_token_bytes, (t + 1) * kv_token_bytes) of its slot; granules do not
align with tokens. A slot is free, running (a request computes in it) or a donor: its request has finished, was
cancelled or preempted, or was left by a dead worker. A donor keeps its granules, and its tokens can be reused, until
the pool wants them.

Two rules hold at every point of the list of operations, so that a worker may die between any two of them:
- a granule that several slots hold is written by none. A new request shares the whole granules of its prefix and gets a
  copy of the rest; what several slots hold is therefore always the beginning of each.
- the `committed` count that the manager has for a request never exceeds what its slot holds. So a slot changes hands by
  way of nobody: Claim(slot, "") first, then Map and CopyTokens, then Claim(slot, request, tokens reused).

Pure: the operations are returned by `take_ops`, carried out by the engine. Called by `workers.scheduler` and, once
after a worker's death, by the engine (`restore`). Not responsible for who runs when, nor for which requests must give
way.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from itertools import islice

from flexpert.hbm.ops import Claim, Map, Unmap
from flexpert.workers.free_granules import FreeGranules
from flexpert.workers.kv_geometry import Grant, KvGeometry, SlotRecord
from flexpert.workers.kv_slots import Slot, check_slots
from flexpert.workers.prefix import PrefixIndex
from flexpert.workers.step import CopyTokens, MemoryOp

__all__ = ["Grant", "KvBooks", "KvGeometry", "SlotRecord"]

_CANDIDATES = 8  # how many slots with the same longest prefix are looked at for the best one to reuse
_MOST_ROOM = 16  # granules that a request is expected to grow by, at most: longer runs are not kept whole for it


class KvBooks:
    """The books of one KV arena. granules: the ids granted to it. ahead_granules: growth that is backed before need."""

    def __init__(self, geometry: KvGeometry, granules: Sequence[int] = (), *, ahead_granules: int = 2) -> None:
        self.geometry = geometry
        self.total_granules = len(granules) if geometry.shareable else 0
        self._ahead = ahead_granules
        self._slots = [Slot(index, geometry.tokens_in(0)) for index in range(geometry.slots)]
        self._free_slots = list(range(geometry.slots - 1, -1, -1))
        self._donors: dict[int, None] = {}  # least recently used first
        self._restored: dict[str, int] = {}  # request id -> donor slot whose tokens are not known here
        self._free = FreeGranules(granules if geometry.shareable else ())
        self._holders: dict[int, int] = {}  # granule -> slots that hold it
        self._pins: dict[int, int] = {}  # granule -> running slots that hold it; only where there are any
        self._index = PrefixIndex()
        self._ops: list[MemoryOp] = []

    # What there is

    @property
    def available_granules(self) -> int:
        """Granules that are free or can be taken from donors."""
        return self.total_granules - len(self._pins)

    @property
    def capacity_tokens(self) -> int:
        everywhere = self.geometry.slots * self.geometry.max_context_tokens
        if not self.geometry.shareable:
            return everywhere
        return min(everywhere, self.total_granules * self.geometry.granule_bytes // self.geometry.kv_token_bytes)

    @property
    def used_tokens(self) -> int:
        """Tokens that fit into what running requests hold: what donors hold counts as free."""
        if not self.geometry.shareable:
            return sum(slot.committed for slot in self._slots if slot.running)
        return min(self.capacity_tokens, len(self._pins) * self.geometry.granule_bytes // self.geometry.kv_token_bytes)

    def fits_alone(self, tokens: int) -> bool:
        """Whether one request of so many tokens fits when nothing else runs."""
        return tokens <= self.geometry.max_context_tokens and self.geometry.granules_for(tokens) <= self.total_granules

    def reserve_granules(self, slot: int, tokens: int) -> int:
        """What a running slot still needs to hold `tokens` tokens and one granule more, in granules."""
        return max(0, self.geometry.granules_for(tokens) - len(self._slots[slot].granules)) + self.geometry.shareable

    def reachable_tokens(self, slot: int) -> int:
        """How far the slot could grow now without anybody being preempted."""
        return self.geometry.tokens_in(len(self._slots[slot].granules) + self.available_granules)

    def take_ops(self) -> tuple[MemoryOp, ...]:
        """The operations decided since the last call, in the order in which they must be carried out."""
        ops, self._ops = tuple(self._ops), []
        return ops

    # A request's life in a slot

    def acquire(
        self, request_id: str, tokens: Sequence[int], *, reuse_limit: int, reserve_granules: int = 0
    ) -> Grant | None:
        """A slot for a request of these tokens, with the longest prefix of tokens[:reuse_limit] that any slot holds.

        None where no slot is to be had, or not enough memory for all of `tokens` with `reserve_granules` left over.
        """
        if not self._free_slots and not self._donors:
            return None
        source, reuse = self._find_source(request_id, tokens, reuse_limit)
        shared = reuse * self.geometry.kv_token_bytes // self.geometry.granule_bytes
        pinned = sum(granule in self._pins for granule in source.granules[:shared]) if source else 0
        if self.geometry.granules_for(len(tokens)) - pinned + reserve_granules > self.available_granules:
            return None
        if source is not None:
            slot = self._reuse(source, request_id, reuse, len(tokens))
            if slot is not None:
                return self._start(slot, request_id, tokens, reuse)
        fresh = self._fresh_slot()
        if fresh is None:
            return None
        self._ops.append(Claim(fresh.index, request_id, 0))
        return self._start(fresh, request_id, tokens, 0)

    def grow(self, slot: int, end_tokens: int, *, limit_tokens: int) -> bool:
        """Back the slot up to `end_tokens`; while memory is plentiful a little further, never beyond `limit_tokens`."""
        held = self._slots[slot]
        if end_tokens <= held.backed_tokens:
            return True
        missing = self.geometry.granules_for(end_tokens) - len(held.granules)
        if missing > self.available_granules:
            return False
        if self.available_granules - missing - self._ahead > self.total_granules // 8:
            wanted = self.geometry.granules_for(min(end_tokens + self._ahead_tokens(), limit_tokens))
            missing = max(missing, min(wanted - len(held.granules), missing + self._ahead))
        granules = self._take_granules(
            missing,
            after=held.granules[-1] if held.granules else None,
            room=self.geometry.granules_for(limit_tokens) - len(held.granules),
        )
        assert granules is not None, "available granules could not be reclaimed"
        self._map(held, granules)
        return True

    def commit(self, slot: int, tokens: Sequence[int]) -> None:
        """A whole step has computed the KV of these tokens, which follow those committed before."""
        self._slots[slot].committed += len(tokens)
        self._index.extend(slot, tokens)

    def release(self, slot: int) -> None:
        """The request leaves its slot, which becomes a donor."""
        held = self._slots[slot]
        held.running = False
        for granule in held.granules:
            if self._pins[granule] == 1:
                del self._pins[granule]
            else:
                self._pins[granule] -= 1
        self._donors[slot] = None
        if held.committed == 0:
            self._drop(held)

    def restore(self, records: Iterable[SlotRecord]) -> None:
        """Take over what a dead worker left, as donors: a request finds its slot by its id; what none asks for goes first.

        Called once, before anything else. A record that cannot be (a granule that is not ours, or not at the same place
        of each of its slots) costs its slot: that request computes again.
        """
        positions: dict[int, int] = {}  # granule -> its place in every slot that holds it
        followers: dict[int, int | None] = {}  # granule -> the one before it in every slot
        ours = set(self._free)
        for record in records:
            slot = self._slots[record.slot]
            granules = list(record.granules) if self.geometry.shareable else []
            befores = [None, *granules[:-1]] if granules else []
            sound = ours.issuperset(granules) and all(
                positions.get(granule, place) == place and followers.get(granule, before) == before
                for place, (granule, before) in enumerate(zip(granules, befores, strict=True))
            )
            committed = min(record.committed, self.geometry.tokens_in(len(granules)))
            if not (sound and record.request_id and committed > 0 and len(set(granules)) == len(granules)):
                if record.request_id or record.committed or record.granules:
                    self._ops += [Claim(slot.index, "", 0), *([Unmap(slot.index)] if record.granules else [])]
                continue
            positions.update((granule, place) for place, granule in enumerate(granules))
            followers.update(zip(granules, befores, strict=True))
            slot.owner, slot.committed, slot.granules = record.request_id, committed, granules
            slot.backed_tokens = self.geometry.tokens_in(len(granules))
            for granule in granules:
                self._holders[granule] = self._holders.get(granule, 0) + 1
            self._donors[slot.index] = None
            known = self._restored.get(slot.owner)
            if known is None or committed > self._slots[known].committed:
                self._restored[slot.owner] = slot.index
        self._free = FreeGranules(ours - self._holders.keys())
        self._free_slots = [slot for slot in self._free_slots if slot not in self._donors]

    # Reuse

    def _find_source(self, request_id: str, tokens: Sequence[int], limit: int) -> tuple[Slot | None, int]:
        """The slot with the most of tokens[:limit]: the request's own of before, else a donor that loses nothing, else any."""
        length, slots = self._index.match(tokens, limit)
        restored = self._restored.get(request_id)
        if restored is not None and min(self._slots[restored].committed, limit) >= max(length, 1):
            return self._slots[restored], min(self._slots[restored].committed, limit)
        if length == 0:
            return None, 0

        def rank(slot: Slot) -> tuple[bool, bool]:
            return (slot.owner == request_id, not slot.running and slot.committed <= length + 1)

        return max((self._slots[index] for index in islice(slots, _CANDIDATES)), key=rank), length

    def _reuse(self, source: Slot, request_id: str, reuse: int, total: int) -> Slot | None:
        """A slot that holds the first `reuse` tokens of `source`, perhaps the source itself; None: compute them again."""
        others = bool(self._free_slots) or self._donors.keys() - {source.index}
        loses_nothing = source.committed <= reuse + 1 or source.owner == request_id
        if self._can_take_over(source, reuse) and (loses_nothing or not others):
            return self._take_over(source, request_id, reuse, total)
        slot = self._fresh_slot(keep=source)
        if slot is not None:
            if self._share(source, slot, reuse):
                self._ops.append(Claim(slot.index, request_id, reuse))
                return slot
            self._free_slots.append(slot.index)
        if self._can_take_over(source, reuse):
            return self._take_over(source, request_id, reuse, total)
        if not source.running:
            self._drop(source)
        return None

    def _can_take_over(self, source: Slot, reuse: int) -> bool:
        """Whether the source is a donor, none of whose granules from position `reuse` on is held by another slot."""
        shared_bytes = self._shared_granules(source) * self.geometry.granule_bytes
        return not source.running and shared_bytes <= reuse * self.geometry.kv_token_bytes

    def _take_over(self, slot: Slot, request_id: str, reuse: int, total: int) -> Slot:
        self._ops.append(Claim(slot.index, request_id, reuse))
        self._shrink(slot, self.geometry.granules_for(total), reuse)
        del self._donors[slot.index]
        self._forget_restored(slot)
        return slot

    def _share(self, source: Slot, slot: Slot, reuse: int) -> bool:
        """Map the whole granules of the prefix in `slot` too and copy the rest; False without memory for the rest."""
        if not self.geometry.shareable:
            self._ops.append(CopyTokens(source.index, slot.index, 0, reuse))
        else:
            token_bytes, granule_bytes = self.geometry.kv_token_bytes, self.geometry.granule_bytes
            whole, rest_bytes = divmod(reuse * token_bytes, granule_bytes)
            shared = source.granules[:whole]
            fresh = self._take_granules(1 if rest_bytes else 0, after=shared[-1] if shared else None, keep=source)
            if fresh is None:
                return False
            self._map(slot, shared + fresh)
            if rest_bytes:
                first, skip_bytes = divmod(whole * granule_bytes, token_bytes)
                self._ops.append(CopyTokens(source.index, slot.index, first, reuse, skip_bytes))
        if source.index in self._donors:  # recently used
            self._donors[source.index] = self._donors.pop(source.index)
        return True

    def _start(self, slot: Slot, request_id: str, tokens: Sequence[int], reuse: int) -> Grant:
        slot.owner, slot.running, slot.committed = request_id, True, reuse
        known = self._index.length(slot.index)
        if known > reuse:
            self._index.truncate(slot.index, reuse)
        else:
            self._index.extend(slot.index, tokens[known:reuse])
        for granule in slot.granules:
            self._pins[granule] = self._pins.get(granule, 0) + 1
        return Grant(slot.index, reuse)

    # Granules

    def _ahead_tokens(self) -> int:
        return self._ahead * self.geometry.granule_bytes // self.geometry.kv_token_bytes

    def _map(self, slot: Slot, granules: list[int]) -> None:
        if not granules:
            return
        self._ops.append(Map(slot.index, len(slot.granules), tuple(granules)))
        slot.granules += granules
        slot.backed_tokens = self.geometry.tokens_in(len(slot.granules))
        for granule in granules:
            self._holders[granule] = self._holders.get(granule, 0) + 1
            if slot.running:
                self._pins[granule] = self._pins.get(granule, 0) + 1

    def _take_granules(
        self, count: int, *, after: int | None, room: int = 0, keep: Slot | None = None
    ) -> list[int] | None:
        """`count` granules out of the free ones and, least recently used first, those of donors other than `keep`."""
        if not self._reclaim(count, keep=keep):
            return None
        return self._free.take(count, after=after, room=min(room, _MOST_ROOM), growing=self._pins)

    def _reclaim(self, count: int, *, keep: Slot | None = None) -> bool:
        """Have `count` granules free; False where donors other than `keep` do not hold enough."""
        while (short := count - len(self._free)) > 0:
            victim = next((self._slots[index] for index in self._donors if self._slots[index] is not keep), None)
            if victim is None:
                return False
            # A few more than needed at a time: the next to grow will want them.
            remaining = len(victim.granules) - max(short, 4 * self._ahead)
            if remaining >= self._shared_granules(victim) and self.geometry.tokens_in(remaining) > 0:
                tokens = min(victim.committed, self.geometry.tokens_in(remaining))
                self._ops.append(Claim(victim.index, victim.owner, tokens))
                victim.committed = tokens
                self._index.truncate(victim.index, tokens)
                self._shrink(victim, remaining, tokens)
            else:
                self._drop(victim)
        return True

    def _fresh_slot(self, keep: Slot | None = None) -> Slot | None:
        """A slot that holds nothing; the least recently used donor other than `keep` gives way if need be."""
        if not self._free_slots:
            victim = next((self._slots[index] for index in self._donors if self._slots[index] is not keep), None)
            if victim is None:
                return None
            self._drop(victim)
        return self._slots[self._free_slots.pop()]

    def _drop(self, donor: Slot) -> None:
        """Forget a donor. Granules that other slots hold stay with those."""
        self._ops.append(Claim(donor.index, "", 0))
        self._shrink(donor, 0, 0)
        self._index.remove(donor.index)
        del self._donors[donor.index]
        self._forget_restored(donor)
        donor.owner, donor.committed = "", 0
        self._free_slots.append(donor.index)

    def _shrink(self, slot: Slot, granules: int, tokens: int) -> None:
        """Take away what backs a donor's slot beyond its first `granules` granules, which must hold `tokens`."""
        gone = slot.granules[max(granules, self.geometry.granules_for(tokens)) :]
        if not gone:
            return
        del slot.granules[-len(gone) :]
        self._ops.append(Unmap(slot.index, len(slot.granules)))
        slot.backed_tokens = self.geometry.tokens_in(len(slot.granules))
        free = []
        for granule in gone:
            if self._holders[granule] == 1:
                del self._holders[granule]
                free.append(granule)
            else:
                self._holders[granule] -= 1
        self._free.give(free)

    def _forget_restored(self, slot: Slot) -> None:
        if self._restored.get(slot.owner) == slot.index:
            del self._restored[slot.owner]

    def _shared_granules(self, slot: Slot) -> int:
        """How many of the slot's granules other slots hold too; they are always its first ones."""
        return bisect_left(slot.granules, True, key=lambda granule: self._holders[granule] == 1)

    def check_integrity(self) -> None:
        """Raise AssertionError where the books contradict themselves."""
        check_slots(self.geometry, self._slots, self._holders, self._pins)
        free = set(self._free)
        assert len(free) == len(self._free), "the count of free granules is wrong"
        assert not free & self._holders.keys(), "a granule is free and held"
        assert len(free) + len(self._holders) == self.total_granules, "granules were lost"
        running = {slot.index for slot in self._slots if slot.running}
        states = [*running, *self._donors, *self._free_slots]
        assert sorted(states) == list(range(len(self._slots))), "a slot is in two states or none"
        assert all(self._slots[index].committed for index in self._donors), "a donor has nothing to give"
        for slot in self._slots:
            known = self._index.length(slot.index)
            assert known == slot.committed or (known == 0 and slot.index in self._donors), "the prefix index is stale"
        self._index.check_integrity()
