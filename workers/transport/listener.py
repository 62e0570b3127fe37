"""Where a worker's peers connect: one listening socket for every epoch that this process takes part in.

A thread that sleeps in epoll accepts, reads each peer's Hello and checks token and user; that is all it does. A connection for an
epoch waits here until `pairs.connect_pairs` expects that epoch, or until the peer gives up and closes it. Made once by the worker
process; used by `pairs`.
"""

from __future__ import annotations

import contextlib
import hmac
import os
import select
import socket
import threading
import time
from dataclasses import dataclass
from types import TracebackType

from flexpert.workers.transport.handshake import (
    FrameReader,
    HandshakeError,
    Hello,
    Refused,
    parse_address,
    prepare_stream,
    send_frame,
)

HELLO_TIMEOUT_S = 5.0
_MAX_CONNECTIONS = 4096


@dataclass
class Caller:
    """A peer that has introduced itself; `descriptor` came with its Hello. Whoever takes it owns both."""

    hello: Hello
    sock: socket.socket
    descriptor: int | None

    def close(self) -> None:
        self.sock.close()
        if self.descriptor is not None:
            os.close(self.descriptor)
            self.descriptor = None

    def refuse(self, reason: str) -> None:
        with contextlib.suppress(OSError):
            send_frame(self.sock, Refused(reason=reason))
        self.close()


@dataclass
class _Stranger:
    """A connection whose Hello is not here yet."""

    reader: FrameReader
    give_up_at: float


class Expectation:
    """The callers of one epoch, for as long as somebody connects that epoch: readable (`fileno`) when there is news."""

    def __init__(self, listener: ExchangeListener, epoch_number: int) -> None:
        self.cancelled = False
        self._listener = listener
        self._epoch_number = epoch_number
        self._event = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def fileno(self) -> int:
        return self._event

    def notify(self) -> None:
        os.eventfd_write(self._event, 1)

    def take(self) -> list[Caller]:
        """The callers that are here; each is returned once."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._event)
        return self._listener._take(self._epoch_number)

    def __enter__(self) -> Expectation:
        self._listener._expect(self._epoch_number, self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._listener._expect_no_more(self._epoch_number)
        os.close(self._event)


class ExchangeListener:
    """address: "unix:/path" (made, mode 0600; its folder must exist) or "tcp:host:port" (port 0: any); `.address` is what peers use."""

    def __init__(self, address: str, *, token: str) -> None:
        self._token = token
        family, where = parse_address(address)
        self._sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self._path: str | None = None
        try:
            if isinstance(where, str):
                self._bind_path(where)
                self.address = address
            else:
                self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                self._sock.bind(where)
                self.address = f"{address.rpartition(':')[0]}:{self._sock.getsockname()[1]}"
            self._sock.listen(1024)
        except OSError as error:
            self._sock.close()
            raise OSError(f"cannot listen for exchange peers at {address}: {error}") from error
        self._sock.setblocking(False)
        self._lock = threading.Lock()
        self._strangers: dict[int, _Stranger] = {}
        self._callers: dict[int, Caller] = {}
        self._expected: dict[int, Expectation] = {}
        self._closed = False
        self._stop = os.eventfd(0, os.EFD_CLOEXEC)
        self._epoll = select.epoll()
        self._epoll.register(self._sock, select.EPOLLIN)
        self._epoll.register(self._stop, select.EPOLLIN)
        self._thread = threading.Thread(target=self._run, name="exchange-listener", daemon=True)
        self._thread.start()

    def expect(self, epoch_number: int) -> Expectation:
        """A context in which the callers of this epoch can be taken; one at a time for each epoch."""
        return Expectation(self, epoch_number)

    def cancel(self, epoch_number: int) -> None:
        """Whoever is connecting this epoch gives up at once, and its waiting callers are closed. From any thread."""
        for caller in self._take(epoch_number):
            caller.close()
        with self._lock:
            if expectation := self._expected.get(epoch_number):
                expectation.cancelled = True
                expectation.notify()

    def close(self) -> None:
        """Stop listening; transports that are connected live on."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            os.eventfd_write(self._stop, 1)
            for expectation in self._expected.values():
                expectation.cancelled = True
                expectation.notify()
        self._thread.join()
        for stranger in self._strangers.values():
            stranger.reader.drop_descriptor()
            stranger.reader.sock.close()
        for caller in self._callers.values():
            caller.close()
        self._callers.clear()
        self._epoll.close()
        self._sock.close()
        os.close(self._stop)
        if self._path is not None:
            with contextlib.suppress(OSError):
                os.unlink(self._path)

    def _bind_path(self, path: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(
                path
            )  # a predecessor of this name left it: the caller gives each incarnation its own path, or knows it dead
        self._sock.bind(path)
        os.chmod(path, 0o600)
        self._path = path

    def _run(self) -> None:
        while True:
            events = self._epoll.poll(self._next_timeout_s())
            with self._lock:
                if self._closed:
                    return
                for descriptor, _ in events:
                    if descriptor == self._sock.fileno():
                        self._accept()
                    elif descriptor in self._strangers:
                        self._hear(descriptor)
                    elif descriptor in self._callers:  # it has nothing to say before Welcome: it gave up
                        self._release(descriptor).close()
                self._drop_silent()

    def _next_timeout_s(self) -> float:
        if not self._strangers:
            return -1.0
        return max(0.0, min(stranger.give_up_at for stranger in self._strangers.values()) - time.monotonic())

    def _accept(self) -> None:
        try:
            sock, _ = self._sock.accept()
        except OSError:  # gone again, or no descriptors left: the peer will see its connection time out
            return
        try:
            prepare_stream(sock)
            if len(self._strangers) + len(self._callers) >= _MAX_CONNECTIONS:
                raise HandshakeError(f"more than {_MAX_CONNECTIONS} connections wait here")
        except (HandshakeError, OSError):
            sock.close()
            return
        self._strangers[sock.fileno()] = _Stranger(FrameReader(sock), time.monotonic() + HELLO_TIMEOUT_S)
        self._epoll.register(sock, select.EPOLLIN | select.EPOLLRDHUP)

    def _hear(self, descriptor: int) -> None:
        """Read of a stranger's Hello what is here; with all of it the stranger becomes a caller, or is turned away."""
        reader = self._strangers[descriptor].reader
        try:
            hello = reader.read()
        except HandshakeError:
            self._drop_stranger(descriptor)
            return
        if hello is None:
            return
        reason = self._objection(hello)
        if reason or not isinstance(hello, Hello):
            with contextlib.suppress(OSError):
                send_frame(reader.sock, Refused(reason=reason))
            self._drop_stranger(descriptor)
            return
        del self._strangers[descriptor]
        for other, caller in list(self._callers.items()):  # a peer that tries again: its older connection is dead
            if (caller.hello.epoch, caller.hello.rank) == (hello.epoch, hello.rank):
                self._release(other).close()
        self._callers[descriptor] = Caller(hello, reader.sock, reader.descriptor)
        if expectation := self._expected.get(hello.epoch):
            expectation.notify()

    def _objection(self, hello: object) -> str:
        if not isinstance(hello, Hello):
            return f"expected Hello, got {type(hello).__name__}"
        if not hmac.compare_digest(hello.cluster_token.encode(), self._token.encode()):
            return "wrong cluster token: this worker belongs to another cluster"
        return ""

    def _drop_stranger(self, descriptor: int) -> None:
        stranger = self._strangers.pop(descriptor)
        self._epoll.unregister(descriptor)
        stranger.reader.drop_descriptor()
        stranger.reader.sock.close()

    def _drop_silent(self) -> None:
        now = time.monotonic()
        for descriptor in [each for each, stranger in self._strangers.items() if stranger.give_up_at <= now]:
            self._drop_stranger(descriptor)

    def _release(self, descriptor: int) -> Caller:
        self._epoll.unregister(descriptor)
        return self._callers.pop(descriptor)

    def _take(self, epoch_number: int) -> list[Caller]:
        with self._lock:
            found = [each for each, caller in self._callers.items() if caller.hello.epoch == epoch_number]
            return [self._release(descriptor) for descriptor in found]

    def _expect(self, epoch_number: int, expectation: Expectation) -> None:
        with self._lock:
            if epoch_number in self._expected:
                raise RuntimeError(f"epoch {epoch_number} is being connected already")
            expectation.cancelled = self._closed
            self._expected[epoch_number] = expectation
            expectation.notify()

    def _expect_no_more(self, epoch_number: int) -> None:
        with self._lock:
            del self._expected[epoch_number]
