"""The manager's books: who owns which granule, who may write where, and what a KV arena's slots hold. Pure: no I/O, no
clock.

The daemon tells the books what happened (a client came, asked, closed its socket, exited) and does the I/O that
follows. Three kinds of things own granules, each through an owner id that stands in `owner_of` for every granule:
weight sets and KV arenas; 0 is nobody.

A lease is the right of one client to write to one KV arena. It starts when the arena is opened and ends only when the
client gives it back or its process has exited; a closed socket merely makes it `ending`. Until then nobody else gets
the arena and none of its granules is reassigned: mappings live in the client, out of the manager's reach. The same
holds for readers of weights that were dropped. Fencing tokens order the incarnations of a writer: a newer one may wait
for an arena (the daemon sees to it that the holder exits), an older one is refused for ever.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence

from flexpert.hbm import audit
from flexpert.hbm.errors import BudgetError, BusyError, FencedError, LoadError, NotFoundError, ProtocolError
from flexpert.hbm.granules import Extent, GranulePool
from flexpert.hbm.records import Arena, Client, Geometry, Lease, Segment, Slot, Waiter, WeightSet


class Books:
    """All state of one manager. Methods change everything or, raising, nothing."""

    def __init__(self, *, num_granules: int, granule_bytes: int) -> None:
        self.granule_bytes = granule_bytes
        self.pool = GranulePool(num_granules)
        self.owner_of = array("q", bytes(8 * num_granules))
        self.clients: dict[int, Client] = {}
        self.weights: dict[str, WeightSet] = {}
        self.dropped: list[WeightSet] = []
        self.failures: dict[str, str] = {}
        self.arenas: dict[str, Arena] = {}
        self.tokens: dict[str, int] = {}  # arena name -> newest fencing token seen; outlives the arena
        self.leases: dict[int, Arena] = {}
        self._released: list[Extent] = []
        self._next_id = 0

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
        for weight_set in [*self.weights.values(), *self.dropped]:
            weight_set.readers.pop(client_id, None)
        self._free_unread()
        freed = [
            arena for arena in self.arenas.values() if arena.lease is not None and arena.lease.client_id == client_id
        ]
        for arena in freed:
            self._end_lease(arena)
        return [arena for arena in freed if arena.waiter is not None]

    def holds_anything(self, client_id: int) -> bool:
        return any(
            arena.lease is not None and arena.lease.client_id == client_id for arena in self.arenas.values()
        ) or any(client_id in weight_set.readers for weight_set in [*self.weights.values(), *self.dropped])

    # Weights

    def begin_load(self, key: str, segments: Mapping[str, int], manifest: bytes) -> WeightSet:
        """Granules for new weights. Raises BudgetError where too few are free, LoadError for sizes that are none."""
        if key in self.weights:
            raise BusyError(f"weights {key!r} exist already")
        if not segments or any(nbytes <= 0 for nbytes in segments.values()):
            raise LoadError(
                f"weights {key!r}: expected at least one segment, each of at least 1 byte, got {dict(segments)}"
            )
        counts = {name: -(-nbytes // self.granule_bytes) for name, nbytes in segments.items()}
        self._require_free(sum(counts.values()), for_what=f"weights {key!r}")
        owner_id = self._new_id()
        made = {name: Segment(nbytes, self._take(counts[name], owner_id)) for name, nbytes in segments.items()}
        self.failures.pop(key, None)
        self.weights[key] = weight_set = WeightSet(owner_id, key, made, manifest)
        return weight_set

    def load_ready(self, key: str) -> None:
        self.weights[key].ready = True

    def load_failed(self, key: str, reason: str) -> None:
        """The helper has exited without having finished: the granules go back, the reason stays until the next try."""
        self._free_weights(self.weights.pop(key))
        self.failures[key] = reason

    def attach_weights(self, key: str, client_id: int) -> WeightSet:
        weight_set = self.weights.get(key)
        if weight_set is None:
            reason = self.failures.get(key)
            detail = (
                f"loading failed: {reason}" if reason else f"there are {', '.join(map(repr, self.weights)) or 'none'}"
            )
            raise NotFoundError(f"no weights {key!r}: {detail}")
        if not weight_set.ready:
            raise BusyError(f"weights {key!r} are still being loaded; load_weights waits for them")
        weight_set.readers[client_id] = weight_set.readers.get(client_id, 0) + 1
        return weight_set

    def detach_weights(self, owner_id: int, client_id: int) -> None:
        for weight_set in [*self.weights.values(), *self.dropped]:
            if weight_set.owner_id == owner_id and client_id in weight_set.readers:
                weight_set.readers[client_id] -= 1
                if weight_set.readers[client_id] == 0:
                    del weight_set.readers[client_id]
                self._free_unread()
                return
        raise NotFoundError(f"this client has no mapping of weights number {owner_id}")

    def drop_weights(self, key: str) -> None:
        """The key is free at once; the granules are when the last reader lets go. The daemon ends a running load
        first.
        """
        if self.failures.pop(key, None) is not None:
            return
        weight_set = self.weights.get(key)
        if weight_set is None:
            raise NotFoundError(f"no weights {key!r} to drop")
        if not weight_set.ready:
            raise BusyError(f"weights {key!r} are being loaded")
        del self.weights[key]
        weight_set.dropped = True
        self.dropped.append(weight_set)
        self._free_unread()

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
        self._require_fits(geometry, arena)
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
        owner_of, total = self.owner_of, self.pool.total
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

    # Released granules and the proof

    def take_released(self) -> list[Extent]:
        """Granules that became free since the last call: their memory must be discarded before anyone is granted
        them.
        """
        released, self._released = self._released, []
        return released

    def check(self) -> list[str]:
        """Proves owners, leases and mappings against each other; what is wrong, in words. Empty: the books are
        right.
        """
        return audit.findings(self)

    # Private

    def _new_id(self) -> int:
        self._next_id += 1
        return self._next_id

    def _require_free(self, count: int, *, for_what: str, reclaimed: int = 0) -> None:
        free = self.pool.num_free + reclaimed
        if count <= free:
            return
        size = self.granule_bytes
        in_weights = sum(weight_set.num_granules for weight_set in self.weights.values())
        in_arenas = sum(arena.geometry.granules for arena in self.arenas.values())
        in_dropped = sum(weight_set.num_granules for weight_set in self.dropped)
        raise BudgetError(
            f"no memory for {for_what}: {count * size} bytes ({count} granules of {size}) are needed, {free * size} are free. "
            f"Of the budget of {self.pool.total * size} bytes weights hold {in_weights * size}, KV arenas {in_arenas * size}, "
            f"dropped weights that are still mapped {in_dropped * size}. Raise the memory budget, ask for less, or drop something."
        )

    def _require_fits(self, geometry: Geometry, arena: Arena | None) -> None:
        if min(geometry.slots, geometry.slot_granules, geometry.granules) <= 0:
            raise ProtocolError(f"{geometry}: every number must be at least 1")
        if arena is None or arena.geometry != geometry:
            reclaimed = arena.geometry.granules if arena is not None else 0
            self._require_free(geometry.granules, for_what="a KV arena", reclaimed=reclaimed)

    def _take(self, count: int, owner_id: int) -> tuple[Extent, ...]:
        extents = self.pool.take(count)
        self._set_owner(extents, owner_id)
        return extents

    def _give(self, extents: Sequence[Extent]) -> None:
        self.pool.give(extents)
        self._set_owner(extents, 0)
        self._released.extend(extents)

    def _set_owner(self, extents: Sequence[Extent], owner_id: int) -> None:
        for extent in extents:
            self.owner_of[extent.start : extent.end] = array("q", [owner_id]) * extent.length

    def _grant(self, client: Client, name: str, geometry: Geometry) -> Lease:
        arena = self.arenas.get(name)
        self._require_fits(geometry, arena)
        if arena is None or arena.geometry != geometry:
            if arena is not None:
                self._free_arena(arena)
            owner_id = self._new_id()
            table = [Slot() for _ in range(geometry.slots)]
            arena = Arena(owner_id, name, geometry, self._take(geometry.granules, owner_id), table)
            self.arenas[name] = arena
        arena.lease = Lease(self._new_id(), client.client_id, client.fencing_token)
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
        self._give(arena.extents)
        del self.arenas[arena.name]

    def _free_weights(self, weight_set: WeightSet) -> None:
        for segment in weight_set.segments.values():
            self._give(segment.extents)

    def _free_unread(self) -> None:
        for weight_set in [weight_set for weight_set in self.dropped if not weight_set.readers]:
            self.dropped.remove(weight_set)
            self._free_weights(weight_set)

    def _slot(self, arena: Arena, slot: int) -> Slot:
        if not 0 <= slot < len(arena.table):
            raise ProtocolError(f"arena {arena.name!r} has slots 0 to {len(arena.table) - 1}, not {slot}")
        return arena.table[slot]
