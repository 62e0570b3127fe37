"""How components speak to their actors, with Ray's calls played."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from flexpert.controller import components as module
from flexpert.controller.components import Components
from flexpert.controller.ray_cluster import ActorGone
from flexpert.controller.spec import ClusterSpec
from flexpert.controller.supervision_types import AGENT, AgentReady, Died, Event, Failed, ManagerLost


class PlayedRay:
    """Actors that answer from a table: method -> value, exception, or an event to wait for."""

    def __init__(self, answers: dict[str, Any]) -> None:
        self.answers, self.killed, self.created = answers, 0, 0

    def create_actor(self, cls: type, name: str, arguments: dict[str, Any], **options: Any) -> object:
        self.created += 1
        return object()

    def kill_actor(self, actor: object) -> None:
        self.killed += 1

    async def call(self, actor: object, method: str, *arguments: Any) -> Any:
        answer = self.answers.get(method)
        if answer is None:
            await asyncio.Event().wait()
        if isinstance(answer, asyncio.Event):
            await answer.wait()
            raise ActorGone("killed")
        if isinstance(answer, Exception):
            raise answer
        return answer


MANAGER = {"agent_pid": 1, "pid": 2, "socket": "/m.sock", "adopted": False}


def make(
    answers: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> tuple[Components, PlayedRay, asyncio.Queue[Event]]:
    ray: PlayedRay = PlayedRay(answers)
    monkeypatch.setattr(module, "ray_cluster", ray)
    queue: asyncio.Queue[Event] = asyncio.Queue()
    spec = ClusterSpec(
        name="default", runtime_path=Path("/r/default"), model_dir=Path("/model"), model_id="m", device="cpu", dtype=None,
        memory_bytes=1 << 30, memory_exact=True, kv_bytes=None, max_context_tokens=None, max_running=4, max_batch_tokens=64,
        host="127.0.0.1", port=0, api_keys=(), cluster_token="t", log_level="info", standbys=0, threads=1, drain_timeout_s=1,
    )  # fmt: skip
    return Components(spec, send=queue.put_nowait, tell=lambda kind, text, **details: None), ray, queue


async def next_event(queue: asyncio.Queue[Event]) -> Event:
    return await asyncio.wait_for(queue.get(), 10)


async def test_death_of_an_actor_is_an_event(monkeypatch: pytest.MonkeyPatch) -> None:
    died = asyncio.Event()
    components, _, queue = make({"ensure": MANAGER, "wait_closed": died}, monkeypatch)
    components.start_agent()
    assert await next_event(queue) == AgentReady()
    died.set()
    assert await next_event(queue) == Died(AGENT, "killed")


async def test_death_of_an_actor_that_was_ended_is_no_event(monkeypatch: pytest.MonkeyPatch) -> None:
    died = asyncio.Event()
    components, ray, queue = make({"ensure": MANAGER, "wait_closed": died}, monkeypatch)
    components.start_agent()
    await next_event(queue)
    components.kill(AGENT)
    died.set()
    for _ in range(5):
        await asyncio.sleep(0)
    assert queue.empty()
    assert ray.killed == 1


async def test_agent_that_cannot_start_is_ended_and_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    failure = {"kind": "limits", "message": "too few descriptors", "permanent": True}
    components, ray, queue = make({"ensure": {"failure": failure}}, monkeypatch)
    components.start_agent()
    assert await next_event(queue) == Failed(AGENT, "limits", "too few descriptors", True)
    assert ray.killed == 1


async def test_lost_manager_keeps_its_agent_which_starts_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    components, ray, queue = make({"ensure": MANAGER, "wait_manager_closed": "gone"}, monkeypatch)
    components.start_agent()
    assert {await next_event(queue), await next_event(queue)} == {AgentReady(), ManagerLost("gone")}
    components.start_agent()
    await next_event(queue)
    assert ray.created == 1


@pytest.mark.parametrize("answer", [ActorGone("killed"), RuntimeError("the connection to the HBM manager broke")])
async def test_component_in_trouble_tells_nothing_and_hides_nothing(
    monkeypatch: pytest.MonkeyPatch, answer: Exception
) -> None:
    components, _, queue = make({"ensure": MANAGER, "status": answer}, monkeypatch)
    components.start_agent()
    await next_event(queue)
    assert await components.status(AGENT) == {}
    assert await components.status("process-9") == {}
