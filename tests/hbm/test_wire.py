"""Frames: cut at any place they come out whole; descriptors arrive with their own message."""

from __future__ import annotations

import itertools
import os
import socket
from collections import deque

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexpert.hbm import ProtocolError, messages, wire


@given(st.lists(st.binary(max_size=40), max_size=8), st.lists(st.integers(0, 400), max_size=6))
def test_a_stream_cut_anywhere_gives_the_same_messages(texts: list[bytes], cuts: list[int]) -> None:
    sent = [messages.ErrorReply(number, "error", text.hex()) for number, text in enumerate(texts)]
    stream = b"".join(wire.encode(message) for message in sent)
    reader = wire.manager_messages()
    received = []
    edges = [0, *sorted(min(cut, len(stream)) for cut in cuts), len(stream)]
    for begin, end in itertools.pairwise(edges):
        reader.add(stream[begin:end])
        received.extend(message for message, _ in reader.messages())
    assert received == sent


def test_a_message_that_is_too_large_is_not_sent() -> None:
    with pytest.raises(ProtocolError, match="cannot be sent"):
        wire.encode(messages.PinnedReply(1, 1, {}, bytes(wire.MAX_FRAME_BYTES)))


def test_descriptors_arrive_in_the_order_of_their_messages() -> None:
    ours, theirs = socket.socketpair()
    files = [os.memfd_create(f"file{number}") for number in range(4)]
    for number, pair in enumerate((files[:2], files[2:])):
        frame = memoryview(wire.encode(messages.Done(number), 2))
        first = wire.send_some(ours, frame[:3], pair)
        while first < len(frame):
            first += wire.send_some(ours, frame[first:])
    ours.close()
    received: deque[int] = deque()
    reader = wire.manager_messages()
    while data := wire.receive(theirs, received):
        reader.add(data)
    assert [num_descriptors for _, num_descriptors in reader.messages()] == [2, 2]
    names = [os.readlink(f"/proc/self/fd/{descriptor}") for descriptor in received]
    assert ["file" + str(number) in name for number, name in enumerate(names)] == [True] * 4
    assert not any(os.get_inheritable(descriptor) for descriptor in received)
    for descriptor in [*files, *received]:
        os.close(descriptor)
    theirs.close()


def test_the_peers_pid_and_uid_come_from_the_kernel() -> None:
    ours, theirs = socket.socketpair()
    assert wire.peer_credentials(ours) == (os.getpid(), os.geteuid())
    pidfd = wire.peer_pidfd(ours, os.getpid())
    assert not os.get_inheritable(pidfd)
    os.close(pidfd)
    ours.close()
    theirs.close()
