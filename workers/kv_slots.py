"""What the books of a KV arena know of one slot, and what must be true of all of them. Pure. Used by `workers.kv_books` only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from flexpert.workers.kv_geometry import KvGeometry


class Slot:
    """owner: the request whose KV is here. running: it computes here now. committed: of how many tokens the KV is whole."""

    __slots__ = ("backed_tokens", "committed", "granules", "index", "owner", "running")

    def __init__(self, index: int, backed_tokens: int) -> None:
        self.index = index
        self.owner = ""
        self.running = False
        self.committed = 0
        self.granules: list[int] = []
        self.backed_tokens = backed_tokens


def check_slots(
    geometry: KvGeometry, slots: Sequence[Slot], known_holders: Mapping[int, int], known_pins: Mapping[int, int]
) -> None:
    """known_holders, known_pins: granule -> how many slots, and running slots, are thought to hold it. Raises AssertionError."""
    holders: dict[int, int] = {}
    pins: dict[int, int] = {}
    for slot in slots:
        for granule in slot.granules:
            holders[granule] = holders.get(granule, 0) + 1
            if slot.running:
                pins[granule] = pins.get(granule, 0) + 1
    assert holders == known_holders, "the counts of slots that hold a granule are wrong"
    assert pins == known_pins, "the counts of running slots that hold a granule are wrong"
    for slot in slots:
        counts = [holders[granule] for granule in slot.granules]
        assert counts == sorted(counts, reverse=True), "shared granules are not the first of their slot"
        assert slot.backed_tokens == geometry.tokens_in(len(slot.granules)), "backed_tokens is stale"
        assert slot.committed <= slot.backed_tokens, "committed tokens without memory"
        shared_bytes = sum(count > 1 for count in counts) * geometry.granule_bytes
        own_from = slot.committed * geometry.kv_token_bytes
        assert not slot.running or shared_bytes <= own_from, "a running slot would write into a shared granule"
