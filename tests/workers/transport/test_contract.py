"""What every transport does alike: bytes, order, idle ranks, epochs side by side."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from .play import Missed
from .worlds import TIMEOUT_S, World


@pytest.fixture
def connected(world: World) -> Iterator[World]:
    world.connect("t")
    yield world
    world.everyone("close", lambda rank: ("t",))


def test_thousands_of_exchanges_are_exact_to_the_byte(connected: World) -> None:
    done = connected.everyone("play", lambda rank: ("t",), seed=1, steps=160, phases=13)

    assert done == [160 * 13] * 4


def test_parts_beyond_the_capacity_arrive_whole(connected: World) -> None:
    done = connected.everyone("play", lambda rank: ("t",), seed=2, steps=12, phases=3, largest=300_000)

    assert done == [36] * 4


def test_each_rank_gets_its_part_in_rank_order(connected: World) -> None:
    texts = [b"from zero", b"", b"from two", b"from three" * 100]

    received = connected.everyone("exchange", lambda rank: ("t", 0, 0, texts[rank]))

    assert received == [texts] * 4


def test_later_phases_are_kept_until_they_are_asked_for(connected: World) -> None:
    """Ranks 1 to 3 end phase 0 and send phase 1 while rank 0 has not taken phase 0 yet, over and over."""
    for step in range(20):
        ahead = [connected.call(rank, "exchange", "t", step, 0, b"early") for rank in (1, 2, 3)]
        first = connected.call(0, "exchange", "t", step, 0, b"late")
        assert [each.result(TIMEOUT_S) for each in [first, *ahead]] == [[b"late", b"early", b"early", b"early"]] * 4
        later = [connected.call(rank, "exchange", "t", step, 1, b"1") for rank in (3, 2, 1)]
        last = connected.call(0, "exchange", "t", step, 1, b"0").result(TIMEOUT_S)
        assert last == [b"0", b"1", b"1", b"1"]
        assert [each.result(TIMEOUT_S) for each in later] == [last] * 3


def test_idle_rank_learns_that_a_peer_has_begun(connected: World) -> None:
    assert connected.everyone("started", lambda rank: ("t", 0)) == [False] * 4
    waiting = connected.call(0, "wait", "t", 0, None)

    begun = connected.call(2, "exchange", "t", 0, 0)

    assert waiting.result(TIMEOUT_S) is True
    assert connected.call(0, "started", "t", 0).result(TIMEOUT_S) is True
    assert connected.call(0, "started", "t", 1).result(TIMEOUT_S) is False
    connected.everyone("exchange", lambda rank: ("t", 0, 0), ranks=[0, 1, 3])
    begun.result(TIMEOUT_S)


def test_wait_ends_with_its_time_and_by_wake(connected: World) -> None:
    assert connected.call(0, "wait", "t", 0, 0.0).result(TIMEOUT_S) is False
    waiting = connected.call(0, "wait", "t", 0, None)

    connected.call(0, "wake", "t").result(TIMEOUT_S)

    assert waiting.result(TIMEOUT_S) is False
    connected.call(0, "wake", "t").result(TIMEOUT_S)
    assert connected.call(0, "wait", "t", 0, None).result(TIMEOUT_S) is False  # the next one, at once


def test_two_epochs_live_beside_each_other(connected: World) -> None:
    connected.connect("next")
    first = [connected.call(rank, "play", "t", seed=3, steps=20, phases=5) for rank in range(4)]
    second = [connected.call(rank, "play", "next", seed=4, steps=20, phases=5) for rank in range(4)]

    assert [each.result(TIMEOUT_S) for each in first + second] == [100] * 8
    connected.everyone("close", lambda rank: ("next",))
    assert connected.everyone("exchange", lambda rank: ("t", 20, 0, b"on")) == [[b"on"] * 4] * 4


def test_closing_ends_what_runs_here_and_at_the_peers(world: World) -> None:
    world.connect("ending", step_timeout_s=TIMEOUT_S)
    here = world.call(0, "exchange", "ending", 0, 0)
    assert world.call(2, "wait", "ending", 0, None).result(TIMEOUT_S) is True
    there = world.call(2, "wait", "ending", 1, None)

    world.call(0, "close", "ending").result(TIMEOUT_S)

    assert here.result(TIMEOUT_S).suspects == ()
    assert there.result(TIMEOUT_S).suspects == (0,)
    # What a rank has sent before it went may still be taken; what it has not sent is missed at once.
    last = world.everyone("exchange", lambda rank: ("ending", 0, 0), ranks=[1, 2, 3])
    assert all(each == [b"x"] * 4 or each.suspects == (0,) for each in last)
    if not any(isinstance(each, Missed) for each in last):
        missed = world.everyone("exchange", lambda rank: ("ending", 0, 1), ranks=[1, 2, 3])
        assert [each.suspects for each in missed] == [(0,)] * 3
    world.everyone("close", lambda rank: ("ending",), ranks=[1, 2, 3])


def test_a_missed_step_names_those_who_took_no_part(world: World) -> None:
    world.connect("slow", step_timeout_s=0.3)

    missed = world.everyone("exchange", lambda rank: ("slow", 0, 0), ranks=[0, 1, 2])

    assert [each.suspects for each in missed] == [(3,)] * 3
    world.everyone("close", lambda rank: ("slow",))
