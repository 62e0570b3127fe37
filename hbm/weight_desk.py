"""Answers what clients ask about weights, and runs the loads that fill them.

A question for segments is pursued until the key has all of them: while another load fills some of them it waits for
that one; then what is missing is loaded, all of it or nothing. A load that fails fails everyone who waits for it. The
load of a client that dies goes on. Called by `manager.Manager`, on the daemon's one thread.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from flexpert.hbm import messages as m
from flexpert.hbm.backend import Pool
from flexpert.hbm.books import Books
from flexpert.hbm.describe import state_of
from flexpert.hbm.errors import HbmError, LoadError
from flexpert.hbm.helpers import Helpers
from flexpert.hbm.loads import Load
from flexpert.hbm.loop import EventLoop
from flexpert.hbm.peers import Peers

log = logging.getLogger(__name__)

SPARE_DELAY_S = 1.0  # the caller has things to do with what was loaded, and needs the cores

WeightsMessage = m.GetWeightsState | m.GetSegments | m.LoadSegments | m.PinSegments | m.ReleasePin | m.DropSegments


class WeightDesk:
    """settle: to be called where granules may have become free; discard: before any are handed out."""

    def __init__(
        self,
        loop: EventLoop,
        pool: Pool,
        books: Books,
        peers: Peers,
        *,
        settle: Callable[[], None],
        discard: Callable[[], None],
    ) -> None:
        self._loop, self._pool, self._books, self._peers = loop, pool, books, peers
        self._settle, self._discard = settle, discard
        self._loads: dict[int, Load] = {}
        self._helpers = Helpers()
        loop.call_later(SPARE_DELAY_S, self._prepare)

    def answer(self, client_id: int, message: WeightsMessage) -> None:
        """Raises HbmError for what is refused."""
        weights = self._books.weights
        match message:
            case m.GetWeightsState():
                self._peers.send(client_id, self._state(message))
                return
            case m.GetSegments():
                reply = m.SegmentsReply(message.request, weights.ready_segments(message.key))
                self._peers.send(client_id, reply)
                return
            case m.LoadSegments():
                self._pursue(client_id, message)
                return
            case m.PinSegments():
                self._pin(client_id, message)
                return
            case m.ReleasePin():
                weights.unpin(message.pin_id, client_id)
            case m.DropSegments():
                for load_id in weights.drop(message.key, message.names):
                    self._loads[load_id].kill("the weights were dropped while they were being loaded")
        self._peers.send(client_id, m.Done(message.request))

    def close(self) -> None:
        """The daemon ends: no helper outlives it."""
        self._helpers.close()
        for load in list(self._loads.values()):
            load.process.kill()
            load.process.wait()

    # Loading

    def _pursue(self, client_id: int, message: m.LoadSegments) -> None:
        missing, load_id = self._books.weights.outstanding(message.key, message.segments)
        if not missing and load_id is None:
            self._peers.send(client_id, m.Done(message.request))
            return
        load = self._start(message, missing) if load_id is None else self._loads[load_id]
        load.waiters.append((client_id, message))
        self._peers.send(client_id, m.Progress(message.request, load.done_bytes, load.total_bytes))

    def _start(self, message: m.LoadSegments, missing: dict[str, int]) -> Load:
        record = self._books.begin_load(message.key, missing, message.manifest)
        self._discard()
        try:
            load = Load(
                self._loop,
                self._pool,
                record,
                bytes(message.copies),
                self._helpers,
                on_progress=self._progressed,
                on_end=self._ended,
            )
        except OSError as error:
            reason = f"the loader helper could not be started: {error}"
            self._books.weights.load_failed(record.load_id, reason)
            raise LoadError(reason) from error
        self._loads[record.load_id] = load
        log.info("loading %d segments of weights %r with helper pid %d", len(missing), message.key, load.process.pid)
        return load

    def _prepare(self) -> None:
        """Have a helper that waits for the next load, where none runs."""
        if not self._loads:
            try:
                self._helpers.prepare()
            except OSError as error:
                log.warning("no loader helper could be started in advance: %s", error)

    def _progressed(self, load: Load) -> None:
        for client_id, message in load.waiters:
            if self._peers.is_keeping_up(client_id):
                self._peers.send(client_id, m.Progress(message.request, load.done_bytes, load.total_bytes))

    def _ended(self, load: Load, reason: str | None) -> None:
        load_id = load.load_id
        del self._loads[load_id]
        self._loop.call_later(SPARE_DELAY_S, self._prepare)
        weights = self._books.weights
        key = weights.loads[load_id].key
        if reason is None:
            weights.load_ready(load_id)
            log.info("weights %r: segments are ready, %d bytes read", key, load.done_bytes)
        else:
            weights.load_failed(load_id, reason)
            log.error("loading segments of weights %r failed: %s", key, reason)
        self._settle()
        for client_id, message in load.waiters:
            try:
                if reason is not None:
                    raise LoadError(f"weights {key!r}: {reason}")
                if client_id in self._books.clients and self._books.clients[client_id].connected:
                    self._pursue(client_id, message)
            except HbmError as error:
                self._peers.send(client_id, m.ErrorReply(message.request, error.kind, str(error)))
        self._settle()

    # Reading

    def _pin(self, client_id: int, message: m.PinSegments) -> None:
        pin, manifest = self._books.weights.pin(message.key, message.names, client_id)
        segments = {segment.name: (segment.nbytes, segment.extents) for segment in pin.segments}
        reply = m.PinnedReply(message.request, pin.pin_id, segments, manifest)
        self._peers.send(client_id, reply, [self._pool.export(writable=False)])

    def _state(self, message: m.GetWeightsState) -> m.WeightsStateReply:
        key = message.key
        records = self._books.weights.loads.values()
        running = [self._loads[found.load_id] for found in records if found.key == key and not found.abandoned]
        done_bytes, total_bytes = sum(load.done_bytes for load in running), sum(load.total_bytes for load in running)
        reason = self._books.weights.failures.get(key, "")
        state = state_of(self._books, key)
        return m.WeightsStateReply(message.request, state, done_bytes, total_bytes, reason)
