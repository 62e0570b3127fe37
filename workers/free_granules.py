"""The free granules of a KV pool as runs of neighbouring ids, so that what a slot gets can be mapped in few calls.

A taker gets the neighbours of what it has, else the smallest run that is long enough, lowest ids first, so that long runs stay long;
it begins behind nobody who is growing, as far as there is a choice. What leaves the pool are the highest ids. Finding a run costs the
logarithm of their number.

Pure. Called by `workers.kv_books` and `workers.kv_trade` only; which slot holds a granule that is not free is written there.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Container, Iterable, Iterator

_CANDIDATES = 8  # how many runs that are long enough are looked at for one that nobody grows into


class FreeGranules:
    """A set of granule ids."""

    def __init__(self, granules: Iterable[int] = ()) -> None:
        self._end_of: dict[int, int] = {}  # first id of a run -> one past its last
        self._start_of: dict[int, int] = {}  # and back
        self._by_length: list[tuple[int, int]] = []  # (length, start), sorted
        self._count = 0
        self.give(granules)

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[int]:
        for start, end in self._end_of.items():
            yield from range(start, end)

    def lowest_run(self, length: int) -> int | None:
        """The first id of the lowest run of at least `length` ids; None where there is none."""
        at = bisect_left(self._by_length, (length, -1))
        return min((start for _, start in self._by_length[at:]), default=None)

    def give(self, granules: Iterable[int]) -> None:
        """Make these ids free again; they must not be free already."""
        ids = sorted(granules)
        first = 0
        for position in range(1, len(ids) + 1):
            if position == len(ids) or ids[position] != ids[position - 1] + 1:
                self._give_run(ids[first], ids[position - 1] + 1)
                first = position
        self._count += len(ids)

    def take(self, count: int, *, after: int | None = None, room: int = 0, growing: Container[int] = ()) -> list[int]:
        """`count` ids, where possible those that follow `after`. There must be as many (len).

        room: how many the taker will want in all, as far as is known. growing: who holds one of these will want the ids behind it.
        """
        if count > self._count:
            raise ValueError(f"{count} granules wanted, {self._count} are free: reclaim some first")
        taken: list[int] = []
        begin = None if after is None else after + 1
        while len(taken) < count:
            missing = count - len(taken)
            if begin is None or begin not in self._end_of:
                begin = self._open_run(missing, max(missing, room - len(taken)), growing)
            end = self._end_of[begin]
            cut = min(end, begin + missing)
            self._forget(begin, end)
            if cut < end:
                self._remember(cut, end)
            taken.extend(range(begin, cut))
            begin = cut
        self._count -= count
        return taken

    def take_highest(self, count: int) -> list[int]:
        """The `count` highest ids, sorted. There must be as many."""
        if count > self._count:
            raise ValueError(f"{count} granules wanted, {self._count} are free: reclaim some first")
        runs: list[range] = []
        missing = count
        for start in sorted(self._end_of, reverse=True):
            if not missing:
                break
            end = self._end_of[start]
            cut = max(start, end - missing)
            self._forget(start, end)
            if cut > start:
                self._remember(start, cut)
            runs.append(range(cut, end))
            missing -= end - cut
        self._count -= count
        return [granule for run in reversed(runs) for granule in run]

    def _open_run(self, count: int, room: int, growing: Container[int]) -> int:
        """Where to begin, so that `room` ids follow if possible, and whoever holds the ids before can grow too."""
        at = bisect_left(self._by_length, (room, -1))
        for length, start in self._by_length[at : at + _CANDIDATES]:
            if start - 1 not in growing:
                return start
            if length >= 2 * room:
                return self._cut(start, start + length // 2)
        length, start = self._by_length[-1]
        if start - 1 in growing and length // 2 >= count:
            return self._cut(start, start + length // 2)
        return start

    def _cut(self, start: int, middle: int) -> int:
        end = self._end_of[start]
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
        insort(self._by_length, (end - start, start))

    def _forget(self, start: int, end: int) -> None:
        del self._end_of[start]
        del self._start_of[end]
        del self._by_length[bisect_left(self._by_length, (end - start, start))]
