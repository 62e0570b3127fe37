"""What a load leaves behind in the manager."""

from __future__ import annotations

import gc
import os
import weakref
from collections.abc import Sequence

import msgspec

from flexpert.hbm import GRANULE_BYTES, messages
from flexpert.hbm.host import HostBackend
from flexpert.hbm.loop import EventLoop
from flexpert.hbm.manager import Manager
from flexpert.hbm.records import Client


class PlayedPeers:
    """Ends the loop at the last answer to a load."""

    def __init__(self, loop: EventLoop) -> None:
        self._loop = loop
        self.last: object = None

    def send(self, client_id: int, message: object, descriptors: Sequence[int] = ()) -> None:
        self.last = message
        if isinstance(message, messages.Done | messages.ErrorReply):
            self._loop.stop()

    def is_keeping_up(self, client_id: int) -> bool:
        return True

    def kill(self, client_id: int) -> None:
        raise AssertionError("nobody is to be killed here")


def test_a_load_that_has_ended_is_gone_without_a_search_for_garbage() -> None:
    """A search looks at all there is: a manager does none for hours, and holds what each load was told until then."""
    loop = EventLoop()
    peers = PlayedPeers(loop)
    manager = Manager(loop, HostBackend(), num_granules=8, peers=peers)
    manager.greet(Client(1, os.getpid(), "c", 1), 1)
    no_copies = msgspec.Raw(msgspec.msgpack.encode([]))
    gc.disable()
    try:
        manager.handle(1, messages.LoadSegments(2, "w", {"s": GRANULE_BYTES}, b"", no_copies))
        [load] = [weakref.ref(load) for load in manager.weights._loads.values()]
        loop.run()
        assert peers.last == messages.Done(2)
        assert load() is None
    finally:
        gc.enable()
        manager.close()
