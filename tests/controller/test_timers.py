"""Timers: what is overtaken is not sent, and not kept."""

from __future__ import annotations

import asyncio
import weakref

from flexpert.controller.timers import Timers


class Event:
    pass


async def test_event_is_sent_when_its_time_comes_and_is_forgotten() -> None:
    sent: asyncio.Queue[str] = asyncio.Queue()
    timers = Timers(sent.put_nowait)
    timers.set("t-1", "late", after_s=0.002)
    timers.set("t-2", "soon", after_s=0.001)
    async with asyncio.timeout(10):
        assert [await sent.get(), await sent.get()] == ["soon", "late"]
    assert len(timers) == 0


async def test_next_one_of_the_same_takes_the_place_of_the_one_before() -> None:
    sent: asyncio.Queue[str] = asyncio.Queue()
    timers = Timers(sent.put_nowait)
    timers.set("t-1", "start", after_s=0)
    timers.set("t-1", "prepare", after_s=0.001)
    async with asyncio.timeout(10):
        assert await sent.get() == "prepare"
    assert sent.empty()


async def test_dropped_one_is_not_sent() -> None:
    sent: asyncio.Queue[str] = asyncio.Queue()
    timers = Timers(sent.put_nowait)
    timers.set("t-1", "dropped", after_s=0)
    timers.drop("t-1")
    timers.drop("t-1")
    timers.set("t-2", "kept", after_s=0.001)
    async with asyncio.timeout(10):
        assert await sent.get() == "kept"
    assert sent.empty()


async def test_what_is_dropped_or_overtaken_is_held_no_more() -> None:
    timers = Timers(lambda event: None)
    dropped, overtaken = Event(), Event()
    gone = [weakref.ref(dropped), weakref.ref(overtaken)]
    timers.set("t-1", dropped, after_s=600)
    timers.drop("t-1")
    timers.set("t-2", overtaken, after_s=600)
    timers.set("t-2", Event(), after_s=600)
    del dropped, overtaken
    assert [ref() for ref in gone] == [None, None]
    timers.drop("t-2")
