"""How components speak to their actors, with Ray's calls played."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from flexpert.controller import actors as actors_module
from flexpert.controller import components as module
from flexpert.controller import members as members_module
from flexpert.controller import ray_cluster as real_ray_cluster
from flexpert.controller import transition_types as t
from flexpert.controller.components import Components
from flexpert.controller.placement import Node, places
from flexpert.controller.ray_cluster import ActorGone
from flexpert.controller.spec import ClusterSpec
from flexpert.controller.supervision_types import (
    AGENT,
    GATEWAY,
    AgentReady,
    Answered,
    Died,
    Event,
    Failed,
    GatewayDrained,
    GatewayReady,
    ProcessFound,
    ProcessWarm,
    SpawnProcess,
)
from flexpert.workers.epoch import Epoch

HERE = Node("node", "10.0.0.1")
HERE_0 = Node("here", "10.0.0.1")
NOBODY = 0  # no process has this id, so none is signalled


class PlayedRay:
    """Actors that answer from a table: method -> value, exception, or an event to wait for."""

    def __init__(self, answers: dict[str, Any]) -> None:
        self.answers, self.killed, self.created = {"pid": NOBODY, **answers}, 0, 0
        self.calls: list[tuple[Any, ...]] = []
        self.found: set[str] = set()

    def create_actor(self, cls: type, name: str, arguments: dict[str, Any], **options: Any) -> object:
        self.created += 1
        if isinstance(self.answers.get("create"), Exception):
            raise self.answers["create"]
        return object()

    def kill_actor(self, actor: object) -> None:
        self.killed += 1

    def find_actor(self, name: str) -> object | None:
        return object() if name in self.found else None

    def kill_actors(self, *prefixes: str, keep: set[str]) -> list[str]:
        ended = sorted(name for name in self.found if name.startswith(prefixes) and name not in keep)
        self.found -= set(ended)
        return ended

    async def call(self, actor: object, method: str, *arguments: Any) -> Any:
        self.calls.append((method, *arguments))
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
    monkeypatch.setattr(members_module, "ray_cluster", ray)
    monkeypatch.setattr(actors_module, "ray_cluster", ray)
    queue: asyncio.Queue[Event] = asyncio.Queue()
    spec = ClusterSpec(
        name="default", runtime_path=Path("/r/default"), model_dir=Path("/model"), model_id="m", device="cpu", dtype=None,
        memory_bytes=1 << 30, memory_exact=True, kv_bytes=None, max_context_tokens=None, max_running=4, max_batch_tokens=64,
        host="127.0.0.1", port=0, api_keys=(), cluster_token="t", log_level="info", standbys=0, threads=1, drain_timeout_s=1,
        max_workers=4,
    )  # fmt: skip
    components = Components(spec, send=queue.put_nowait, tell=lambda kind, text, **details: None, shape={}, managers={})
    components._places.update(places(spec.worker_ids, [HERE] * 4, own=HERE))
    components.need_devices({"device-0"})
    return components, ray, queue


async def next_event(queue: asyncio.Queue[Event]) -> Event:
    return await asyncio.wait_for(queue.get(), 10)


async def test_death_of_an_actor_is_an_event(monkeypatch: pytest.MonkeyPatch) -> None:
    died = asyncio.Event()
    components, _, queue = make({"ensure": MANAGER, "wait_closed": died}, monkeypatch)
    components.start_agent(AGENT)
    assert await next_event(queue) == AgentReady()
    died.set()
    assert await next_event(queue) == Died(AGENT, "killed")


async def test_death_of_an_actor_that_was_ended_is_no_event(monkeypatch: pytest.MonkeyPatch) -> None:
    died = asyncio.Event()
    components, ray, queue = make({"ensure": MANAGER, "wait_closed": died}, monkeypatch)
    components.start_agent(AGENT)
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
    components.start_agent(AGENT)
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
        AGENT: lambda: components.start_agent(AGENT),
        GATEWAY: lambda: components.start_gateway(1),
        "process-0": lambda: components.spawn_process(SpawnProcess("process-0")),
    }
    orders[component]()
    assert await next_event(queue) == Failed(component, "internal", "ZeroDivisionError: boom", False)
    assert ray.killed == ("create" not in answers)


WARM = {"pid": os.getpid(), "warm_s": 1.0}


EPOCH = Epoch(number=3, members=(), holders=())
START = t.StartWorker("worker-0", "process-0", 5, EPOCH, (t.Source("worker-1", "/peer.sock", (1, 2)),))
STARTED = {
    "worker_id": "worker-0", "incarnation": 5, "pid": 9, "address": "unix:/w", "exchange_address": "unix:/x", "seconds": 0.5,
}  # fmt: skip
SHAPE = {"layers": 1, "experts": 2}
FAILURE = {"failure": {"kind": "memory", "message": "no room", "permanent": True}}


async def with_process(
    answers: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> tuple[Components, PlayedRay, asyncio.Queue[Event]]:
    """An agent with a manager, and a warm process."""
    components, ray, queue = make({"ensure": MANAGER, "warm": WARM, **answers}, monkeypatch)
    components.start_agent(AGENT)
    assert await next_event(queue) == AgentReady()
    components.spawn_process(SpawnProcess("process-0"))
    assert await next_event(queue) == ProcessWarm("process-0")
    components._pids.clear()  # it is this very process that plays it
    ray.calls.clear()
    return components, ray, queue


async def test_process_is_ready_once_the_model_is_known_and_its_device_has_a_manager(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    components, ray, queue = await with_process({"model_shape": SHAPE}, monkeypatch)
    components.give_process("worker-0", "process-0")
    assert await next_event(queue) == module.ShapeKnown(SHAPE)
    assert await next_event(queue) == t.ProcessReady("worker-0", "process-0")
    assert ("ensure", "device-0") not in ray.calls, "it runs already"
    ray.answers["ensure"] = MANAGER | {"device": "device-1"}
    components.give_process("worker-1", "process-0")
    assert await next_event(queue) == t.ProcessReady("worker-1", "process-0")
    assert ray.calls.count(("model_shape", "/model", "float32")) == 1
    assert components.devices.running() == ["device-0", "device-1"]


async def test_device_without_a_manager_fails_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    components, ray, queue = await with_process({"model_shape": SHAPE}, monkeypatch)
    monkeypatch.setattr(module, "AGAIN_S", 0)
    ray.answers["ensure"] = FAILURE
    components.give_process("worker-1", "process-0")
    await next_event(queue)
    assert await next_event(queue) == t.Failed("worker-1", "", "process", "no room", permanent=True)


async def test_managers_that_nobody_needs_are_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    components, ray, queue = await with_process({"stop": True}, monkeypatch)
    ray.answers["ensure"] = MANAGER | {"device": "device-1"}
    components.need_devices({"device-1"})
    for _ in range(10):
        await asyncio.sleep(0)
    assert components.devices.running() == ["device-1"]
    assert ("stop", "device-0") in ray.calls
    assert queue.empty(), "no death"


async def test_worker_is_started_with_its_epoch_and_asked_for_trouble(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {"status": False, "start": STARTED}
    components, ray, queue = await with_process(answers, monkeypatch)
    components.members.start_worker(START)
    assert await next_event(queue) == t.WorkerStarted(
        "worker-0", "process-0", "unix:/x", "unix:/w", MANAGER["socket"], 0.5
    )
    [config] = [call[1] for call in ray.calls if call[0] == "start"]
    assert (config["worker_id"], config["incarnation"], config["sources"]) == (
        "worker-0", 5, [("/peer.sock", (1, 2))],
    )  # fmt: skip
    await asyncio.sleep(0)
    assert ("wait_trouble",) in ray.calls


async def test_bytes_are_told_while_a_step_lasts(monkeypatch: pytest.MonkeyPatch) -> None:
    components, ray, queue = await with_process({"prepare": None, "progress": (3, 4)}, monkeypatch)
    components.members.prepare(t.Prepare("worker-0", "process-0", EPOCH, (), 9.0))
    assert await next_event(queue) == t.Moved("worker-0", "process-0", "prepare", 3, EPOCH.number)
    assert components.progress == {"worker-0": (3, 4)}
    assert ("progress", "prepare") in ray.calls


async def test_worker_that_was_started_by_an_earlier_controller_is_not_started_twice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    components, ray, queue = await with_process({"status": STARTED}, monkeypatch)
    components.members.start_worker(START)
    assert isinstance(await next_event(queue), t.WorkerStarted)
    assert "start" not in [call[0] for call in ray.calls]


MEMBER = ("worker-0", "process-0")
STEPS: dict[str, tuple[Any, dict[str, Any], t.Event]] = {
    "prepare": (
        t.Prepare(*MEMBER, EPOCH, (), 9.0),
        {"moved_bytes": 5, "loaded_bytes": 2},
        t.Prepared(*MEMBER, 3, 7, 0.0),
    ),
    "commit": (t.Commit(*MEMBER, 3, 9.0), {"pause_s": 0.25}, t.Committed(*MEMBER, 3, 0.25)),
    "retire": (t.Retire(*MEMBER, 3), {"freed_bytes": 8}, t.Retired(*MEMBER, 3, 8)),
    "abort": (t.Abort(*MEMBER, 3), {}, t.Aborted(*MEMBER, 3)),
    "release": (t.Release(*MEMBER), {}, t.Released(*MEMBER)),
}


@pytest.mark.parametrize("step", STEPS)
async def test_each_step_of_a_transition_is_asked_and_answered(monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    order, answer, event = STEPS[step]
    components, _, queue = await with_process({step: answer}, monkeypatch)
    monkeypatch.setattr(members_module, "time", SimpleNamespace(monotonic=lambda: 0.0))
    getattr(components.members, step)(order)
    assert await next_event(queue) == event


@pytest.mark.parametrize(
    ("answer", "reason"), [(FAILURE, "no room"), (ZeroDivisionError("boom"), "ZeroDivisionError: boom")]
)
@pytest.mark.parametrize("step", ["start", *STEPS])
async def test_step_that_fails_is_told_and_ends_nobody(
    monkeypatch: pytest.MonkeyPatch, step: str, answer: Any, reason: str
) -> None:
    components, ray, queue = await with_process({step: answer, "status": False}, monkeypatch)
    order = START if step == "start" else STEPS[step][0]
    (components.members.start_worker if step == "start" else getattr(components.members, step))(order)
    number = 0 if step in ("start", "release") else 3
    permanent = isinstance(answer, dict)
    assert await next_event(queue) == t.Failed(*MEMBER, step, reason, number, permanent)
    assert ray.killed == 0


async def test_step_of_a_process_that_dies_is_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its death is told, once, by whoever watches it."""
    components, _, queue = await with_process({"commit": ActorGone("killed")}, monkeypatch)
    components.members.commit(t.Commit(*MEMBER, 3, 9.0))
    components.members.commit(t.Commit("worker-1", "process-7", 3, 9.0))
    for _ in range(5):
        await asyncio.sleep(0)
    assert queue.empty()


async def test_trouble_is_told_until_the_process_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"epoch": 3, "step": 8, "suspects": ("worker-1",), "reason": "step 8 missed"}
    components, _, queue = await with_process({"wait_trouble": found}, monkeypatch)
    monkeypatch.setattr(members_module, "TROUBLE_AGAIN_S", 0)
    components.members.follow(*MEMBER)
    trouble = t.Trouble(*MEMBER, 3, ("worker-1",), "step 8 missed")
    assert [await next_event(queue), await next_event(queue)] == [trouble, trouble]
    components.kill("process-0")
    for _ in range(5):
        await asyncio.sleep(0)
    while not queue.empty():
        queue.get_nowait()
    for _ in range(5):
        await asyncio.sleep(0)
    assert queue.empty()


async def test_load_of_all_workers_is_added_up(monkeypatch: pytest.MonkeyPatch) -> None:
    components, _, queue = await with_process({"expert_load": [[1, 2], [3, 4]]}, monkeypatch)
    components.measure_load(["process-0", "process-0", "process-that-is-gone"])
    assert await next_event(queue) == t.LoadMeasured(((2, 4), (6, 8)))


FOUND_STATUS = {"worker_id": "worker-0", "pid": os.getpid(), "address": "unix:/w"}


@pytest.mark.parametrize(
    ("recorded", "status", "warm", "event"),
    [
        (["worker-0", "agent"], FOUND_STATUS, False, ProcessFound("process-0", "worker-0")),
        (["", "agent"], False, True, ProcessFound("process-0")),
        (["worker-0", "agent"], False, True, None),
        (["", "agent"], FOUND_STATUS, False, None),
        (["", "agent"], False, False, None),
    ],
    ids=["worker", "standby", "was to start", "has another part", "still warming"],
)
async def test_processes_that_an_earlier_controller_left(
    monkeypatch: pytest.MonkeyPatch, recorded: Any, status: Any, warm: bool, event: Event | None
) -> None:
    process = subprocess.Popen(["sleep", "60"])
    try:
        components, ray, _ = make({"pid": process.pid, "status": status, "is_warm": warm}, monkeypatch)
        ray.found = {"default:process-0"}
        assert await components.find({"process-0": recorded}, 1) == ([event] if event else [])
        assert ray.killed == (event is None)
        if event is None:
            assert await asyncio.to_thread(process.wait, 10) == -signal.SIGKILL
    finally:
        process.kill()
        process.wait(10)


async def test_actors_that_nobody_knows_are_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """A controller that ended before it could end what it had struck off its books."""
    components, ray, _ = make({"status": {"port": 1, "devices": {}}, "ensure": MANAGER}, monkeypatch)
    known = {"default:controller", "default:agent", "default:gateway-2", "default:process-1", "other:process-0"}
    ray.found = {*known, "default:gateway-1", "default:process-0"}
    await components.find({"process-1": ("", "agent")}, 2)
    assert ray.found == known


class PlayedGroup:
    """A placement group with a bundle that has lost its node."""

    def ready(self) -> Any:
        return SimpleNamespace(future=Future)


@pytest.mark.parametrize("found", [True, False], ids=["found", "made"])
async def test_placement_that_lost_a_node_is_kept(monkeypatch: pytest.MonkeyPatch, found: bool) -> None:
    removed: list[str] = []

    def get(name: str) -> PlayedGroup:
        if not found:
            raise ValueError(name)
        return PlayedGroup()

    util = SimpleNamespace(
        get_placement_group=get, placement_group=lambda *_, **__: PlayedGroup(),
        placement_group_table=lambda group: {"bundles_to_node_id": {1: "", 0: "here"}},
    )  # fmt: skip
    nodes = [{"NodeID": "here", "NodeManagerAddress": "10.0.0.1"}]
    played = SimpleNamespace(util=util, nodes=lambda: nodes, available_resources=dict)
    monkeypatch.setattr(real_ray_cluster, "ray", played)
    monkeypatch.setattr(real_ray_cluster, "remove_placement", removed.append)
    place = partial(real_ray_cluster.place_devices, "devices", [{"CPU": 1.0}] * 2, timeout_s=0.01)
    if found:
        gone = Node("gone", "10.0.0.2")
        assert await place(known=[Node("old", "10.0.0.9"), gone]) == [HERE_0, gone]
    with pytest.raises(real_ray_cluster.RayUnavailable):
        await place()
    assert removed == ([] if found else ["devices"])


async def test_manager_that_died_while_no_controller_looked_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    components, ray, queue = make({"status": {"devices": {"device-0": MANAGER}}, "ensure": MANAGER}, monkeypatch)
    components.devices._expected = {"device-0": 77}
    ray.found = {"default:agent"}
    assert await components.find({}, 1) == [AgentReady()]
    assert isinstance(await next_event(queue), t.ManagerDied)


async def test_order_to_what_was_ended_meanwhile_is_no_news(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = asyncio.Event()
    components, ray, queue = make({"ensure": ended}, monkeypatch)
    components.start_agent(AGENT)
    await asyncio.sleep(0)
    components.kill(AGENT)
    ended.set()
    for _ in range(5):
        await asyncio.sleep(0)
    assert (queue.empty(), ray.killed) == (True, 1)


@pytest.mark.parametrize("answer", [BUG, ActorGone("killed"), "drained"], ids=["bug", "gone", "well"])
async def test_drain_ends_however_it_goes(monkeypatch: pytest.MonkeyPatch, answer: Any) -> None:
    components, _, queue = make({"start": {"pid": 0, "port": 8000}, "drain": answer}, monkeypatch)
    components.start_gateway(1)
    assert await next_event(queue) == GatewayReady(1)
    components.drain_gateway()
    assert await next_event(queue) == GatewayDrained()


async def test_actor_that_ray_lost_sight_of_is_ended_before_it_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    lost = asyncio.Event()
    components, ray, queue = make({"start": {"pid": 0, "port": 8000}, "wait_closed": lost}, monkeypatch)
    components.start_gateway(1)
    assert await next_event(queue) == GatewayReady(1)
    lost.set()
    assert await next_event(queue) == Died(GATEWAY, "killed")
    assert ray.killed == 1


async def test_manager_that_cannot_be_watched_costs_the_agent(monkeypatch: pytest.MonkeyPatch) -> None:
    components, ray, queue = make({"ensure": MANAGER, "wait_manager_closed": OSError("no descriptors")}, monkeypatch)
    components.start_agent(AGENT)
    events = {await next_event(queue), await next_event(queue)}
    assert events == {AgentReady(), Died(AGENT, "the HBM manager of device-0 cannot be watched: no descriptors")}
    assert ray.killed == 1


async def test_stopped_process_is_ended_by_its_pid(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray asks a process to end itself, which a stopped one does not hear."""
    process = subprocess.Popen(["sleep", "60"])
    try:
        process.send_signal(signal.SIGSTOP)
        components, _, queue = make({"warm": WARM | {"pid": process.pid}}, monkeypatch)
        components.spawn_process(SpawnProcess("process-0"))
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
    components, _, queue = make({"warm": WARM, "pid": answer}, monkeypatch)
    components._keep("process-0", object())
    components.ask_process("process-0")
    for _ in range(5):
        await asyncio.sleep(0)
    assert (not queue.empty() and queue.get_nowait() == Answered("process-0")) == answered


async def test_lost_manager_keeps_its_agent_which_starts_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    gone = asyncio.Event()
    components, ray, queue = make({"ensure": MANAGER, "wait_manager_closed": gone, "model_shape": SHAPE}, monkeypatch)
    ray.answers["wait_manager_closed"] = "gone"
    components.start_agent(AGENT)
    assert {await next_event(queue), await next_event(queue)} == {AgentReady(), t.ManagerDied("worker-0", "gone")}
    ray.answers["wait_manager_closed"] = None
    components._actors["process-0"] = object()
    components.give_process("worker-0", "process-0")
    await next_event(queue)
    assert await next_event(queue) == t.ProcessReady("worker-0", "process-0")
    assert (ray.created, ray.calls.count(("ensure", "device-0"))) == (1, 2)


@pytest.mark.parametrize("answer", [ActorGone("killed"), RuntimeError("the connection to the HBM manager broke")])
async def test_component_in_trouble_tells_nothing_and_hides_nothing(
    monkeypatch: pytest.MonkeyPatch, answer: Exception
) -> None:
    components, _, queue = make({"ensure": MANAGER, "status": answer}, monkeypatch)
    components.start_agent(AGENT)
    await next_event(queue)
    assert await components.status(AGENT) == {}
    assert await components.status("process-9") == {}
