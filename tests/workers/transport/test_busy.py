"""A rank that computes longer than the deadline says so and is waited for; one that is silent is found within it."""

from __future__ import annotations

import select
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait

import pytest

from flexpert.workers.transport import StepMissed
from flexpert.workers.transport.doorbells import Doorbells

from .worlds import TIMEOUT_S

STEP_TIMEOUT_S = 0.2
NOTHING = (-1, -1, -1)


@pytest.fixture
def ranks() -> Iterator[list[Doorbells]]:
    """Three ranks in the middle of a step: all have rung for phase 0, and collected."""
    pairs = {(low, high): socket.socketpair() for low in range(3) for high in range(low + 1, 3)}
    ends = [
        {peer: pairs[min(rank, peer), max(rank, peer)][rank > peer] for peer in range(3) if peer != rank}
        for rank in range(3)
    ]
    made = [Doorbells(7, socks, step_timeout_s=STEP_TIMEOUT_S) for socks in ends]
    ring(made[0], (0, 0, 0))
    ring(made[1], (0, 0, 0))
    ring(made[2], (0, 0, 0))
    for rank in made:
        collect(rank, (0, 0, 0))
    yield made
    for rank in made:
        rank.close()


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as made:
        yield made


def ring(rank: Doorbells, key: tuple[int, int, int]) -> None:
    with rank.busy:
        for peer in list(rank._peers):
            rank.ring(peer, key)


def collect(rank: Doorbells, key: tuple[int, int, int]) -> set[int]:
    """As a transport does: the sockets are its own meanwhile."""
    with rank.busy:
        return set(rank.collect(key))


def wait_for_notice(rank: Doorbells, sender: int) -> None:
    """Until `sender` has told this rank that it waits."""
    with rank.busy:
        peer = rank._peers[sender]
        while not peer.excused:
            select.select([peer.sock], [], [])
            rank._read_one(peer)


def test_rank_that_computes_beyond_the_deadline_is_waited_for(ranks, threads) -> None:
    ring(ranks[0], (0, 1, 0))
    ring(ranks[1], (0, 1, 0))
    waiting = [threads.submit(collect, ranks[rank], (0, 1, 0)) for rank in (0, 1)]
    done, _ = wait(waiting, timeout=4 * STEP_TIMEOUT_S)
    assert not done, [each.exception() for each in done]
    ring(ranks[2], (0, 1, 0))
    assert [each.result(TIMEOUT_S) for each in waiting] == [{1, 2}, {0, 2}]


def test_rank_that_falls_silent_while_it_computes_is_the_suspect(ranks, threads) -> None:
    """Its notices end as if it had been stopped; rank 1 computes on meanwhile."""
    ring(ranks[0], (0, 1, 0))
    waiting = threads.submit(collect, ranks[0], (0, 1, 0))
    assert not wait([waiting], timeout=2 * STEP_TIMEOUT_S).done
    with ranks[2].busy, pytest.raises(StepMissed) as error:
        waiting.result(TIMEOUT_S)
    assert error.value.suspects == (2,)


def test_rank_that_never_answers_again_is_given_up_some_time(ranks, threads) -> None:
    """A thread that only says that it is busy must not keep its peers for ever: as many notices as a socket holds, no more."""
    ranks[2]._busy_notices_left = 3
    ring(ranks[0], (0, 1, 0))
    ring(ranks[1], (0, 1, 0))
    waiting = threads.submit(collect, ranks[0], (0, 1, 0))
    with pytest.raises(StepMissed) as error:
        waiting.result(TIMEOUT_S)
    assert error.value.suspects == (2,)


def test_rank_that_waits_within_a_collective_is_no_suspect(ranks, threads) -> None:
    """Rank 2 is silent, as if it had been stopped within the collective; rank 1 is held up there by it, rank 0 already beyond."""
    with ranks[2].busy, ranks[1].busy, ranks[1].collective((0, 0, 0)):
        ring(ranks[0], (0, 1, 0))
        with pytest.raises(StepMissed) as error:
            threads.submit(collect, ranks[0], (0, 1, 0)).result(TIMEOUT_S)
    assert error.value.suspects == (2,)


def test_rank_speaks_up_again_after_a_long_collective(ranks, threads) -> None:
    """It has told its peers that it waits; now it computes, for longer than the deadline."""
    with ranks[1].busy, ranks[1].collective((0, 0, 0)):
        ring(ranks[0], (0, 1, 0))
        ring(ranks[2], (0, 1, 0))
        told = threads.submit(wait_for_notice, ranks[0], 1)
        told.result(TIMEOUT_S)
    waiting = threads.submit(collect, ranks[0], (0, 1, 0))
    done, _ = wait([waiting], timeout=4 * STEP_TIMEOUT_S)
    assert not done, waiting.exception()
    ring(ranks[1], (0, 1, 0))
    assert waiting.result(TIMEOUT_S) == {1, 2}


def test_rank_outside_of_a_step_says_nothing(ranks) -> None:
    """Before its first exchange a rank is not heard: nobody may read there for long."""
    mine, theirs = socket.socketpair()
    fresh = Doorbells(8, {1: mine}, step_timeout_s=STEP_TIMEOUT_S)
    theirs.settimeout(2 * STEP_TIMEOUT_S)
    with pytest.raises(TimeoutError):
        theirs.recv(4096)
    fresh.close()
    assert theirs.recv(4096) == b""
    theirs.close()
