"""What no client may do to the manager: garbage, lies, floods, leaks, another user. The books stay right and others are
served.
"""

from __future__ import annotations

import os
import select
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.hbm.harness import WAIT_S, Child

from flexpert.hbm import (
    GRANULE_BYTES,
    HbmClient,
    HbmError,
    LoadError,
    LoadPlan,
    ManagerHandle,
    NotFoundError,
    messages,
    wire,
)
from flexpert.hbm.launch import environment

Connect = Callable[..., HbmClient]
RawSocket = Callable[[], socket.socket]


def everything(sock: socket.socket) -> bytes:
    """What the manager sends until it closes."""
    received = b""
    while True:
        try:
            data = sock.recv(65536)
        except ConnectionResetError:
            return received
        if not data:
            return received
        received += data


def hello(token: int = 0) -> bytes:
    return wire.encode(messages.Hello(1, messages.PROTOCOL_VERSION, "raw", token))


def answers(received: bytes) -> list[object]:
    reader = wire.manager_messages()
    reader.add(received)
    return [message for message, _ in reader.messages()]


GARBAGE = {
    "text": b"GET / HTTP/1.1\r\n\r\n",
    "zeros": bytes(64),
    "empty message": b"\0\0\0\0\0",
    "no such tag": wire.encode(["nonsense", 1]),
    "wrong types": wire.encode(["info", "one"]),
    "too few fields": wire.encode(["hello", 1]),
    "a map": wire.encode({"a": 1}),
    "a huge length": b"\xff\xff\xff\xff\0",
    "descriptors announced": b"\x05\0\0\0\xff12345",
    "deeply nested": b"\x00\x01\0\0\0" + b"\x91" * 256,
    "negative number": wire.encode(["info", -1]),
    "another protocol": wire.encode(messages.Hello(1, 999, "raw", 0)),
    "no hello first": wire.encode(messages.GetInfo(1)),
    "a long greeting": wire.encode(messages.Hello(1, 1, "n" * 5000, 0)),
}


@pytest.mark.parametrize("greeted", [False, True])
def test_garbage_is_refused_and_the_socket_closed(raw_socket: RawSocket, connect: Connect, greeted: bool) -> None:
    others = connect()
    for name, data in GARBAGE.items():
        if greeted and name in ("no hello first", "a long greeting"):
            continue
        sock = raw_socket()
        sock.sendall((hello() if greeted else b"") + data)
        received = answers(everything(sock))
        assert isinstance(received[-1], messages.ErrorReply), name
        assert received[-1].kind == "protocol", name
        assert others.findings() == [], name


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(min_size=1, max_size=300))
def test_random_bytes_never_disturb_others(raw_socket: RawSocket, connect: Connect, data: bytes) -> None:
    sock = raw_socket()
    sock.sendall(hello() + data)
    sock.shutdown(socket.SHUT_WR)
    everything(sock)
    sock.close()
    with connect() as client:
        assert client.findings() == []


@pytest.mark.parametrize(
    "op",
    [
        ("m", 0, 0, [255]),  # a granule of the pool that is not this arena's
        ("m", 0, 0, [256]),  # beyond the pool
        ("m", 0, 0, [-1]),
        ("m", 0, 0, [1 << 40]),
        ("m", 9, 0, [0]),  # no such slot
        ("m", 0, 5, [0]),  # a hole
        ("m", 0, 0, [0] * 17),  # longer than the slot
        ("c", 1 << 30, "r"),
        ("u", 4, 0),
    ],
)
def test_a_lying_holder_is_refused_and_its_earlier_records_stand(connect: Connect, op: tuple[object, ...]) -> None:
    client = connect(1)
    kv = client.open_kv_arena("kv", slots=4, slot_bytes=16 * GRANULE_BYTES, granules=32)
    kv.claim(3, "honest")
    client.send_unanswered(("apply", kv._lease_id, [("m", 1, 0, [1]), op, ("c", 2, "after")]))
    kv.close()
    assert client.findings() == []
    again = client.open_kv_arena("kv", slots=4, slot_bytes=16 * GRANULE_BYTES, granules=32)
    assert [(record.slot, record.request_id, record.granules) for record in again.records()] == [
        (1, "", [1]),
        (3, "honest", []),
    ]


def test_anothers_lease_cannot_be_used(holder: Callable[..., Child], connect: Connect) -> None:
    child = holder(1)
    lease_id = child.run("arena.claim(0, 'mine'); arena.flush(); result = arena._lease_id")
    thief = connect(9)
    thief.send_unanswered(("apply", lease_id, [("c", 0, "stolen")]))
    with pytest.raises(HbmError, match="not held by this client"):
        thief.info()
    child.kill()
    [record] = connect(9).open_kv_arena("kv", slots=4, slot_bytes=16 * GRANULE_BYTES, granules=32).records()
    assert record.request_id == "mine"


def test_anothers_pin_cannot_be_released(holder: Callable[..., Child], connect: Connect) -> None:
    """Its reader would find other bytes where its weights were."""
    victim, thief = connect(), connect()
    victim.load_segments("w", LoadPlan({"s": 1}, []))
    weights = victim.map_weights("w")
    victim.drop_weights("w")
    for pin_id in (weights._pin_id, weights._pin_id + 1, 0):
        with pytest.raises(NotFoundError, match="no mapping of weights number"):
            thief.release_pin(pin_id)
    assert thief.info().free_bytes == thief.info().budget_bytes - GRANULE_BYTES
    weights.close()
    with pytest.raises(NotFoundError, match="no mapping"):
        victim.release_pin(weights._pin_id)
    assert thief.info().free_bytes == thief.info().budget_bytes


def test_a_load_whose_copies_are_nonsense_fails_alone(connect: Connect) -> None:
    """The manager passes them on unread; the helper, which reads them, is one load's."""
    client = connect()
    client.load_segments("w", LoadPlan({"dense": 1}, []))
    for copies in (7, ["copy"], [["/etc/hostname", 0, 1, "U8", "new", 1 << 40, "U8"]]):
        request, answers = client._begin()
        raw = msgspec.Raw(msgspec.msgpack.encode(copies))
        client._send(messages.LoadSegments(request, "w", {"new": 1}, b"", raw))
        first, _ = client._next_answer(answers, timeout_s=WAIT_S)
        assert isinstance(first, messages.Progress)
        with pytest.raises(LoadError):
            client._next_answer(answers, timeout_s=WAIT_S)
    assert client.segments("w") == {"dense": 1}
    assert client.findings() == []


def test_half_a_message_from_a_client_that_dies_is_nothing(holder: Callable[..., Child], connect: Connect) -> None:
    child = holder(1)
    child.start(
        "import os\n"
        "from flexpert.hbm import wire\n"
        "arena.claim(0, 'whole')\n"
        "frame = wire.encode(('apply', arena._lease_id, [('c', 0, 'half')]))\n"
        "client._sock.sendall(frame[:-1])\n"
        "os.kill(os.getpid(), 9)"
    )
    child.process.wait(WAIT_S)
    [record] = connect(2).open_kv_arena("kv", slots=4, slot_bytes=16 * GRANULE_BYTES, granules=32).records()
    assert record.request_id == "whole"


def test_a_client_that_does_not_read_is_dropped_and_others_are_served(raw_socket: RawSocket, connect: Connect) -> None:
    others = connect()
    sock = raw_socket()
    sock.sendall(hello())
    sock.setblocking(False)
    question = wire.encode(messages.GetInfo(1)) * 1000
    rest = b""
    for _ in range(10_000):
        try:
            rest = rest or question
            rest = rest[sock.send(rest) :]
        except BlockingIOError:  # the manager no longer reads: it has too much to tell already, or has closed
            select.select([], [sock], [], WAIT_S)
        except (BrokenPipeError, ConnectionResetError):
            break
        others.info()
    else:
        pytest.fail("the manager kept a client that reads nothing")
    assert others.findings() == []


def test_a_stopped_client_does_not_hold_up_the_manager(holder: Callable[..., Child], connect: Connect) -> None:
    holder(1).stop()
    assert connect().findings() == []


def test_many_connections_leak_no_descriptor(manager: ManagerHandle, connect: Connect, tmp_path: Path) -> None:
    def descriptors(pid: int | str) -> int:
        return len(os.listdir(f"/proc/{pid}/fd"))

    def one(token: int) -> None:
        with HbmClient.connect(manager.socket_path, client_name="c", fencing_token=token) as client:
            kv = client.open_kv_arena("kv", slots=1, slot_bytes=GRANULE_BYTES, granules=1)
            kv.map(0, 0, kv.granules)

    watcher = connect()
    one(1)
    watcher.info()
    before = descriptors(manager.pid), descriptors("self")
    for token in range(2, 102):
        one(token)
    watcher.info()
    assert descriptors("self") <= before[1]
    assert descriptors(manager.pid) <= before[0]
    assert [name for name, _pid in watcher.info().clients] == ["test"]


def test_descriptors_that_a_client_sends_are_not_kept(
    manager: ManagerHandle, raw_socket: RawSocket, connect: Connect
) -> None:
    watcher = connect()
    sock = raw_socket()
    sock.sendall(hello())
    sock.recv(100)
    before = len(os.listdir(f"/proc/{manager.pid}/fd"))
    socket.send_fds(sock, [wire.encode(messages.GetInfo(2))], [0, 1, 2])
    sock.recv(100)
    watcher.info()
    assert len(os.listdir(f"/proc/{manager.pid}/fd")) == before


def test_more_clients_than_descriptors_allow_are_refused_with_a_reason(
    runtime_dir: Path, spawn: Callable[[], Child]
) -> None:
    child = spawn()
    child.run("import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))")
    socket_path = child.run(
        "from pathlib import Path\n"
        f"result = str(ensure_manager(ManagerConfig(Path({str(runtime_dir)!r}), budget_bytes=1 << 20)).socket_path)"
    )
    sockets = []
    refusal = b""
    for _ in range(65):
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.settimeout(WAIT_S)
        sock.connect(socket_path)
        sock.sendall(hello())
        refusal = sock.recv(1000)
        sockets.append(sock)
    for sock in sockets:
        sock.close()
    [message] = answers(refusal)
    assert isinstance(message, messages.ErrorReply)
    assert "RLIMIT_NOFILE" in message.text


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_another_user_is_refused_even_where_the_files_would_let_it_in(manager: ManagerHandle, connect: Connect) -> None:
    manager.socket_path.parent.chmod(0o755)
    manager.socket_path.chmod(0o666)
    code = f"""
import os, socket, sys
os.setgid(65534); os.setuid(65534)
sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
sock.settimeout({WAIT_S})
sock.connect({str(manager.socket_path)!r})
data = b""
while part := sock.recv(1000):
    data += part
sys.stdout.buffer.write(data)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, check=True, timeout=WAIT_S
    )
    [message] = answers(done.stdout)
    assert isinstance(message, messages.ErrorReply)
    assert "you are uid 65534" in message.text
    assert connect().findings() == []
