"""Weights as a client sees them: segments mapped read-only and shared with every other reader."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flexpert.hbm.backend import Range
from flexpert.hbm.errors import HbmError
from flexpert.hbm.host import HostBackend, memory_at

if TYPE_CHECKING:
    from flexpert.hbm.client import HbmClient


@dataclass(frozen=True, slots=True)
class MappedSegment:
    address: int
    nbytes: int

    def memory(self) -> memoryview:
        """The bytes, read-only; not to be used after the mapping is closed."""
        return memory_at(self.address, self.nbytes, writable=False)


class MappedWeights:
    """Weights mapped read-only and shared, none copied. They stay mapped until `close`, or the client's."""

    def __init__(
        self, client: HbmClient, owner_id: int, segments: dict[str, MappedSegment], ranges: list[Range], manifest: bytes
    ) -> None:
        self.segments = segments
        self.manifest = manifest
        self._client, self._owner_id, self._ranges = client, owner_id, ranges

    def close(self) -> None:
        """Unmap; no view of the memory may be used afterwards."""
        if self._ranges:
            ranges, self._ranges = self._ranges, []
            for mapped in ranges:
                HostBackend().release(mapped)
            with contextlib.suppress(HbmError):  # the manager has gone
                self._client.release_weights(self._owner_id)
