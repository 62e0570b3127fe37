"""The pool of granule ids."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexpert.hbm.granules import Extent, GranulePool, ids_of, joined, runs_of, split, without


def test_a_new_pool_gives_one_run() -> None:
    pool = GranulePool(100)
    assert pool.take(40) == (Extent(0, 40),)
    assert pool.num_free == 60


def test_the_smallest_run_that_is_long_enough_is_taken() -> None:
    pool = GranulePool(30)
    pool.take(30)
    pool.give([Extent(0, 10), Extent(15, 4), Extent(25, 5)])
    assert pool.take(4) == (Extent(15, 4),)
    assert pool.take(5) == (Extent(25, 5),)


def test_without_a_long_run_the_longest_ones_are_joined() -> None:
    pool = GranulePool(30)
    pool.take(30)
    pool.give([Extent(0, 3), Extent(10, 6), Extent(20, 1)])
    assert pool.take(8) == (Extent(0, 2), Extent(10, 6))


def test_neighbours_given_back_are_one_run_again() -> None:
    pool = GranulePool(30)
    pool.take(30)
    for extent in (Extent(10, 5), Extent(20, 5), Extent(15, 5)):
        pool.give([extent])
    assert pool.free_extents() == (Extent(10, 15),)


@pytest.mark.parametrize("extent", [Extent(0, 1), Extent(4, 2), Extent(28, 5), Extent(-1, 2), Extent(10, 0)])
def test_granules_that_are_free_or_none_cannot_be_given_back(extent: Extent) -> None:
    pool = GranulePool(30)
    pool.take(5)
    with pytest.raises(ValueError, match="granules"):
        pool.give([extent] if extent != Extent(0, 1) else [extent, extent])
    assert pool.num_free == 25
    assert pool.check() == []


def test_more_than_is_free_cannot_be_taken() -> None:
    pool = GranulePool(4)
    with pytest.raises(ValueError, match="5 granules asked for, 4 of 4 are free"):
        pool.take(5)


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 12)), max_size=60))
def test_no_granule_is_ever_in_two_hands(steps: list[tuple[bool, int]]) -> None:
    pool = GranulePool(40)
    held: list[tuple[Extent, ...]] = []
    for take, number in steps:
        if take and number <= pool.num_free:
            held.append(pool.take(number))
        elif held:
            pool.give(held.pop(number % len(held)))
        ids = [granule for extents in held for granule in ids_of(extents)] + list(ids_of(pool.free_extents()))
        assert sorted(ids) == list(range(40))
        assert pool.check() == []


@given(st.lists(st.integers(0, 20), max_size=20))
def test_runs_cover_the_list_in_order_and_are_as_long_as_can_be(granules: list[int]) -> None:
    runs = list(runs_of(granules))
    assert [granule for _, run in runs for granule in range(run.start, run.end)] == granules
    for (index, run), (next_index, following) in itertools.pairwise(runs):
        assert index + run.length == next_index
        assert run.end != following.start


EXTENTS = st.lists(st.builds(Extent, st.integers(0, 30), st.integers(1, 6)), max_size=12)


def granules(extents: Iterable[Extent]) -> list[int]:
    return [granule for extent in extents for granule in range(extent.start, extent.end)]


@given(EXTENTS)
def test_joined_extents_are_the_same_granules_in_as_few_runs_as_can_be(extents: list[Extent]) -> None:
    runs = list(joined(extents))
    assert granules(runs) == granules(extents)
    assert all(before.end != after.start for before, after in itertools.pairwise(runs))


@given(EXTENTS, st.data())
def test_parts_of_extents_are_all_of_them_in_order(extents: list[Extent], data: st.DataObject) -> None:
    rest, counts = len(granules(extents)), []
    while rest:
        counts.append(data.draw(st.integers(1, rest)))
        rest -= counts[-1]
    parts = split(extents, counts)
    assert [len(granules(part)) for part in parts] == counts
    assert granules(extent for part in parts for extent in part) == granules(extents)


@given(st.sets(st.integers(0, 40)), st.data())
def test_extents_without_some_of_their_granules(whole: set[int], data: st.DataObject) -> None:
    removed = {granule for granule in whole if data.draw(st.booleans())}
    extents, gone = ([run for _, run in runs_of(sorted(ids))] if ids else [] for ids in (whole, removed))
    rest = without(extents, gone)
    assert granules(rest) == sorted(whole - removed)
    assert list(joined(rest)) == list(rest)


def test_what_is_given_back_is_reported_in_runs() -> None:
    pool = GranulePool(30)
    pool.take(30)
    assert pool.give([Extent(10, 5), Extent(3, 2), Extent(5, 1), Extent(20, 1)]) == [
        Extent(3, 3),
        Extent(10, 5),
        Extent(20, 1),
    ]
