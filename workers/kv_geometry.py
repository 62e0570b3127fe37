"""The shape of a KV arena, and the two small values that its books take and give.

Pure. Used by `workers.kv_books` and by the engine, which lays the arena out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class KvGeometry:
    """The shape of a KV arena.

    shareable: a granule can be mapped in several slots (host memory, CUDA virtual memory). Plain torch memory cannot do that:
    there every slot is backed from the start, granules play no part, and a reused prefix is copied whole.
    """

    slots: int
    max_context_tokens: int
    kv_token_bytes: int
    granule_bytes: int
    shareable: bool = True

    def __post_init__(self) -> None:
        for name in ("slots", "max_context_tokens", "kv_token_bytes", "granule_bytes"):
            if getattr(self, name) < 1:
                raise ValueError(f"KvGeometry.{name} is {getattr(self, name)}; it must be at least 1")

    def granules_for(self, tokens: int) -> int:
        """How many granules the KV of the first `tokens` tokens lies in (0 where granules play no part)."""
        return -(-tokens * self.kv_token_bytes // self.granule_bytes) if self.shareable else 0

    def tokens_in(self, granules: int) -> int:
        """How many whole tokens the first `granules` granules of a slot can hold."""
        if not self.shareable:
            return self.max_context_tokens
        return min(self.max_context_tokens, granules * self.granule_bytes // self.kv_token_bytes)


class SlotRecord(Protocol):
    """What the HBM manager recorded for a slot (hbm.SlotRecord)."""

    @property
    def slot(self) -> int: ...
    @property
    def request_id(self) -> str: ...
    @property
    def granules(self) -> Sequence[int]: ...
    @property
    def committed(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Grant:
    """A slot for a request, in which the KV of its first `reused_tokens` tokens lies already."""

    slot: int
    reused_tokens: int
