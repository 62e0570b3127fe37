"""The worker's side of the gateway stream: listens, greets, hands requests to the engine and its outputs to their gateways.

Runs an asyncio loop on its own thread. A gateway is one connection; when it closes, the requests it had here are cancelled
(it submits them again elsewhere, or its clients are gone with it). A gateway that cannot show the cluster's token, speaks another
protocol version or sends a broken frame is refused and closed; nobody else notices.
"""

from __future__ import annotations

import asyncio
import hmac
import itertools
import logging
import threading
from pathlib import Path

from flexpert.workers.engine import Engine, Owner
from flexpert.workers.framing import FrameError, gateway_frames
from flexpert.workers.messages import PROTOCOL_VERSION, Hello, Refused, Submit, Welcome, WorkerFrame

log = logging.getLogger(__name__)

HELLO_TIMEOUT_S = 5.0
MAX_HELLO_BYTES = 64 << 10  # until a peer has shown the cluster's token
MAX_UNSENT_BYTES = 256 << 20


class WorkerServer:
    """Serves one engine on `address` ("unix:/path" or "tcp:host:port"; port 0 lets the kernel choose)."""

    def __init__(self, *, address: str, cluster_token: str, welcome: Welcome) -> None:
        self._wanted = address
        self._token = cluster_token
        self._welcome = welcome
        self._codec = gateway_frames()
        self._engine: Engine | None = None
        self._writers: dict[Owner, asyncio.StreamWriter] = {}
        self._numbers = itertools.count(1)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="worker-server", daemon=True)
        self._server: asyncio.Server | None = None
        self.address = address

    def start(self, engine: Engine) -> str:
        """Listen; returns the address that gateways connect to."""
        self._engine = engine
        self._thread.start()
        self.address = asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result()
        return self.address

    def stop(self) -> None:
        """Close all streams, end the thread."""
        if self._thread.is_alive():
            asyncio.run_coroutine_threadsafe(self._close(), self._loop).result()
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
        self._loop.close()

    def emit(self, owner: Owner, frame: WorkerFrame) -> None:
        """For the engine's thread: send a frame to one gateway; never blocks."""
        data = self._codec.encode(frame)
        self._loop.call_soon_threadsafe(self._write, owner, data)

    def _write(self, owner: Owner, data: bytes) -> None:
        writer = self._writers.get(owner)
        if writer is None:
            return
        writer.write(data)
        if writer.transport.get_write_buffer_size() > MAX_UNSENT_BYTES:
            log.error("gateway %s does not read: %d bytes unsent, closing its stream", owner, MAX_UNSENT_BYTES)
            writer.transport.abort()

    async def _listen(self) -> str:
        kind, _, rest = self._wanted.partition(":")
        if kind == "unix":
            Path(rest).unlink(missing_ok=True)
            self._server = await asyncio.start_unix_server(self._serve, path=rest)
            Path(rest).chmod(0o600)
            return self._wanted
        host, _, port = rest.rpartition(":")
        if kind != "tcp" or not host or not port.isdigit():
            raise ValueError(f"worker address {self._wanted!r}: expected unix:/path or tcp:host:port")
        self._server = await asyncio.start_server(self._serve, host=host, port=int(port))
        return f"tcp:{host}:{self._server.sockets[0].getsockname()[1]}"

    async def _close(self) -> None:
        if self._server is not None:
            self._server.close()
        for writer in list(self._writers.values()):
            writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        owner: Owner | None = None
        try:
            owner = await self._greet(reader, writer)
            if owner is not None:
                await self._receive(owner, reader)
        except FrameError as error:
            log.warning("closing the stream of gateway %s: %s", owner or "(not greeted)", error)
        except Exception:
            log.exception("the stream of gateway %s broke", owner)
        finally:
            if owner is not None:
                self._writers.pop(owner, None)
                self._require_engine().leave(owner)
            writer.close()

    async def _greet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Owner | None:
        try:
            hello = await asyncio.wait_for(self._codec.read(reader, max_bytes=MAX_HELLO_BYTES), HELLO_TIMEOUT_S)
        except TimeoutError:
            return None
        if hello is None:  # looked in and left
            return None
        reason = self._refusal(hello)
        if reason is not None:
            log.warning("refused a connection: %s", reason)
            writer.write(self._codec.encode(Refused(reason=reason)))
            await writer.drain()
            return None
        assert isinstance(hello, Hello)
        owner = f"{hello.gateway_id}#{next(self._numbers)}"
        writer.write(self._codec.encode(self._welcome))
        self._writers[owner] = writer
        self._require_engine().join(owner)
        return owner

    def _refusal(self, hello: object) -> str | None:
        if not isinstance(hello, Hello):
            return f"found {type(hello).__name__} as the first frame, expected Hello"
        if not hmac.compare_digest(hello.cluster_token.encode(), self._token.encode()):
            return "the cluster token does not match; gateway and worker belong to different clusters"
        if hello.protocol != PROTOCOL_VERSION:
            return f"found protocol {hello.protocol}, expected {PROTOCOL_VERSION}; run the same flexpert version on all nodes"
        return None

    async def _receive(self, owner: Owner, reader: asyncio.StreamReader) -> None:
        engine = self._require_engine()
        while (frame := await self._codec.read(reader)) is not None:
            if isinstance(frame, Submit):
                engine.submit(owner, frame)
            elif isinstance(frame, Hello):
                raise FrameError("a second Hello on one stream")
            else:
                engine.cancel(owner, frame)

    def _require_engine(self) -> Engine:
        assert self._engine is not None, "start() was not called"
        return self._engine
