"""The free granules of a KV pool as runs of neighbouring ids, so that what a slot gets can be mapped in few calls.

Pure. Called by `workers.kv_books` only; which slot holds a granule that is not free is written there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from heapq import heapify, heappop, heappush


class FreeGranules:
    """A set of granule ids. `take` hands out neighbours of a given id first, then pieces of the longest runs."""

    def __init__(self, granules: Iterable[int] = ()) -> None:
        self._end_of: dict[int, int] = {}  # first id of a run -> one past its last
        self._start_of: dict[int, int] = {}  # and back
        self._longest: list[tuple[int, int, int]] = []  # heap of (-length, start, end), past runs too
        self._count = 0
        self.give(granules)

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[int]:
        for start, end in self._end_of.items():
            yield from range(start, end)

    def give(self, granules: Iterable[int]) -> None:
        """Make these ids free again; they must not be free already."""
        ids = sorted(granules)
        first = 0
        for position in range(1, len(ids) + 1):
            if position == len(ids) or ids[position] != ids[position - 1] + 1:
                self._give_run(ids[first], ids[position - 1] + 1)
                first = position
        self._count += len(ids)

    def take(self, count: int, *, after: int | None = None) -> list[int]:
        """`count` ids, where possible those that follow `after`. There must be as many (len)."""
        if count > self._count:
            raise ValueError(f"{count} granules wanted, {self._count} are free: reclaim some first")
        taken: list[int] = []
        wanted_start = None if after is None else after + 1
        while len(taken) < count:
            missing = count - len(taken)
            if wanted_start is None or wanted_start not in self._end_of:
                wanted_start = self._open_run(missing)
            end = self._end_of[wanted_start]
            cut = min(end, wanted_start + missing)
            self._forget(wanted_start, end)
            if cut < end:
                self._remember(cut, end)
            taken.extend(range(wanted_start, cut))
            wanted_start = cut
        self._count -= count
        return taken

    def _open_run(self, count: int) -> int:
        """Where to begin in the longest run: in its middle, so that whoever holds the ids before it can grow too."""
        while True:
            _, start, end = self._longest[0]
            if self._end_of.get(start) == end:
                break
            heappop(self._longest)
        middle = start + (end - start) // 2
        if end - middle < count or start == middle:
            return start
        self._forget(start, end)
        self._remember(start, middle)
        self._remember(middle, end)
        return middle

    def _give_run(self, start: int, end: int) -> None:
        if start in self._start_of:
            before = self._start_of[start]
            self._forget(before, start)
            start = before
        if end in self._end_of:
            after_end = self._end_of[end]
            self._forget(end, after_end)
            end = after_end
        self._remember(start, end)

    def _remember(self, start: int, end: int) -> None:
        self._end_of[start] = end
        self._start_of[end] = start
        heappush(self._longest, (start - end, start, end))
        if len(self._longest) > 4 * len(self._end_of) + 64:
            self._longest = [(first - last, first, last) for first, last in self._end_of.items()]
            heapify(self._longest)

    def _forget(self, start: int, end: int) -> None:
        del self._end_of[start]
        del self._start_of[end]
