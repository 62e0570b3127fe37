"""The manager's books: who owns which granule, who may write where, and what a KV arena's slots hold. Pure: no I/O, no
clock.

The daemon tells the books what happened (a client came, asked, closed its socket, exited) and does the I/O that
follows. Weight segments and KV arenas own granules, each through an owner id that stands in the ledger for every
granule. Clients, leases and arenas are here, weights in `weight_books`.

A lease is the right of one client to write to one KV arena. It starts when the arena is opened and ends only when the
client gives it back or its process has exited; a closed socket merely makes it `ending`. Until then nobody else gets
the arena and none of its granules is reassigned: mappings live in the client, out of the manager's reach. The same
holds for readers of weights that were dropped. Fencing tokens order the incarnations of a writer: a newer one may wait
for an arena (the daemon sees to it that the holder exits), an older one is refused for ever.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

from flexpert.hbm import audit
from flexpert.hbm.errors import BudgetError, BusyError, FencedError, HbmError, NotFoundError, ProtocolError
from flexpert.hbm.granules import Extent, ids_of, joined, without
from flexpert.hbm.ledger import Ledger
from flexpert.hbm.records import Arena, Client, Geometry, Lease, LoadRecord, Slot, Waiter
from flexpert.hbm.weight_books import WeightBooks


class Books:
    """All state of one manager. Methods change everything or, raising, nothing."""

    def __init__(self, *, num_granules: int, granule_bytes: int) -> None:
        self.ledger = Ledger(num_granules=num_granules, granule_bytes=granule_bytes)
        self.weights = WeightBooks(self.ledger)
        self.clients: dict[int, Client] = {}
        self.arenas: dict[str, Arena] = {}
        self.tokens: dict[str, int] = {}  # arena name -> newest fencing token seen; outlives the arena
        self.leases: dict[int, Arena] = {}

    # Clients

    def add_client(self, client: Client) -> None:
        self.clients[client.client_id] = client

    def client_closed(self, client_id: int) -> bool:
        """Its socket is closed. Whether it still holds something, so that its exit has to be waited for; if not, it is
        forgotten.
        """
        client = self.clients.get(client_id)
        if client is None:
            return False
        client.connected = False
        self._forget_waiter(client_id)
        for arena in self.arenas.values():
            if arena.lease is not None and arena.lease.client_id == client_id:
                arena.lease.ending = True
        if self.holds_anything(client_id):
            return True
        del self.clients[client_id]
        return False

    def client_exited(self, client_id: int) -> list[Arena]:
        """Its process is gone: everything it held ends. The arenas whose waiter can be granted now."""
        if self.clients.pop(client_id, None) is None:
            return []
        self._forget_waiter(client_id)
        self.weights.client_exited(client_id)
        freed = [
            arena for arena in self.arenas.values() if arena.lease is not None and arena.lease.client_id == client_id
        ]
        for arena in freed:
            self._end_lease(arena)
        return [arena for arena in freed if arena.waiter is not None]

    def holds_anything(self, client_id: int) -> bool:
        return any(
            arena.lease is not None and arena.lease.client_id == client_id for arena in self.arenas.values()
        ) or self.weights.has_pins(client_id)

    def begin_load(self, key: str, segments: Mapping[str, int], manifest: bytes) -> LoadRecord:
        """Granules for new segments of a key. Raises BudgetError where too few are free."""
        count = self.weights.num_granules_for(segments)
        self._require_free(count, for_what=f"weights {key!r}")
        return self.weights.begin_load(key, segments, manifest)

    # KV arenas

    def open_arena(
        self, client_id: int, name: str, geometry: Geometry, *, request: int
    ) -> tuple[Lease | None, Waiter | None]:
        """(lease, None): granted. (None, waiter that gave way): the holder has to exit first; the caller waits in
        `arena.waiter`.

        Raises FencedError for a token older than any seen (or no newer than the holder's), BusyError for a second lease
        of one process.
        """
        client = self.clients[client_id]
        newest = self.tokens.get(name, client.fencing_token)
        if client.fencing_token < newest:
            raise FencedError(
                f"arena {name!r}: fencing token {client.fencing_token} is older than {newest}, which has been seen"
            )
        arena = self.arenas.get(name)
        if arena is None or arena.lease is None:
            return self._grant(client, name, geometry), None
        holder = self.clients[arena.lease.client_id]
        if holder.pid == client.pid:
            raise BusyError(
                f"arena {name!r}: this process (pid {client.pid}) holds it already; close that KvArena first"
            )
        if client.fencing_token == newest:
            raise FencedError(
                f"arena {name!r}: held or waited for with fencing token {newest} (holder pid {holder.pid}); only a larger token takes over"
            )
        self._fitting(name, geometry)
        self.tokens[name] = client.fencing_token
        displaced, arena.waiter = arena.waiter, Waiter(client_id, geometry, request)
        return None, displaced

    def grant_waiter(self, arena: Arena) -> tuple[Waiter, Lease]:
        """After `client_exited` or `release_arena`. Raises BudgetError where the new geometry no longer fits."""
        waiter = arena.waiter
        assert waiter is not None
        assert arena.lease is None
        arena.waiter = None
        return waiter, self._grant(self.clients[waiter.client_id], arena.name, waiter.geometry)

    def arena_of(self, lease_id: int, client_id: int) -> Arena:
        """The arena of a client's own lease."""
        arena = self.leases.get(lease_id)
        if arena is None or arena.lease is None or arena.lease.client_id != client_id:
            raise ProtocolError(f"lease {lease_id} is not held by this client")
        return arena

    def release_arena(self, lease_id: int, client_id: int) -> Arena:
        """The holder has unmapped everything and gives the lease back; contents and records stay."""
        arena = self.arena_of(lease_id, client_id)
        self._end_lease(arena)
        return arena

    def drop_arena(self, name: str) -> None:
        arena = self.arenas.get(name)
        if arena is None:
            raise NotFoundError(f"no arena {name!r} to drop")
        if arena.lease is not None:
            holder = self.clients[arena.lease.client_id]
            raise BusyError(
                f"arena {name!r} is held by {holder.name!r} (pid {holder.pid}); it can be dropped when that has ended"
            )
        self._free_arena(arena)

    # What a lease's holder does with its arena

    def grow_arena(self, arena: Arena, count: int) -> tuple[Extent, ...]:
        """So many granules more, which are returned. BudgetError where too few are free."""
        if count < 1:
            raise HbmError(f"arena {arena.name!r} cannot grow by {count} granules, at least 1 is expected")
        self._require_free(count, for_what=f"growing KV arena {arena.name!r}")
        added = self.ledger.take(count, arena.owner_id)
        arena.extents = tuple(joined(sorted([*arena.extents, *added])))
        arena.geometry = replace(arena.geometry, granules=arena.geometry.granules + count)
        return added

    def shrink_arena(self, arena: Arena, extents: Sequence[Extent]) -> None:
        """Free again. NotFoundError for granules that are not the arena's, BusyError for those that a slot maps."""
        given = sorted(extents)
        if any(before.end > after.start for before, after in pairwise(given)):
            raise HbmError(f"arena {arena.name!r}: granules are given back twice")
        for extent in given:
            if not self.ledger.belongs_to(extent, arena.owner_id):
                raise NotFoundError(
                    f"arena {arena.name!r}: granules {extent.start} to {extent.end - 1} do not all belong to it"
                )
        count = sum(extent.length for extent in given)
        if not 1 <= count < arena.geometry.granules:
            raise HbmError(
                f"arena {arena.name!r} has {arena.geometry.granules} granules and cannot give {count} back: "
                "at least one has to go, and one to stay"
            )
        ids = frozenset(ids_of(given))
        for number, slot in enumerate(arena.table):
            if not ids.isdisjoint(slot.granules):
                mapped = next(granule for granule in slot.granules if granule in ids)
                raise BusyError(f"arena {arena.name!r}: granule {mapped} is mapped in slot {number}; unmap it first")
        arena.extents = without(arena.extents, given)
        arena.geometry = replace(arena.geometry, granules=arena.geometry.granules - count)
        self.ledger.give(given)

    def claim(self, arena: Arena, slot: int, request_id: str) -> None:
        self._slot(arena, slot).request_id = request_id

    def map(self, arena: Arena, slot: int, first_granule: int, granules: Sequence[int]) -> None:
        """Granules of the arena at [first_granule, ...) of a slot; replaces what was there. No holes, no foreign
        granules.
        """
        backed = self._slot(arena, slot).granules
        end = first_granule + len(granules)
        if not 0 <= first_granule <= len(backed) or end > arena.geometry.slot_granules:
            raise ProtocolError(
                f"arena {arena.name!r}, slot {slot}: granules [{first_granule}, {end}) cannot be mapped; "
                f"{len(backed)} of {arena.geometry.slot_granules} are backed, and there can be no hole"
            )
        owner_of, total = self.ledger.owner_of, self.ledger.pool.total
        for granule in granules:
            if not 0 <= granule < total or owner_of[granule] != arena.owner_id:
                raise ProtocolError(
                    f"arena {arena.name!r}, slot {slot}: granule {granule} does not belong to this arena"
                )
        backed[first_granule:end] = granules

    def unmap(self, arena: Arena, slot: int, first_granule: int) -> None:
        backed = self._slot(arena, slot).granules
        if first_granule < 0:
            raise ProtocolError(f"arena {arena.name!r}, slot {slot}: unmap from granule {first_granule}")
        del backed[first_granule:]

    # The proof

    def check(self) -> list[str]:
        """Proves owners, leases and mappings against each other; what is wrong, in words. Empty: the books are
        right.
        """
        return audit.findings(self)

    # Private

    def _require_free(self, count: int, *, for_what: str, reclaimed: int = 0) -> None:
        pool, size = self.ledger.pool, self.ledger.granule_bytes
        free = pool.num_free + reclaimed
        if count <= free:
            return
        in_arenas = sum(arena.geometry.granules for arena in self.arenas.values())
        in_dropped = sum(extent.length for segment in self.weights.dropped.values() for extent in segment.extents)
        in_weights = pool.total - pool.num_free - in_arenas - in_dropped
        raise BudgetError(
            f"no memory for {for_what}: {count * size} bytes ({count} granules of {size}) are needed, {free * size} are free. "
            f"Of the budget of {pool.total * size} bytes weights hold {in_weights * size}, KV arenas {in_arenas * size}, "
            f"dropped weights that are still mapped {in_dropped * size}. Raise the memory budget, ask for less, or drop something."
        )

    def _fitting(self, name: str, geometry: Geometry) -> Geometry:
        """The geometry with its number of granules. Raises where that is none, or where they do not fit."""
        arena = self.arenas.get(name)
        if geometry.granules == 0:
            if arena is None:
                raise NotFoundError(
                    f"no arena {name!r} that would have a number of granules; say how many it is to get"
                )
            geometry = replace(geometry, granules=arena.geometry.granules)
        if min(geometry.slots, geometry.slot_granules, geometry.granules) <= 0:
            raise ProtocolError(f"{geometry}: every number must be at least 1")
        if arena is None or arena.geometry != geometry:
            reclaimed = arena.geometry.granules if arena is not None else 0
            self._require_free(geometry.granules, for_what="a KV arena", reclaimed=reclaimed)
        return geometry

    def _grant(self, client: Client, name: str, geometry: Geometry) -> Lease:
        geometry = self._fitting(name, geometry)
        arena = self.arenas.get(name)
        if arena is None or arena.geometry != geometry:
            if arena is not None:
                self._free_arena(arena)
            owner_id = self.ledger.new_id()
            table = [Slot() for _ in range(geometry.slots)]
            arena = Arena(owner_id, name, geometry, self.ledger.take(geometry.granules, owner_id), table)
            self.arenas[name] = arena
        arena.lease = Lease(self.ledger.new_id(), client.client_id, client.fencing_token)
        self.leases[arena.lease.lease_id] = arena
        self.tokens[name] = client.fencing_token
        return arena.lease

    def _end_lease(self, arena: Arena) -> None:
        assert arena.lease is not None
        del self.leases[arena.lease.lease_id]
        arena.lease = None

    def _forget_waiter(self, client_id: int) -> None:
        for arena in self.arenas.values():
            if arena.waiter is not None and arena.waiter.client_id == client_id:
                arena.waiter = None

    def _free_arena(self, arena: Arena) -> None:
        self.ledger.give(arena.extents)
        del self.arenas[arena.name]

    def _slot(self, arena: Arena, slot: int) -> Slot:
        if not 0 <= slot < len(arena.table):
            raise ProtocolError(f"arena {arena.name!r} has slots 0 to {len(arena.table) - 1}, not {slot}")
        return arena.table[slot]
