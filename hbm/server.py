"""The manager's sockets: accepts clients, checks who they are, carries messages, and notices how each of them ends.

A client ends in two steps. Its socket closes (it said goodbye, crashed, sent nonsense, or did not read): its leases
start to end. Its pidfd reports that the process has exited: they have ended. What it had written to the socket before
it died is read first. Nothing here blocks on one client. Used by `daemon`.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Sequence

from flexpert.hbm import wire
from flexpert.hbm.backend import Backend
from flexpert.hbm.connection import Connection
from flexpert.hbm.errors import ProtocolError
from flexpert.hbm.limits import DESCRIPTORS_PER_CLIENT, RESERVED_DESCRIPTORS
from flexpert.hbm.loop import READ, WRITE, EventLoop
from flexpert.hbm.manager import Manager
from flexpert.hbm.messages import PROTOCOL_VERSION, ErrorReply, Hello
from flexpert.hbm.records import Client

log = logging.getLogger(__name__)


class Server:
    """Implements `peers.Peers`. `listener` is bound and listening."""

    def __init__(
        self, loop: EventLoop, backend: Backend, listener: socket.socket, *, num_granules: int, max_descriptors: int
    ) -> None:
        self._loop = loop
        self._listener = listener
        self._connections: dict[int, Connection] = {}
        self._next_id = 0
        self._max_clients = (max_descriptors - RESERVED_DESCRIPTORS) // DESCRIPTORS_PER_CLIENT
        self.manager = Manager(loop, backend, num_granules=num_granules, peers=self)
        listener.setblocking(False)
        loop.watch(listener.fileno(), READ, self._on_listener)

    def close(self) -> None:
        for connection in self._connections.values():
            connection.close()
        self.manager.close()

    # For the manager

    def send(self, client_id: int, message: object, descriptors: Sequence[int] = ()) -> None:
        connection = self._connections.get(client_id)
        if connection is None:
            for descriptor in descriptors:
                os.close(descriptor)
            return
        try:
            connection.send(message, descriptors)
        except ProtocolError as error:
            # Dropped after this round: the caller is in the middle of something.
            reason = str(error)
            self._loop.call_later(0, lambda: self._drop(connection, reason))
            return
        self._watch_writes(connection)

    def is_keeping_up(self, client_id: int) -> bool:
        connection = self._connections.get(client_id)
        return connection is not None and connection.backlog_bytes == 0

    def kill(self, client_id: int) -> None:
        connection = self._connections[client_id]
        try:
            connection.kill()
        except PermissionError:
            log.error("%s cannot be killed: no permission", connection)

    # Accepting

    def _on_listener(self, _events: int) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError as error:
            log.warning("accept failed: %s", error)
            return
        refusal = self._why_refused(sock)
        if refusal is not None:
            log.warning("a connection is refused: %s", refusal)
            self._refuse(sock, refusal)
            return
        pid, _uid = wire.peer_credentials(sock)
        try:
            pidfd = wire.peer_pidfd(sock, pid)
        except OSError as error:
            self._refuse(sock, f"no pidfd for process {pid}: {error}")
            return
        self._next_id += 1
        connection = Connection(sock, client_id=self._next_id, pid=pid, pidfd=pidfd)
        self._connections[connection.client_id] = connection
        self._loop.watch(sock.fileno(), READ, lambda events: self._on_socket(connection, events))
        self._loop.watch(pidfd, READ, lambda _events: self._on_exit(connection))

    def _why_refused(self, sock: socket.socket) -> str | None:
        pid, uid = wire.peer_credentials(sock)
        if uid != os.geteuid():
            return f"the HBM manager belongs to uid {os.geteuid()} and serves no other; you are uid {uid}"
        if pid == 0:
            return "your process is not visible from the HBM manager's pid namespace; share it (shareProcessNamespace, --pid)"
        if len(self._connections) >= self._max_clients:
            return f"{len(self._connections)} clients are connected, as many as RLIMIT_NOFILE allows; raise it"
        return None

    @staticmethod
    def _refuse(sock: socket.socket, text: str) -> None:
        sock.setblocking(False)
        try:
            sock.send(wire.encode(ErrorReply(0, ProtocolError.kind, text)))
        except OSError:
            log.info("the refused client had gone")
        sock.close()

    # A client's life

    def _on_socket(self, connection: Connection, events: int) -> None:
        if events & WRITE:
            connection.send_pending()
            self._watch_writes(connection)
        if events & READ:
            more = connection.receive()
            self._handle_messages(connection)
            if not more and not connection.closed:
                self._close(connection)

    def _handle_messages(self, connection: Connection) -> None:
        try:
            for message in connection.messages():
                self._handle(connection, message)
                if connection.closed:
                    return
        except ProtocolError as error:
            self._drop(connection, str(error))
        except Exception:
            log.exception("a message of %s could not be handled", connection)
            self._drop(connection, "internal error of the HBM manager; its log has the story")

    def _handle(self, connection: Connection, message: object) -> None:
        if connection.greeted:
            self.manager.handle(connection.client_id, message)  # type: ignore[arg-type]
            return
        if not isinstance(message, Hello):
            raise ProtocolError(f"the first message must be a hello, not {type(message).__name__}")
        if message.protocol != PROTOCOL_VERSION:
            raise ProtocolError(
                f"the HBM manager speaks protocol {PROTOCOL_VERSION}, you {message.protocol}: "
                "it was started by another version of flexpert; stop it first (this drops weights and KV)"
            )
        connection.welcome(message.client_name)
        client = Client(connection.client_id, connection.pid, message.client_name, message.fencing_token)
        self.manager.greet(client, message.request)

    def _drop(self, connection: Connection, reason: str) -> None:
        """Tell a client that cannot be trusted, if it listens, and close its socket. Its leases end with its
        process.
        """
        if connection.closed:
            return
        log.warning("%s is dropped: %s", connection, reason)
        if connection.backlog_bytes == 0:
            connection.send(ErrorReply(0, ProtocolError.kind, reason))
        self._close(connection)

    def _close(self, connection: Connection) -> None:
        self._loop.unwatch(connection.sock.fileno())
        connection.close()
        if not (connection.greeted and self.manager.client_closed(connection.client_id)):
            self._forget(connection)

    def _on_exit(self, connection: Connection) -> None:
        if not connection.closed:
            connection.receive_rest()
            self._handle_messages(connection)
        if not connection.closed:
            self._close(connection)
        if connection.client_id in self._connections:
            log.info("%s has exited", connection)
            self.manager.client_exited(connection.client_id)
            self._forget(connection)

    def _forget(self, connection: Connection) -> None:
        self._loop.unwatch(connection.pidfd)
        connection.forget()
        del self._connections[connection.client_id]

    def _watch_writes(self, connection: Connection) -> None:
        if not connection.closed:
            wanted = READ | WRITE if connection.backlog_bytes else READ
            self._loop.change(connection.sock.fileno(), wanted)
