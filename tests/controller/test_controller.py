"""The controller around its machine: what it writes down, what it tells, how a restarted one takes over. No Ray: components are played."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from flexpert.controller import controller as module
from flexpert.controller.controller import Controller
from flexpert.controller.journal import Journal, read_events
from flexpert.controller.runtime_dir import RuntimeDir, make, read_json
from flexpert.controller.spec import ClusterSpec
from flexpert.controller.supervision_types import (
    AgentReady,
    Answered,
    AssignWorker,
    Died,
    Event,
    Failed,
    GatewayDrained,
    GatewayReady,
    ProcessWarm,
    WorkerAddress,
    WorkerFound,
    WorkerReady,
)


class PlayedComponents:
    """Everything starts at once and works; a test sends what goes wrong."""

    found: tuple[Event, ...] = ()
    last: PlayedComponents

    def __init__(self, spec: ClusterSpec, *, send: Any, tell: Any) -> None:
        self.spec, self.send, self.tell = spec, send, tell
        self.port, self.progress = spec.port, {"worker-0": (1, 2)}
        self.journal_when_assigned: dict[str, Any] | None = None
        self.told_workers: list[tuple[WorkerAddress, ...]] = []
        self.killed: list[str] = []
        self.asked_processes: list[str] = []
        self.drains, self.silent, self.drained = 0, False, True
        self.refuse_worker: Failed | None = None
        PlayedComponents.last = self

    async def find(self, live: list[str], generation: int) -> list[Event]:
        self.asked = (live, generation)
        await asyncio.sleep(0)
        return list(self.found)

    def start_agent(self) -> None:
        self.send(AgentReady())

    def spawn_process(self, name: str, *, urgent: bool) -> None:
        self.send(ProcessWarm(name))

    def assign_worker(self, order: AssignWorker) -> None:
        self.journal_when_assigned = read_json(self.spec.runtime.journal)
        self.send(self.refuse_worker or WorkerReady(order.process, f"unix:/{order.incarnation}"))

    def ask_process(self, name: str) -> None:
        self.asked_processes.append(name)
        if not self.silent:
            self.send(Answered(name))

    def kill(self, component: str) -> None:
        self.killed.append(component)

    def start_gateway(self, generation: int) -> None:
        self.port = 8123
        self.send(GatewayReady(generation))

    def set_workers(self, workers: tuple[WorkerAddress, ...]) -> None:
        self.told_workers.append(workers)

    def drain_gateway(self) -> None:
        self.drains += 1
        if self.drained:
            self.send(GatewayDrained())

    async def stop_all(self) -> None:
        self.tell("test", "all stopped")

    async def status(self, component: str) -> dict[str, Any]:
        return {"component": component}


@pytest.fixture
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RuntimeDir:
    monkeypatch.setattr(module, "Components", PlayedComponents)
    monkeypatch.setattr(module, "open_process_log", lambda path, level: None)
    monkeypatch.setattr(PlayedComponents, "found", ())
    monkeypatch.setenv("FLEXPERT_RUNTIME_DIR", str(tmp_path / "r"))
    monkeypatch.setattr("flexpert.controller.runtime_dir.MAX_SOCKET_PATH_BYTES", 1000)
    return make("default")


def make_controller(runtime: RuntimeDir) -> Controller:
    spec = ClusterSpec(
        name="default", runtime_path=runtime.path, model_dir=Path("/model"), model_id="m", device="cpu", dtype=None,
        memory_bytes=1 << 30, memory_exact=True, kv_bytes=None, max_context_tokens=None, max_running=4, max_batch_tokens=64,
        host="127.0.0.1", port=0, api_keys=(), cluster_token="t", log_level="info", standbys=0, threads=1, drain_timeout_s=1,
    )  # fmt: skip
    return Controller(spec=spec, log_path="/unused")


async def watch_until(controller: Controller, key: str) -> dict[str, Any]:
    """Follow like `up` does, until the answer has something under `key`; all events are collected."""
    after, events = 0, []
    async with asyncio.timeout(10):
        while True:
            state = await controller.watch(after, 5.0)
            after = state["last"]
            events += state["events"]
            if state[key]:
                return {**state, "events": events}


async def test_first_watch_brings_the_cluster_up(runtime: RuntimeDir) -> None:
    state = await watch_until(make_controller(runtime), "ready")
    assert state["port"] == 8123
    assert state["progress"] == {"worker-0": (1, 2)}
    assert PlayedComponents.last.told_workers[-1] == (WorkerAddress("worker-0", 1, "unix:/1"),)


async def test_incarnation_is_on_disk_before_a_worker_gets_it(runtime: RuntimeDir) -> None:
    await watch_until(make_controller(runtime), "ready")
    written = PlayedComponents.last.journal_when_assigned
    assert written is not None
    assert written["incarnations"] == {"worker-0": 1}
    assert runtime.journal.stat().st_mode & 0o077 == 0


async def test_incarnations_go_on_growing_after_everything_was_killed(runtime: RuntimeDir) -> None:
    await watch_until(make_controller(runtime), "ready")
    await watch_until(make_controller(runtime), "ready")
    assert PlayedComponents.last.told_workers[-1] == (WorkerAddress("worker-0", 2, "unix:/2"),)


async def test_restarted_controller_takes_over_and_starts_nothing(
    runtime: RuntimeDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    await watch_until(make_controller(runtime), "ready")
    found = (AgentReady(), GatewayReady(1), WorkerFound("process-0", "worker-0", 1, "unix:/1"))
    monkeypatch.setattr(PlayedComponents, "found", found)
    await watch_until(make_controller(runtime), "ready")
    second = PlayedComponents.last
    assert second.asked == (["process-0"], 1)
    assert second.journal_when_assigned is None
    assert second.told_workers == [(WorkerAddress("worker-0", 1, "unix:/1"),)]


async def test_restarted_controller_answers_only_once_it_knows_what_runs(
    runtime: RuntimeDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    await watch_until(make_controller(runtime), "ready")
    found = (AgentReady(), GatewayReady(1), WorkerFound("process-0", "worker-0", 1, "unix:/1"))
    monkeypatch.setattr(PlayedComponents, "found", found)
    assert (await make_controller(runtime).status())["workers"] == [{"component": "process-0"}]


async def test_replacement_is_told_with_the_time_it_took(runtime: RuntimeDir) -> None:
    controller = make_controller(runtime)
    await watch_until(controller, "ready")
    PlayedComponents.last.send(Died("process-0", "killed"))
    async with asyncio.timeout(10):
        while not any(event["kind"] == "replaced" for event in read_events(runtime)):
            await controller.watch(0, 1.0)
    assert PlayedComponents.last.told_workers[-1] == (WorkerAddress("worker-0", 2, "unix:/2"),)
    [told] = [event for event in read_events(runtime) if event["kind"] == "replaced"]
    assert told["seconds"] >= 0


async def test_hopeless_start_is_given_up_with_kind_and_reason(runtime: RuntimeDir) -> None:
    controller = make_controller(runtime)
    watching = asyncio.create_task(watch_until(controller, "given_up"))
    await asyncio.sleep(0)
    PlayedComponents.last.refuse_worker = Failed("process-0", "model", "recurrent state", True)
    state = await watching
    assert state["given_up"] == {"component": "worker-0", "kind": "model", "reason": "recurrent state"}
    assert "process-0" in PlayedComponents.last.killed


async def test_stop_drains_and_ends_everything(runtime: RuntimeDir) -> None:
    controller = make_controller(runtime)
    await watch_until(controller, "ready")
    await controller.stop()
    state = await watch_until(controller, "stopped")
    kinds = [event["kind"] for event in state["events"]]
    assert kinds.index("drain") < kinds.index("test") < kinds.index("stopped")


async def test_stop_may_be_asked_again_and_again(runtime: RuntimeDir) -> None:
    controller = make_controller(runtime)
    await watch_until(controller, "ready")
    played = PlayedComponents.last
    played.drained = False
    for _ in range(3):
        await controller.stop()
        await controller.watch(0, 0.0)
    assert played.drains == 1
    await controller.stop()
    assert controller._queue.empty(), "nothing new: `watch` would return at once, and be asked again at once"
    played.send(GatewayDrained())
    await watch_until(controller, "stopped")
    await controller.stop()


async def test_end_that_goes_wrong_is_an_end_all_the_same(runtime: RuntimeDir, monkeypatch: pytest.MonkeyPatch) -> None:
    async def stop_all(self: PlayedComponents) -> None:
        raise RuntimeError("Ray is gone")

    monkeypatch.setattr(PlayedComponents, "stop_all", stop_all)
    controller = make_controller(runtime)
    await watch_until(controller, "ready")
    await controller.stop()
    await watch_until(controller, "stopped")


async def test_worker_that_stopped_answering_is_ended_and_replaced(
    runtime: RuntimeDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = PlayedClock()
    monkeypatch.setattr(module, "TICK_S", 0)
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=clock, time=time.time))
    controller = make_controller(runtime)
    await watch_until(controller, "ready")
    played = PlayedComponents.last
    async with asyncio.timeout(10):
        while played.asked_processes.count("process-0") < 50:
            await controller.watch(0, 1.0)
    assert played.killed == [], "it always answered"
    played.silent = True
    async with asyncio.timeout(10):
        while not played.killed:
            await controller.watch(0, 1.0)
    played.silent = False
    assert played.killed == ["process-0"]
    state = await watch_until(controller, "ready")
    assert played.told_workers[-1] == (WorkerAddress("worker-0", 2, "unix:/2"),)
    kinds = [event["kind"] for event in state["events"]]
    assert kinds.index("died") < kinds.index("replaced")
    assert "no answer for" in state["events"][kinds.index("died")]["text"]


class PlayedClock:
    """Half a second passes whenever somebody looks."""

    now_s = 0.0

    def __call__(self) -> float:
        self.now_s += 0.5
        return self.now_s


async def test_status_asks_every_component(runtime: RuntimeDir) -> None:
    controller = make_controller(runtime)
    await watch_until(controller, "ready")
    status = await controller.status()
    assert (status["manager"], status["gateway"]) == ({"component": "agent"}, {"component": "gateway"})
    assert status["workers"] == [{"component": "process-0"}]
    assert status["ready"]


async def test_bug_in_the_controller_reaches_the_user(runtime: RuntimeDir) -> None:
    controller = make_controller(runtime)
    await watch_until(controller, "ready")
    PlayedComponents.last.send(WorkerReady("process-0", "unix:/x"))
    state = await watch_until(controller, "given_up")
    assert state["given_up"]["kind"] == "internal"
    assert "ImpossibleEvent" in state["given_up"]["reason"]


def test_event_line_cut_short_by_a_crash_is_left_out(runtime: RuntimeDir) -> None:
    journal = Journal(runtime)
    journal.tell("a", "first")
    with runtime.events.open("a") as file:
        file.write(json.dumps({"sequence": 2})[:-3])
    assert [event["text"] for event in read_events(runtime)] == ["first"]
    assert Journal(runtime).tell("b", "next")["sequence"] == 2
