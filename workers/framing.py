"""Frames on a byte stream: a 4-byte big-endian length, then one msgpack-encoded struct of `workers.messages`.

Used by the gateway and the worker's socket server, both on asyncio streams. A frame beyond MAX_FRAME_BYTES, an unknown tag or a wrong
field raises FrameError; the side that sees it closes the stream, since nothing behind a broken frame can be trusted.
"""

from __future__ import annotations

import asyncio
from typing import Generic, TypeVar

import msgspec

from flexpert.workers.messages import GatewayFrame, WorkerFrame

MAX_FRAME_BYTES = 64 << 20
_LENGTH_BYTES = 4

Frame = TypeVar("Frame")


class FrameError(Exception):
    """The peer sent what is not a frame of this protocol."""


class FrameCodec(Generic[Frame]):
    """Encodes any frame, decodes those of one direction."""

    def __init__(self, frame_type: type[Frame]) -> None:
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(frame_type)

    def encode(self, frame: object) -> bytes:
        body = self._encoder.encode(frame)
        if len(body) > MAX_FRAME_BYTES:
            raise FrameError(f"frame of {len(body)} bytes, at most {MAX_FRAME_BYTES} can be sent")
        return len(body).to_bytes(_LENGTH_BYTES, "big") + body

    def decode(self, body: bytes) -> Frame:
        try:
            return self._decoder.decode(body)
        except msgspec.DecodeError as error:
            raise FrameError(f"a frame of {len(body)} bytes could not be decoded: {error}") from error

    async def read(self, reader: asyncio.StreamReader, *, max_bytes: int = MAX_FRAME_BYTES) -> Frame | None:
        """The next frame, or None where the peer closed the stream (also in the middle of a frame: it died)."""
        try:
            length = int.from_bytes(await reader.readexactly(_LENGTH_BYTES), "big")
            if length > max_bytes:
                raise FrameError(f"a frame announces {length} bytes, at most {max_bytes} are read here")
            body = await reader.readexactly(length)
        except (asyncio.IncompleteReadError, ConnectionError):
            return None
        return self.decode(body)


def gateway_frames() -> FrameCodec[GatewayFrame]:
    """For the worker: decodes what a gateway sends."""
    return FrameCodec(GatewayFrame)  # type: ignore[arg-type]


def worker_frames() -> FrameCodec[WorkerFrame]:
    """For the gateway: decodes what a worker sends."""
    return FrameCodec(WorkerFrame)  # type: ignore[arg-type]


async def open_stream(address: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Connect to "unix:/path" or "tcp:host:port"."""
    kind, _, rest = address.partition(":")
    if kind == "unix" and rest:
        return await asyncio.open_unix_connection(rest)
    host, _, port = rest.rpartition(":")
    if kind == "tcp" and host and port.isdigit():
        return await asyncio.open_connection(host, int(port))
    raise ValueError(f"worker address {address!r}: expected unix:/path or tcp:host:port")
