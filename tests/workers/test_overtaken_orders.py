"""Orders of transitions that overtake each other: a prepare after its abort, a newer prepare, an abort that comes late."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from random import Random

import pytest
from tests.workers.group_world import random_submit, tokens_alone
from tests.workers.played_membership import WAIT_S, PlayedMember, epoch_of

from flexpert.workers.model.layout import segment_of
from flexpert.workers.prepared import PrepareAborted
from flexpert.workers.transport import ConnectError


@pytest.fixture
def member(monkeypatch):
    made = PlayedMember(monkeypatch)
    yield made
    made.close()


@pytest.fixture
def threads():
    with ThreadPoolExecutor(4) as made:
        yield made


def enter(member: PlayedMember, number: int, *names: str) -> None:
    member.membership.prepare(epoch_of(number, *names))
    member.membership.commit(number)
    member.membership.retire(number)


def test_a_prepare_that_its_abort_overtook_is_refused_at_once(member):
    assert member.membership.abort(2) == {"freed_bytes": 0}
    with pytest.raises(PrepareAborted, match="epoch 2 was aborted"):
        member.membership.prepare(epoch_of(2, "worker-0", "worker-1"))
    assert member.weights.fetches == []
    enter(member, 3, "worker-0")
    assert member.membership.abort(2) == {"freed_bytes": 0}, "an abort that comes twice changes nothing"


def test_an_abort_reaches_a_prepare_that_is_about_to_connect(member, threads, monkeypatch):
    """The first cancel comes when nobody connects yet, and is forgotten."""
    connect, about_to, go_on = member.membership._connect, member.weights.fetching, member.weights.go_on

    def late(*arguments):
        about_to.set()
        assert go_on.wait(WAIT_S)
        return connect(*arguments)

    monkeypatch.setattr(member.membership, "_connect", late)
    preparing = threads.submit(member.membership.prepare, epoch_of(2, "worker-0", "worker-1"))
    assert about_to.wait(WAIT_S)
    aborting = threads.submit(member.membership.abort, 2)
    with member._news:
        assert member._news.wait_for(lambda: member.cancelled, WAIT_S)
    go_on.set()
    aborting.result(5)
    with pytest.raises((ConnectError, PrepareAborted)):
        preparing.result(5)


def test_a_newer_prepare_ends_an_older_one_that_waits_for_its_peers(member, threads):
    older = threads.submit(member.membership.prepare, epoch_of(2, "worker-0", "worker-1"))
    assert member.connecting.wait(WAIT_S)
    newer = threads.submit(member.membership.prepare, epoch_of(3, "worker-0"))
    assert newer.result(5)["moved_bytes"] > 0
    with pytest.raises((ConnectError, PrepareAborted)):
        older.result(5)
    with pytest.raises(PrepareAborted, match="epoch 3 came after it"):
        member.membership.prepare(epoch_of(2, "worker-0", "worker-1"))


def test_a_late_abort_leaves_the_fetch_of_a_newer_epoch_alone(member, threads):
    member.weights.held_fetches = 1
    preparing = threads.submit(member.membership.prepare, epoch_of(3, "worker-0"))
    assert member.weights.fetching.wait(WAIT_S)
    aborting = threads.submit(member.membership.abort, 2)
    with member._news:
        assert member._news.wait_for(lambda: member.cancelled.count(2) > 1, WAIT_S)
    assert member.weights.interrupted == []
    member.weights.go_on.set()
    assert preparing.result(WAIT_S)["moved_bytes"] == 4
    assert aborting.result(WAIT_S) == {"freed_bytes": 0}


def test_what_was_fetched_for_an_epoch_that_another_replaced_is_not_fetched_again(member):
    member.meet(2, 3)
    member.meet(3, 2)
    member.membership.prepare(epoch_of(2, "worker-0", "worker-1", "worker-2"))  # experts 0 and 3
    member.membership.prepare(epoch_of(3, "worker-0", "worker-1"))  # experts 0 and 2
    assert member.weights.fetches == [(segment_of(0), segment_of(3)), (segment_of(2),)]
    assert member.weights.dropped == [segment_of(3)]
    assert member.membership.abort(3) == {"freed_bytes": 2}
    assert member.weights.here == {}, "what it took over goes with it"


def test_an_epoch_that_the_engine_enters_meanwhile_is_not_undone(member, threads):
    """Nobody else commits epoch 2, and the group of epoch 1 breaks just when epoch 3 replaces it."""
    group = member.meet(1, 2)
    member.meet(2, 2, step_timeout_s=0.1)
    enter(member, 1, "worker-0", "worker-1")
    member.membership.prepare(epoch_of(2, "worker-1", "worker-0"))
    engine = member.played.engine
    entered = engine.enter(member.membership._prepared[2].following)
    with group.changed:  # the empty step with which rank 0 says that it is ready
        assert group.changed.wait_for(lambda: (0, 0) in group.sent[0], WAIT_S)
    replaces, withdraw = threading.Event(), engine.withdraw
    engine.withdraw = lambda number: (withdraw(number), replaces.set())[0]
    replacing = threads.submit(member.membership.prepare, epoch_of(3, "worker-0"))
    replacing.add_done_callback(lambda _: replaces.set())
    assert replaces.wait(WAIT_S)
    group.fail(1)
    entered.result(WAIT_S)
    replacing.result(WAIT_S)
    submit = random_submit(Random(1), 0)
    member.gateway.add(submit, member.played.name)
    engine.submit("gateway", submit)
    assert member.membership.wait_trouble().result(5).epoch == 2, "a worker that is in epoch 2 takes no step alone"
    member.membership.commit(3)
    assert member.gateway.wait_all() == tokens_alone([submit])
    assert member.played.error is None
