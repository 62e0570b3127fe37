"""Weights as a client reaches them: mapped read-only and shared with every other reader, or exported, which is the
place where a process of another device can read their bytes.

Both hold a pin at the manager: the granules stay what they are until `close`, or this process's exit.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flexpert.hbm.backend import Range, map_back_to_back
from flexpert.hbm.errors import HbmError
from flexpert.hbm.granules import Extent, joined
from flexpert.hbm.host import GRANULE_BYTES, HostBackend, memory_at
from flexpert.hbm.limits import count_mappings, max_mappings, require_mappings
from flexpert.hbm.messages import Extents, PinnedReply

if TYPE_CHECKING:
    from flexpert.hbm.client import HbmClient

_FEW_MAPPINGS = 64  # so many fit without counting
_export_numbers = itertools.count()


@dataclass(frozen=True, slots=True)
class MappedSegment:
    address: int
    nbytes: int

    def memory(self) -> memoryview:
        """The bytes, read-only; not to be used after the mapping is closed."""
        return memory_at(self.address, self.nbytes, writable=False)


class MappedWeights:
    """Segments mapped read-only and shared, none copied. They stay mapped until `close`, or the client's.

    One range of `nbytes` from `address`, in which they lie back to back, each from a granule boundary on.
    """

    def __init__(self, client: HbmClient, pinned: PinnedReply, descriptor: int, *, populate: bool) -> None:
        """Takes the descriptor over."""
        backend = HostBackend()
        pool = backend.import_(descriptor, writable=False)
        extents = [extent for _nbytes, parts in pinned.segments.values() for extent in _extents(parts)]
        try:
            num_runs = sum(1 for _ in joined(extents))
            if num_runs > _FEW_MAPPINGS:
                found, limit = count_mappings(), max_mappings()
                require_mappings(needed=num_runs, found=found, limit=limit, for_what="mapping these weights")
            self._range: Range | None = map_back_to_back(backend, pool, extents, populate=populate)
        finally:
            pool.close()
        self._client, self._pin_id = client, pinned.pin_id
        self.manifest = pinned.manifest
        self.address, self.nbytes = self._range.address, self._range.nbytes
        self.segments: dict[str, MappedSegment] = {}
        address = self.address
        for name, (nbytes, parts) in pinned.segments.items():
            self.segments[name] = MappedSegment(address, nbytes)
            address += sum(count for _start, count in parts) * GRANULE_BYTES

    def __enter__(self) -> MappedWeights:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Unmap; no view of the memory may be used afterwards."""
        if self._range is not None:
            mapped, self._range = self._range, None
            HostBackend().release(mapped)
            with contextlib.suppress(HbmError):  # the manager has gone
                self._client.release_pin(self._pin_id)
            self._client.closed(self)


class ExportedSegments:
    """`path` can be opened by any process of this user, and of this pid namespace, until `close`; `extents` says where
    in it the bytes of each segment lie: [(file offset, bytes)].

    Whoever reads has to look afterwards whether `path` is still the file that it opened, as the loader helper does: it
    is for exactly as long as the bytes are held in place. It vanishes with this process, and soon after the manager.
    """

    def __init__(self, client: HbmClient, pinned: PinnedReply, descriptor: int) -> None:
        """Takes the descriptor over."""
        self._client, self._pin_id, self._lock = client, pinned.pin_id, threading.Lock()
        self._descriptor: int | None = _renumbered(descriptor)
        self._closed = False
        self.path = f"/proc/{os.getpid()}/fd/{self._descriptor}"
        self.manifest = pinned.manifest
        self.extents: dict[str, list[tuple[int, int]]] = {}
        for name, (nbytes, found) in pinned.segments.items():
            parts, rest = [], nbytes
            for extent in _extents(found):
                size = min(rest, extent.length * GRANULE_BYTES)
                parts.append((extent.start * GRANULE_BYTES, size))
                rest -= size
            self.extents[name] = parts

    def __enter__(self) -> ExportedSegments:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def withdraw(self) -> None:
        """The path is gone, the hold is not."""
        with self._lock:
            descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)

    def close(self) -> None:
        """Nobody can read by `path` from now on; who was reading will find out."""
        self.withdraw()
        with self._lock:
            was_closed, self._closed = self._closed, True
        if not was_closed:
            with contextlib.suppress(HbmError):  # the manager has gone
                self._client.release_pin(self._pin_id)
            self._client.closed(self)


def _extents(found: Extents) -> list[Extent]:
    return [Extent(start, count) for start, count in found]


def _renumbered(descriptor: int) -> int:
    """The same under a number that the last few hundred exports did not have: a reader must not take a later export of
    the same pool for the one it opened.
    """
    try:
        number = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 256 + next(_export_numbers) % 256)
    except OSError:  # the limit of open files is below that
        return descriptor
    os.close(descriptor)
    return number
