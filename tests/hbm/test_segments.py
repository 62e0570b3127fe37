"""Segments of a key that come and go: added, mapped back to back, read by another device's manager, dropped."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.hbm.harness import WAIT_S, BackgroundLoad, Child, helper_pid, readable, wait_for_exit

from flexpert.hbm import (
    GRANULE_BYTES,
    BudgetError,
    BusyError,
    Copy,
    HbmClient,
    HbmError,
    LimitError,
    LoadError,
    LoadPlan,
    ManagerConfig,
    ManagerGoneError,
    ManagerHandle,
    NotFoundError,
    ensure_manager,
    mapped_weights,
    peer_plan,
)
from flexpert.hbm.limits import RESERVED_MAPPINGS

Connect = Callable[..., HbmClient]
NAMES = ["dense", "experts:0", "experts:1", "experts:2"]
SIZES = {"dense": 2 * GRANULE_BYTES + 777, "experts:0": GRANULE_BYTES, "experts:1": GRANULE_BYTES, "experts:2": 5}


@pytest.fixture
def content(tmp_path: Path) -> bytes:
    """Of a file that has all segments, one after the other."""
    data = os.urandom(sum(SIZES.values()))
    (tmp_path / "model").write_bytes(data)
    return data


@pytest.fixture
def plan_of(tmp_path: Path, content: bytes) -> Callable[..., LoadPlan]:
    """A plan for some of the segments."""

    def plan(*names: str, more: tuple[Copy, ...] = ()) -> LoadPlan:
        file, begins = str(tmp_path / "model"), offsets()
        copies = [Copy(file, begins[name], SIZES[name], "U8", name, 0, "U8") for name in names]
        return LoadPlan({name: SIZES[name] for name in names}, [*copies, *more], b"manifest")

    return plan


def offsets() -> dict[str, int]:
    begins, offset = {}, 0
    for name, nbytes in SIZES.items():
        begins[name] = offset
        offset += nbytes
    return begins


def part(content: bytes, name: str) -> bytes:
    return content[offsets()[name] : offsets()[name] + SIZES[name]]


@pytest.fixture
def peer(runtime_dir: Path) -> ManagerHandle:
    """The manager of another device."""
    return ensure_manager(ManagerConfig(runtime_dir, name="device-1", budget_bytes=64 * GRANULE_BYTES))


@pytest.fixture
def connect_peer(peer: ManagerHandle) -> Iterator[Callable[[], HbmClient]]:
    clients = []

    def connect_client() -> HbmClient:
        clients.append(HbmClient.connect(peer.socket_path, client_name="peer"))
        return clients[-1]

    yield connect_client
    for client in clients:
        client.close()


def free_granules(client: HbmClient) -> int:
    return client.info().free_bytes // GRANULE_BYTES


# Adding


def test_segments_are_added_to_a_key_and_those_that_are_there_are_not_read_again(
    connect: Connect, plan_of: Callable[..., LoadPlan], content: bytes, tmp_path: Path
) -> None:
    client = connect()
    assert client.segments("w") == {}
    client.load_segments("w", plan_of("dense", "experts:1"))
    before = client.map_weights("w")
    (tmp_path / "model").write_bytes(content[: offsets()["experts:0"]] + bytes(GRANULE_BYTES) + bytes(GRANULE_BYTES))
    client.load_segments("w", plan_of("dense", "experts:0", "experts:1"))
    assert client.segments("w") == {name: SIZES[name] for name in ("dense", "experts:1", "experts:0")}
    weights = client.map_weights("w")
    assert weights.segments["dense"].memory() == part(content, "dense")
    assert weights.segments["experts:1"].memory() == part(content, "experts:1")
    assert weights.segments["experts:0"].memory() == bytes(GRANULE_BYTES)
    assert before.segments["dense"].memory() == part(content, "dense")
    assert (weights.manifest, list(before.segments)) == (b"manifest", ["dense", "experts:1"])
    [info] = client.info().weights
    assert (info.state, info.segments) == ("ready", client.segments("w"))
    assert info.nbytes == sum(info.segments.values())


def test_a_segment_of_another_size_is_refused_and_nothing_of_the_plan_is_added(
    connect: Connect, plan_of: Callable[..., LoadPlan]
) -> None:
    client = connect()
    client.load_segments("w", plan_of("dense"))
    free = free_granules(client)
    with pytest.raises(LoadError, match=rf"'dense' is there with {SIZES['dense']} bytes, the plan has 1"):
        client.load_segments("w", LoadPlan({"new": 1, "dense": 1}, []))
    assert (client.segments("w"), free_granules(client)) == ({"dense": SIZES["dense"]}, free)


def test_what_does_not_fit_leaves_everything_as_it_was(connect: Connect, plan_of: Callable[..., LoadPlan]) -> None:
    client = connect()
    client.load_segments("w", plan_of("dense", "experts:0"))
    before = client.info()
    with pytest.raises(BudgetError, match=r"253 granules.*are needed"):
        client.load_segments("w", LoadPlan({"dense": SIZES["dense"], "small": 1, "large": 252 * GRANULE_BYTES}, []))
    after = client.info()
    assert (after.weights, after.free_bytes) == (before.weights, before.free_bytes)
    assert client.map_weights("w", ["dense"]).segments["dense"].nbytes == SIZES["dense"]
    assert client.findings() == []


def test_a_failed_addition_leaves_the_key_as_it_was(
    connect: Connect, plan_of: Callable[..., LoadPlan], tmp_path: Path, content: bytes
) -> None:
    client = connect()
    client.load_segments("w", plan_of("dense"))
    free = free_granules(client)
    gone = Copy(str(tmp_path / "gone"), 0, 1, "U8", "experts:2", 0, "U8")
    plan = plan_of("dense", "experts:0")
    with pytest.raises(LoadError, match="gone: No such file"):
        client.load_segments("w", LoadPlan({**plan.segments, "experts:2": 5}, [*plan.copies, gone]))
    assert (client.segments("w"), free_granules(client)) == ({"dense": SIZES["dense"]}, free)
    state = client.weights_state("w")
    assert state is not None
    assert state.state == "ready"
    client.load_segments("w", plan)
    assert client.map_weights("w").segments["experts:0"].memory() == part(content, "experts:0")
    assert client.findings() == []


def test_a_caller_that_wants_more_joins_the_running_load_and_then_loads_the_rest(
    connect: Connect, manager: ManagerHandle, plan_of: Callable[..., LoadPlan], tmp_path: Path, content: bytes
) -> None:
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    first = BackgroundLoad(connect(), plan_of("dense", more=(nothing_from(gate, "dense"),)))
    assert readable(first.progressed)
    second = BackgroundLoad(connect(), plan_of("dense", "experts:0"))
    client = connect()
    with pytest.raises(BusyError, match="still being loaded"):
        client.map_weights("w", ["dense"])
    with pytest.raises(NotFoundError, match="experts:0"):  # not begun
        client.map_weights("w", ["experts:0"])
    open_for_writing(gate)
    assert (first.join(), second.join()) == (None, None)
    weights = client.map_weights("w", ["experts:0", "dense"])
    assert weights.segments["experts:0"].memory() == part(content, "experts:0")
    assert client.findings() == []


def nothing_from(file: Path, segment: str) -> Copy:
    """A copy that reads nothing, but for which the file is opened: a FIFO holds the helper up until it has a writer."""
    return Copy(str(file), 0, 0, "U8", segment, SIZES[segment], "U8")


def open_for_writing(fifo: Path) -> None:
    """Returns when the helper has opened it too."""
    os.close(os.open(fifo, os.O_WRONLY))


# Mapping


@pytest.mark.parametrize("populate", [False, True])
def test_segments_are_mapped_back_to_back_in_the_order_asked_for(
    connect: Connect, plan_of: Callable[..., LoadPlan], content: bytes, populate: bool
) -> None:
    client = connect()
    for name in reversed(NAMES):
        client.load_segments("w", plan_of(name))
    order = ["experts:1", "dense", "experts:0"]
    weights = client.map_weights("w", order, populate=populate)
    assert list(weights.segments) == order
    begins = [weights.segments[name].address - weights.address for name in order]
    assert begins == [0, GRANULE_BYTES, 4 * GRANULE_BYTES]
    assert weights.nbytes == 5 * GRANULE_BYTES
    for name in order:
        assert weights.segments[name].memory() == part(content, name)


def test_a_populated_mapping_is_there_before_it_is_used(connect: Connect, plan_of: Callable[..., LoadPlan]) -> None:
    client = connect()
    client.load_segments("w", plan_of("dense"))
    weights = client.map_weights("w", ["dense"], populate=True)
    resident = 0
    with open("/proc/self/smaps") as lines:
        inside = False
        for line in lines:
            if "-" in line.split()[0] and not line.split()[0].endswith(":"):
                inside = int(line.split("-")[0], 16) == weights.address
            elif inside and line.startswith("Rss:"):
                resident = int(line.split()[1]) * 1024
    assert resident == weights.nbytes


@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        (["dense", "experts:7"], NotFoundError, "no segments 'experts:7'; they have 'dense'"),
        (["dense", "dense"], HbmError, "each once"),
        ([], HbmError, "expected names"),
    ],
)
def test_wrong_names_are_refused_and_hold_nothing(
    connect: Connect, plan_of: Callable[..., LoadPlan], names: list[str], error: type[HbmError], message: str
) -> None:
    client = connect()
    client.load_segments("w", plan_of("dense"))
    for call in (client.map_weights, client.export_segments, client.drop_segments):
        with pytest.raises(error, match=message):
            call("w", names)
    with pytest.raises(NotFoundError, match="no weights 'other'"):
        client.drop_segments("other", ["dense"])
    assert client.segments("w") == {"dense": SIZES["dense"]}
    assert client.info().weights[0].readers == []
    assert client.findings() == []


# Dropping


def test_a_dropped_segment_is_gone_at_once_and_its_granules_when_its_mapping_is_closed(
    connect: Connect, plan_of: Callable[..., LoadPlan], content: bytes
) -> None:
    client, other = connect(), connect()
    client.load_segments("w", plan_of(*NAMES))
    all_of_it, one = client.map_weights("w"), other.map_weights("w", ["experts:0"])
    client.drop_segments("w", ["experts:0", "experts:2"])
    assert list(client.segments("w")) == ["dense", "experts:1"]
    assert free_granules(client) == 256 - 6
    client.load_segments("w", plan_of("experts:0"))  # the name is free: another segment of the same name
    assert [(found.state, found.nbytes) for found in client.info().weights if found.state == "dropped"] == [
        ("dropped", SIZES["experts:0"] + SIZES["experts:2"])
    ]
    assert free_granules(client) == 256 - 7
    all_of_it.close()
    assert free_granules(client) == 256 - 6
    assert one.segments["experts:0"].memory() == part(content, "experts:0")
    one.close()
    assert free_granules(client) == 256 - 5
    assert client.findings() == []


def test_granules_of_a_dropped_segment_come_back_when_its_reader_is_killed(
    connect: Connect, manager: ManagerHandle, spawn: Callable[[], Child], plan_of: Callable[..., LoadPlan]
) -> None:
    client = connect(1)
    client.load_segments("w", plan_of("dense", "experts:0"))
    child = spawn()
    child.run(f"client = HbmClient.connect({str(manager.socket_path)!r}, client_name='c')")
    child.run("weights = client.map_weights('w', ['experts:0'])")
    client.drop_segments("w", ["experts:0"])
    child.run("import socket; client._sock.shutdown(socket.SHUT_RDWR)")
    assert free_granules(client) == 256 - 4
    kv = client.open_kv_arena("kv", slots=1, slot_bytes=GRANULE_BYTES, granules=252)
    with pytest.raises(BudgetError):
        kv.grow(1)
    os.kill(child.pid, signal.SIGSTOP)
    assert free_granules(client) == 0
    child.kill()
    wait_until(lambda: free_granules(client) == 1)
    assert len(kv.grow(1)) == 1
    assert client.findings() == []


def wait_until(holds: Callable[[], bool]) -> None:
    for _ in range(20_000):  # each is a round trip
        if holds():
            return
    pytest.fail("it never came true")


def test_dropping_a_segment_that_is_being_loaded_ends_the_load_and_frees_its_names_at_once(
    connect: Connect, manager: ManagerHandle, plan_of: Callable[..., LoadPlan], tmp_path: Path, content: bytes
) -> None:
    client = connect()
    client.load_segments("w", plan_of("dense"))
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    load = BackgroundLoad(connect(), plan_of("experts:0", "experts:1", more=(nothing_from(gate, "experts:0"),)))
    assert readable(load.progressed)
    pid = helper_pid(manager)
    os.kill(pid, signal.SIGSTOP)  # a helper that takes its time to die is not waited for
    client.drop_segments("w", ["experts:1"])
    client.load_segments("w", plan_of("experts:0", "experts:1"))
    assert "dropped while they were being loaded" in str(load.join())
    wait_for_exit(pid)
    assert client.map_weights("w").segments["experts:1"].memory() == part(content, "experts:1")
    assert free_granules(client) == 256 - 5
    assert client.findings() == []


# Reading what another device's manager has


def test_a_peers_segments_are_pulled_byte_for_byte_also_from_scattered_granules(
    connect: Connect, connect_peer: Connect, plan_of: Callable[..., LoadPlan], content: bytes
) -> None:
    theirs, ours = connect_peer(), connect()
    for number in range(6):  # leaves holes of one granule
        theirs.load_segments("filler", LoadPlan({str(number): GRANULE_BYTES}, []))
    theirs.load_segments("rest", LoadPlan({"rest": 58 * GRANULE_BYTES}, []))
    theirs.drop_segments("filler", ["0", "2", "4"])
    theirs.load_segments("w", plan_of("dense"))
    theirs.drop_segments("filler", ["1", "5"])
    theirs.load_segments("w", plan_of("experts:0", "experts:2"))
    with theirs.export_segments("w", ["experts:2", "dense"]) as exported:
        assert [len(parts) for parts in exported.extents.values()] == [1, 3]
        assert exported.manifest == b"manifest"
        ours.load_segments("w", peer_plan(exported.path, exported.extents, exported.manifest))
    weights = ours.map_weights("w")
    assert {name: bytes(segment.memory()) for name, segment in weights.segments.items()} == {
        name: part(content, name) for name in ("experts:2", "dense")
    }
    assert weights.manifest == b"manifest"
    assert ours.findings() == theirs.findings() == []


def test_an_export_can_be_pulled_from_another_process_and_holds_what_was_dropped(
    connect: Connect,
    connect_peer: Connect,
    peer: ManagerHandle,
    spawn: Callable[[], Child],
    plan_of: Callable[..., LoadPlan],
    content: bytes,
) -> None:
    theirs, ours = connect_peer(), connect()
    theirs.load_segments("w", plan_of("dense", "experts:1"))
    child = spawn()
    child.run(f"client = HbmClient.connect({str(peer.socket_path)!r}, client_name='c')")
    path, extents = child.run(
        "exported = client.export_segments('w', ['experts:1']); result = (exported.path, exported.extents)"
    )
    theirs.drop_weights("w")
    theirs.load_segments("other", LoadPlan({"zeros": theirs.info().free_bytes}, []))
    ours.load_segments("w", peer_plan(path, extents))
    assert ours.map_weights("w").segments["experts:1"].memory() == part(content, "experts:1")
    child.run("exported.close()")
    assert theirs.info().free_bytes == GRANULE_BYTES
    with pytest.raises(LoadError, match=r"cannot be read.*has ended or let go"):
        ours.load_segments("w", peer_plan(path, {"late": extents["experts:1"]}))
    assert list(ours.segments("w")) == ["experts:1"]


@pytest.mark.parametrize("end", ["manager", "exporter", "close", "close and export again"])
def test_a_pull_whose_source_lets_go_in_the_middle_fails_and_the_key_is_as_before(
    connect: Connect,
    connect_peer: Connect,
    peer: ManagerHandle,
    spawn: Callable[[], Child],
    plan_of: Callable[..., LoadPlan],
    tmp_path: Path,
    end: str,
) -> None:
    ours = connect()
    connect_peer().load_segments("w", plan_of("dense", "experts:0", "experts:1"))
    ours.load_segments("w", plan_of("experts:0"))
    before = ours.info()
    child = spawn()
    child.run(f"client = HbmClient.connect({str(peer.socket_path)!r}, client_name='c')")
    path, extents = child.run("e = client.export_segments('w', ['dense', 'experts:1']); result = (e.path, e.extents)")
    opened, go_on = tmp_path / "opened", tmp_path / "go on"
    for gate in (opened, go_on):
        os.mkfifo(gate)
    plan = peer_plan(path, extents)
    plan = LoadPlan(
        {"experts:0": SIZES["experts:0"], **plan.segments},
        [*plan.copies, nothing_from(opened, "dense"), nothing_from(go_on, "dense")],
    )
    load = BackgroundLoad(connect(), plan)
    open_for_writing(opened)  # the helper has opened the peer's memory as well
    if end == "manager":
        os.kill(peer.pid, signal.SIGKILL)
        child.run(f"client._reader.join({WAIT_S})")
    elif end == "exporter":
        child.kill()
    else:
        child.run("e.close()")
        if end == "close and export again":
            child.run("e = client.export_segments('w', ['dense', 'experts:1'])")
    open_for_writing(go_on)
    error = load.join()
    assert isinstance(error, LoadError)
    assert "was withdrawn while it was read" in str(error)
    after = ours.info()
    assert (after.weights, after.free_bytes) == (before.weights, before.free_bytes)
    assert ours.findings() == []


def test_an_export_ends_with_its_manager_and_can_be_closed_then(
    connect_peer: Connect, peer: ManagerHandle, plan_of: Callable[..., LoadPlan]
) -> None:
    client = connect_peer()
    client.load_segments("w", plan_of("dense"))
    exported = client.export_segments("w", ["dense"])
    assert os.path.exists(exported.path)
    os.kill(peer.pid, signal.SIGKILL)
    client._reader.join(WAIT_S)
    assert not os.path.exists(exported.path)
    exported.close()
    with pytest.raises(ManagerGoneError):
        client.segments("w")


# Many


def mappings_between(begin: int, nbytes: int) -> int:
    with open("/proc/self/maps") as lines:
        starts = [int(line.split("-")[0], 16) for line in lines]
    return sum(begin <= start < begin + nbytes for start in starts)


def test_neighbours_are_mapped_in_one_call_and_scattered_segments_in_the_right_order(
    connect: Connect, tmp_path: Path
) -> None:
    client = connect()
    names = [f"experts:{number}" for number in range(240)]
    words = [number.to_bytes(4, "little") for number in range(240)]
    (tmp_path / "file").write_bytes(b"".join(word * (GRANULE_BYTES // 4) for word in words))
    copies = [
        Copy(str(tmp_path / "file"), number * GRANULE_BYTES, GRANULE_BYTES, "U8", name, 0, "U8")
        for number, name in enumerate(names)
    ]
    plan = LoadPlan(dict.fromkeys(names, GRANULE_BYTES), copies)
    client.load_segments("w", plan)
    with client.map_weights("w") as weights:
        assert mappings_between(weights.address, weights.nbytes) == 1
    client.drop_segments("w", names[::2])
    client.load_segments("w", plan)
    backwards = client.map_weights("w", names[::-1])
    for name, word in zip(names, words, strict=True):
        assert backwards.segments[name].memory()[:8] == word * 2
    assert client.findings() == []


def test_scattered_segments_beyond_the_limit_of_mappings_are_refused_and_held_by_nobody(
    connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = connect()
    names = [str(number) for number in range(200)]
    client.load_segments("w", LoadPlan(dict.fromkeys(names, GRANULE_BYTES), []))
    monkeypatch.setattr(
        mapped_weights, "max_mappings", lambda: mapped_weights.count_mappings() + RESERVED_MAPPINGS + 99
    )
    with pytest.raises(LimitError, match=r"needs 100 memory mappings.*vm.max_map_count"):
        client.map_weights("w", names[::2])
    assert client.info().weights[0].readers == []


def test_fifteen_thousand_segments_of_a_key_come_and_go(runtime_dir: Path) -> None:
    num_segments = 15_000
    budget_bytes = num_segments * GRANULE_BYTES  # sparse: nothing is written
    many = ensure_manager(ManagerConfig(runtime_dir, name="many", budget_bytes=budget_bytes))
    names = [f"experts:{number}" for number in range(num_segments)]
    with HbmClient.connect(many.socket_path, client_name="c") as client:
        client.load_segments("w", LoadPlan(dict.fromkeys(names, GRANULE_BYTES), []))
        with client.map_weights("w", names) as weights, client.export_segments("w", names) as exported:
            assert len(weights.segments) == len(exported.extents) == num_segments
            client.drop_segments("w", names[::2])
            assert client.info().free_bytes == 0
        assert client.info().free_bytes == budget_bytes // 2
        client.load_segments("w", LoadPlan(dict.fromkeys(names, GRANULE_BYTES), []))
        with client.map_weights("w", names[::-1]) as weights:
            assert mappings_between(weights.address, weights.nbytes) == num_segments
        assert client.findings() == []
        client.drop_weights("w")
        assert client.info().free_bytes == budget_bytes
