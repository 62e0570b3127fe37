"""The server without a process around it, where the order of events matters."""

from __future__ import annotations

import mmap
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from flexpert.hbm import GRANULE_BYTES, messages, wire
from flexpert.hbm.host import HostBackend
from flexpert.hbm.loop import EventLoop
from flexpert.hbm.records import Client
from flexpert.hbm.server import Server


@pytest.fixture
def listener(runtime_dir: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.bind(os.fspath(runtime_dir / "s"))
        sock.listen()
        yield sock


def test_what_a_client_sent_counts_even_where_its_exit_is_noticed_first(listener: socket.socket) -> None:
    server = Server(EventLoop(), HostBackend(), listener, num_granules=8, max_descriptors=256)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.connect(listener.getsockname())
        server._on_listener(0)
        [connection] = server._connections.values()
        sock.sendall(
            wire.encode(messages.Hello(1, messages.PROTOCOL_VERSION, "c", 1))
            + wire.encode(messages.OpenArena(2, "kv", 1, 4, 4))
            + wire.encode(messages.Apply(2, [messages.ClaimOp(0, "r"), messages.MapOp(0, 0, [1])]))
        )
        server._on_exit(connection)
    books = server.manager.books
    [slot] = books.arenas["kv"].table
    assert (slot.request_id, slot.granules) == ("r", [1])
    assert (books.arenas["kv"].lease, books.clients, server._connections) == (None, {}, {})
    assert books.check() == []
    server.close()


def test_a_drop_and_an_exit_in_one_round_are_one_end(listener: socket.socket) -> None:
    server = Server(EventLoop(), HostBackend(), listener, num_granules=8, max_descriptors=256)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.connect(listener.getsockname())
        server._on_listener(0)
        [connection] = server._connections.values()
        sock.sendall(
            wire.encode(messages.Hello(1, messages.PROTOCOL_VERSION, "c", 1))
            + wire.encode(messages.OpenArena(2, "kv", 1, 4, 4))
            + b"\xff" * 50
        )
        server._on_socket(connection, 1)
        assert connection.closed
        [arena] = server.manager.books.arenas.values()
        assert arena.lease is not None
        assert arena.lease.ending
        server._on_exit(connection)
    assert arena.lease is None
    assert server.manager.books.check() == []
    server.close()


@pytest.mark.parametrize("taker", ["arena", "load", "grow"])
def test_granules_are_zero_the_moment_they_are_handed_on(listener: socket.socket, taker: str) -> None:
    server = Server(EventLoop(), HostBackend(), listener, num_granules=8, max_descriptors=256)
    manager = server.manager
    nbytes = 8 * GRANULE_BYTES
    descriptor = manager._pool.export(writable=True)
    with mmap.mmap(descriptor, nbytes) as memory:
        manager.greet(Client(1, os.getpid(), "c", 1), 1)
        manager.handle(1, messages.OpenArena(1, "kv", 1, 8, 8))
        lease = manager.books.arenas["kv"].lease
        assert lease is not None
        memory[:] = b"\x77" * nbytes
        manager.handle(1, messages.ReleaseArena(2, lease.lease_id))
        manager.handle(1, messages.DropArena(3, "kv"))
        if taker == "arena":
            manager.handle(1, messages.OpenArena(4, "other", 1, 8, 8))
        elif taker == "grow":
            manager.handle(1, messages.OpenArena(4, "other", 1, 8, 1))
            lease = manager.books.arenas["other"].lease
            assert lease is not None
            memory[:] = b"\x77" * nbytes
            manager.handle(1, messages.GrowArena(5, lease.lease_id, 6))
            manager.handle(1, messages.ShrinkArena(6, lease.lease_id, [(1, 6)]))
            manager.handle(1, messages.GrowArena(7, lease.lease_id, 7))
            memory[:GRANULE_BYTES] = bytes(GRANULE_BYTES)  # never given back
            memory[7 * GRANULE_BYTES :] = bytes(GRANULE_BYTES)  # free since the beginning
        else:
            no_copies = msgspec.Raw(msgspec.msgpack.encode([]))
            manager.handle(1, messages.LoadSegments(4, "w", {"s": nbytes}, b"", no_copies))
        assert memory[:].count(0) == nbytes
    os.close(descriptor)
    server.close()
