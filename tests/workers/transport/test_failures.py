"""Peers that are killed, that hang and that say what cannot be."""

from __future__ import annotations

import signal
import socket
from collections.abc import Callable, Iterator

import pytest

from flexpert.workers.transport import ProtocolError, StepMissed
from flexpert.workers.transport.doorbells import _DOORBELL, Doorbells

from .play import Missed
from .worlds import TIMEOUT_S, World

BETWEEN_PROCESSES = pytest.mark.parametrize("kind", ["mapped", "gloo"])


@BETWEEN_PROCESSES
def test_killed_peer_is_missed_at_once_by_all(make_world: Callable[[str, int], World], kind: str) -> None:
    """At once: the deadline is far beyond what the test waits for."""
    world = make_world(kind, 4)
    world.connect("t", step_timeout_s=100 * TIMEOUT_S)
    waiting = [world.call(rank, "exchange", "t", 0, 0) for rank in (0, 1)]
    assert world.call(2, "wait", "t", 0, None).result(TIMEOUT_S) is True
    idle = world.call(2, "wait", "t", 1, None)

    world.ranks[3].kill()

    missed = [each.result(TIMEOUT_S) for each in [*waiting, idle]]
    assert [each.suspects for each in missed] == [(3,)] * 3


@BETWEEN_PROCESSES
def test_killed_in_the_midst_of_exchanges(make_world: Callable[[str, int], World], kind: str) -> None:
    world = make_world(kind, 3)
    world.connect("t", step_timeout_s=100 * TIMEOUT_S)
    running = [world.call(rank, "play", "t", seed=5, steps=10**6, phases=5) for rank in range(3)]
    world.call(1, "processor_seconds").result(TIMEOUT_S)

    world.ranks[1].kill()

    missed = [running[rank].result(TIMEOUT_S) for rank in (0, 2)]
    assert [each.suspects for each in missed] == [(1,)] * 2


@BETWEEN_PROCESSES
def test_stopped_peer_is_the_suspect_of_all_after_the_deadline(
    make_world: Callable[[str, int], World], kind: str
) -> None:
    """Stopped anywhere in an exchange: some ranks wait for the phase before that of the others, and must not be blamed."""
    world = make_world(kind, 4)
    for attempt in range(2):
        world.connect("t", step_timeout_s=2.0)
        running = [world.call(rank, "play", "t", seed=attempt, steps=10**6, phases=5) for rank in range(4)]
        world.call(0, "processor_seconds").result(TIMEOUT_S)

        world.ranks[2].signal(signal.SIGSTOP)

        missed = [running[rank].result(TIMEOUT_S) for rank in (0, 1, 3)]
        world.ranks[2].signal(signal.SIGCONT)
        assert [each.suspects for each in missed] == [(2,)] * 3, missed
        assert isinstance(running[2].result(TIMEOUT_S), Missed)
        world.everyone("close", lambda rank: ("t",))


@BETWEEN_PROCESSES
def test_idle_peer_that_closed_because_of_a_death_is_no_suspect(
    make_world: Callable[[str, int], World], kind: str
) -> None:
    """Rank 0 learns of the death while it is idle and closes, as an engine does; rank 1 looks only then and finds both gone."""
    world = make_world(kind, 3)
    world.connect("t", step_timeout_s=100 * TIMEOUT_S)
    world.everyone("exchange", lambda rank: ("t", 0, 0))

    world.ranks[2].kill()
    first = world.call(0, "wait", "t", 1, None).result(TIMEOUT_S)
    world.call(0, "close", "t").result(TIMEOUT_S)
    second = world.call(1, "wait", "t", 1, None).result(TIMEOUT_S)

    assert [first.suspects, second.suspects] == [(2,), (2,)]


@BETWEEN_PROCESSES
def test_survivors_meet_in_another_epoch(make_world: Callable[[str, int], World], kind: str) -> None:
    world = make_world(kind, 3)
    world.connect("t")
    world.ranks[2].kill()
    missed = world.everyone("exchange", lambda rank: ("t", 0, 0), ranks=[0, 1])
    assert [each.suspects for each in missed] == [(2,)] * 2

    world.ranks.pop().end()
    world.addresses.pop()
    world.size = 2
    world.connect("next")

    assert world.everyone("play", lambda rank: ("next",), seed=6, steps=5, phases=5) == [25] * 2


@pytest.fixture
def rung() -> Iterator[tuple[Doorbells, socket.socket, socket.socket]]:
    """Doorbells of epoch 7 with peers 1 and 2, whose ends are in the test's hands."""
    (mine1, theirs1), (mine2, theirs2) = socket.socketpair(), socket.socketpair()
    doorbells = Doorbells(7, {1: mine1, 2: mine2}, step_timeout_s=0.2)
    yield doorbells, theirs1, theirs2
    doorbells.close()
    theirs1.close()
    theirs2.close()


def bell(step: int, phase: int, *, epoch: int = 7, rounds: int = 1) -> bytes:
    return _DOORBELL.pack(epoch, step, phase, 0, rounds, 0, 0, 0)


def notice(step: int, phase: int, round_: int = 0) -> bytes:
    """The sender waits itself, or gives up, and has rung last for this."""
    return _DOORBELL.pack(7, step, phase, round_, 0, 0, 0, 0)


NOWHERE = (-1, -1, -1)  # of a rank that never rang


def test_doorbell_of_another_epoch_is_a_protocol_error(rung) -> None:
    doorbells, first, _ = rung
    first.send(bell(0, 0, epoch=8))

    with pytest.raises(ProtocolError, match="rank 1 exchanges in epoch 8, this is 7") as error:
        doorbells.collect((0, 0, 0))

    assert error.value.suspects == (1,)


def test_peer_that_leaves_out_a_phase_is_not_waited_for(rung) -> None:
    doorbells, first, second = rung
    first.send(bell(0, 0) + bell(0, 1))
    second.send(bell(0, 1))

    with pytest.raises(ProtocolError, match="rank 2 is at step 0 phase 1 and left out step 0 phase 0"):
        doorbells.collect((0, 0, 0))


def test_peer_that_goes_back_is_a_protocol_error(rung) -> None:
    doorbells, first, _ = rung
    first.send(bell(3, 1) + bell(3, 0))

    with pytest.raises(ProtocolError, match="rank 1 is at step 3 phase 0 after step 3 phase 1"):
        doorbells.collect((3, 1, 0))


def test_doorbell_in_pieces_is_one_doorbell(rung) -> None:
    doorbells, first, second = rung
    data = bell(0, 0)
    first.send(data[:5])
    assert doorbells.started(0) is False
    first.send(data[5:])
    assert doorbells.started(0) is True
    second.send(data)

    assert set(doorbells.collect((0, 0, 0))) == {1, 2}


def test_what_a_dead_peer_had_sent_is_taken_before_its_death_counts(rung) -> None:
    doorbells, first, second = rung
    doorbells.ring(1, (0, 0, 0))  # unread at its end when it dies, which resets the connection
    first.send(bell(0, 0))
    first.close()
    second.send(bell(0, 0) + bell(0, 1))

    assert set(doorbells.collect((0, 0, 0))) == {1, 2}
    with pytest.raises(StepMissed, match="gone") as error:
        doorbells.collect((0, 1, 0))
    assert error.value.suspects == (1,)


def test_peer_that_only_waits_itself_is_no_suspect(rung) -> None:
    doorbells, first, second = rung
    first.send(bell(0, 0) + bell(0, 0, rounds=0))  # a notice: rank 1 waits in phase 0 for somebody else
    second.send(bell(0, 0))
    doorbells.collect((0, 0, 0))

    with pytest.raises(StepMissed, match=r"ranks \[1, 2\] took no part") as error:
        doorbells.collect((0, 1, 0))

    assert error.value.suspects == (2,)


def test_peer_that_gave_up_and_closed_is_no_suspect(rung) -> None:
    """Rank 2 died, rank 1 noticed first and has closed its end already when this rank looks."""
    doorbells, first, second = rung
    first.send(bell(0, 0) + bell(0, 0, rounds=0))
    first.shutdown(socket.SHUT_WR)
    second.send(bell(0, 0))
    second.close()
    doorbells.collect((0, 0, 0))

    with pytest.raises(StepMissed, match=r"ranks \[1, 2\] are gone") as error:
        doorbells.collect((0, 1, 0))

    assert error.value.suspects == (2,)


def test_idle_rank_blames_the_one_whose_end_is_seen_later(rung) -> None:
    """Rank 1 saw that rank 2 is gone, and closed, before anything of that is seen here."""
    doorbells, first, second = rung
    first.send(notice(*NOWHERE))
    first.close()

    with pytest.raises(StepMissed) as error:
        doorbells.wait(0, None)

    assert error.value.suspects == (2,)
    assert second.recv(4096) == notice(*NOWHERE), "a rank that gives up tells its peers"


def test_waiting_rank_blames_the_one_whose_end_is_seen_later(rung) -> None:
    doorbells, first, _ = rung
    first.send(bell(0, 0) + notice(0, 0))
    first.close()

    with pytest.raises(StepMissed) as error:
        doorbells.collect((0, 1, 0))

    assert error.value.suspects == (2,)


def test_idle_rank_blames_all_that_are_gone_where_nobody_else_is_left(rung) -> None:
    doorbells, *others = rung
    for other in others:
        other.send(notice(*NOWHERE))
        other.close()

    with pytest.raises(StepMissed) as error:
        doorbells.wait(0, None)

    assert error.value.suspects == (1, 2)


def test_idle_peer_that_died_without_a_word_is_the_suspect_at_once() -> None:
    """At once: the deadline is far beyond what the test waits for."""
    (mine1, theirs1), (mine2, theirs2) = socket.socketpair(), socket.socketpair()
    doorbells = Doorbells(7, {1: mine1, 2: mine2}, step_timeout_s=100 * TIMEOUT_S)
    theirs1.send(bell(0, 0))
    theirs1.close()

    with pytest.raises(StepMissed) as error:
        doorbells.wait(1, None)

    assert error.value.suspects == (1,)
    doorbells.close()
    theirs2.close()
