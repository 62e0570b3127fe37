"""A manager for each test, clients in processes of their own, and their end by process id whatever happens."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.hbm.harness import WAIT_S, Child, end_manager

from flexpert.hbm import GRANULE_BYTES, HbmClient, ManagerConfig, ManagerHandle, ensure_manager


@pytest.fixture
def runtime_dir() -> Iterator[Path]:
    """Short enough for a socket path. Whatever manager has been started in it ends here."""
    path = Path(tempfile.mkdtemp(prefix="hbm-"))
    try:
        yield path
    finally:
        for lock in path.glob("*.lock"):
            end_manager(path, lock.stem)
        shutil.rmtree(path)


@pytest.fixture
def manager(runtime_dir: Path) -> ManagerHandle:
    """A manager of 256 granules (16 MiB)."""
    return ensure_manager(ManagerConfig(runtime_dir, budget_bytes=256 * GRANULE_BYTES))


@pytest.fixture
def connect(manager: ManagerHandle) -> Iterator[Callable[..., HbmClient]]:
    """Clients in this process."""
    clients = []

    def connect_client(fencing_token: int = 0, name: str = "test") -> HbmClient:
        clients.append(HbmClient.connect(manager.socket_path, client_name=name, fencing_token=fencing_token))
        return clients[-1]

    yield connect_client
    for client in clients:
        client.close()


@pytest.fixture
def spawn() -> Iterator[Callable[[], Child]]:
    """Clients in processes of their own."""
    children = []

    def spawn_child() -> Child:
        children.append(Child())
        return children[-1]

    yield spawn_child
    for child in children:
        child.kill()


@pytest.fixture
def holder(manager: ManagerHandle, spawn: Callable[[], Child]) -> Callable[..., Child]:
    """A process that is connected as `client` and holds the arena `kv` as `arena`."""

    def start(fencing_token: int = 1, *, slots: int = 4, slot_granules: int = 16, granules: int = 32) -> Child:
        child = spawn()
        child.run(
            f"client = HbmClient.connect({str(manager.socket_path)!r}, client_name='h', fencing_token={fencing_token})"
        )
        child.run(
            f"arena = client.open_kv_arena('kv', slots={slots}, slot_bytes={slot_granules} * GRANULE_BYTES, granules={granules})"
        )
        return child

    return start


@pytest.fixture
def raw_socket(manager: ManagerHandle) -> Iterator[Callable[[], socket.socket]]:
    """Plain connections to the manager's socket."""
    sockets = []

    def connect_raw() -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.settimeout(WAIT_S)
        sock.connect(os.fspath(manager.socket_path))
        sockets.append(sock)
        return sock

    yield connect_raw
    for sock in sockets:
        sock.close()
