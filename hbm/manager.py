"""The manager: answers clients' questions from the books and does the I/O that follows from them.

It owns the pool, the books and the `committed` tables; weights are `weight_desk`'s matter. It knows clients by number and speaks to them
through `Peers` (the server); it neither reads sockets nor waits. Everything runs on the daemon's one thread.
"""

from __future__ import annotations

import logging
import mmap
import os
from dataclasses import dataclass

from flexpert.hbm import messages as m
from flexpert.hbm.backend import Backend
from flexpert.hbm.books import Books
from flexpert.hbm.describe import describe
from flexpert.hbm.errors import HbmError, NotFoundError, ProtocolError
from flexpert.hbm.granules import Extent
from flexpert.hbm.host import sealed_memfd
from flexpert.hbm.loop import EventLoop
from flexpert.hbm.peers import Peers
from flexpert.hbm.records import Arena, Client, Geometry, Lease
from flexpert.hbm.weight_desk import WeightDesk

log = logging.getLogger(__name__)

TAKEOVER_GRACE_S = 1.0  # for a holder that has closed its socket and is exiting; one that has not is killed at once
_DISCARD_BYTES_A_TURN = 16 << 20


@dataclass(frozen=True, slots=True)
class CommittedTable:
    """int64 [slots] in a sealed memfd of its own, mapped by the arena's holder and by the manager."""

    descriptor: int
    memory: mmap.mmap

    @classmethod
    def create(cls, slots: int) -> CommittedTable:
        descriptor = sealed_memfd("flexpert-committed", slots * 8)
        return cls(descriptor, mmap.mmap(descriptor, slots * 8, mmap.MAP_SHARED, mmap.PROT_READ))

    def close(self) -> None:
        self.memory.close()
        os.close(self.descriptor)


class Manager:
    def __init__(self, loop: EventLoop, backend: Backend, *, num_granules: int, peers: Peers) -> None:
        self._loop, self._backend, self._peers = loop, backend, peers
        self._pool = backend.create(num_granules)
        self.books = Books(num_granules=num_granules, granule_bytes=backend.granule_bytes)
        self._tables: dict[int, CommittedTable] = {}  # by the arena's owner id
        self._dirty: list[Extent] = []  # free in the books, memory not yet given back
        self.weights = WeightDesk(loop, self._pool, self.books, peers, settle=self._settle, discard=self._discard_all)
        loop.idle = self._discard_some

    # Events from the server

    def greet(self, client: Client, request: int) -> None:
        self.books.add_client(client)
        size = self._backend.granule_bytes
        self._peers.send(client.client_id, m.Welcome(request, os.getpid(), size, self.books.ledger.pool.total * size))

    def handle(self, client_id: int, message: m.ClientMessage) -> None:
        """Answer one message. A refusal is an error frame; ProtocolError means that the client is not to be trusted
        further.
        """
        if isinstance(message, m.Apply):
            self._apply(client_id, message)
            return
        try:
            self._answer(client_id, message)
        except ProtocolError:
            raise
        except HbmError as error:
            self._refuse(client_id, message.request, error)
        self._settle()

    def client_closed(self, client_id: int) -> bool:
        """Whether its exit has to be waited for."""
        return self.books.client_closed(client_id)

    def client_exited(self, client_id: int) -> None:
        for arena in self.books.client_exited(client_id):
            self._grant_waiter(arena)
        self._settle()

    def close(self) -> None:
        """The daemon ends: no helper outlives it."""
        self.weights.close()
        for table in self._tables.values():
            table.close()
        self._pool.close()

    # Questions

    def _answer(self, client_id: int, message: m.ClientMessage) -> None:
        match message:
            case m.GetInfo():
                self._peers.send(client_id, describe(self.books, message.request))
            case m.GetCheck():
                self._peers.send(client_id, m.Findings(message.request, self.books.check()))
            case (
                m.GetWeightsState()
                | m.GetSegments()
                | m.LoadSegments()
                | m.PinSegments()
                | m.ReleasePin()
                | m.DropSegments()
            ):
                self.weights.answer(client_id, message)
            case m.OpenArena():
                self._open_arena(client_id, message)
            case m.Flush():
                self._flush(client_id, message)
            case m.GrowArena():
                self._grow(client_id, message)
            case m.ShrinkArena():
                self._shrink(client_id, message)
            case m.ReleaseArena():
                arena = self.books.release_arena(message.lease_id, client_id)
                self._done(client_id, message.request)
                if arena.waiter is not None:
                    self._grant_waiter(arena)
            case m.DropArena():
                self.books.drop_arena(message.name)
                self._done(client_id, message.request)
            case _:
                raise ProtocolError(f"{type(message).__name__} is not expected here")

    def _done(self, client_id: int, request: int) -> None:
        self._peers.send(client_id, m.Done(request))

    def _refuse(self, client_id: int, request: int, error: HbmError, *, lease_id: int = 0) -> None:
        self._peers.send(client_id, m.ErrorReply(request, error.kind, str(error), lease_id))

    # KV arenas

    def _open_arena(self, client_id: int, message: m.OpenArena) -> None:
        geometry = Geometry(message.slots, message.slot_granules, message.granules)
        if min(message.slots, message.slot_granules) < 1:
            raise HbmError(f"arena {message.name!r}: {geometry}, expected every number to be at least 1")
        lease, displaced = self.books.open_arena(client_id, message.name, geometry, request=message.request)
        arena = self.books.arenas[message.name]
        if displaced is not None:
            text = f"arena {message.name!r}: a newer fencing token took this one's place in waiting for it"
            self._peers.send(displaced.client_id, m.ErrorReply(displaced.request, "fenced", text))
        if lease is not None:
            self._hand_over(arena, lease, message.request)
        else:
            self._evict_holder(arena)

    def _evict_holder(self, arena: Arena) -> None:
        """A newer writer waits. The holder is killed, at once unless it is exiting by itself."""
        lease = arena.lease
        assert lease is not None
        if not lease.ending:
            log.warning(
                "arena %r: killing its holder, client %d: a newer fencing token waits", arena.name, lease.client_id
            )
            self._peers.kill(lease.client_id)
            return

        def kill_if_still_there() -> None:
            if arena.lease is lease:
                log.warning(
                    "arena %r: killing client %d, which closed its socket and did not exit", arena.name, lease.client_id
                )
                self._peers.kill(lease.client_id)

        self._loop.call_later(TAKEOVER_GRACE_S, kill_if_still_there)

    def _grant_waiter(self, arena: Arena) -> None:
        waiter = arena.waiter
        assert waiter is not None
        try:
            _, lease = self.books.grant_waiter(arena)
            self._hand_over(self.books.arenas[arena.name], lease, waiter.request)
        except HbmError as error:
            self._refuse(waiter.client_id, waiter.request, error)

    def _hand_over(self, arena: Arena, lease: Lease, request: int) -> None:
        self._settle()
        self._discard_all()
        table = self._tables.get(arena.owner_id)
        if table is None:
            table = self._tables[arena.owner_id] = CommittedTable.create(arena.geometry.slots)
        slots = [(slot.request_id, slot.granules) for slot in arena.table]
        reply = m.ArenaReply(request, lease.lease_id, arena.extents, slots)
        self._peers.send(lease.client_id, reply, [self._pool.export(writable=True), os.dup(table.descriptor)])
        log.info("arena %r: leased to client %d with token %d", arena.name, lease.client_id, lease.fencing_token)

    def _apply(self, client_id: int, message: m.Apply) -> None:
        """In order. The first operation that is refused faults the lease: what its client has mapped is no longer
        known.
        """
        books = self.books
        arena = books.arena_of(message.lease_id, client_id)
        assert arena.lease is not None
        if arena.lease.faulted:
            return
        try:
            for op in message.ops:
                match op:
                    case m.MapOp():
                        books.map(arena, op.slot, op.first_granule, op.granules)
                    case m.ClaimOp():
                        books.claim(arena, op.slot, op.request_id)
                    case m.UnmapOp():
                        books.unmap(arena, op.slot, op.first_granule)
        except ProtocolError as error:
            arena.lease.faulted = True
            log.error("client %d: %s", client_id, error)
            self._refuse(client_id, 0, error, lease_id=message.lease_id)

    def _flush(self, client_id: int, message: m.Flush) -> None:
        arena = self.books.arena_of(message.lease_id, client_id)
        assert arena.lease is not None
        if arena.lease.faulted:
            self._refuse(client_id, message.request, ProtocolError("an earlier operation on this arena was refused"))
        else:
            self._done(client_id, message.request)

    def _usable_arena(self, lease_id: int, client_id: int) -> Arena:
        arena = self.books.leases.get(lease_id)
        if arena is None or arena.lease is None or arena.lease.client_id != client_id:
            raise NotFoundError(f"lease {lease_id} is not held by this client")
        if arena.lease.faulted:
            raise HbmError(f"arena {arena.name!r}: an earlier operation on it was refused; it has to be opened anew")
        return arena

    def _grow(self, client_id: int, message: m.GrowArena) -> None:
        arena = self._usable_arena(message.lease_id, client_id)
        added = self.books.grow_arena(arena, message.granules)
        self._discard_all()
        self._peers.send(client_id, m.GrownReply(message.request, message.lease_id, added))

    def _shrink(self, client_id: int, message: m.ShrinkArena) -> None:
        arena = self._usable_arena(message.lease_id, client_id)
        self.books.shrink_arena(arena, [Extent(start, count) for start, count in message.extents])
        self._done(client_id, message.request)

    # Memory that became free

    def _settle(self) -> None:
        """After anything that may have freed granules."""
        self._dirty.extend(self.books.ledger.take_released())
        alive = {arena.owner_id for arena in self.books.arenas.values()}
        for owner_id in [owner_id for owner_id in self._tables if owner_id not in alive]:
            self._tables.pop(owner_id).close()

    def _discard_some(self) -> bool:
        if self._dirty:
            extent = self._dirty.pop()
            count = min(extent.length, max(1, _DISCARD_BYTES_A_TURN // self._backend.granule_bytes))
            if count < extent.length:
                self._dirty.append(Extent(extent.start + count, extent.length - count))
            self._pool.discard(Extent(extent.start, count))
        return bool(self._dirty)

    def _discard_all(self) -> None:
        """Before granules are handed out: nobody sees what others left in them."""
        while self._discard_some():
            pass
