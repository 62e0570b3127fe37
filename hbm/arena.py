"""A client's KV arena: one reserved address range in which it maps and unmaps granules, each change recorded with the
manager.

Used by the worker's engine thread, and by one that maps ahead of need. A batch costs one mmap call for each run of
neighbouring granules and one message that nobody waits for: what was written to the socket before a kill is read by the
manager before it takes the client for dead, so the records of a dead holder are complete. `committed` lies in shared
memory: raising it is one aligned store.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flexpert.hbm.backend import Range
from flexpert.hbm.errors import HbmError
from flexpert.hbm.granules import Extent, ids_of, runs_of
from flexpert.hbm.host import GRANULE_BYTES, HostBackend, HostPool, map_fixed, map_zeros, memory_at
from flexpert.hbm.limits import RESERVED_MAPPINGS, count_mappings, max_mappings, require_mappings
from flexpert.hbm.ops import ArenaOp, Claim, Map, Unmap

if TYPE_CHECKING:
    from flexpert.hbm.client import HbmClient

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SlotRecord:
    """What the previous holder left in a slot: KV of `committed` tokens lies in these granules; what lies behind is
    garbage.
    """

    slot: int
    request_id: str
    granules: list[int]
    committed: int


class KvArena:
    """[slots, slot_bytes] bytes at `address`; slot s starts at address + s * slot_bytes.

    Unbacked parts read as zeros and writing there faults. On opening, every slot is backed as the previous holder left
    it (`records`); a holder that does not want that calls `reset` before anything else.
    """

    def __init__(
        self,
        client: HbmClient,
        *,
        name: str,
        lease_id: int,
        slots: int,
        slot_granules: int,
        extents: Sequence[Extent],
        table: Sequence[tuple[str, list[int]]],
        pool_descriptor: int,
        committed_descriptor: int,
    ) -> None:
        """Takes the descriptors over. Raises LimitError where vm.max_map_count is too low."""
        self.name = name
        self.slots = slots
        self.slot_bytes = slot_granules * GRANULE_BYTES
        self.granule_bytes = GRANULE_BYTES
        self.granules: Sequence[int] = ids_of(extents)
        self._client, self._lease_id, self._slot_granules = client, lease_id, slot_granules
        self._allowed = frozenset(self.granules)
        self._lock = threading.RLock()
        self._backed: list[list[int]] = [[] for _ in range(slots)]
        self._num_runs = 0
        self._fault: str | None = None
        self._pool = HostPool(pool_descriptor, writable=True)
        try:
            self._table_memory = mmap.mmap(committed_descriptor, slots * 8)
        finally:
            os.close(committed_descriptor)
        self.committed = memoryview(self._table_memory).cast("q")
        self._records = [
            SlotRecord(slot, request_id, granules, self.committed[slot])
            for slot, (request_id, granules) in enumerate(table)
            if request_id or granules
        ]
        try:
            self._mappings_allowed = self._room_for_mappings(table)
        except HbmError:
            self._pool.close()
            raise
        self._range: Range | None = HostBackend().reserve(slots * self.slot_bytes)
        self.address = self._range.address
        for record in self._records:
            self._map(record.slot, 0, record.granules)

    # What the worker does

    def records(self) -> list[SlotRecord]:
        """The slots that had a request or granules when this arena was opened."""
        return list(self._records)

    def claim(self, slot: int, request_id: str, committed_tokens: int = 0) -> None:
        """`apply` of one Claim."""
        self.apply([Claim(slot, request_id, committed_tokens)])

    def map(self, slot: int, first_granule: int, granule_ids: Sequence[int]) -> None:
        """`apply` of one Map."""
        self.apply([Map(slot, first_granule, tuple(granule_ids))])

    def unmap(self, slot: int, first_granule: int = 0) -> None:
        """`apply` of one Unmap."""
        self.apply([Unmap(slot, first_granule)])

    def reset(self) -> None:
        """Forget all slots: nobody's, unbacked, nothing committed."""
        batch: list[ArenaOp] = []
        for slot in range(self.slots):
            batch += [Claim(slot, ""), Unmap(slot)]
        self.apply(batch)

    def apply(self, batch: Sequence[ArenaOp]) -> None:
        """Carry out in order, and have recorded, without waiting.

        A slot's `committed` is 0 from before its new claim is recorded until the whole batch is, then the claim's
        number: a kill in between never leaves a request with KV that is another's. So a Claim may count only KV that is
        there when the batch is done. Raises HbmError before anything is changed for an operation that is wrong (slot,
        position, hole, foreign granule) or, LimitError, needs too many mappings; and for what the manager refused, or
        where it has gone, since the last call.
        """
        with self._lock:
            self._require_usable()
            self._check(batch)
            message: list[tuple[object, ...]] = []
            committed: list[tuple[int, int]] = []
            try:
                for op in batch:
                    if isinstance(op, Map):
                        self._map(op.slot, op.first_granule, op.granules)
                        message.append(("m", op.slot, op.first_granule, op.granules))
                    elif isinstance(op, Unmap):
                        self._unmap(op.slot, op.first_granule)
                        message.append(("u", op.slot, op.first_granule))
                    else:
                        self.committed[op.slot] = 0
                        committed.append((op.slot, op.committed_tokens))
                        message.append(("c", op.slot, op.request_id))
            except HbmError as error:
                self._fault = f"mapping failed in the middle of a batch: {error}"
                raise
            if message:
                self._client.send_unanswered(("apply", self._lease_id, message))
            for slot, tokens in committed:
                self.committed[slot] = tokens

    def flush(self) -> None:
        """Returns when the manager has recorded everything. Raises what it refused."""
        with self._lock:
            self._require_usable()
            self._client.flush(self._lease_id)

    def grow(self, granules: int) -> list[int]:
        """Ids of so many granules more, from the manager's free ones; they belong to the arena from now on, whatever
        becomes of this process. Raises BudgetError where too few are free.
        """
        with self._lock:
            self._require_usable()
        added = ids_of(self._client.grow_arena(self._lease_id, granules))
        with self._lock:
            self._set_granules(self._allowed.union(added))
        return list(added)

    def shrink(self, granule_ids: Iterable[int]) -> None:
        """Give granules back to the manager; at least one stays. Raises HbmError, and changes nothing, where one of
        them is not the arena's or is mapped in a slot.
        """
        ids = sorted(granule_ids)
        removed = frozenset(ids)
        with self._lock:
            self._require_usable()
            if len(removed) != len(ids) or not removed <= self._allowed or not 0 < len(removed) < len(self._allowed):
                raise HbmError(
                    f"arena {self.name!r} has {len(self._allowed)} granules and cannot give back {len(ids)}, "
                    f"{len(removed & self._allowed)} of which are its own: expected ids of its own, each once, not all"
                )
            for slot, backed in enumerate(self._backed):
                if not removed.isdisjoint(backed):
                    raise HbmError(f"arena {self.name!r}: slot {slot} maps granules that are to be given back")
            self._set_granules(self._allowed - removed)  # nobody maps them while the manager is asked
        try:
            self._client.shrink_arena(self._lease_id, [run for _index, run in runs_of(ids)])
        except HbmError:
            with self._lock:
                self._set_granules(self._allowed | removed)
            raise

    def memory(self) -> memoryview:
        """All bytes of the range ('B'). Writing an unbacked part kills the process; so does any use after `close`."""
        return memory_at(self.address, self.slots * self.slot_bytes, writable=True)

    def close(self) -> None:
        """Unmap everything and give the lease back: another client can open the arena at once and finds everything as
        it is.
        """
        with self._lock:
            if self._range is None:
                return
            HostBackend().release(self._range)
            self._range = None
            self.committed.release()
            self._table_memory.close()
            self._pool.close()
            with contextlib.suppress(HbmError):  # the manager has gone, and the lease with it
                self._client.release_arena(self._lease_id)
            self._client.closed(self)

    # Private

    def _require_usable(self) -> None:
        if self._range is None:
            raise HbmError(f"arena {self.name!r} is closed")
        fault = self._fault or self._client.lease_fault(self._lease_id)
        if fault is not None:
            raise HbmError(f"arena {self.name!r} can no longer be used and has to be opened anew: {fault}")
        self._client.require_open()

    def _set_granules(self, ids: frozenset[int]) -> None:
        self._allowed = ids
        self.granules = sorted(ids)

    def _check(self, batch: Sequence[ArenaOp]) -> None:
        """Everything that could be wrong with a batch, before its first operation is carried out."""
        lengths: dict[int, int] = {}
        new_runs = 0
        for op in batch:
            slot = op.slot
            if not 0 <= slot < self.slots:
                raise HbmError(f"arena {self.name!r} has slots 0 to {self.slots - 1}, not {slot}: {op}")
            if isinstance(op, Claim):
                continue
            backed = lengths.get(slot)
            if backed is None:
                backed = len(self._backed[slot])
            first = op.first_granule
            if isinstance(op, Unmap):
                if first < 0:
                    raise HbmError(f"arena {self.name!r}: {op} starts before the slot")
                lengths[slot] = min(backed, first)
                continue
            end = first + len(op.granules)
            if not 0 <= first <= backed or end > self._slot_granules:
                raise HbmError(
                    f"arena {self.name!r}: {op} does not fit: {backed} of {self._slot_granules} granules of the slot are backed, "
                    "and there can be no hole"
                )
            for granule in op.granules:
                if granule not in self._allowed:
                    raise HbmError(f"arena {self.name!r}: granule {granule} does not belong to it: {op}")
            lengths[slot] = max(backed, end)
            new_runs += len(op.granules)
        if new_runs and self._mappings_used() + new_runs > self._mappings_allowed:
            self._mappings_allowed = self._measure_room(new_runs)

    def _map(self, slot: int, first_granule: int, granules: Sequence[int]) -> None:
        descriptor, protection = self._pool.descriptor, self._pool.protection
        base = self.address + slot * self.slot_bytes + first_granule * GRANULE_BYTES
        num_runs = 0
        for index, (start, length) in runs_of(granules):
            offset = start * GRANULE_BYTES
            map_fixed(base + index * GRANULE_BYTES, length * GRANULE_BYTES, protection, descriptor, offset)
            num_runs += 1
        backed = self._backed[slot]
        if first_granule == len(backed):
            if backed and granules and backed[-1] + 1 == granules[0]:
                num_runs -= 1  # the kernel joins neighbours
            backed.extend(granules)
        else:
            num_runs -= _num_runs(backed)
            backed[first_granule : first_granule + len(granules)] = granules
            num_runs += _num_runs(backed) - sum(1 for _ in runs_of(granules))
        self._num_runs += num_runs

    def _unmap(self, slot: int, first_granule: int) -> None:
        backed = self._backed[slot]
        if first_granule < len(backed):
            base = self.address + slot * self.slot_bytes
            map_zeros(base + first_granule * GRANULE_BYTES, (len(backed) - first_granule) * GRANULE_BYTES)
            removed = backed[first_granule:]
            joined = first_granule > 0 and backed[first_granule - 1] + 1 == backed[first_granule]
            self._num_runs -= _num_runs(removed) - joined
            del backed[first_granule:]

    def _mappings_used(self) -> int:
        """At most: one for each run of neighbours, one for the unbacked end of each slot."""
        return self._num_runs + self.slots

    def _room_for_mappings(self, table: Sequence[tuple[str, list[int]]]) -> int:
        """How many mappings this arena may use. LimitError where not even what is there on opening fits."""
        needed = self.slots + sum(_num_runs(granules) for _request_id, granules in table)
        found, limit = count_mappings(), max_mappings()
        require_mappings(needed=needed, found=found, limit=limit, for_what=f"KV arena {self.name!r}")
        room = limit - RESERVED_MAPPINGS - found
        if self.slots + len(self.granules) > room:
            log.warning(
                "KV arena %r: with scattered granules it needs %d memory mappings, there is room for %d; "
                "if it comes to that, mapping fails. Raise vm.max_map_count",
                self.name,
                self.slots + len(self.granules),
                room,
            )
        return room

    def _measure_room(self, new_runs: int) -> int:
        """The estimate has run out: count what the kernel really has. LimitError where that is too much as well."""
        found, limit = count_mappings(), max_mappings()
        require_mappings(needed=new_runs, found=found, limit=limit, for_what=f"KV arena {self.name!r}")
        return self._mappings_used() + limit - RESERVED_MAPPINGS - found


def _num_runs(granules: Sequence[int]) -> int:
    return sum(1 for _ in runs_of(granules))
