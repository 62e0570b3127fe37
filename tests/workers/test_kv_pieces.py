"""In how many pieces KV lies: every piece is a mapping of its own and a system call, so it may not fall into more with time."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from statistics import fmean

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexpert.hbm import SlotRecord
from flexpert.hbm.granules import GranulePool, ids_of, runs_of
from flexpert.hbm.ops import Claim, Map, Unmap
from flexpert.workers.free_granules import FreeGranules
from flexpert.workers.kv_books import KvGeometry
from flexpert.workers.kv_trade import TradingKvBooks
from flexpert.workers.step import CopyTokens

SLOTS, TOKENS_A_GRANULE, CONTEXT = 24, 4, 64
GEOMETRY = KvGeometry(slots=SLOTS, max_context_tokens=CONTEXT, kv_token_bytes=8, granule_bytes=8 * TOKENS_A_GRANULE)
MOST_A_SLOT = CONTEXT // TOKENS_A_GRANULE


def pieces(granules: Sequence[int]) -> int:
    return sum(1 for _ in runs_of(granules)) if granules else 0


class Cycled:
    """A manager's pool in which an arena and weights take turns with `traded` granules, under a load of so many requests at once."""

    def __init__(self, rng: Random, *, arena: int, traded: int, spare: int, running: int) -> None:
        self.rng, self.traded, self.most_running = rng, traded, running
        self.pool = GranulePool(arena + traded + spare)
        self.weights = self.pool.take(traded)
        self.ids = set(ids_of(self.pool.take(arena)))
        self.books = TradingKvBooks(GEOMETRY, sorted(self.ids))
        self.running: dict[int, tuple[list[int], int]] = {}  # slot -> (tokens, how many it wants in all)
        self.count = 0

    def load(self, events: int) -> None:
        for _ in range(events):
            if len(self.running) < self.most_running and self.rng.random() < 0.4:
                self.begin()
            elif self.running:
                self.advance(self.rng.choice(list(self.running)))

    def begin(self) -> None:
        self.count += 1
        tokens = [self.count, *(self.rng.randrange(9) for _ in range(self.rng.randint(0, CONTEXT // 2)))]
        grant = self.books.acquire(f"r{self.count}", tokens, reuse_limit=len(tokens) - 1)
        if grant is not None:
            self.running[grant.slot] = tokens, min(CONTEXT, len(tokens) + self.rng.randint(1, CONTEXT // 2))

    def advance(self, slot: int) -> None:
        tokens, limit = self.running[slot]
        done = self.books._slots[slot].committed
        if len(tokens) == limit or not self.books.grow(slot, len(tokens), limit_tokens=limit):
            del self.running[slot]
            self.books.release(slot)
            return
        self.books.commit(slot, tokens[done:])
        tokens.append(self.rng.randrange(9))

    def up(self) -> None:
        self.pool.give(self.weights)
        added = ids_of(self.pool.take(self.traded))
        self.ids |= set(added)
        self.books.add_granules(added)
        self.books.check_integrity()

    def down(self) -> None:
        while self.books.available_granules < self.traded:
            slot = next(iter(self.running))
            del self.running[slot]
            self.books.release(slot)
        removed = self.books.remove_granules(self.traded)
        assert len(removed) == self.traded
        self.ids -= set(removed)
        self.books.check_integrity()
        self.pool.give([run for _, run in runs_of(sorted(removed))])
        self.weights = self.pool.take(self.traded)

    def held(self, *, donors_only: bool = False) -> list[list[int]]:
        return [s.granules for s in self.books._slots if s.granules and not (donors_only and s.running)]


def random_cycled(seed: int) -> Cycled:
    rng = Random(seed)
    return Cycled(rng, arena=160, traded=120, spare=rng.randint(0, 40), running=rng.randint(1, 8))


@given(st.integers())
@settings(max_examples=25, deadline=None)
def test_slots_arena_and_weights_lie_in_few_pieces_after_every_change(seed: int) -> None:
    world = random_cycled(seed)
    for _ in range(8):
        world.load(world.rng.randint(0, 120))
        world.up()
        for slot in (world.books._slots[index] for index in world.books._donors):
            needed = GEOMETRY.granules_for(slot.committed)
            fits = world.books._free_slots and world.books._free.lowest_run(needed) is not None
            assert pieces(slot.granules) == 1 or not fits, "there is a run for it, but a donor was left in pieces"
        world.load(world.rng.randint(0, 120))
        world.down()
        # Slots that run stay where they are, so not everything that leaves is the highest.
        assert pieces(sorted(world.ids)) <= 32, "the arena is scattered over the pool"
        assert len(world.weights) <= 24, "the weights that took its place are scattered"


def test_pieces_do_not_become_more_from_cycle_to_cycle() -> None:
    arena: list[list[int]] = []
    weights: list[list[int]] = []
    slots: list[list[float]] = []
    for seed in range(30):
        world = random_cycled(seed)
        for history in (arena, weights, slots):
            history.append([])
        for _ in range(16):
            for change in (world.up, world.down):
                world.load(world.rng.randint(0, 120))
                change()
            arena[-1].append(pieces(sorted(world.ids)))
            weights[-1].append(len(world.weights))
            slots[-1].append(fmean(map(pieces, world.held())) if world.held() else 1.0)
    for history, most in ((arena, 16), (weights, 9), (slots, 1.4)):
        sooner = fmean(fmean(each[4:10]) for each in history)
        later = fmean(fmean(each[10:]) for each in history)
        assert later <= most
        assert later <= 1.15 * sooner


def books_with(*requests: list[int], granules: list[int]) -> TradingKvBooks:
    """Donors with these granules; request i has the tokens [i, i, ...]."""
    books = TradingKvBooks(GEOMETRY, granules)
    books.restore(SlotRecord(slot, f"r{slot}", ids, len(ids) * TOKENS_A_GRANULE) for slot, ids in enumerate(requests))
    assert books.take_ops() == ()
    return books


def test_growth_puts_a_donor_together_with_nothing_but_copies_between_slots() -> None:
    books = books_with([3, 7, 1], [4, 5], granules=[1, 3, 4, 5, 7])
    books.add_granules([20, 21, 22, 30])
    mapped, copied, claimed, forgotten, unmapped = books.take_ops()
    assert isinstance(mapped, Map)
    assert mapped.granules == (20, 21, 22)
    assert copied == CopyTokens(0, mapped.slot, 0, 12)
    assert claimed == Claim(mapped.slot, "r0", 12)
    assert (forgotten, unmapped) == (Claim(0, "", 0), Unmap(0, 0))
    books.check_integrity()
    grant = books.acquire("r0", [0] * 14, reuse_limit=13)
    assert grant is not None
    assert (grant.slot, grant.reused_tokens) == (mapped.slot, 12)


def test_shared_granules_stay_where_they_are() -> None:
    books = books_with([3, 7, 1], [3, 7, 9], granules=[1, 3, 7, 9])
    books.add_granules([20, 21, 22, 23, 24, 25])
    assert books.take_ops() == ()


def test_the_highest_granules_leave_and_donors_that_hold_them_move_down() -> None:
    books = books_with([8, 9], granules=list(range(10)))
    assert books.remove_granules(4) == [6, 7, 8, 9]
    mapped, copied, *_ = books.take_ops()
    assert isinstance(mapped, Map)
    assert mapped.granules == (0, 1)
    assert copied == CopyTokens(0, mapped.slot, 0, 8)
    books.check_integrity()


def test_what_tidying_copies_at_a_time_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flexpert.workers.kv_trade.MOVED_BYTES", 3 * GEOMETRY.granule_bytes)
    books = books_with([0, 2], [4, 6], [8, 10], granules=[0, 2, 4, 6, 8, 10])
    books.add_granules(range(20, 30))
    assert sum(isinstance(op, CopyTokens) for op in books.take_ops()) == 1


def test_kv_that_arrives_in_parts_goes_on_where_it_was_moved_to() -> None:
    books = TradingKvBooks(GEOMETRY, [0, 2, 4, 6])
    slot = books.import_tokens("r", None, 0, [1] * 8)
    assert slot is not None
    books.imported(slot, [1] * 8)
    books.add_granules(range(20, 30))
    further = books.import_tokens("r", slot, 8, [1] * 4)
    assert further not in (None, slot)
    books.check_integrity()


def test_a_taker_gets_the_smallest_run_that_is_long_enough_and_the_lowest_of_those() -> None:
    free = FreeGranules([*range(10, 14), *range(20, 23), *range(30, 33), *range(40, 60)])
    assert free.take(2, room=3) == [20, 21]
    assert free.take(3) == [30, 31, 32]
    assert free.take(1, room=30) == [40]


def test_nobody_begins_right_behind_one_who_grows() -> None:
    free = FreeGranules([*range(10, 13), *range(20, 30)])
    assert free.take(2, room=3, growing={9}) == [20, 21]
    assert free.take(2, room=3, growing={9, 21}) == [26, 27]
