"""The manager: answers clients' questions from the books and does the I/O that follows from them.

It owns the pool, the books, the `committed` tables and the running loads. It knows clients by number and speaks to them
through `Peers` (the server); it neither reads sockets nor waits. Everything runs on the daemon's one thread.
"""

from __future__ import annotations

import logging
import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from flexpert.hbm import messages as m
from flexpert.hbm.backend import Backend
from flexpert.hbm.books import Books
from flexpert.hbm.errors import HbmError, LoadError, ProtocolError
from flexpert.hbm.granules import Extent
from flexpert.hbm.host import sealed_memfd
from flexpert.hbm.loads import Load
from flexpert.hbm.loop import EventLoop
from flexpert.hbm.records import Arena, Client, Geometry, Lease, WeightSet

log = logging.getLogger(__name__)

TAKEOVER_GRACE_S = 1.0  # for a holder that has closed its socket and is exiting; one that has not is killed at once
_DISCARD_BYTES_A_TURN = 16 << 20


class Peers(Protocol):
    """What the manager needs from the server."""

    def send(self, client_id: int, message: object, descriptors: Sequence[int] = ()) -> None:
        """Never blocks; closes the descriptors; a client that is gone or does not read is the server's matter."""

    def is_keeping_up(self, client_id: int) -> bool:
        """Whether everything sent to it so far has gone out."""

    def kill(self, client_id: int) -> None:
        """SIGKILL."""


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
        self._loads: dict[str, Load] = {}
        self._dirty: list[Extent] = []  # free in the books, memory not yet given back
        loop.idle = self._discard_some

    # Events from the server

    def greet(self, client: Client, request: int) -> None:
        self.books.add_client(client)
        size = self._backend.granule_bytes
        self._peers.send(client.client_id, m.Welcome(request, os.getpid(), size, self.books.pool.total * size))

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
        for load in list(self._loads.values()):
            load.process.kill()
            load.process.wait()
        for table in self._tables.values():
            table.close()
        self._pool.close()

    # Questions

    def _answer(self, client_id: int, message: m.ClientMessage) -> None:
        match message:
            case m.GetInfo():
                self._peers.send(client_id, self._info(message.request))
            case m.GetCheck():
                self._peers.send(client_id, m.Findings(message.request, self.books.check()))
            case m.GetWeightsState():
                self._peers.send(client_id, self._weights_state(message))
            case m.LoadWeights():
                self._load_weights(client_id, message)
            case m.MapWeights():
                self._map_weights(client_id, message)
            case m.OpenArena():
                self._open_arena(client_id, message)
            case m.Flush():
                self._flush(client_id, message)
            case m.ReleaseWeights():
                self.books.detach_weights(message.owner_id, client_id)
                self._done(client_id, message.request)
            case m.DropWeights():
                self._drop_weights(message.key)
                self._done(client_id, message.request)
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

    # Weights

    def _load_weights(self, client_id: int, message: m.LoadWeights) -> None:
        key = message.key
        weight_set = self.books.weights.get(key)
        if weight_set is not None and weight_set.ready:
            self._done(client_id, message.request)
            return
        load = self._loads.get(key)
        if load is None:
            load = self._start_load(message)
        load.waiters.append((client_id, message.request))
        self._peers.send(client_id, m.Progress(message.request, load.done_bytes, load.total_bytes))

    def _start_load(self, message: m.LoadWeights) -> Load:
        key = message.key
        weight_set = self.books.begin_load(key, message.segments, message.manifest)
        self._discard_all()
        try:
            load = Load(
                self._loop,
                self._pool,
                weight_set,
                bytes(message.copies),
                on_progress=lambda: self._load_progressed(load),
                on_end=lambda reason: self._load_ended(key, load, reason),
            )
        except OSError as error:
            self.books.load_failed(key, f"the loader helper could not be started: {error}")
            raise LoadError(self.books.failures[key]) from error
        self._loads[key] = load
        log.info("loading weights %r with helper pid %d", key, load.process.pid)
        return load

    def _load_progressed(self, load: Load) -> None:
        for client_id, request in load.waiters:
            if self._peers.is_keeping_up(client_id):
                self._peers.send(client_id, m.Progress(request, load.done_bytes, load.total_bytes))

    def _load_ended(self, key: str, load: Load, reason: str | None) -> None:
        del self._loads[key]
        if reason is None:
            self.books.load_ready(key)
            log.info("weights %r are ready, %d bytes read", key, load.done_bytes)
        else:
            self.books.load_failed(key, reason)
            log.error("loading weights %r failed: %s", key, reason)
        for client_id, request in load.waiters:
            if reason is None:
                self._done(client_id, request)
            else:
                self._refuse(client_id, request, LoadError(f"weights {key!r}: {reason}"))
        self._settle()

    def _drop_weights(self, key: str) -> None:
        load = self._loads.get(key)
        if load is not None:
            load.kill("the weights were dropped while they were being loaded")
        else:
            self.books.drop_weights(key)

    def _map_weights(self, client_id: int, message: m.MapWeights) -> None:
        weight_set = self.books.attach_weights(message.key, client_id)
        segments = {name: (segment.nbytes, segment.extents) for name, segment in weight_set.segments.items()}
        reply = m.MappedWeightsReply(message.request, weight_set.owner_id, segments, weight_set.manifest)
        self._peers.send(client_id, reply, [self._pool.export(writable=False)])

    def _weights_state(self, message: m.GetWeightsState) -> m.WeightsStateReply:
        state = self._state_of(message.key)
        load = self._loads.get(message.key)
        done, total = (load.done_bytes, load.total_bytes) if load is not None else (0, 0)
        return m.WeightsStateReply(message.request, state, done, total, self.books.failures.get(message.key, ""))

    def _state_of(self, key: str) -> str:
        weight_set = self.books.weights.get(key)
        if weight_set is not None:
            return "ready" if weight_set.ready else "loading"
        return "failed" if key in self.books.failures else "absent"

    # KV arenas

    def _open_arena(self, client_id: int, message: m.OpenArena) -> None:
        geometry = Geometry(message.slots, message.slot_granules, message.granules)
        if min(message.slots, message.slot_granules, message.granules) < 1:
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

    # Memory that became free

    def _settle(self) -> None:
        """After anything that may have freed granules."""
        self._dirty.extend(self.books.take_released())
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

    # Description

    def _info(self, request: int) -> m.Info:
        books, size = self.books, self._backend.granule_bytes
        weights = [self._weights_info(key, self._state_of(key), books.weights[key]) for key in books.weights]
        weights += [m.WeightsInfo(key, "failed", 0, []) for key in books.failures]
        weights += [self._weights_info(weight_set.key, "dropped", weight_set) for weight_set in books.dropped]
        return m.Info(
            request,
            os.getpid(),
            size,
            books.pool.total * size,
            books.pool.num_free * size,
            [(client.name, client.pid) for client in books.clients.values()],
            weights,
            [self._arena_info(arena) for arena in books.arenas.values()],
            books.tokens,
        )

    def _weights_info(self, key: str, state: str, weight_set: WeightSet) -> m.WeightsInfo:
        nbytes = sum(segment.nbytes for segment in weight_set.segments.values())
        return m.WeightsInfo(key, state, nbytes, [self.books.clients[reader].pid for reader in weight_set.readers])

    def _arena_info(self, arena: Arena) -> m.ArenaInfo:
        lease, geometry = arena.lease, arena.geometry
        holder_pid = self.books.clients[lease.client_id].pid if lease is not None else 0
        ending = lease is not None and lease.ending
        token = self.books.tokens[arena.name]
        return m.ArenaInfo(
            arena.name, geometry.slots, geometry.slot_granules, geometry.granules, token, holder_pid, ending
        )
