"""The HBM manager as its clients see it: one socket, one client. Used by workers, the node agent and the command line.

Calls may come from any thread (see `caller`). A child made by fork must not use its parent's client.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import socket
import struct
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from flexpert.hbm import messages as m
from flexpert.hbm.arena import KvArena
from flexpert.hbm.caller import Caller
from flexpert.hbm.errors import HbmError, LoadError, ManagerGoneError
from flexpert.hbm.granules import Extent
from flexpert.hbm.host import GRANULE_BYTES
from flexpert.hbm.loading import LoadPlan, check_plan, with_absolute_paths
from flexpert.hbm.mapped_weights import ExportedSegments, MappedWeights

ManagerInfo = m.Info
ANSWER_TIMEOUT_S = 30.0
TAKEOVER_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class WeightsState:
    """state: "loading" (done_bytes of total_bytes are read), "ready" or "failed" (reason)."""

    state: str
    done_bytes: int = 0
    total_bytes: int = 0
    reason: str = ""


class HbmClient(Caller):
    """A connection to the HBM manager. Its leases and mappings last until they are closed or this process exits."""

    def __init__(self, sock: socket.socket, *, timeout_s: float) -> None:
        super().__init__(sock, timeout_s=timeout_s)
        self._open_things: dict[int, KvArena | MappedWeights | ExportedSegments] = {}  # by id()
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
        """`load_segments` of a whole model."""
        self.load_segments(key, plan, on_progress=on_progress)

    def load_segments(self, key: str, plan: LoadPlan, *, on_progress: Callable[[int, int], None] | None = None) -> None:
        """Returns when the key has all segments of the plan: loaded now, before, or by another client's running load,
        which is joined.

        Segments that are there are not looked at, and the manifest of the load that made the key stays: a key stands
        for its content. What is missing is added as a whole or, raising BudgetError or LoadError (what file, what was
        found and expected), not at all: the key is as it was, and the call can be repeated. `on_progress(done_bytes,
        total_bytes)` is called in the caller's thread.
        """
        plan = with_absolute_paths(plan)
        check_plan(plan)
        copies = [
            (c.file, c.file_offset, c.num_elements, c.source_dtype, c.segment, c.segment_offset, c.dtype)
            + ((dataclasses.astuple(c.scale),) if c.scale else ())
            for c in plan.copies
        ]
        raw = msgspec.Raw(msgspec.msgpack.encode(copies))
        request, answers = self._begin()
        try:
            self._send(m.LoadSegments(request, key, dict(plan.segments), plan.manifest, raw))
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

    def segments(self, key: str) -> dict[str, int]:
        """The ready segments of a key and their bytes; {} for an unknown key."""
        return self._ask(m.SegmentsReply, lambda n: m.GetSegments(n, key)).segments

    def map_weights(self, key: str, names: Sequence[str] | None = None, *, populate: bool = False) -> MappedWeights:
        """These segments, back to back in this order in one range; None: all. Each begins at a granule boundary, so
        segments of whole granules have no gap between them. `populate`: the page tables are filled now, so that first
        use does not fault.

        The segments are held until the mapping is closed, dropped or not. Raises NotFoundError for a key or name that
        is not there, BusyError for one that is being loaded, LimitError (vm.max_map_count).
        """
        pinned, descriptor = self._pin(key, names)
        try:
            weights = MappedWeights(self, pinned, descriptor, populate=populate)
        except HbmError:
            self.release_pin(pinned.pin_id)
            raise
        self._open_things[id(weights)] = weights
        return weights

    def export_segments(self, key: str, names: Sequence[str] | None = None) -> ExportedSegments:
        """Where the bytes of these segments can be read by another process of this user, until it is closed: see
        `loading.peer_plan`. Holds them, and raises, as `map_weights` does.
        """
        pinned, descriptor = self._pin(key, names)
        exported = ExportedSegments(self, pinned, descriptor)
        self._open_things[id(exported)] = exported
        if self._gone is not None:
            self._on_gone()
        return exported

    def drop_segments(self, key: str, names: Sequence[str]) -> None:
        """Frees the names at once, the memory when the last reader has closed its mapping or exited. A load that is
        filling one of them ends, as failed, with all it was loading. NotFoundError for a name that is not there;
        nothing is dropped then.
        """
        self._ask(m.Done, lambda n: m.DropSegments(n, key, list(names)))

    def drop_weights(self, key: str) -> None:
        """`drop_segments` of all that the key has."""
        self._ask(m.Done, lambda n: m.DropSegments(n, key))

    # KV arenas

    def open_kv_arena(self, name: str, *, slots: int, slot_bytes: int, granules: int | None) -> KvArena:
        """The arena, as its one writer. slot_bytes is rounded up to granules (`KvArena.slot_bytes` tells). granules
        None: as many as it has, however often it grew or shrank; NotFoundError where there is no such arena.

        Same numbers as the last holder's: contents, records and `committed` are kept; others: made anew, zeroed. Where
        an older fencing token holds the arena this waits until that process has exited, and the manager kills it if
        need be. Raises FencedError for a token older than any seen, BudgetError, LimitError (vm.max_map_count).
        """
        slot_granules = -(-slot_bytes // GRANULE_BYTES)
        if not 1 <= slots <= m.MAX_SLOTS or slot_granules < 1 or (granules is not None and granules < 1):
            raise HbmError(
                f"KV arena {name!r}: {slots} slots of {slot_bytes} bytes over {granules} granules; "
                f"expected 1 to {m.MAX_SLOTS} slots and at least one byte and one granule"
            )
        reply, descriptors = self._ask_for_descriptors(
            m.ArenaReply,
            lambda n: m.OpenArena(n, name, slots, slot_granules, granules or 0),
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
        self._open_things[id(arena)] = arena
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
        for thing in list(self._open_things.values()):
            thing.close()
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        if threading.current_thread() is not self._reader:
            self._reader.join()
        self._sock.close()

    # For KvArena, MappedWeights and ExportedSegments

    def closed(self, thing: KvArena | MappedWeights | ExportedSegments) -> None:
        """It has been closed: nothing is left to do for it when this client is."""
        self._open_things.pop(id(thing), None)

    def release_pin(self, pin_id: int) -> None:
        """What was pinned can no longer be reached from this process."""
        self._ask(m.Done, lambda n: m.ReleasePin(n, pin_id))

    def send_unanswered(self, message: object) -> None:
        self._send(message)

    def flush(self, lease_id: int) -> None:
        self._ask(m.Done, lambda n: m.Flush(n, lease_id))

    def release_arena(self, lease_id: int) -> None:
        self._ask(m.Done, lambda n: m.ReleaseArena(n, lease_id))

    def grow_arena(self, lease_id: int, granules: int) -> list[Extent]:
        reply = self._ask(m.GrownReply, lambda n: m.GrowArena(n, lease_id, granules))
        return [Extent(start, count) for start, count in reply.extents]

    def shrink_arena(self, lease_id: int, extents: Sequence[Extent]) -> None:
        self._ask(m.Done, lambda n: m.ShrinkArena(n, lease_id, [(extent.start, extent.length) for extent in extents]))

    def lease_fault(self, lease_id: int) -> str | None:
        """What the manager refused of this lease's operations."""
        return self._lease_faults.get(lease_id) if self._lease_faults else None

    # Private

    def _pin(self, key: str, names: Sequence[str] | None) -> tuple[m.PinnedReply, int]:
        """The pinned segments, and a descriptor of the pool to read them with."""
        wanted = None if names is None else list(names)
        pinned, [descriptor] = self._ask_for_descriptors(
            m.PinnedReply, lambda n: m.PinSegments(n, key, wanted), num_descriptors=1
        )
        return pinned, descriptor

    def _on_gone(self) -> None:
        """The manager, and its hold on the segments, has gone: nobody is to read them on our word any longer."""
        for thing in list(self._open_things.values()):
            if isinstance(thing, ExportedSegments):
                thing.withdraw()
