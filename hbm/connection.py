"""The manager's end of one client's socket: never blocks, bounds what it buffers, owns the descriptors it is given to
send.

`server.Server` makes one for each accepted client, tells it when its socket is ready and drops it when it raises.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from collections import deque
from collections.abc import Iterator, Sequence

from flexpert.hbm import wire
from flexpert.hbm.errors import ProtocolError
from flexpert.hbm.messages import ClientMessage

MAX_BACKLOG_BYTES = 1 << 20  # a client that has not read this much, and asks for more, is dropped
_DRAIN_BYTES = 64 << 20


class Connection:
    """One client: its socket, its process (pidfd) and what it has not read yet. `closed`: the socket is, the process
    may live.
    """

    def __init__(self, sock: socket.socket, *, client_id: int, pid: int, pidfd: int) -> None:
        sock.setblocking(False)
        self.sock = sock
        self.client_id = client_id
        self.pid = pid
        self.pidfd = pidfd
        self.name = "?"
        self.greeted = False
        self.closed = False
        self._reader = wire.client_messages()
        self._pending: deque[tuple[memoryview, tuple[int, ...]]] = deque()
        self.backlog_bytes = 0

    def __str__(self) -> str:
        return f"client {self.client_id} ({self.name}, pid {self.pid})"

    def receive(self) -> bool:
        """Read once; False at the end of the stream. Descriptors from a client are not accepted: plain recv discards
        them.
        """
        try:
            data = self.sock.recv(wire.READ_BYTES)
        except BlockingIOError:
            return True
        except OSError:
            return False
        self._reader.add(data)
        return bool(data)

    def messages(self) -> Iterator[ClientMessage]:
        """What has arrived completely. Raises ProtocolError."""
        for message, num_descriptors in self._reader.messages():
            if num_descriptors:
                raise ProtocolError("a client sends no descriptors")
            yield message

    def receive_rest(self) -> None:
        """After the client's death: everything it had sent is in the socket already."""
        total = 0
        while total < _DRAIN_BYTES:
            try:
                data = self.sock.recv(wire.READ_BYTES)
            except OSError:
                return
            if not data:
                return
            self._reader.add(data)
            total += len(data)

    def welcome(self, name: str) -> None:
        self.name = name
        self.greeted = True
        self._reader.limit_bytes = wire.MAX_FRAME_BYTES

    def send(self, message: object, descriptors: Sequence[int] = ()) -> None:
        """Send now what fits, keep the rest. Closes the descriptors. Raises ProtocolError for a client that does not
        read.
        """
        try:
            if self.closed:
                return
            if self.backlog_bytes > MAX_BACKLOG_BYTES:
                raise ProtocolError(f"{self.backlog_bytes} bytes of answers have not been read")
            frame = memoryview(wire.encode(message, len(descriptors)))
            if not self._pending:
                sent = self._send_some(frame, descriptors)
                if sent:
                    frame, descriptors = frame[sent:], self._close(descriptors)
            if frame:
                self._pending.append((frame, tuple(descriptors)))
                self.backlog_bytes += len(frame)
                descriptors = ()
        finally:
            self._close(descriptors)

    def send_pending(self) -> None:
        while self._pending:
            frame, descriptors = self._pending.popleft()
            sent = self._send_some(frame, descriptors)
            self.backlog_bytes -= sent
            if sent:
                descriptors = self._close(descriptors)
            if sent < len(frame):
                self._pending.appendleft((frame[sent:], descriptors))
                return
            self._close(descriptors)

    def close(self) -> None:
        """Close the socket; the pidfd stays open until `forget`."""
        if not self.closed:
            self.closed = True
            self.sock.close()
            for _frame, descriptors in self._pending:
                self._close(descriptors)
            self._pending.clear()
            self.backlog_bytes = 0

    def forget(self) -> None:
        self.close()
        os.close(self.pidfd)

    def kill(self) -> None:
        """SIGKILL through the pidfd, so no other process that got the same number can be hit."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)

    def _send_some(self, frame: memoryview, descriptors: Sequence[int]) -> int:
        try:
            return wire.send_some(self.sock, frame, descriptors)
        except BlockingIOError:
            return 0
        except OSError:
            return len(frame)  # the client is gone: its end of file comes through the loop

    @staticmethod
    def _close(descriptors: Sequence[int]) -> tuple[int, ...]:
        for descriptor in descriptors:
            os.close(descriptor)
        return ()
