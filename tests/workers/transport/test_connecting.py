"""How ranks find each other: who is let in, who waits, who is told no, and that nothing of it is left behind."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from flexpert.workers import epoch as epochs
from flexpert.workers.transport import ExchangeListener

from .play import NotConnected
from .worlds import TIMEOUT_S, TOKEN, World

CYCLES = 100


@pytest.fixture(params=["mapped", "gloo"])
def pair(request: pytest.FixtureRequest, make_world: Callable[[str, int], World]) -> World:
    return make_world(request.param, 2)


def connect(world: World, rank: int, epoch: epochs.Epoch, **options):
    return world.call(rank, "connect", "t", world.kind, epochs.encode(epoch), rank, **options)


def test_peer_with_another_token_is_refused(pair: World) -> None:
    epoch = pair.epoch()
    lower = connect(pair, 0, epoch)

    refused = connect(pair, 1, epoch, token="another").result(TIMEOUT_S)

    assert refused.ranks == (0,)
    assert "wrong cluster token" in refused.message
    assert connect(pair, 1, epoch).result(TIMEOUT_S) is None  # and rank 0 has gone on waiting for the right one
    assert lower.result(TIMEOUT_S) is None


def test_earlier_rank_waits_for_one_that_has_not_begun(pair: World) -> None:
    """Rank 1 calls for two epochs before rank 0 has heard of either; rank 0 prepares the later one first."""
    first, second = pair.epoch(), pair.epoch()
    calling = [pair.call(1, "connect", str(each.number), pair.kind, epochs.encode(each), 1) for each in (first, second)]
    for each in (second, first):
        answer = pair.call(0, "connect", str(each.number), pair.kind, epochs.encode(each), 0)
        assert answer.result(TIMEOUT_S) is None
    assert [each.result(TIMEOUT_S) for each in calling] == [None, None]

    for each in (first, second):
        assert (
            pair.everyone("exchange", lambda rank, at=str(each.number): (at, 0, 0, at.encode()))
            == [[str(each.number).encode()] * 2] * 2
        )


def test_connecting_ends_with_its_time_and_names_who_is_missing(pair: World) -> None:
    epoch = pair.epoch()

    for rank in (0, 1):
        missed = connect(pair, rank, epoch, connect_timeout_s=0.2).result(TIMEOUT_S)
        assert missed.ranks == (1 - rank,)
        assert f"worker-{1 - rank}" in missed.message


def test_cancelled_epoch_gives_up_at_once(pair: World) -> None:
    epoch = pair.epoch()
    other = pair.epoch()
    waiting = connect(pair, 0, epoch, connect_timeout_s=100 * TIMEOUT_S)
    assert connect(pair, 1, epoch, token="x").result(TIMEOUT_S).ranks == (0,)

    pair.call(0, "cancel", other.number).result(TIMEOUT_S)  # nobody connects that one
    while not waiting.done():
        pair.call(0, "cancel", epoch.number).result(TIMEOUT_S)

    assert isinstance(waiting.result(), NotConnected)


def test_another_incarnation_is_refused(pair: World) -> None:
    epoch = pair.epoch()
    lower = connect(pair, 0, epoch)
    stale = msgspec.structs.replace(epoch.members[1], incarnation=epoch.members[1].incarnation - 1)

    refused = connect(pair, 1, msgspec.structs.replace(epoch, members=(epoch.members[0], stale))).result(TIMEOUT_S)

    assert "is worker-1 incarnation 1, not worker-1 incarnation 0" in refused.message
    assert connect(pair, 1, epoch).result(TIMEOUT_S) is None
    assert lower.result(TIMEOUT_S) is None


def test_peer_that_dies_while_connecting_fails_the_others_at_once(pair: World) -> None:
    """Rank 0 connects another epoch meanwhile, so its process has called nobody back when it is killed."""
    waiting = connect(pair, 1, pair.epoch(), connect_timeout_s=100 * TIMEOUT_S)
    connect(pair, 0, pair.epoch(), connect_timeout_s=0.2).result(TIMEOUT_S)

    pair.ranks[0].kill()

    assert waiting.result(TIMEOUT_S).ranks == (0,)


def test_nothing_is_left_of_a_hundred_epochs(pair: World) -> None:
    def cycle() -> None:
        pair.connect("t")
        pair.everyone("play", lambda rank: ("t",), seed=7, steps=1, phases=2)
        pair.everyone("close", lambda rank: ("t",))

    cycle()
    before = pair.everyone("resources")
    for _ in range(CYCLES):
        cycle()
    after = pair.everyone("resources")

    growth = [now - then for rank in zip(before, after, strict=True) for then, now in zip(*rank, strict=True)]
    assert max(growth) < CYCLES // 10  # a thread that has been joined may take a moment to go


def test_a_rank_that_is_alone_exchanges_with_itself(make_world: Callable[[str, int], World]) -> None:
    for kind in ("mapped", "gloo"):
        world = make_world(kind, 1)
        world.connect("t")

        assert world.everyone("play", lambda rank: ("t",), seed=8, steps=3, phases=3) == [9]
        assert world.call(0, "wait", "t", 3, 0.0).result(TIMEOUT_S) is False


def test_listener_drops_what_is_no_hello(tmp_path: Path) -> None:
    listener = ExchangeListener(f"unix:{tmp_path}/socket", token=TOKEN)
    try:
        for garbage in (b"\xff\xff\xff\xff", b"\x00\x00\x00\x02hi"):
            with socket.socket(socket.AF_UNIX) as stranger:
                stranger.settimeout(TIMEOUT_S)
                stranger.connect(str(tmp_path / "socket"))
                stranger.send(garbage)
                assert stranger.recv(1) == b""
    finally:
        listener.close()
    assert not (tmp_path / "socket").exists()


def test_address_of_another_form_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected unix:/path or tcp:host:port"):
        ExchangeListener("somewhere", token=TOKEN)
    with pytest.raises(OSError, match=f"cannot listen for exchange peers at unix:{tmp_path}/no/such/folder"):
        ExchangeListener(f"unix:{tmp_path}/no/such/folder", token=TOKEN)
