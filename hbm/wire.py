"""Frames on a Unix stream socket: 4 bytes length (little endian), 1 byte number of descriptors, one msgpack message.

Descriptors travel by SCM_RIGHTS with the first bytes of their frame, from the manager to a client only. Used by the
daemon's connections, the client and the loader helper; none of them trusts the other's bytes: lengths are bounded,
messages are typed, and there is no pickle. The peer's uid and pid come from the kernel (SO_PEERCRED).
"""

from __future__ import annotations

import array
import contextlib
import os
import socket
import struct
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Generic, TypeVar

import msgspec

from flexpert.hbm.errors import ProtocolError
from flexpert.hbm.messages import ClientMessage, LoaderMessage, ManagerMessage

MAX_FRAME_BYTES = 64 << 20  # a load plan or the table of a large arena
MAX_GREETING_BYTES = 4 << 10  # what is read from a peer that has not said Hello
MAX_DESCRIPTORS = 4  # of one frame
READ_BYTES = 256 << 10

_HEADER = struct.Struct("<IB")
_SO_PEERPIDFD = 77  # Linux 6.5
_encoder = msgspec.msgpack.Encoder()

Message = TypeVar("Message")


def encode(message: object, num_descriptors: int = 0) -> bytes:
    """A whole frame. Raises ProtocolError beyond MAX_FRAME_BYTES."""
    body = _encoder.encode(message)
    if len(body) > MAX_FRAME_BYTES:
        raise ProtocolError(f"a message of {len(body)} bytes cannot be sent, at most {MAX_FRAME_BYTES} can")
    return _HEADER.pack(len(body), num_descriptors) + body


class FrameReader(Generic[Message]):
    """Cuts a stream into messages of one direction. `add` what was received, then iterate over what is complete."""

    def __init__(self, message_type: object, *, limit_bytes: int = MAX_FRAME_BYTES) -> None:
        self._decoder = msgspec.msgpack.Decoder(message_type)
        self._buffer = bytearray()
        self.limit_bytes = limit_bytes

    def add(self, data: bytes) -> None:
        self._buffer += data

    def messages(self) -> Iterator[tuple[Message, int]]:
        """Complete messages with their number of descriptors. Raises ProtocolError for anything that is not one."""
        buffer = self._buffer
        begin = 0
        try:
            while len(buffer) - begin >= _HEADER.size:
                length, num_descriptors = _HEADER.unpack_from(buffer, begin)
                if length > self.limit_bytes or num_descriptors > MAX_DESCRIPTORS:
                    raise ProtocolError(
                        f"a frame announces {length} bytes and {num_descriptors} descriptors, "
                        f"at most {self.limit_bytes} and {MAX_DESCRIPTORS} are read"
                    )
                body = begin + _HEADER.size
                if len(buffer) - body < length:
                    break
                begin = body + length
                yield self._decode(bytes(memoryview(buffer)[body:begin])), num_descriptors
        finally:
            del buffer[:begin]

    def _decode(self, body: bytes) -> Message:
        try:
            return self._decoder.decode(body)  # type: ignore[no-any-return]
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise ProtocolError(f"a message of {len(body)} bytes is not of this protocol: {error}") from error


def client_messages() -> FrameReader[ClientMessage]:
    """For the manager. Small until the peer has said Hello."""
    return FrameReader(ClientMessage, limit_bytes=MAX_GREETING_BYTES)


def manager_messages() -> FrameReader[ManagerMessage]:
    """For a client."""
    return FrameReader(ManagerMessage)


def loader_messages() -> FrameReader[LoaderMessage]:
    """For the manager, from its loader helper."""
    return FrameReader(LoaderMessage)


def receive(sock: socket.socket, descriptors: deque[int]) -> bytes:
    """What there is to read (b"" at the end of the stream); descriptors that came along are appended, close-on-exec."""
    space = socket.CMSG_SPACE(MAX_DESCRIPTORS * 4)
    data, ancillary, _flags, _address = sock.recvmsg(READ_BYTES, space, socket.MSG_CMSG_CLOEXEC)
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            numbers = array.array("i")
            numbers.frombytes(payload[: len(payload) - len(payload) % numbers.itemsize])
            descriptors.extend(numbers)
    return data


def send_some(sock: socket.socket, data: bytes | memoryview, descriptors: Sequence[int] = ()) -> int:
    """One sendmsg; how many bytes went out. The descriptors go with the first of them."""
    if not descriptors:
        return sock.send(data)
    rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))
    return sock.sendmsg([data], [rights])


def peer_credentials(sock: socket.socket) -> tuple[int, int]:
    """(pid, uid) of the process that connected, as the kernel recorded them; pid 0: it lives in a foreign pid
    namespace.
    """
    pid, uid, _gid = struct.unpack(
        "iII", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("iII"))
    )
    return pid, uid


def peer_pidfd(sock: socket.socket, pid: int) -> int:
    """A pidfd of the process that connected. Raises ProcessLookupError where it is gone already."""
    with contextlib.suppress(OSError):
        descriptor = sock.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD)
        os.set_inheritable(descriptor, False)
        return descriptor
    return os.pidfd_open(pid)
