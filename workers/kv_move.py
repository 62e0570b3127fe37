"""KV of a leaver's requests, copied to the workers where they will go on, so that nothing has to be computed again.

    leaver (KvSender)                          a worker that stays (KvReceiver)
    Offer(token, layout)        ─────────>
    Rows(request, first, tokens, bytes)  ──>   a donor slot of that request grows by these tokens
                                <─────────     Taken(ok)

Most is copied while the requests still decode, the rest after the flip. Both ends touch KV between two steps only, a piece at a time: so a
piece is whole when it is read and is in the books when it is written, and no step waits for more than one. What does not fit, or
comes too late, is computed again from its tokens. The receiver listens beside the exchange address ("unix:" ones only).
"""

from __future__ import annotations

import contextlib
import hmac
import logging
import os
import socket
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from flexpert.workers.engine import Engine
from flexpert.workers.epoch import Epoch
from flexpert.workers.memory import KvMemory, read_tokens, write_tokens
from flexpert.workers.scheduler import Scheduler

log = logging.getLogger(__name__)

PIECE_BYTES = 1 << 20
MAX_FRAME_BYTES = 64 << 20
CALL_TIMEOUT_S = 30.0
_LENGTH = struct.Struct(">I")


class Offer(msgspec.Struct, frozen=True, tag=True):
    """The first word. layout: what the bytes of a token's KV mean; the receiver must have the same."""

    cluster_token: str
    layout: str


class Rows(msgspec.Struct, frozen=True, tag=True):
    """KV of tokens [first, first + len(tokens)) of a request."""

    request_id: str
    first: int
    tokens: list[int]
    data: bytes


class Taken(msgspec.Struct, frozen=True, tag=True):
    """ok: False where there is no room for these rows, and none will come of what was sent of that request before."""

    ok: bool


Word = Offer | Rows | Taken
_decoder: msgspec.msgpack.Decoder[Word] = msgspec.msgpack.Decoder(Word)


def door_of(exchange_address: str) -> str | None:
    """The path of the receiver's socket; None where there is none."""
    kind, _, path = exchange_address.partition(":")
    return f"{path}.kv" if kind == "unix" and path else None


class _Stream:
    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock

    def send(self, word: Word) -> None:
        body = msgspec.msgpack.encode(word)
        self.sock.sendall(_LENGTH.pack(len(body)) + body)

    def receive(self) -> Word | None:
        """None at the end of the stream. Raises OSError, msgspec.DecodeError."""
        head = self._read(_LENGTH.size)
        if head is None:
            return None
        (length,) = _LENGTH.unpack(head)
        if length > MAX_FRAME_BYTES:
            raise OSError(f"a frame of {length} bytes was announced")
        body = self._read(length)
        return None if body is None else _decoder.decode(body)

    def _read(self, count: int) -> bytes | None:
        data = bytearray()
        while len(data) < count:
            part = self.sock.recv(count - len(data))
            if not part:
                return None
            data += part
        return bytes(data)


class KvReceiver:
    """Takes KV for this worker's engine, on a thread for each leaver."""

    def __init__(
        self,
        path: str,
        *,
        cluster_token: str,
        layout: str,
        token_bytes: int,
        engine: Engine,
        scheduler: Scheduler,
        memory: KvMemory,
    ) -> None:
        self._path, self._cluster_token, self._layout, self._token_bytes = path, cluster_token, layout, token_bytes
        self._engine, self._scheduler, self._memory = engine, scheduler, memory
        self._streams: set[socket.socket] = set()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._sock.bind(path)
        Path(path).chmod(0o600)
        self._sock.listen()
        threading.Thread(target=self._accept, name="kv-receiver", daemon=True).start()

    def close(self) -> None:
        for sock in (self._sock, *list(self._streams)):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()
        with contextlib.suppress(OSError):
            os.unlink(self._path)

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._sock.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(sock,), name="kv-stream", daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        self._streams.add(sock)
        stream, slots = _Stream(sock), dict[str, int]()
        try:
            offer = stream.receive()
            if not isinstance(offer, Offer) or not hmac.compare_digest(
                offer.cluster_token.encode(), self._cluster_token.encode()
            ):
                return
            same = offer.layout == self._layout
            stream.send(Taken(same))
            while same and isinstance(word := stream.receive(), Rows):
                stream.send(Taken(self._take(word, slots)))
        except (OSError, msgspec.MsgspecError, RuntimeError, TimeoutError) as error:
            log.info("a leaver's KV stream ended: %s", error)
        finally:
            self._streams.discard(sock)
            sock.close()

    def _take(self, rows: Rows, slots: dict[str, int]) -> bool:
        if not rows.tokens or len(rows.data) != len(rows.tokens) * self._token_bytes:
            return False
        slot = slots.get(rows.request_id)
        taken = self._engine.call(lambda: self._write(rows, slot)).result(CALL_TIMEOUT_S)
        if taken is None:
            return False
        slots[rows.request_id] = taken
        return True

    def _write(self, rows: Rows, slot: int | None) -> int | None:
        """On the engine's thread."""
        room = self._scheduler.import_kv(rows.request_id, slot, rows.first, rows.tokens)
        if room is None:
            return None
        taken, ops = room
        self._memory.apply(ops)
        write_tokens(self._memory.tensor, taken, rows.first, rows.data, self._token_bytes)
        self._memory.apply(self._scheduler.imported(taken, rows.tokens))
        return taken


class KvSender:
    """Copies the KV of this worker's running requests to the members of the epoch that it leaves for."""

    def __init__(
        self,
        *,
        cluster_token: str,
        layout: str,
        token_bytes: int,
        engine: Engine,
        scheduler: Scheduler,
        memory: KvMemory,
    ) -> None:
        self._offer, self._token_bytes = Offer(cluster_token, layout), token_bytes
        self._piece_tokens = max(1, PIECE_BYTES // token_bytes)
        self._engine, self._scheduler, self._memory = engine, scheduler, memory
        self._doors: dict[str, _Stream] = {}
        self._load: dict[str, int] = {}  # tokens sent, by worker
        self._sent: dict[str, tuple[str, int]] = {}  # request -> worker, tokens that are there
        self._refused: set[str] = set()
        self.moved_bytes = 0

    def open(self, epoch: Epoch) -> None:
        for member in epoch.members:
            path = door_of(member.exchange_address)
            if path is None:
                continue
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            stream = _Stream(sock)
            try:
                sock.settimeout(CALL_TIMEOUT_S)
                sock.connect(path)
                stream.send(self._offer)
                answer = stream.receive()
            except (OSError, msgspec.MsgspecError) as error:
                log.info("worker %s takes no KV: %s", member.worker_id, error)
                answer = None
            if isinstance(answer, Taken) and answer.ok:
                self._doors[member.worker_id], self._load[member.worker_id] = stream, 0
            else:
                sock.close()

    def copy(self, until_s: float, check: Callable[[], None] = lambda: None) -> None:
        """Everything that is committed and not yet there, the longest requests first, until that time."""
        if not self._doors:
            return
        running = self._engine.call(self._scheduler.running).result(CALL_TIMEOUT_S)
        for request_id, _ in sorted(running, key=lambda one: -one[1]):
            while request_id not in self._refused and self._doors and time.monotonic() < until_s:
                check()
                if not self._copy_piece(request_id):
                    break

    def targets(self) -> dict[str, str]:
        """request -> the worker that has its KV, of those that were copied up to their last committed token, or nearly."""
        return {name: worker for name, (worker, _) in self._sent.items() if name not in self._refused}

    def close(self) -> None:
        for stream in self._doors.values():
            stream.sock.close()
        self._doors = {}

    def _copy_piece(self, request_id: str) -> bool:
        """The next piece of this request's KV. False where that was the last for now (what it computes meanwhile comes after the flip),
        where there is none, or where nobody takes it."""
        worker, first = self._sent.get(request_id, ("", 0))
        if worker and worker not in self._doors:
            self._refused.add(request_id)
            return False
        piece = self._engine.call(lambda: self._read(request_id, first)).result(CALL_TIMEOUT_S)
        if piece is None:
            return False
        candidates = [worker] if worker else sorted(self._doors, key=lambda name: self._load[name])
        for name in candidates:
            if self._give(name, piece):
                self._sent[request_id] = (name, first + len(piece.tokens))
                return len(piece.tokens) == self._piece_tokens
        self._refused.add(request_id)
        return False

    def _read(self, request_id: str, first: int) -> Rows | None:
        """On the engine's thread."""
        found = self._scheduler.computed(request_id)
        if found is None or len(found[1]) <= first:
            return None
        slot, tokens = found
        end = min(len(tokens), first + self._piece_tokens)
        data = read_tokens(self._memory.tensor, slot, first, end, self._token_bytes)
        return Rows(request_id, first, tokens[first:end], data)

    def _give(self, worker: str, rows: Rows) -> bool:
        stream = self._doors[worker]
        try:
            stream.send(rows)
            answer = stream.receive()
        except (OSError, msgspec.MsgspecError) as error:
            log.info("worker %s takes no more KV: %s", worker, error)
            answer = None
        if answer is None:
            self._doors.pop(worker).sock.close()
        if not isinstance(answer, Taken) or not answer.ok:
            return False
        self._load[worker] += len(rows.tokens)
        self.moved_bytes += len(rows.data)
        return True
