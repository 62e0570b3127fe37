"""What the books ask of the arena in particular cases; the general rules are tested by tests/workers/test_scheduler_properties.py."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.workers.kv_world import Record

from flexpert.hbm.ops import Claim, Map, Unmap
from flexpert.workers.free_granules import FreeGranules
from flexpert.workers.kv_books import KvBooks, KvGeometry
from flexpert.workers.step import CopyTokens

# 10 bytes a token, 32 bytes a granule: granule 1 begins 2 bytes into token 3.
GEOMETRY = KvGeometry(slots=3, max_context_tokens=30, kv_token_bytes=10, granule_bytes=32)
TOKENS = list(range(100, 120))


def make_books(granules: int = 30, ahead: int = 0, geometry: KvGeometry = GEOMETRY) -> KvBooks:
    return KvBooks(geometry, range(granules), ahead_granules=ahead)


def run_tokens(books: KvBooks, name: str, tokens: list[int]) -> int:
    """A request that has computed all of its tokens."""
    grant = books.acquire(name, tokens, reuse_limit=len(tokens) - 1)
    assert grant is not None
    assert books.grow(grant.slot, len(tokens), limit_tokens=len(tokens))
    books.commit(grant.slot, tokens[grant.reused_tokens :])
    books.check_integrity()
    return grant.slot


def test_shared_prefix_is_mapped_whole_granules_and_copied_for_the_rest() -> None:
    books = make_books()
    first = run_tokens(books, "a", TOKENS)
    books.take_ops()
    grant = books.acquire("b", [*TOKENS[:8], 7, 7], reuse_limit=9)
    assert grant is not None
    assert grant.reused_tokens == 8
    mapped, copied, claimed = books.take_ops()
    # 8 tokens are 80 bytes: two granules whole, then bytes 64 to 80, which begin 4 bytes into token 6.
    assert isinstance(mapped, Map)
    assert (mapped.slot, mapped.first_granule, len(mapped.granules)) == (grant.slot, 0, 3)
    assert copied == CopyTokens(first, grant.slot, 6, 8, skip_bytes=4)
    assert claimed == Claim(grant.slot, "b", 8)
    assert len(set(mapped.granules) & set(books._slots[first].granules)) == 2


def test_request_that_continues_a_donor_takes_its_slot_over_without_a_copy() -> None:
    books = make_books()
    slot = run_tokens(books, "a", TOKENS)
    books.release(slot)
    books.take_ops()
    grant = books.acquire("b", [*TOKENS, 1, 2], reuse_limit=21)
    assert grant is not None
    assert (grant.slot, grant.reused_tokens) == (slot, 20)
    assert books.take_ops() == (Claim(slot, "b", 20),)


def test_identical_prompt_leaves_its_last_token_to_compute() -> None:
    books = make_books()
    run_tokens(books, "a", TOKENS)
    grant = books.acquire("b", TOKENS, reuse_limit=19)
    assert grant is not None
    assert grant.reused_tokens == 19


def test_without_shareable_granules_the_whole_prefix_is_copied_and_nothing_is_mapped() -> None:
    geometry = KvGeometry(slots=2, max_context_tokens=30, kv_token_bytes=10, granule_bytes=32, shareable=False)
    books = KvBooks(geometry)
    first = run_tokens(books, "a", TOKENS)
    second = run_tokens(books, "b", [*TOKENS[:8], 7])
    assert books.take_ops() == (
        Claim(first, "a", 0), CopyTokens(first, second, 0, 8), Claim(second, "b", 8),
    )  # fmt: skip
    assert (books.used_tokens, books.capacity_tokens) == (29, 60)


def test_donor_is_trimmed_from_its_end_and_its_claim_lowered_first() -> None:
    books = make_books(granules=9)
    donor = run_tokens(books, "a", TOKENS)  # 7 granules
    books.release(donor)
    books.take_ops()
    other = books.acquire("b", [1, 2, 3, 4, 5, 6, 7, 8], reuse_limit=7)  # 3 granules, 2 are free
    assert other is not None
    assert books.grow(other.slot, 8, limit_tokens=8)
    claim_other, lowered, unmapped, mapped = books.take_ops()
    assert claim_other == Claim(other.slot, "b", 0)
    assert lowered == Claim(donor, "a", 19)  # six granules hold 19 whole tokens
    assert unmapped == Unmap(donor, 6)
    assert isinstance(mapped, Map)
    books.check_integrity()


def test_least_recently_used_donor_goes_first() -> None:
    books = make_books()
    slots = [run_tokens(books, name, [ord(name)] * 10) for name in "abc"]
    for slot in slots:
        books.release(slot)
    books.take_ops()
    assert run_tokens(books, "d", [1] * 10) == slots[0]


def test_growth_goes_ahead_while_memory_is_plentiful_and_not_when_it_is_scarce() -> None:
    books = make_books(granules=30, ahead=2)
    grant = books.acquire("a", TOKENS, reuse_limit=19)
    assert grant is not None
    books.grow(grant.slot, 3, limit_tokens=30)
    assert len(books._slots[grant.slot].granules) == 3
    scarce = make_books(granules=3, ahead=2)
    grant = scarce.acquire("a", [1, 2, 3], reuse_limit=2)
    assert grant is not None
    scarce.grow(grant.slot, 3, limit_tokens=9)
    assert len(scarce._slots[grant.slot].granules) == 1


def test_growth_ahead_ends_where_the_request_ends() -> None:
    books = make_books(granules=30, ahead=5)
    grant = books.acquire("a", [1, 2], reuse_limit=1)
    assert grant is not None
    books.grow(grant.slot, 2, limit_tokens=6)
    assert len(books._slots[grant.slot].granules) == 2


def test_new_slot_does_not_sit_on_the_granules_its_neighbour_grows_into() -> None:
    books = make_books(granules=30)
    slots = [run_tokens(books, name, [ord(name)] * 3) for name in "ab"]
    for _ in range(4):
        for slot in slots:
            books.grow(slot, books._slots[slot].backed_tokens + 1, limit_tokens=30)
    for slot in slots:
        ids = books._slots[slot].granules
        assert ids == list(range(ids[0], ids[0] + len(ids))), "one call would have mapped them"


def test_more_than_there_is_cannot_be_had() -> None:
    books = make_books(granules=8)
    slot = run_tokens(books, "a", TOKENS)
    assert books.acquire("b", [1] * 10, reuse_limit=9) is None
    assert books.reachable_tokens(slot) == 25
    assert not books.grow(slot, 26, limit_tokens=30)
    books.check_integrity()


def test_restored_request_finds_its_slot_and_leaves_one_token_to_compute() -> None:
    books = make_books()
    books.restore([Record(1, "a", [4, 5, 6, 7, 8, 9, 10], 20), Record(0, "gone", [1], 3), Record(2, "", [], 0)])
    assert books.take_ops() == ()
    grant = books.acquire("a", TOKENS[:12], reuse_limit=11)
    assert grant is not None
    assert (grant.slot, grant.reused_tokens) == (1, 11)
    assert books.take_ops() == (Claim(1, "a", 11), Unmap(1, 4))
    books.check_integrity()


@pytest.mark.parametrize(
    "record",
    [
        Record(1, "a", [4, 99], 5),  # not ours
        Record(1, "a", [3, 2], 5),  # 2 is the first granule of slot 0
        Record(1, "a", [4, 4], 5),  # twice
        Record(1, "", [4, 5], 0),  # died while the slot changed hands
        Record(1, "a", [4, 5], 0),
    ],
)
def test_record_that_cannot_be_used_costs_its_slot_only(record: Record) -> None:
    books = make_books()
    books.restore([Record(0, "sound", [2, 3], 6), record])
    assert books.take_ops() == (Claim(1, "", 0), Unmap(1))
    books.check_integrity()
    grant = books.acquire("sound", TOKENS[:8], reuse_limit=7)
    assert grant is not None
    assert grant.reused_tokens == 6


def test_restored_slots_may_share_their_first_granules() -> None:
    books = make_books()
    books.restore([Record(0, "a", [2, 3, 4], 9), Record(1, "b", [2, 3, 7], 9)])
    books.check_integrity()
    assert books.available_granules == 30
    grant = books.acquire("b", TOKENS[:9], reuse_limit=4)  # would write into granule 3, which "a" holds too
    assert grant is not None
    assert grant.slot == 2
    books.check_integrity()


def test_pool_hands_out_every_granule_once() -> None:
    free = FreeGranules([7, 2, 4, 5, 20])
    assert free.take(2, after=3) == [4, 5]
    assert sorted(free.take(3)) == [2, 7, 20]
    with pytest.raises(ValueError, match="1 granules wanted, 0 are free"):
        free.take(1)


@given(st.randoms(use_true_random=False))
def test_free_granules_are_a_set(rng: Random) -> None:
    free = FreeGranules(range(40))
    held: set[int] = set()
    for _ in range(rng.randint(1, 40)):
        if rng.random() < 0.6:
            count = rng.randint(0, len(free))
            after = rng.choice([None, *held]) if held else None
            taken = free.take(count, after=after)
            assert len(taken) == count
            assert not held & set(taken)
            held |= set(taken)
        elif rng.random() < 0.3:
            count = rng.randint(0, len(free))
            highest = sorted(free)[len(free) - count :]
            assert free.take_highest(count) == highest
            held |= set(highest)
        elif held:
            back = rng.sample(sorted(held), rng.randint(1, len(held)))
            free.give(back)
            held -= set(back)
        assert set(free) == set(range(40)) - held
        assert len(free) == 40 - len(held)


def test_geometry_that_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="kv_token_bytes is 0"):
        KvGeometry(slots=1, max_context_tokens=1, kv_token_bytes=0, granule_bytes=1)
