"""The proof that the books are right: owners, leases, pins and mappings against each other. Pure, changes nothing.

`books.Books.check` calls it; every finding is a sentence that names what disagrees.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING

from flexpert.hbm.granules import ids_of

if TYPE_CHECKING:
    from flexpert.hbm.books import Books
    from flexpert.hbm.records import Segment


def findings(books: Books) -> list[str]:
    """What is wrong; empty when nothing is."""
    return [*books.ledger.pool.check(), *_owners(books), *_weights(books), *_leases(books), *_mappings(books)]


def _owners(books: Books) -> list[str]:
    found_wrong: list[str] = []
    pool = books.ledger.pool
    expected = array("q", bytes(8 * pool.total))
    owned = [(arena.owner_id, f"arena {arena.name!r}", arena.extents) for arena in books.arenas.values()]
    for segment in _segments(books):
        owned.append((segment.owner_id, f"weights {segment.key!r}, segment {segment.name!r}", segment.extents))
    owned.append((-1, "the free list", pool.free_extents()))
    for owner_id, what, extents in owned:
        for granule in ids_of(extents):
            if expected[granule] != 0:
                found_wrong.append(f"granule {granule} of {what} has another owner, {expected[granule]}")
            expected[granule] = owner_id
    for granule, (found, wanted) in enumerate(zip(books.ledger.owner_of, expected, strict=True)):
        if found != max(wanted, 0) or wanted == 0:
            found_wrong.append(
                f"granule {granule} is entered for owner {found}, held by {wanted or 'nobody, and not free'}"
            )
    return found_wrong


def _segments(books: Books) -> Iterator[Segment]:
    for weight_set in books.weights.sets.values():
        yield from weight_set.segments.values()
    yield from books.weights.dropped.values()


def _weights(books: Books) -> list[str]:
    found_wrong: list[str] = []
    weights = books.weights
    found_wrong.extend(f"weights {key!r} have no segment" for key, found in weights.sets.items() if not found.segments)
    pins: Counter[int] = Counter()
    for pin in weights.pins.values():
        pins.update(segment.owner_id for segment in pin.segments)
        if pin.client_id not in books.clients:
            found_wrong.append(f"pin {pin.pin_id}: its reader, client {pin.client_id}, is not known")
    for segment in _segments(books):
        what = f"weights {segment.key!r}, segment {segment.name!r}"
        num_pins = pins.pop(segment.owner_id, 0)
        if num_pins != segment.num_pins:
            found_wrong.append(f"{what}: {segment.num_pins} pins are entered, {num_pins} are held")
        load = weights.loads.get(segment.load_id)
        if segment.load_id and (load is None or load.segments.get(segment.name) is not segment or num_pins):
            found_wrong.append(f"{what}: load {segment.load_id} is not known, or does not fill it alone")
        if load is not None and load.abandoned != segment.dropped:
            found_wrong.append(f"{what}: dropped={segment.dropped}, its load abandoned={load.abandoned}")
        under_its_name = segment.key in weights.sets and weights.sets[segment.key].segments.get(segment.name) is segment
        if segment.dropped == under_its_name or (segment.dropped and load is None and not num_pins):
            found_wrong.append(
                f"{what}: dropped={segment.dropped}, under its name={under_its_name}, {num_pins} pins, load {segment.load_id}"
            )
        if sum(extent.length for extent in segment.extents) != books.ledger.granules_for(segment.nbytes):
            found_wrong.append(f"{what}: {segment.extents} are not the granules of {segment.nbytes} bytes")
    found_wrong.extend(f"pins hold segment {owner_id}, which is not known" for owner_id in pins)
    return found_wrong


def _leases(books: Books) -> list[str]:
    found_wrong: list[str] = []
    for arena in books.arenas.values():
        lease, waiter = arena.lease, arena.waiter
        newest = books.tokens.get(arena.name)
        if waiter is not None and (lease is None or waiter.client_id not in books.clients):
            found_wrong.append(f"arena {arena.name!r}: someone waits for nobody, or has gone")
        if (
            waiter is not None
            and waiter.client_id in books.clients
            and books.clients[waiter.client_id].fencing_token != newest
        ):
            found_wrong.append(f"arena {arena.name!r}: the waiter does not have the newest token {newest}")
        if lease is None:
            continue
        if books.leases.get(lease.lease_id) is not arena:
            found_wrong.append(f"arena {arena.name!r}: its lease {lease.lease_id} is not in the list of leases")
        holder = books.clients.get(lease.client_id)
        if holder is None:
            found_wrong.append(f"arena {arena.name!r}: its holder, client {lease.client_id}, is not known")
        elif holder.connected == lease.ending:
            found_wrong.append(
                f"arena {arena.name!r}: lease ending={lease.ending}, its holder connected={holder.connected}"
            )
        if newest is None or lease.fencing_token > newest:
            found_wrong.append(f"arena {arena.name!r}: lease has token {lease.fencing_token}, newest seen is {newest}")
    if len(books.leases) != sum(arena.lease is not None for arena in books.arenas.values()):
        found_wrong.append(f"{len(books.leases)} leases are listed, but not as many arenas are held")
    return found_wrong


def _mappings(books: Books) -> list[str]:
    found_wrong: list[str] = []
    for arena in books.arenas.values():
        if (
            sum(extent.length for extent in arena.extents) != arena.geometry.granules
            or len(arena.table) != arena.geometry.slots
        ):
            found_wrong.append(f"arena {arena.name!r} does not have its {arena.geometry}")
        if any(before.end >= after.start for before, after in pairwise(arena.extents)):
            found_wrong.append(f"arena {arena.name!r}: its extents touch or are not sorted: {arena.extents}")
        for number, slot in enumerate(arena.table):
            if len(slot.granules) > arena.geometry.slot_granules:
                found_wrong.append(
                    f"arena {arena.name!r}, slot {number}: {len(slot.granules)} granules are mapped, too many"
                )
            found_wrong.extend(
                f"arena {arena.name!r}, slot {number}: granule {granule} belongs to {books.ledger.owner_of[granule]}"
                for granule in slot.granules
                if books.ledger.owner_of[granule] != arena.owner_id
            )
    return found_wrong
