"""The question for trouble that the controller leaves open at each worker: it ends with the worker, and leaves no task behind."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from flexpert.controller import members as module
from flexpert.controller import transition_types as t
from flexpert.controller.members import Members

FOUND = {"epoch": 3, "step": 8, "suspects": ("worker-1",), "reason": "missed"}


class Watches:
    """Members whose one process answers questions for trouble when the test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[asyncio.Future[Any]] = []
        self.tasks: list[asyncio.Task[None]] = []
        self.sent: list[t.Event] = []
        monkeypatch.setattr(module, "ray_cluster", SimpleNamespace(call=self._call))
        monkeypatch.setattr(module, "TROUBLE_AGAIN_S", 0)
        self.members = Members(
            SimpleNamespace(drill_dir=None),  # type: ignore[arg-type]
            {},
            actor=lambda process: process,
            socket=str,
            spawn=lambda work: self.tasks.append(asyncio.create_task(work)),
            send=self.sent.append,
            tell=lambda *told, **details: None,
        )

    async def _call(self, actor: object, method: str, *arguments: object) -> object:
        if method == "release":
            return {"freed_bytes": 0}
        self.asked.append(asyncio.get_running_loop().create_future())
        return await self.asked[-1]


async def turns() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def test_worker_that_ended_is_not_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    watches = Watches(monkeypatch)
    watches.members.follow("worker-0", "process-0")
    await turns()
    watches.asked[0].set_result(None)
    await turns()
    assert len(watches.asked) == 1
    assert [task.done() for task in watches.tasks] == [True]
    assert watches.sent == []


async def test_process_that_is_used_again_is_watched_though_the_former_answer_is_late(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    watches = Watches(monkeypatch)
    watches.members.follow("worker-0", "process-0")
    await turns()
    watches.members.release(t.Release("worker-0", "process-0"))
    await turns()
    watches.members.follow("worker-1", "process-0")
    await turns()
    watches.asked[0].set_result(None)
    await turns()
    watches.asked[1].set_result(FOUND)
    await turns()
    assert t.Trouble("worker-1", "process-0", 3, ("worker-1",), "missed") in watches.sent
    watches.members.unfollow("process-0")
    watches.asked[-1].set_result(None)
    await asyncio.wait_for(asyncio.gather(*watches.tasks), 10)
