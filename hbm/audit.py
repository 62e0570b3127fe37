"""The proof that the books are right: owners, leases and mappings against each other. Pure, changes nothing.

`books.Books.check` calls it; every finding is a sentence that names what disagrees.
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING

from flexpert.hbm.granules import ids_of

if TYPE_CHECKING:
    from flexpert.hbm.books import Books


def findings(books: Books) -> list[str]:
    """What is wrong; empty when nothing is."""
    return [*books.pool.check(), *_owners(books), *_leases(books), *_mappings(books)]


def _owners(books: Books) -> list[str]:
    found_wrong: list[str] = []
    expected = array("q", bytes(8 * books.pool.total))
    owned = [(arena.owner_id, f"arena {arena.name!r}", arena.extents) for arena in books.arenas.values()]
    for weight_set in [*books.weights.values(), *books.dropped]:
        for name, segment in weight_set.segments.items():
            owned.append((weight_set.owner_id, f"weights {weight_set.key!r}, segment {name!r}", segment.extents))
    owned.append((-1, "the free list", books.pool.free_extents()))
    for owner_id, what, extents in owned:
        for granule in ids_of(extents):
            if expected[granule] != 0:
                found_wrong.append(f"granule {granule} of {what} has another owner, {expected[granule]}")
            expected[granule] = owner_id
    for granule, (found, wanted) in enumerate(zip(books.owner_of, expected, strict=True)):
        if found != max(wanted, 0) or wanted == 0:
            found_wrong.append(
                f"granule {granule} is entered for owner {found}, held by {wanted or 'nobody, and not free'}"
            )
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
    for weight_set in [*books.weights.values(), *books.dropped]:
        found_wrong.extend(
            f"weights {weight_set.key!r}: reader {client_id} is not known, or reads nothing"
            for client_id, times in weight_set.readers.items()
            if client_id not in books.clients or times <= 0
        )
        if weight_set.dropped == (books.weights.get(weight_set.key) is weight_set) or (
            weight_set.dropped and not weight_set.readers
        ):
            found_wrong.append(
                f"weights {weight_set.key!r}: dropped={weight_set.dropped} with {len(weight_set.readers)} readers"
            )
    return found_wrong


def _mappings(books: Books) -> list[str]:
    found_wrong: list[str] = []
    for arena in books.arenas.values():
        if (
            sum(extent.length for extent in arena.extents) != arena.geometry.granules
            or len(arena.table) != arena.geometry.slots
        ):
            found_wrong.append(f"arena {arena.name!r} does not have its {arena.geometry}")
        for number, slot in enumerate(arena.table):
            if len(slot.granules) > arena.geometry.slot_granules:
                found_wrong.append(
                    f"arena {arena.name!r}, slot {number}: {len(slot.granules)} granules are mapped, too many"
                )
            found_wrong.extend(
                f"arena {arena.name!r}, slot {number}: granule {granule} belongs to {books.owner_of[granule]}"
                for granule in slot.granules
                if books.owner_of[granule] != arena.owner_id
            )
    return found_wrong
