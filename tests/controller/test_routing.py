"""Which worker takes a request, decided from values alone."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from flexpert.controller.routing import (
    BATCHES_HELD,
    PREFIX_BLOCK_TOKENS,
    PREFIX_BLOCKS_MAX,
    PrefixIndex,
    WorkerLoad,
    choose_worker,
)


def load(worker_id: str, **settings: Any) -> WorkerLoad:
    return WorkerLoad(**{"worker_id": worker_id, "in_flight": 0, "max_running": 8, **settings})


def test_no_worker_takes_nothing() -> None:
    assert choose_worker(prompt_tokens=10, workers=[]) is None


def test_draining_worker_takes_nothing() -> None:
    assert choose_worker(prompt_tokens=10, workers=[load("a", draining=True)]) is None
    assert choose_worker(prompt_tokens=10, workers=[load("a", draining=True), load("b", in_flight=9)]) == "b"


def test_worker_holds_one_batch_more_than_it_runs() -> None:
    assert choose_worker(prompt_tokens=10, workers=[load("a", in_flight=8 * BATCHES_HELD - 1)]) == "a"
    assert choose_worker(prompt_tokens=10, workers=[load("a", in_flight=8 * BATCHES_HELD)]) is None


def test_free_place_beats_a_cached_prefix() -> None:
    full = load("a", in_flight=8, prefix_tokens=1000)
    assert choose_worker(prompt_tokens=1001, workers=[full, load("b")]) == "b"


def test_free_kv_beats_less_work() -> None:
    tight = load("a", kv_free_tokens=50)
    roomy = load("b", kv_free_tokens=5000, in_flight=3)
    assert choose_worker(prompt_tokens=100, workers=[tight, roomy]) == "b"


def test_cached_prefix_attracts_as_long_as_the_load_is_alike() -> None:
    cached = load("b", prefix_tokens=512, in_flight=2)
    assert choose_worker(prompt_tokens=600, workers=[load("a"), cached]) == "b"
    busy = load("b", prefix_tokens=512, unstarted_prompt_tokens=5000)
    assert choose_worker(prompt_tokens=600, workers=[load("a"), busy]) == "a"


def test_ties_go_by_name_whatever_the_order() -> None:
    assert choose_worker(prompt_tokens=5, workers=[load("b"), load("a")]) == "a"


loads = st.builds(
    WorkerLoad,
    worker_id=st.sampled_from("abcdef"),
    in_flight=st.integers(0, 20),
    max_running=st.integers(1, 8),
    unstarted_prompt_tokens=st.integers(0, 10_000),
    kv_free_tokens=st.none() | st.integers(0, 10_000),
    prefix_tokens=st.integers(0, 4096),
    draining=st.booleans(),
)


@given(st.lists(loads, unique_by=lambda one: one.worker_id), st.integers(1, 10_000), st.randoms())
def test_choice_is_open_and_independent_of_order(workers: list[WorkerLoad], prompt_tokens: int, random: Any) -> None:
    chosen = choose_worker(prompt_tokens=prompt_tokens, workers=workers)
    shuffled = list(workers)
    random.shuffle(shuffled)
    assert choose_worker(prompt_tokens=prompt_tokens, workers=shuffled) == chosen
    open_ids = {one.worker_id for one in workers if not one.draining and one.in_flight < BATCHES_HELD * one.max_running}
    assert (chosen in open_ids) if open_ids else (chosen is None)


def test_prefix_index_counts_whole_blocks_of_the_beginning() -> None:
    index = PrefixIndex()
    prompt = list(range(3 * PREFIX_BLOCK_TOKENS + 5))
    index.record("a", prompt)
    index.record("b", prompt[: PREFIX_BLOCK_TOKENS + 1])
    assert index.seen_tokens(prompt) == {"a": 3 * PREFIX_BLOCK_TOKENS, "b": PREFIX_BLOCK_TOKENS}
    assert index.seen_tokens(prompt[: 2 * PREFIX_BLOCK_TOKENS] + [9999] * 200)["a"] == 2 * PREFIX_BLOCK_TOKENS
    assert index.seen_tokens([7, *prompt]) == {}
    index.forget("a")
    assert index.seen_tokens(prompt) == {"b": PREFIX_BLOCK_TOKENS}


def test_prefix_index_forgets_the_oldest() -> None:
    index = PrefixIndex(max_blocks=2)
    old, new = [1] * PREFIX_BLOCK_TOKENS, [2] * (2 * PREFIX_BLOCK_TOKENS)
    index.record("a", old)
    index.record("a", new)
    assert index.seen_tokens(old) == {}
    assert index.seen_tokens(new) == {"a": 2 * PREFIX_BLOCK_TOKENS}


def test_prefix_index_looks_at_a_bounded_part_of_a_prompt() -> None:
    index = PrefixIndex()
    prompt = [3] * (PREFIX_BLOCK_TOKENS * (PREFIX_BLOCKS_MAX + 10))
    index.record("a", prompt)
    assert index.seen_tokens(prompt) == {"a": PREFIX_BLOCK_TOKENS * PREFIX_BLOCKS_MAX}
