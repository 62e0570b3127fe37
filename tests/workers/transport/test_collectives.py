"""The distributed transport within its collectives: two ranks over gloo, and over NCCL."""

from __future__ import annotations

import signal
from collections.abc import Callable
from concurrent.futures import Future

import pytest

from .play import Missed
from .worlds import TIMEOUT_S, World


@pytest.fixture(params=["gloo", pytest.param("nccl", marks=pytest.mark.gpu)])
def pair(request: pytest.FixtureRequest, make_world: Callable[[str, int], World]) -> World:
    return make_world(request.param, 2)


def enter_alone(pair: World) -> Future:
    """Rank 0's exchange: rank 1 has rung, too, and is held before its collective."""
    pair.call(1, "hold", "t").result(TIMEOUT_S)
    stuck = pair.call(0, "exchange", "t", 0, 0)
    pair.call(1, "exchange", "t", 0, 0)
    pair.call(1, "held").result(TIMEOUT_S)
    return stuck


def test_exchanges_are_exact_to_the_byte_in_two_epochs_at_once(pair: World) -> None:
    pair.connect("t")
    pair.connect("next")
    running = [pair.call(rank, "play", "t", seed=1, steps=40, phases=13) for rank in range(2)]
    assert [each.result(TIMEOUT_S) for each in running] == [520] * 2

    assert pair.everyone("play", lambda rank: ("next",), seed=2, steps=4, phases=3, largest=4_000_000) == [12] * 2
    pair.everyone("close", lambda rank: ("t",))
    assert pair.everyone("exchange", lambda rank: ("next", 4, 0, b"on")) == [[b"on"] * 2] * 2


def test_idle_rank_is_told_and_woken(pair: World) -> None:
    pair.connect("t")
    waiting = pair.call(0, "wait", "t", 0, None)
    begun = pair.call(1, "exchange", "t", 0, 0)
    assert waiting.result(TIMEOUT_S) is True
    assert pair.call(0, "exchange", "t", 0, 0).result(TIMEOUT_S) == begun.result(TIMEOUT_S) == [b"x"] * 2

    waiting = pair.call(0, "wait", "t", 1, None)
    pair.call(0, "wake", "t").result(TIMEOUT_S)
    assert waiting.result(TIMEOUT_S) is False


@pytest.mark.parametrize("seed", range(3))
def test_killed_peer_is_missed_at_once_wherever_it_was(pair: World, seed: int) -> None:
    pair.connect("t", step_timeout_s=100 * TIMEOUT_S)
    running = pair.call(0, "play", "t", seed=seed, steps=10**6, phases=5)
    pair.call(1, "play", "t", seed=seed, steps=10**6, phases=5)
    pair.call(0, "processor_seconds").result(TIMEOUT_S)

    pair.ranks[1].kill()

    assert running.result(TIMEOUT_S).suspects == (1,)
    pair.call(0, "close", "t").result(TIMEOUT_S)


def test_rank_is_freed_whose_peer_is_killed_before_its_collective(pair: World) -> None:
    pair.connect("t", step_timeout_s=100 * TIMEOUT_S)
    stuck = enter_alone(pair)

    pair.ranks[1].kill()

    assert stuck.result(TIMEOUT_S).suspects == (1,)
    pair.call(0, "close", "t").result(TIMEOUT_S)


def test_rank_is_freed_whose_peer_stops_before_its_collective(pair: World) -> None:
    pair.connect("t", step_timeout_s=2.0)
    stuck = enter_alone(pair)

    pair.ranks[1].signal(signal.SIGSTOP)

    assert stuck.result(TIMEOUT_S).suspects == (1,)
    pair.call(0, "close", "t").result(TIMEOUT_S)


def test_closing_frees_the_own_rank_within_a_collective(pair: World) -> None:
    pair.connect("t", step_timeout_s=100 * TIMEOUT_S)
    stuck = enter_alone(pair)

    pair.call(0, "close", "t").result(TIMEOUT_S)

    assert stuck.result(TIMEOUT_S).suspects == ()
    pair.call(1, "release").result(TIMEOUT_S)
    assert isinstance(pair.call(1, "exchange", "t", 0, 1).result(TIMEOUT_S), Missed)
    pair.call(1, "close", "t").result(TIMEOUT_S)


def test_nothing_is_left_of_ten_epochs(pair: World) -> None:
    def cycle() -> None:
        pair.connect("t")
        pair.everyone("play", lambda rank: ("t",), seed=7, steps=1, phases=2)
        pair.everyone("close", lambda rank: ("t",))

    for _ in range(2):
        cycle()
    before = pair.everyone("resources")
    for _ in range(10):
        cycle()
    after = pair.everyone("resources")

    growth = [now - then for rank in zip(before, after, strict=True) for then, now in zip(*rank, strict=True)]
    assert max(growth) < 5
