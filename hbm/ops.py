"""What a worker asks of its KV arena, as values.

The worker's books (pure) emit these, `KvArena.apply` carries them out and has the manager record them, in order.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Claim:
    """From here on `slot` belongs to `request_id` ("" = nobody); its committed count is set to `committed_tokens`."""

    slot: int
    request_id: str
    committed_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Map:
    """Back the slot's granules [first_granule, first_granule + len(granules)) with these granule ids of the pool."""

    slot: int
    first_granule: int
    granules: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Unmap:
    """Take the backing away from `first_granule` to the end of the slot."""

    slot: int
    first_granule: int = 0


ArenaOp = Claim | Map | Unmap
