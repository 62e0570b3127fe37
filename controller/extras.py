"""Integer shares of a table: how many groups of each layer each rank gets, when they do not divide evenly. Pure; part of the planner.

A layer of E groups on n ranks gives each E // n and E % n of them one more, an *extra*. Over the layers the extras go round so that the
ranks' totals differ by at most one. An extra costs nothing where the rank holds that many groups of the layer already, and one moved group
elsewhere; `spread_extras` takes an assignment of least cost.
"""

from __future__ import annotations

from collections.abc import Sequence

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
    """Exchange extras along cycles of columns for as long as that saves moves; with none left the cost is the least (the assignment is a
    transportation problem, and a flow without negative cycles is optimal)."""
    size = len(free[0])
    while True:
        cost = sum(not free[row][column] for row, columns in enumerate(taken) for column in columns)
        least = sum(max(0, len(columns) - sum(free[row])) for row, columns in enumerate(taken))
        if cost == least:
            return
        cycle = _negative_cycle(*_exchanges(taken, free, even=even), size)
        if cycle is None:
            return
        for row, give, take in cycle:
            if row >= 0:
                taken[row].remove(give)
                taken[row].add(take)


def _exchanges(taken: Sequence[set[int]], free: Sequence[Sequence[bool]], *, even: bool) -> tuple[Table, Table]:
    """weight[a][b], row[a][b]: the cheapest row in which an extra can go from column a to b. Where totals may differ by one, a column with
    one more may also hand that on: row -1 at no cost, from the lesser to the greater, as the end of a chain of such exchanges."""
    size = len(free[0])
    weight = [[2] * size for _ in range(size)]
    where = [[-1] * size for _ in range(size)]
    for row, columns in enumerate(taken):
        here = free[row]
        others = [column for column in range(size) if column not in columns]
        for give in columns:
            weights, rows = weight[give], where[give]
            for take in others:
                change = here[give] - here[take]
                if change < weights[take]:
                    weights[take], rows[take] = change, row
    if even:
        sums = [sum(column in columns for columns in taken) for column in range(size)]
        for low in range(size):
            for high in range(size):
                if sums[low] + 1 == sums[high] and weight[low][high] > 0:
                    weight[low][high], where[low][high] = 0, -1
    return weight, where


def _negative_cycle(weight: Table, where: Table, size: int) -> list[tuple[int, int, int]] | None:
    """Bellman and Ford: (row, give, take) of the exchanges of a cycle that costs less than nothing."""
    distance, before = [0] * size, [-1] * size
    changed = -1
    for _ in range(size):
        changed = -1
        for a in range(size):
            reach, weights = distance[a], weight[a]
            for b in range(size):
                if weights[b] < 2 and reach + weights[b] < distance[b]:
                    distance[b], before[b], changed = reach + weights[b], a, b
        if changed < 0:
            return None
    for _ in range(size):
        changed = before[changed]
    cycle, at = [], changed
    while True:
        cycle.append((where[before[at]][at], before[at], at))
        at = before[at]
        if at == changed:
            return cycle
