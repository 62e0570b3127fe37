"""What the manager tells of itself: the books as one `Info` message. Changes nothing. Called by `manager`."""

from __future__ import annotations

import os
from collections.abc import Iterable

from flexpert.hbm import messages as m
from flexpert.hbm.books import Books
from flexpert.hbm.records import Arena, Segment


def describe(books: Books, request: int) -> m.Info:
    ledger, size = books.ledger, books.ledger.granule_bytes
    return m.Info(
        request,
        os.getpid(),
        size,
        ledger.pool.total * size,
        ledger.pool.num_free * size,
        [(client.name, client.pid) for client in books.clients.values()],
        _weights(books),
        [_arena(books, arena) for arena in books.arenas.values()],
        books.tokens,
    )


def state_of(books: Books, key: str) -> str:
    """As in `messages.WeightsStateReply`."""
    weight_set = books.weights.sets.get(key)
    if weight_set is None:
        return "failed" if key in books.weights.failures else "absent"
    return "loading" if any(segment.load_id for segment in weight_set.segments.values()) else "ready"


def _weights(books: Books) -> list[m.WeightsInfo]:
    weights = books.weights
    readers: dict[tuple[str, bool], set[int]] = {}  # (key, dropped) -> pids
    for pin in weights.pins.values():
        for kind in {(segment.key, segment.dropped) for segment in pin.segments}:
            readers.setdefault(kind, set()).add(books.clients[pin.client_id].pid)
    dropped: dict[str, list[Segment]] = {}
    for segment in weights.dropped.values():
        dropped.setdefault(segment.key, []).append(segment)
    return [
        *(
            _info(key, state_of(books, key), found.segments.values(), readers.get((key, False), ()))
            for key, found in weights.sets.items()
        ),
        *(m.WeightsInfo(key, "failed", 0, []) for key in weights.failures),
        *(_info(key, "dropped", segments, readers.get((key, True), ())) for key, segments in dropped.items()),
    ]


def _info(key: str, state: str, segments: Iterable[Segment], readers: Iterable[int]) -> m.WeightsInfo:
    nbytes: dict[str, int] = {}
    for segment in segments:  # a name may have been dropped more than once
        nbytes[segment.name] = nbytes.get(segment.name, 0) + segment.nbytes
    return m.WeightsInfo(key, state, sum(nbytes.values()), sorted(readers), nbytes)


def _arena(books: Books, arena: Arena) -> m.ArenaInfo:
    lease, geometry = arena.lease, arena.geometry
    holder_pid = books.clients[lease.client_id].pid if lease is not None else 0
    ending = lease is not None and lease.ending
    token = books.tokens[arena.name]
    return m.ArenaInfo(arena.name, geometry.slots, geometry.slot_granules, geometry.granules, token, holder_pid, ending)
