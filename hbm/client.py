"""The HBM manager as its clients see it: one socket, one client. Used by workers, the node agent and the command line.

A reader thread takes what the manager sends and hands each answer to the caller that waits for it, so calls may come
from any thread, and sending a batch of arena operations waits for nothing: a refusal, or the manager's end, is noticed
by the thread and raised by the next call. A child made by fork must not use its parent's client.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import queue
import socket
import struct
import threading
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import msgspec

from flexpert.hbm import messages as m
from flexpert.hbm import wire
from flexpert.hbm.arena import KvArena
from flexpert.hbm.errors import HbmError, LoadError, ManagerGoneError, error_of_kind
from flexpert.hbm.granules import Extent
from flexpert.hbm.host import GRANULE_BYTES, HostBackend
from flexpert.hbm.loading import LoadPlan, check_plan, with_absolute_paths
from flexpert.hbm.mapped_weights import MappedSegment, MappedWeights

ManagerInfo = m.Info
ANSWER_TIMEOUT_S = 30.0
TAKEOVER_TIMEOUT_S = 60.0
LAST_WORDS_TIMEOUT_S = 1.0

Answer = TypeVar("Answer")


@dataclass(frozen=True, slots=True)
class WeightsState:
    """state: "loading" (done_bytes of total_bytes are read), "ready" or "failed" (reason)."""

    state: str
    done_bytes: int = 0
    total_bytes: int = 0
    reason: str = ""


class HbmClient:
    """A connection to the HBM manager. Its leases and mappings last until they are closed or this process exits."""

    def __init__(self, sock: socket.socket, *, timeout_s: float) -> None:
        self._sock = sock
        self._timeout_s = timeout_s
        self._pid = os.getpid()
        self._requests = itertools.count(1)
        self._send_lock = threading.Lock()
        self._waiting: dict[int, queue.SimpleQueue[_Answered | None]] = {}
        self._descriptors: deque[int] = deque()
        self._lease_faults: dict[int, str] = {}
        self._gone: str | None = None
        self._open_things: list[KvArena | MappedWeights] = []
        self._reader = threading.Thread(target=self._read, name="hbm-client", daemon=True)
        self._reader.start()

    @classmethod
    def connect(
        cls,
        socket_path: Path | str,
        *,
        client_name: str,
        fencing_token: int = 0,
        timeout_s: float = ANSWER_TIMEOUT_S,
    ) -> HbmClient:
        """Raises FileNotFoundError or ConnectionRefusedError where no manager listens, ManagerGoneError where it does
        not answer.
        """
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            # The kernel's own timeout: the socket stays a blocking one, and connecting waits for a place in the queue.
            seconds, rest = divmod(max(timeout_s, 0.001), 1)
            timeout = struct.pack("ll", int(seconds), int(rest * 1e6))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeout)
            sock.connect(os.fspath(socket_path))
        except BlockingIOError as error:
            sock.close()
            raise ManagerGoneError(f"the HBM manager at {socket_path} accepts no connection") from error
        except OSError:
            sock.close()
            raise
        client = cls(sock, timeout_s=timeout_s)
        try:
            client._ask(m.Welcome, lambda n: m.Hello(n, m.PROTOCOL_VERSION, client_name, fencing_token))
        except BaseException:
            client.close()
            raise
        return client

    def __enter__(self) -> HbmClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def info(self) -> ManagerInfo:
        """Budget, free bytes, clients, weights, arenas, newest fencing tokens."""
        return self._ask(m.Info, m.GetInfo)

    def findings(self) -> list[str]:
        """Has the manager prove its books; what it found wrong."""
        return self._ask(m.Findings, m.GetCheck).findings

    # Weights

    def weights_state(self, key: str) -> WeightsState | None:
        """None: nothing is known under this key."""
        reply = self._ask(m.WeightsStateReply, lambda n: m.GetWeightsState(n, key))
        if reply.state == "absent":
            return None
        return WeightsState(reply.state, reply.done_bytes, reply.total_bytes, reply.reason)

    def load_weights(self, key: str, plan: LoadPlan, *, on_progress: Callable[[int, int], None] | None = None) -> None:
        """Returns when weights of this key are ready: loaded now, before, or by another client's running load, which is
        joined.

        The key stands for the content: a plan for a key that is there is not looked at. `on_progress(done_bytes,
        total_bytes)` is called in the caller's thread. Raises LoadError (what file, what was found and expected),
        BudgetError; can be repeated.
        """
        plan = with_absolute_paths(plan)
        check_plan(plan)
        copies = [
            (c.file, c.file_offset, c.num_elements, c.source_dtype, c.segment, c.segment_offset, c.dtype)
            for c in plan.copies
        ]
        raw = msgspec.Raw(msgspec.msgpack.encode(copies))
        request, answers = self._begin()
        try:
            self._send(m.LoadWeights(request, key, dict(plan.segments), plan.manifest, raw))
            while True:
                answer, _ = self._next_answer(answers, timeout_s=None)
                if isinstance(answer, m.Done):
                    return
                if not isinstance(answer, m.Progress):
                    raise LoadError(f"the HBM manager answered {type(answer).__name__} to a load")
                if on_progress is not None and answer.total_bytes:
                    on_progress(answer.done_bytes, answer.total_bytes)
        finally:
            self._waiting.pop(request, None)

    def map_weights(self, key: str) -> MappedWeights:
        """Raises NotFoundError, or BusyError while they are being loaded."""
        reply, descriptors = self._ask_for_descriptors(
            m.MappedWeightsReply, lambda n: m.MapWeights(n, key), num_descriptors=1
        )
        backend = HostBackend()
        pool = backend.import_(descriptors[0], writable=False)
        ranges, segments = [], {}
        try:
            for name, (nbytes, extents) in reply.segments.items():
                size = sum(count for _start, count in extents) * GRANULE_BYTES
                target = backend.reserve(size)
                ranges.append(target)
                offset = 0
                for start, count in extents:
                    backend.map(target, offset, pool, Extent(start, count))
                    offset += count * GRANULE_BYTES
                segments[name] = MappedSegment(target.address, nbytes)
        finally:
            pool.close()
        weights = MappedWeights(self, reply.owner_id, segments, ranges, reply.manifest)
        self._open_things.append(weights)
        return weights

    def drop_weights(self, key: str) -> None:
        """Frees the key at once, the memory when the last reader has closed its mapping or exited. Ends a running
        load.
        """
        self._ask(m.Done, lambda n: m.DropWeights(n, key))

    def release_weights(self, owner_id: int) -> None:
        """For MappedWeights.close, after it has unmapped."""
        self._ask(m.Done, lambda n: m.ReleaseWeights(n, owner_id))

    # KV arenas

    def open_kv_arena(self, name: str, *, slots: int, slot_bytes: int, granules: int) -> KvArena:
        """The arena, as its one writer. slot_bytes is rounded up to granules (`KvArena.slot_bytes` tells).

        Same numbers as the last holder's: contents, records and `committed` are kept; others: made anew, zeroed. Where
        an older fencing token holds the arena this waits until that process has exited, and the manager kills it if
        need be. Raises FencedError for a token older than any seen, BudgetError, LimitError (vm.max_map_count).
        """
        slot_granules = -(-slot_bytes // GRANULE_BYTES)
        if not 1 <= slots <= m.MAX_SLOTS or slot_granules < 1 or granules < 1:
            raise HbmError(
                f"KV arena {name!r}: {slots} slots of {slot_bytes} bytes over {granules} granules; "
                f"expected 1 to {m.MAX_SLOTS} slots and at least one byte and one granule"
            )
        reply, descriptors = self._ask_for_descriptors(
            m.ArenaReply,
            lambda n: m.OpenArena(n, name, slots, slot_granules, granules),
            num_descriptors=2,
            timeout_s=TAKEOVER_TIMEOUT_S,
        )
        try:
            arena = KvArena(
                self,
                name=name,
                lease_id=reply.lease_id,
                slots=slots,
                slot_granules=slot_granules,
                extents=[Extent(start, count) for start, count in reply.extents],
                table=reply.table,
                pool_descriptor=descriptors[0],
                committed_descriptor=descriptors[1],
            )
        except HbmError:
            self.release_arena(reply.lease_id)
            raise
        self._open_things.append(arena)
        return arena

    def drop_kv_arena(self, name: str) -> None:
        """Free its granules and forget its records. BusyError while someone holds it."""
        self._ask(m.Done, lambda n: m.DropArena(n, name))

    def close(self) -> None:
        """Unmap everything that was mapped through this client, give its leases back, and close the socket.

        A forked child merely closes its descriptor: mappings and leases are its parent's.
        """
        if os.getpid() != self._pid:
            self._sock.close()
            return
        for thing in self._open_things:
            thing.close()
        self._open_things.clear()
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        if threading.current_thread() is not self._reader:
            self._reader.join()
        self._sock.close()

    # For KvArena

    def send_unanswered(self, message: object) -> None:
        self._send(message)

    def flush(self, lease_id: int) -> None:
        self._ask(m.Done, lambda n: m.Flush(n, lease_id))

    def release_arena(self, lease_id: int) -> None:
        self._ask(m.Done, lambda n: m.ReleaseArena(n, lease_id))

    def lease_fault(self, lease_id: int) -> str | None:
        """What the manager refused of this lease's operations."""
        return self._lease_faults.get(lease_id) if self._lease_faults else None

    def require_open(self) -> None:
        """Raises ManagerGoneError once the connection has ended, HbmError in a forked child."""
        if os.getpid() != self._pid:
            raise HbmError(f"this HbmClient belongs to process {self._pid}; a forked child must connect for itself")
        if self._gone is not None:
            raise ManagerGoneError(self._gone)

    # Questions and answers

    def _ask(self, answer_type: type[Answer], question: Callable[[int], object]) -> Answer:
        return self._ask_for_descriptors(answer_type, question, num_descriptors=0)[0]

    def _ask_for_descriptors(
        self,
        answer_type: type[Answer],
        question: Callable[[int], object],
        *,
        num_descriptors: int,
        timeout_s: float | None = None,
    ) -> tuple[Answer, list[int]]:
        request, answers = self._begin()
        try:
            self._send(question(request))
            answer, descriptors = self._next_answer(answers, timeout_s=timeout_s or self._timeout_s)
        finally:
            self._waiting.pop(request, None)
        if not isinstance(answer, answer_type) or len(descriptors) != num_descriptors:
            _close_all(descriptors)
            raise HbmError(f"the HBM manager answered {type(answer).__name__}, expected {answer_type.__name__}")
        return answer, descriptors

    def _begin(self) -> tuple[int, queue.SimpleQueue[_Answered | None]]:
        self.require_open()
        request = next(self._requests)
        answers: queue.SimpleQueue[_Answered | None] = queue.SimpleQueue()
        self._waiting[request] = answers
        return request, answers

    def _next_answer(self, answers: queue.SimpleQueue[_Answered | None], *, timeout_s: float | None) -> _Answered:
        self.require_open()
        try:
            answered = answers.get(timeout=timeout_s)
        except queue.Empty:
            raise ManagerGoneError(f"the HBM manager has not answered for {timeout_s:.0f} s") from None
        if answered is None:
            self.require_open()
            raise ManagerGoneError("the connection to the HBM manager has ended")
        message = answered[0]
        if isinstance(message, m.ErrorReply):
            _close_all(answered[1])
            raise error_of_kind(message.kind, message.text)
        return answered

    def _send(self, message: object) -> None:
        frame = wire.encode(message)
        with self._send_lock:
            try:
                self._sock.sendall(frame)
            except OSError as error:
                # A part of the frame may have gone out: nothing can follow it. Why it ended may still be there to be read.
                with contextlib.suppress(OSError):
                    self._sock.shutdown(socket.SHUT_WR)
                if threading.current_thread() is not self._reader:
                    self._reader.join(LAST_WORDS_TIMEOUT_S)
                with contextlib.suppress(OSError):
                    self._sock.shutdown(socket.SHUT_RDWR)
                self.require_open()
                raise ManagerGoneError(f"the HBM manager takes no messages: {error}") from error

    # The reader thread

    def _read(self) -> None:
        told = ""  # why the manager closes the connection, in its own words
        reason = "the HBM manager has ended, or closed the connection"
        frames = wire.manager_messages()
        try:
            while data := wire.receive(self._sock, self._descriptors):
                frames.add(data)
                for message, num_descriptors in frames.messages():
                    descriptors = [self._descriptors.popleft() for _ in range(num_descriptors)]
                    if isinstance(message, m.ErrorReply) and message.request == 0 and message.lease_id == 0:
                        told = message.text
                    self._deliver(message, descriptors)
        except (OSError, HbmError, IndexError) as error:
            reason = f"the connection to the HBM manager broke: {error}"
        self._gone = told or reason
        _close_all(self._descriptors)
        for answers in list(self._waiting.values()):
            answers.put(None)

    def _deliver(self, message: m.ManagerMessage, descriptors: list[int]) -> None:
        if isinstance(message, m.ErrorReply) and message.request == 0:
            if message.lease_id:
                self._lease_faults[message.lease_id] = message.text
            return
        answers = self._waiting.get(message.request)
        if answers is None:  # the caller gave up waiting
            _close_all(descriptors)
            if isinstance(message, m.ArenaReply):
                self._send(m.ReleaseArena(next(self._requests), message.lease_id))
        else:
            answers.put((message, descriptors))


_Answered = tuple[m.ManagerMessage, list[int]]


def _close_all(descriptors: Iterable[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
