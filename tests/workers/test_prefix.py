"""The radix tree against the plainest possible answer: compare with every slot, token by token."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from flexpert.workers.prefix import PrefixIndex

TOKENS = st.lists(st.integers(0, 2), max_size=9)
SLOTS = st.integers(0, 4)


def common(left: list[int], right: list[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))


class Sequences(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.index = PrefixIndex()
        self.model: dict[int, list[int]] = {}

    @rule(slot=SLOTS, tokens=TOKENS)
    def extend(self, slot: int, tokens: list[int]) -> None:
        self.index.extend(slot, tokens)
        self.model[slot] = self.model.get(slot, []) + tokens

    @rule(slot=SLOTS, length=st.integers(0, 20))
    def truncate(self, slot: int, length: int) -> None:
        self.index.truncate(slot, length)
        self.model[slot] = self.model.get(slot, [])[:length]

    @rule(slot=SLOTS)
    def remove(self, slot: int) -> None:
        self.index.remove(slot)
        self.model.pop(slot, None)

    @rule(slot=SLOTS, to=SLOTS)
    def move(self, slot: int, to: int) -> None:
        if not self.model.get(to) and slot != to:
            self.index.move(slot, to)
            self.model[to] = self.model.pop(slot, [])

    @rule(tokens=TOKENS, limit=st.integers(0, 9))
    def match(self, tokens: list[int], limit: int) -> None:
        limit = min(limit, len(tokens))
        best = max((common(held, tokens[:limit]) for held in self.model.values()), default=0)
        length, slots = self.index.match(tokens, limit)
        assert length == best
        if length:
            assert set(slots) == {slot for slot, held in self.model.items() if common(held, tokens[:limit]) == best}

    @invariant()
    def lengths_and_tree(self) -> None:
        assert {slot: len(held) for slot, held in self.model.items() if held} == {
            slot: self.index.length(slot) for slot in range(5) if self.index.length(slot)
        }
        self.index.check_integrity()


TestSequences = Sequences.TestCase
TestSequences.settings = settings(max_examples=60, stateful_step_count=40)


def test_two_slots_that_grow_in_step_stay_one_path() -> None:
    index = PrefixIndex()
    for slot in (0, 1):
        index.extend(slot, [1, 2, 3])
    for token in range(50):
        index.extend(0, [token])
        index.extend(1, [token])
    index.check_integrity()
    tokens = [1, 2, 3, *range(50)]
    length, slots = index.match(tokens, len(tokens))
    assert (length, set(slots)) == (53, {0, 1})


def test_a_walk_that_leaves_an_edge_half_way_names_its_slots() -> None:
    index = PrefixIndex()
    index.extend(3, [5, 6, 7, 8])
    length, slots = index.match([5, 6, 9], 3)
    assert (length, list(slots)) == (2, [3])
