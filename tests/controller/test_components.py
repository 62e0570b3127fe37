"""How components speak to their actors, with Ray's calls played."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from flexpert.controller import components as module
from flexpert.controller.components import Components
from flexpert.controller.ray_cluster import ActorGone
from flexpert.controller.spec import ClusterSpec
from flexpert.controller.supervision_types import (
    AGENT,
    GATEWAY,
    AgentReady,
    Answered,
    AssignWorker,
    Died,
    Event,
    Failed,
    GatewayDrained,
    GatewayReady,
    ManagerLost,
    ProcessWarm,
)


class PlayedRay:
    """Actors that answer from a table: method -> value, exception, or an event to wait for."""

    def __init__(self, answers: dict[str, Any]) -> None:
        self.answers, self.killed, self.created = answers, 0, 0

    def create_actor(self, cls: type, name: str, arguments: dict[str, Any], **options: Any) -> object:
        self.created += 1
        if isinstance(self.answers.get("create"), Exception):
            raise self.answers["create"]
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


MANAGER = {"device": "device-0", "agent_pid": 1, "pid": 2, "socket": "/m.sock", "adopted": False}


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


BUG = ZeroDivisionError("boom")


@pytest.mark.parametrize("answers", [{"ensure": BUG, "warm": BUG, "start": BUG}, {"create": BUG}], ids=["call", "make"])
@pytest.mark.parametrize("component", [AGENT, GATEWAY, "process-0"])
async def test_order_that_breaks_ends_its_component_and_is_reported(
    monkeypatch: pytest.MonkeyPatch, component: str, answers: dict[str, Any]
) -> None:
    components, ray, queue = make(answers, monkeypatch)
    orders = {
        AGENT: components.start_agent,
        GATEWAY: lambda: components.start_gateway(1),
        "process-0": lambda: components.spawn_process("process-0", urgent=True),
    }
    orders[component]()
    assert await next_event(queue) == Failed(component, "internal", "ZeroDivisionError: boom", False)
    assert ray.killed == ("create" not in answers)


WARM = {"pid": os.getpid(), "warm_s": 1.0}


async def test_assignment_that_breaks_ends_its_process_and_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    components, ray, queue = make({"start": BUG, "progress": (0, 0)}, monkeypatch)
    components._keep("process-0", object())
    components.manager = MANAGER
    components.assign_worker(AssignWorker("process-0", "worker-0", 1))
    assert await next_event(queue) == Failed("process-0", "internal", "ZeroDivisionError: boom", False)
    assert ray.killed == 1


async def test_order_to_what_was_ended_meanwhile_is_no_news(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = asyncio.Event()
    components, ray, queue = make({"ensure": ended}, monkeypatch)
    components.start_agent()
    await asyncio.sleep(0)
    components.kill(AGENT)
    ended.set()
    for _ in range(5):
        await asyncio.sleep(0)
    assert (queue.empty(), ray.killed) == (True, 1)


@pytest.mark.parametrize("answer", [BUG, ActorGone("killed"), "drained"], ids=["bug", "gone", "well"])
async def test_drain_ends_however_it_goes(monkeypatch: pytest.MonkeyPatch, answer: Any) -> None:
    components, _, queue = make({"start": {"pid": 1, "port": 8000}, "drain": answer}, monkeypatch)
    components.start_gateway(1)
    assert await next_event(queue) == GatewayReady(1)
    components.drain_gateway()
    assert await next_event(queue) == GatewayDrained()


async def test_actor_that_ray_lost_sight_of_is_ended_before_it_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    lost = asyncio.Event()
    components, ray, queue = make({"start": {"pid": 1, "port": 8000}, "wait_closed": lost}, monkeypatch)
    components.start_gateway(1)
    assert await next_event(queue) == GatewayReady(1)
    lost.set()
    assert await next_event(queue) == Died(GATEWAY, "killed")
    assert ray.killed == 1


async def test_manager_that_cannot_be_watched_costs_the_agent(monkeypatch: pytest.MonkeyPatch) -> None:
    components, ray, queue = make({"ensure": MANAGER, "wait_manager_closed": OSError("no descriptors")}, monkeypatch)
    components.start_agent()
    events = {await next_event(queue), await next_event(queue)}
    assert events == {AgentReady(), Died(AGENT, "the HBM manager cannot be watched: no descriptors")}
    assert ray.killed == 1


async def test_stopped_process_is_ended_by_its_pid(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray asks a process to end itself, which a stopped one does not hear."""
    process = subprocess.Popen(["sleep", "60"])
    try:
        process.send_signal(signal.SIGSTOP)
        components, _, queue = make({"warm": WARM | {"pid": process.pid}}, monkeypatch)
        components.spawn_process("process-0", urgent=True)
        assert await next_event(queue) == ProcessWarm("process-0")
        components.kill("process-0")
        assert await asyncio.to_thread(process.wait, 10) == -signal.SIGKILL
    finally:
        process.kill()
        process.wait(10)


@pytest.mark.parametrize(
    ("answer", "answered"), [({"worker_id": "w"}, True), (BUG, True), (ActorGone("killed"), False)]
)
async def test_process_that_is_asked_answers_while_it_lives(
    monkeypatch: pytest.MonkeyPatch, answer: Any, answered: bool
) -> None:
    components, _, queue = make({"warm": WARM, "status": answer}, monkeypatch)
    components._keep("process-0", object())
    components.ask_process("process-0")
    for _ in range(5):
        await asyncio.sleep(0)
    assert (not queue.empty() and queue.get_nowait() == Answered("process-0")) == answered


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
