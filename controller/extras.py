"""Integer shares of a table: how many groups of each layer each rank gets, when they do not divide evenly. Pure; part of the planner.

A layer of E groups on n ranks gives each E // n and E % n of them one more, an *extra*. Over the layers the extras go round so that the
ranks' totals differ by at most one. An extra costs nothing where the rank holds that many groups of the layer already, and one moved group
elsewhere; `spread_extras` takes an assignment of least cost.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

Table = list[list[int]]


def spread_extras(row_sizes: Sequence[int], totals: Sequence[int] | None, counts: Sequence[Sequence[int]]) -> Table:
    """[row][column] -> share; rows sum to row_sizes. totals: what each column sums to, None for as equal as can be. counts: held now."""
    size = len(counts[0])
    if totals is None:
        base = [[row // size] * size for row in row_sizes]
    else:
        whole = sum(totals)
        base = [[row * total // whole for total in totals] for row in row_sizes]
    extras = [row - sum(shares) for row, shares in zip(row_sizes, base, strict=True)]
    if not any(extras):
        return base
    free = [
        [have > share for have, share in zip(held, shares, strict=True)]
        for held, shares in zip(counts, base, strict=True)
    ]
    if totals is None:
        columns = _even_columns(sum(extras), free)
    else:
        columns = [total - sum(shares) for total, shares in zip(totals, zip(*base, strict=True), strict=True)]
    taken = _greedy(extras, columns, free)
    _improve(taken, free, even=totals is None)
    for shares, row in zip(base, taken, strict=True):
        for column in row:
            shares[column] += 1
    return base


def _even_columns(extras: int, free: Sequence[Sequence[bool]]) -> list[int]:
    """How many extras each column takes: equal but for one, which goes to those that have most of them at no cost."""
    size = len(free[0])
    wishes = [sum(column) for column in zip(*free, strict=True)]
    order = sorted(range(size), key=lambda column: (-wishes[column], column))
    columns = [extras // size] * size
    for column in order[: extras % size]:
        columns[column] += 1
    return columns


def _greedy(extras: Sequence[int], columns: list[int], free: Sequence[Sequence[bool]]) -> list[set[int]]:
    """Row by row: first the columns that need an extra in every row left, then those where it is free, then those that still need most."""
    left = list(columns)
    taken = []
    for row, number in enumerate(extras):
        rows_left = len(extras) - row
        here = free[row]
        order = sorted(range(len(left)), key=lambda c: (left[c] <= 0, left[c] < rows_left, not here[c], -left[c], c))[
            :number
        ]
        for column in order:
            left[column] -= 1
        taken.append(set(order))
    return taken


def _improve(taken: list[set[int]], free: Sequence[Sequence[bool]], *, even: bool) -> None:
    """Exchange extras along cycles of columns for as long as that saves moves. With no such cycle left the cost is the least: this is a
    transportation problem, and a flow without negative cycles is optimal."""
    least = sum(max(0, len(columns) - sum(here)) for columns, here in zip(taken, free, strict=True))
    exchange = _Exchange(taken, free, even=even)
    while exchange.cost > least:
        cycle = exchange.short_cycle() or exchange.any_cycle()
        if not cycle:
            break
        exchange.apply(cycle)
    for row, columns in enumerate(taken):
        columns.clear()
        columns.update(column for column, rows in enumerate(exchange.taken) if rows >> row & 1)


class _Exchange:
    """Sets are bits of integers here. taken[c], free[c]: rows in which column c has an extra, or could have one at no cost. saves[a],
    keeps[a], costs[a]: columns to which an extra of column a can go, in the best row, at a cost of -1, 0 or 1.

    Where column sums may differ by one (`even`), a lesser and a greater one may also change places: an exchange without a row that costs
    nothing, from the lesser to the greater, closes a chain that went the other way.
    """

    def __init__(self, taken: Sequence[set[int]], free: Sequence[Sequence[bool]], *, even: bool) -> None:
        self.size = len(free[0])
        self.even = even
        self.taken = [sum(1 << row for row, columns in enumerate(taken) if c in columns) for c in range(self.size)]
        self.free = [sum(1 << row for row, here in enumerate(free) if here[c]) for c in range(self.size)]
        self.saves, self.keeps, self.costs = [0] * self.size, [0] * self.size, [0] * self.size
        for column in range(self.size):
            self._look(column, range(column + 1, self.size))

    @property
    def cost(self) -> int:
        return sum((rows & ~free).bit_count() for rows, free in zip(self.taken, self.free, strict=True))

    def apply(self, cycle: Sequence[int]) -> None:
        """An extra goes from each column to the next, from the last to the first."""
        steps = list(zip(cycle, [*cycle[1:], cycle[0]], strict=True))
        rows = [self._row(a, b) for a, b in steps]
        for (a, b), row in zip(steps, rows, strict=True):
            self.taken[a] &= ~row
            self.taken[b] |= row
        for column in cycle:
            self._look(column, range(self.size))

    def short_cycle(self) -> list[int]:
        """One that saves a move in one exchange and costs nothing in the others; nearly all are."""
        for first in range(self.size):
            if not self.saves[first]:
                continue
            before = dict.fromkeys(_bits(self.saves[first]), first)
            seen, edge = self.saves[first], self.saves[first]
            while edge and not edge >> first & 1:
                reached = 0
                for column in _bits(edge):
                    new = (self.saves[column] | self.keeps[column]) & ~seen
                    seen |= new
                    reached |= new
                    before.update(dict.fromkeys(_bits(new), column))
                edge = reached
            if edge:
                cycle = [before[first]]
                while cycle[-1] != first:
                    cycle.append(before[cycle[-1]])
                return cycle[::-1]
        return []

    def any_cycle(self) -> list[int]:
        """Bellman and Ford: a cycle that costs less than nothing, or none."""
        distance, before = [0] * self.size, [-1] * self.size
        changed = -1
        for _ in range(self.size):
            changed = -1
            for a in range(self.size):
                for change, columns in ((-1, self.saves[a]), (0, self.keeps[a]), (1, self.costs[a])):
                    reach = distance[a] + change
                    for b in _bits(columns):
                        if reach < distance[b]:
                            distance[b], before[b], changed = reach, a, b
            if changed < 0:
                return []
        for _ in range(self.size):
            changed = before[changed]
        cycle = [changed]
        while before[cycle[-1]] != changed:
            cycle.append(before[cycle[-1]])
        return cycle[::-1]

    def _look(self, column: int, others: range) -> None:
        for other in others:
            if other != column:
                self._weigh(column, other)
                self._weigh(other, column)

    def _weigh(self, a: int, b: int) -> None:
        bit = 1 << b
        self.saves[a] &= ~bit
        self.keeps[a] &= ~bit
        self.costs[a] &= ~bit
        rows = self.taken[a] & ~self.taken[b]
        if rows & ~self.free[a] & self.free[b]:
            self.saves[a] |= bit
        elif rows & ~(self.free[a] ^ self.free[b]) or self._may_swap(a, b):
            self.keeps[a] |= bit
        elif rows:
            self.costs[a] |= bit

    def _row(self, a: int, b: int) -> int:
        """The row, as a bit, in which an extra goes from a to b at the least cost; 0 where sums are swapped."""
        rows = self.taken[a] & ~self.taken[b]
        best = rows & ~self.free[a] & self.free[b] or rows & ~(self.free[a] ^ self.free[b])
        if not best and not self._may_swap(a, b):
            best = rows
        return best & -best

    def _may_swap(self, low: int, high: int) -> bool:
        return self.even and self.taken[low].bit_count() + 1 == self.taken[high].bit_count()


def _bits(number: int) -> Iterator[int]:
    while number:
        low = number & -number
        yield low.bit_length() - 1
        number ^= low
