"""What a controller keeps after many transitions: histories that are full, and nothing else. No Ray: components are played."""

from __future__ import annotations

import gc
import logging
import sys
from pathlib import Path

import pytest
from tests.controller.test_controller import PlayedComponents, finished, make_controller, play_components, watch_until

from flexpert.controller import desk as desk_module
from flexpert.controller import journal as journal_module
from flexpert.controller import transition_course as course_module
from flexpert.controller import transition_types as t
from flexpert.controller.controller import Controller

HISTORY = 4  # so that each is full after a few cycles
MAX_BLOCKS_PER_CYCLE = 10  # a cycle makes thousands; one value that each of its events left would be more


async def up_and_down(controller: Controller, *, cycles: range) -> None:
    for number in cycles:
        for size in (2, 1):
            begun = await controller.scale(size, f"{number}-{size}")
            done = await finished(controller, begun["transition_id"])
            assert done["state"] == "done"
    PlayedComponents.last.members.orders.clear()
    PlayedComponents.last.told.clear()
    PlayedComponents.last.needed.clear()


def held_blocks() -> int:
    """Pieces of memory that Python holds for objects of any kind; less the names in its cache of attributes, which fills slowly."""
    gc.collect()
    sys._clear_type_cache()
    return sys.getallocatedblocks()


async def test_transitions_that_are_over_leave_nothing_in_the_controller(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.root, "handlers", [])  # those of pytest keep what is logged
    monkeypatch.setattr(journal_module, "MAX_EVENTS_KEPT", HISTORY)
    monkeypatch.setattr(desk_module, "KEPT", HISTORY)
    monkeypatch.setattr(course_module, "MAX_REQUESTS", HISTORY)
    monkeypatch.setitem(t.TransitionConfig.__init__.__kwdefaults__, "max_history", HISTORY)
    controller = make_controller(play_components(tmp_path, monkeypatch))
    await watch_until(controller, "ready")
    await up_and_down(controller, cycles=range(30))
    before = held_blocks()
    await up_and_down(controller, cycles=range(30, 90))
    assert (held_blocks() - before) / 60 < MAX_BLOCKS_PER_CYCLE
    assert len(controller._timers) == 0
