"""KV arenas that grow and shrink while they are held, across kills, and against clients that lie."""

from __future__ import annotations

import signal
from collections.abc import Callable

import pytest
from tests.hbm.harness import Child

from flexpert.hbm import (
    GRANULE_BYTES,
    BudgetError,
    BusyError,
    Claim,
    HbmClient,
    HbmError,
    LoadPlan,
    Map,
    NotFoundError,
    SlotRecord,
    messages,
)
from flexpert.hbm.granules import Extent

Connect = Callable[..., HbmClient]
SHAPE = {"slots": 4, "slot_bytes": 16 * GRANULE_BYTES}


def test_granules_that_an_arena_grew_by_can_be_used_and_are_its_own(connect: Connect) -> None:
    client = connect(1)
    kv = client.open_kv_arena("kv", **SHAPE, granules=8)
    first = list(kv.granules)
    added = kv.grow(5)
    assert len(set(added)) == 5
    assert sorted([*first, *added]) == list(kv.granules)
    kv.apply([Claim(0, "r"), Map(0, 0, tuple(added))])
    kv.memory()[: 5 * GRANULE_BYTES] = b"\x11" * (5 * GRANULE_BYTES)
    [info] = client.info().arenas
    assert info.granules == 13
    assert client.info().free_bytes == (256 - 13) * GRANULE_BYTES
    assert client.findings() == []


def test_what_an_arena_gives_back_serves_weights_and_the_other_way_round(connect: Connect) -> None:
    """The donor's and the taker's bytes never meet: what changes hands is zeros."""
    client = connect(1)
    kv = client.open_kv_arena("kv", **SHAPE, granules=156)
    client.load_segments("w", LoadPlan({"experts:0": 100 * GRANULE_BYTES}, []))
    with pytest.raises(BudgetError, match=r"growing KV arena 'kv'.*1 granules.*are needed, 0 are free"):
        kv.grow(1)
    ids = list(kv.granules)
    kv.map(0, 0, ids[-16:])
    kv.memory()[: 16 * GRANULE_BYTES] = b"\x77" * (16 * GRANULE_BYTES)
    kv.unmap(0)
    kv.shrink(ids[-50:])
    assert list(kv.granules) == ids[:-50]
    client.load_segments("w", LoadPlan({"experts:1": 50 * GRANULE_BYTES}, []))
    memory = bytes(client.map_weights("w", ["experts:1"]).segments["experts:1"].memory())
    assert memory.count(0) == len(memory)
    client.drop_segments("w", ["experts:0"])
    assert len(kv.grow(100)) == 100
    assert client.findings() == []


def test_records_of_a_grown_arena_survive_a_kill(holder: Callable[..., Child], connect: Connect) -> None:
    child = holder(1, granules=8)
    added = child.run("added = arena.grow(6); result = added")
    child.run("arena.apply([Claim(0, 'r0', 9), Map(0, 0, tuple(arena.granules[:2]) + tuple(added))])")
    child.run("m = arena.memory(); m[0] = 11; m[7 * GRANULE_BYTES] = 22; arena.shrink([arena.granules[3]])")
    granules = child.run("result = list(arena.granules)")
    child.kill()
    kv = connect(2).open_kv_arena("kv", **SHAPE, granules=13)
    assert kv.records() == [SlotRecord(0, "r0", [*granules[:2], *added], 9)]
    assert (kv.memory()[0], kv.memory()[7 * GRANULE_BYTES]) == (11, 22)
    assert list(kv.granules) == granules


def test_an_arena_can_be_reopened_without_knowing_how_often_it_grew(
    holder: Callable[..., Child], connect: Connect
) -> None:
    child = holder(1, granules=8)
    child.start(
        "import os, signal\n"
        "arena.apply([Claim(1, 'r', 3), Map(1, 0, (arena.granules[0],))])\n"
        "for i in range(20): arena.shrink(arena.grow(i % 5 + 2)[1:])\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert child.process.wait(20) == -signal.SIGKILL
    client = connect(2)
    kv = client.open_kv_arena("kv", **SHAPE, granules=None)
    assert len(kv.granules) == 28
    assert [(record.request_id, record.committed) for record in kv.records()] == [("r", 3)]
    assert client.findings() == []


def test_an_arena_that_is_not_there_has_no_number_of_granules(connect: Connect) -> None:
    with pytest.raises(NotFoundError, match="say how many"):
        connect(1).open_kv_arena("kv", **SHAPE, granules=None)


@pytest.mark.parametrize("which", ["mapped", "foreign", "twice", "all", "none"])
def test_a_wrong_shrink_is_refused_before_anything_changes(connect: Connect, which: str) -> None:
    client = connect(1)
    kv = client.open_kv_arena("kv", **SHAPE, granules=8)
    kv.map(3, 0, kv.granules[4:6])
    ids = {"mapped": [0, 5], "foreign": [0, 8], "twice": [0, 0], "all": list(range(8)), "none": []}[which]
    with pytest.raises(HbmError, match="slot 3 maps" if which == "mapped" else "of its own, each once, not all"):
        kv.shrink(ids)
    assert list(kv.granules) == list(range(8))
    kv.map(0, 0, kv.granules)
    kv.flush()
    assert client.findings() == []


def test_what_was_given_back_cannot_be_mapped_any_more(connect: Connect) -> None:
    kv = connect(1).open_kv_arena("kv", **SHAPE, granules=8)
    kv.shrink([7])
    with pytest.raises(HbmError, match="granule 7 does not belong"):
        kv.map(0, 0, [7])
    kv.flush()


@pytest.mark.parametrize(
    ("extents", "error", "message"),
    [
        ([(3, 2)], BusyError, "granule 4 is mapped in slot 1"),
        ([(100, 1)], NotFoundError, "do not all belong"),  # of the weights
        ([(7, 2)], NotFoundError, "do not all belong"),
        ([(200, 1 << 50)], NotFoundError, "do not all belong"),
        ([(0, 0)], NotFoundError, "do not all belong"),
        ([(0, 2), (1, 1)], HbmError, "given back twice"),
        ([(5, 1)] * 3, HbmError, "given back twice"),
        ([], HbmError, "cannot give 0 back"),
    ],
)
def test_a_client_that_lies_about_what_it_gives_back_is_refused_and_served_on(
    connect: Connect, extents: list[tuple[int, int]], error: type[HbmError], message: str
) -> None:
    client = connect(1)
    kv = client.open_kv_arena("kv", **SHAPE, granules=8)
    client.load_segments("w", LoadPlan({"s": 200 * GRANULE_BYTES}, []))
    kv.map(1, 0, [4])
    before = client.info()
    with pytest.raises(error, match=message):
        client.shrink_arena(kv._lease_id, [Extent(start, length) for start, length in extents])
    assert _fields(client.info()) == _fields(before)
    assert client.findings() == []
    kv.claim(0, "r")
    kv.flush()


def _fields(info: messages.Info) -> list[object]:
    """All but the number of the question."""
    return [getattr(info, name) for name in info.__struct_fields__[1:]]


def test_anothers_arena_can_neither_grow_nor_shrink(holder: Callable[..., Child], connect: Connect) -> None:
    lease_id = holder(1).run("result = arena._lease_id")
    thief = connect(9)
    with pytest.raises(NotFoundError, match="not held by this client"):
        thief.grow_arena(lease_id, 1)
    with pytest.raises(NotFoundError, match="not held by this client"):
        thief.shrink_arena(lease_id, [Extent(0, 1)])
    assert thief.info().arenas[0].granules == 32


@pytest.mark.parametrize("count", [0, 1 << 50])
def test_a_nonsensical_growth_is_refused(connect: Connect, count: int) -> None:
    client = connect(1)
    kv = client.open_kv_arena("kv", **SHAPE, granules=8)
    with pytest.raises(HbmError, match="cannot grow by 0" if count == 0 else "are needed"):
        kv.grow(count)
    kv.flush()


def test_an_arena_whose_operations_were_refused_neither_grows_nor_shrinks(connect: Connect) -> None:
    """Nobody knows any more what its holder has mapped."""
    client = connect(1)
    kv = client.open_kv_arena("kv", **SHAPE, granules=8)
    client.send_unanswered(("apply", kv._lease_id, [("m", 0, 0, [200])]))
    for call in (lambda: client.grow_arena(kv._lease_id, 1), lambda: client.shrink_arena(kv._lease_id, [Extent(0, 1)])):
        with pytest.raises(HbmError, match="has to be opened anew"):
            call()
    assert client.info().arenas[0].granules == 8


def test_granules_that_come_after_their_caller_gave_up_are_given_back(connect: Connect) -> None:
    client = connect(1)
    kv = client.open_kv_arena("kv", **SHAPE, granules=8)
    [extent] = client.grow_arena(kv._lease_id, 4)
    client._deliver(messages.GrownReply(1 << 40, kv._lease_id, [(extent.start, extent.length)]), [])
    assert client.info().arenas[0].granules == 8
    kv.flush()
