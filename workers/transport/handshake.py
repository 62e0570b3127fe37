"""What two ranks say to each other before their first exchange: frames, their reader, and the sockets they travel on.

The higher rank connects and sends Hello; the lower one answers Welcome, or Refused and closes. With either a file descriptor may
come (SCM_RIGHTS, Unix sockets only). Nothing else follows Hello until Welcome is here, so what follows Welcome is the transport's own.
A frame is a 4-byte big-endian length and one msgpack struct. Used by `listener` and `pairs`.
"""

from __future__ import annotations

import array
import os
import socket
import struct

import msgspec

MAX_FRAME_BYTES = 4096
_LENGTH_BYTES = 4
_UCRED = struct.Struct("3i")


class HandshakeError(Exception):
    """The other side is not a rank of this cluster, refuses us, or went away."""


class Hello(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """kind: which transport is meant, both sides must mean the same."""

    cluster_token: str
    kind: str
    epoch: int
    rank: int
    worker_id: str
    incarnation: int


class Welcome(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """data: what the transport's lower rank has to tell, e.g. where its store listens."""

    rank: int
    incarnation: int
    data: str = ""


class Refused(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    reason: str


Frame = Hello | Welcome | Refused
_decoder: msgspec.msgpack.Decoder[Frame] = msgspec.msgpack.Decoder(Frame)


def parse_address(address: str) -> tuple[int, str | tuple[str, int]]:
    """(socket family, what connect and bind take) of "unix:/path" or "tcp:host:port"."""
    kind, _, rest = address.partition(":")
    if kind == "unix" and rest:
        return socket.AF_UNIX, rest
    host, _, port = rest.rpartition(":")
    if kind == "tcp" and host and port.isdigit():
        host = host.removeprefix("[").removesuffix("]")
        return (socket.AF_INET6 if ":" in host else socket.AF_INET), (host, int(port))
    raise ValueError(f"exchange address {address!r}: expected unix:/path or tcp:host:port")


def prepare_stream(sock: socket.socket) -> None:
    """Non-blocking, small messages at once; a Unix peer has to be this user's. Raises HandshakeError."""
    sock.setblocking(False)
    if sock.family != socket.AF_UNIX:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        return
    _, uid, _ = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    if uid != os.getuid():
        raise HandshakeError(f"the process at the other end belongs to user {uid}, this one to {os.getuid()}")


def send_frame(sock: socket.socket, frame: Frame, descriptor: int | None = None) -> None:
    """Frames are far smaller than a fresh socket's buffer, so this never blocks. Raises OSError where the peer is gone."""
    body = msgspec.msgpack.encode(frame)
    data = len(body).to_bytes(_LENGTH_BYTES, "big") + body
    if descriptor is None:
        sent = sock.send(data)
    else:
        rights = array.array("i", [descriptor])
        sent = sock.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
    if sent != len(data):
        raise OSError(f"only {sent} of {len(data)} bytes of a handshake were taken")


class FrameReader:
    """Reads exactly one frame from a non-blocking socket, and the descriptor that came with it (`descriptor`, ours to close)."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.descriptor: int | None = None
        self._data = b""

    def read(self) -> Frame | None:
        """The frame, or None while some of it is still under way. Raises HandshakeError at the stream's end and for what is no frame."""
        while len(self._data) < (wanted := self._wanted()):
            try:
                data = self._receive(wanted - len(self._data))
            except BlockingIOError:
                return None
            except OSError as error:
                raise HandshakeError(f"the connection broke during the handshake: {error}") from error
            if not data:
                raise HandshakeError("the other side closed the connection during the handshake")
            self._data += data
        try:
            return _decoder.decode(self._data[_LENGTH_BYTES:])
        except msgspec.DecodeError as error:
            raise HandshakeError(f"what came is no frame of the handshake: {error}") from error

    def drop_descriptor(self) -> None:
        if self.descriptor is not None:
            os.close(self.descriptor)
            self.descriptor = None

    def _wanted(self) -> int:
        if len(self._data) < _LENGTH_BYTES:
            return _LENGTH_BYTES
        length = int.from_bytes(self._data[:_LENGTH_BYTES], "big")
        if length > MAX_FRAME_BYTES:
            raise HandshakeError(f"a frame of {length} bytes is announced, at most {MAX_FRAME_BYTES} are read")
        return _LENGTH_BYTES + length

    def _receive(self, num_bytes: int) -> bytes:
        if self.sock.family != socket.AF_UNIX:
            return self.sock.recv(num_bytes)
        data, descriptors, _, _ = socket.recv_fds(self.sock, num_bytes, 1, socket.MSG_CMSG_CLOEXEC)
        if descriptors:
            self.drop_descriptor()
            self.descriptor = descriptors[0]
        return data
