"""The pool of granule ids: which are free, and who gets which. Pure; the bytes behind the ids are the backend's.

Free ids are kept as extents (runs of neighbours), since neighbours can be mapped in one call: `take` prefers one run,
the smallest that is long enough, and falls back to the longest runs there are. Called by `books` only.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple


class Extent(NamedTuple):
    """The granule ids [start, start + length)."""

    start: int
    length: int

    @property
    def end(self) -> int:
        return self.start + self.length


class GranulePool:
    """Free granule ids of [0, total)."""

    def __init__(self, total: int) -> None:
        if total <= 0:
            raise ValueError(f"a pool needs at least one granule, got {total}")
        self.total = total
        self._free: list[Extent] = [Extent(0, total)]  # sorted by start, never empty extents, never two that touch
        self._num_free = total

    @property
    def num_free(self) -> int:
        return self._num_free

    def free_extents(self) -> tuple[Extent, ...]:
        return tuple(self._free)

    def take(self, count: int) -> tuple[Extent, ...]:
        """`count` granules in as few runs as the free ones allow, sorted. Raises ValueError where fewer are free: ask
        `num_free` first.
        """
        if count <= 0 or count > self._num_free:
            raise ValueError(f"{count} granules asked for, {self._num_free} of {self.total} are free")
        fitting = [extent for extent in self._free if extent.length >= count]
        if fitting:
            return (self._take_from(min(fitting, key=lambda extent: (extent.length, extent.start)), count),)
        taken = []
        for extent in sorted(self._free, key=lambda extent: (-extent.length, extent.start)):
            part = self._take_from(extent, min(extent.length, count))
            taken.append(part)
            count -= part.length
            if count == 0:
                break
        return tuple(sorted(taken))

    def give(self, extents: Iterable[Extent]) -> list[Extent]:
        """Take granules back; returns them in as few runs as there are. Raises ValueError for ids outside the pool or
        already free, and changes nothing then.
        """
        given = sorted(extents)
        for extent in given:
            self._require_used(extent)
        for before, after in pairwise(given):
            if before.end > after.start:
                raise ValueError(f"granules {after.start}..{before.end - 1} are given back twice")
        runs = list(joined(given))
        for run in runs:
            self._insert(run)
        return runs

    def check(self) -> list[str]:
        """What is wrong with the free list; empty when nothing is."""
        findings = []
        previous_end = -1
        for extent in self._free:
            if extent.length <= 0:
                findings.append(f"free extent {extent} is empty")
            if extent.start <= previous_end:
                findings.append(f"free extent {extent} touches or overlaps the one that ends at {previous_end}")
            previous_end = extent.end
        if previous_end > self.total or (self._free and self._free[0].start < 0):
            findings.append(f"free extents leave the pool of {self.total} granules")
        counted = sum(extent.length for extent in self._free)
        if counted != self._num_free:
            findings.append(f"{counted} granules in free extents, {self._num_free} counted")
        return findings

    def _take_from(self, extent: Extent, count: int) -> Extent:
        index = bisect_left(self._free, extent)
        if extent.length == count:
            del self._free[index]
        else:
            self._free[index] = Extent(extent.start + count, extent.length - count)
        self._num_free -= count
        return Extent(extent.start, count)

    def _require_used(self, extent: Extent) -> None:
        if extent.length <= 0 or extent.start < 0 or extent.end > self.total:
            raise ValueError(f"{extent} is not a run of granules of [0, {self.total})")
        index = bisect_left(self._free, Extent(extent.start, 0))
        neighbours = self._free[max(0, index - 1) : index + 1]
        if any(free.start < extent.end and extent.start < free.end for free in neighbours):
            raise ValueError(f"{extent} holds granules that are free already")

    def _insert(self, extent: Extent) -> None:
        index = bisect_left(self._free, extent)
        start, end = extent.start, extent.end
        if index < len(self._free) and self._free[index].start == end:
            end = self._free[index].end
            del self._free[index]
        if index > 0 and self._free[index - 1].end == start:
            start = self._free[index - 1].start
            del self._free[index - 1]
            index -= 1
        self._free.insert(index, Extent(start, end - start))
        self._num_free += extent.length


def ids_of(extents: Sequence[Extent]) -> Sequence[int]:
    """All granule ids of some extents, in order; a range where there is one extent."""
    if len(extents) == 1:
        return range(extents[0].start, extents[0].end)
    return tuple(granule for extent in extents for granule in range(extent.start, extent.end))


def runs_of(granules: Sequence[int]) -> Iterator[tuple[int, Extent]]:
    """Splits a list of granule ids into runs of neighbours: (index of the run's first id, run)."""
    if len(granules) == 1:
        yield 0, Extent(granules[0], 1)
        return
    begin = 0
    for index in range(1, len(granules) + 1):
        if index == len(granules) or granules[index] != granules[index - 1] + 1:
            yield begin, Extent(granules[begin], index - begin)
            begin = index


def joined(extents: Iterable[Extent]) -> Iterator[Extent]:
    """The same granules in the same order, neighbours that follow each other in one extent."""
    start = end = -1
    for extent in extents:
        if extent.start == end:
            end = extent.end
            continue
        if end > start:
            yield Extent(start, end - start)
        start, end = extent.start, extent.end
    if end > start:
        yield Extent(start, end - start)


def split(extents: Sequence[Extent], counts: Sequence[int]) -> list[tuple[Extent, ...]]:
    """Cut extents, in order, into parts of so many granules; together the parts are all of them."""
    parts = []
    index = used = 0
    for count in counts:
        part = []
        while count:
            extent = extents[index]
            length = min(count, extent.length - used)
            part.append(Extent(extent.start + used, length))
            count -= length
            used += length
            if used == extent.length:
                index, used = index + 1, 0
        parts.append(tuple(part))
    return parts


def without(extents: Sequence[Extent], removed: Sequence[Extent]) -> tuple[Extent, ...]:
    """Sorted extents less sorted extents that lie within them."""
    rest = []
    index = 0
    for extent in extents:
        start = extent.start
        while index < len(removed) and removed[index].start < extent.end:
            if start < removed[index].start:
                rest.append(Extent(start, removed[index].start - start))
            start = removed[index].end
            index += 1
        if start < extent.end:
            rest.append(Extent(start, extent.end - start))
    return tuple(rest)
