"""The controller around its machine: what it writes down, what it tells, how a restarted one takes over. No Ray: components are played."""

from __future__ import annotations

import asyncio
import dataclasses
import errno
import json
import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from flexpert.controller import controller as module
from flexpert.controller import journal as journal_module
from flexpert.controller import transition_types as t
from flexpert.controller.components import ShapeFailed, ShapeKnown
from flexpert.controller.controller import Controller
from flexpert.controller.errors import AdminError
from flexpert.controller.journal import Journal, read_events
from flexpert.controller.runtime_dir import RuntimeDir, make, read_json
from flexpert.controller.spec import ClusterSpec
from flexpert.controller.supervision_types import (
    AgentReady,
    Answered,
    Died,
    Event,
    GatewayDrained,
    GatewayReady,
    ProcessFound,
    ProcessWarm,
    SpawnProcess,
)

SHAPE = {"layers": 2, "experts": 8, "slab_bytes": 1 << 16, "slabs_per_group": 1, "dense_bytes": 0, "kv_token_bytes": 64}


class PlayedMembers:
    """Every step of a transition is done at once; a test says which is not."""

    def __init__(self, components: PlayedComponents) -> None:
        self.components, self.send = components, components.send
        self.failure_kinds: dict[str, str] = {}
        self.followed: list[str] = []
        self.orders: list[Any] = []
        self.holds: set[str] = set()  # steps that take until the test says so
        self.refused: dict[str, t.Failed] = {}
        self.journal_when_started: dict[str, Any] | None = None

    def follow(self, worker_id: str, process: str) -> None:
        self.followed.append(process)

    def _answer(self, order: Any, event: Any) -> None:
        self.orders.append(order)
        step = type(order).__name__
        if step in self.refused:
            failed = self.refused[step]
            self.failure_kinds[order.worker_id] = "model"
            self.send(t.Failed(order.worker_id, order.process, failed.step, failed.reason, 0, failed.permanent))
        elif step not in self.holds:
            self.send(event)

    def start_worker(self, order: t.StartWorker) -> None:
        self.journal_when_started = read_json(self.components.spec.runtime.journal)
        address = f"unix:/{order.worker_id}.{order.incarnation}"
        self._answer(order, t.WorkerStarted(order.worker_id, order.process, address + ".x", address, "/m.sock", 0.1))

    def prepare(self, order: t.Prepare) -> None:
        self._answer(order, t.Prepared(order.worker_id, order.process, order.epoch.number, 10, 0.1))

    def commit(self, order: t.Commit) -> None:
        self._answer(order, t.Committed(order.worker_id, order.process, order.number, 0.001))

    def retire(self, order: t.Retire) -> None:
        self._answer(order, t.Retired(order.worker_id, order.process, order.number))

    def abort(self, order: t.Abort) -> None:
        self._answer(order, t.Aborted(order.worker_id, order.process, order.number))

    def release(self, order: t.Release) -> None:
        self._answer(order, t.Released(order.worker_id, order.process))


class PlayedComponents:
    """Everything starts at once and works; a test sends what goes wrong."""

    found: tuple[Event, ...] = ()
    last: PlayedComponents

    def __init__(
        self, spec: ClusterSpec, *, send: Any, tell: Any, shape: dict[str, int], managers: dict[str, int]
    ) -> None:
        self.spec, self.send, self.tell = spec, send, tell
        self.port, self.progress = spec.port, {"worker-0": (1, 2)}
        self.members, self.devices = PlayedMembers(self), SimpleNamespace(pids=lambda: {"device-0": 7})
        self.shape, self.managers = shape, managers
        self.needed: list[set[str]] = []
        self.told: list[t.Publish] = []
        self.killed: list[str] = []
        self.asked_processes: list[str] = []
        self.drains, self.silent, self.drained = 0, False, True
        self.refuse_shape: ShapeFailed | None = None
        self.answering = {"device-0": {"pid": 7}}
        PlayedComponents.last = self

    @property
    def serving(self) -> list[str]:
        return [f"{worker.worker_id}.{worker.incarnation}" for worker in self.told[-1].serving]

    async def place(self, known: list[tuple[str, str]]) -> dict[str, str]:
        return {}

    async def find(self, processes: dict[str, Any], generation: int) -> list[Event]:
        self.asked = (processes, generation)
        await asyncio.sleep(0)
        return list(self.found)

    def start_agent(self, agent: str) -> None:
        self.send(AgentReady())

    def need_devices(self, devices: set[str]) -> None:
        self.needed.append(devices)

    def spawn_process(self, order: SpawnProcess) -> None:
        self.send(ProcessWarm(order.process))

    def give_process(self, worker_id: str, process: str) -> None:
        if self.refuse_shape is not None:
            self.send(self.refuse_shape)
            return
        if not self.shape:
            self.send(ShapeKnown(SHAPE))
        self.send(t.ProcessReady(worker_id, process))

    def ask_process(self, name: str) -> None:
        self.asked_processes.append(name)
        if not self.silent:
            self.send(Answered(name))

    def measure_load(self, processes: list[str]) -> None:
        pass

    def kill(self, component: str) -> None:
        self.killed.append(component)

    def start_gateway(self, generation: int) -> None:
        self.port = 8123
        self.send(GatewayReady(generation))

    def set_workers(self, publish: t.Publish) -> None:
        self.told.append(publish)

    def drain_gateway(self) -> None:
        self.drains += 1
        if self.drained:
            self.send(GatewayDrained())

    async def stop_all(self) -> None:
        self.tell("test", "all stopped")

    async def device_status(self) -> dict[str, Any]:
        return self.answering

    async def ask(self, component: str, method: str, *arguments: Any) -> Any:
        return None

    async def status(self, component: str) -> dict[str, Any]:
        return {"component": component}


def play_components(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RuntimeDir:
    """A runtime directory for a controller whose components are played."""
    monkeypatch.setattr(module, "Components", PlayedComponents)
    monkeypatch.setattr(module, "open_process_log", lambda path, level: None)
    monkeypatch.setattr(PlayedComponents, "found", ())
    monkeypatch.setenv("FLEXPERT_RUNTIME_DIR", str(tmp_path / "r"))
    monkeypatch.setattr("flexpert.controller.runtime_dir.MAX_SOCKET_PATH_BYTES", 1000)
    return make("default")


@pytest.fixture
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RuntimeDir:
    return play_components(tmp_path, monkeypatch)


def make_controller(runtime: RuntimeDir, *, token: str = "t", **settings: Any) -> Controller:
    spec = ClusterSpec(
        name="default", runtime_path=runtime.path, model_dir=Path("/model"), model_id="m", device="cpu", dtype=None,
        memory_bytes=1 << 30, memory_exact=True, kv_bytes=None, max_context_tokens=None, max_running=4, max_batch_tokens=64,
        host="127.0.0.1", port=0, api_keys=(), cluster_token=token, log_level="info", standbys=0, threads=1, drain_timeout_s=1,
        max_workers=4, **settings,
    )  # fmt: skip
    return Controller(spec=spec, log_path="/unused")


async def until(controller: Controller, condition: Any) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await controller.watch(0, 0.1)


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
    assert PlayedComponents.last.serving == ["worker-0.1"]
    assert PlayedComponents.last.told[-1].serving[0].address == "unix:/worker-0.1"


async def test_all_workers_of_the_boot_come_up_in_one_epoch(runtime: RuntimeDir) -> None:
    controller = make_controller(runtime, workers=3)
    await watch_until(controller, "ready")
    assert PlayedComponents.last.serving == ["worker-0.1", "worker-1.1", "worker-2.1"]
    assert (await controller.status())["epoch"] == 1
    assert PlayedComponents.last.needed[0] == {"device-0", "device-1", "device-2"}


async def test_transition_is_on_disk_before_a_worker_hears_of_it(runtime: RuntimeDir) -> None:
    await watch_until(make_controller(runtime), "ready")
    written = PlayedComponents.last.members.journal_when_started
    assert written is not None
    assert written["transitions"]["incarnations"] == {"worker-0": 1}
    assert written["transitions"]["running"]["kind"] == "boot"
    assert written["processes"] == {"process-0": ["worker-0", "agent"]}
    assert runtime.journal.stat().st_mode & 0o077 == 0


async def test_incarnations_and_epochs_go_on_growing_in_the_next_run(runtime: RuntimeDir) -> None:
    await watch_until(make_controller(runtime), "ready")
    again = make_controller(runtime, token="another")
    await watch_until(again, "ready")
    assert PlayedComponents.last.serving == ["worker-0.2"]
    assert (await again.status())["epoch"] == 2


async def test_everything_died_with_the_controller_and_comes_back(runtime: RuntimeDir) -> None:
    await watch_until(make_controller(runtime), "ready")
    again = make_controller(runtime)
    await watch_until(again, "ready")
    await until(again, lambda: PlayedComponents.last.told and PlayedComponents.last.serving == ["worker-0.2"])
    assert (await again.transition())["kind"] == "repair"


FOUND = (AgentReady(), GatewayReady(1), ProcessFound("process-0", "worker-0"))


async def test_restarted_controller_takes_over_and_starts_nothing(
    runtime: RuntimeDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    await watch_until(make_controller(runtime), "ready")
    monkeypatch.setattr(PlayedComponents, "found", FOUND)
    await watch_until(make_controller(runtime), "ready")
    second = PlayedComponents.last
    assert second.asked == ({"process-0": ["worker-0", "agent"]}, 1)
    assert (second.members.orders, second.members.followed) == ([], ["process-0"])
    assert second.serving == ["worker-0.1"]
    assert (second.shape, second.managers) == (SHAPE, {"device-0": 7})


async def test_restarted_controller_goes_on_with_the_transition_that_ran(
    runtime: RuntimeDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = make_controller(runtime)
    await watch_until(first, "ready")
    PlayedComponents.last.members.holds = {"Prepare"}
    begun = await first.scale(2, "up")
    await until(first, lambda: isinstance(PlayedComponents.last.members.orders[-1], t.Prepare))
    now = await first.transition()
    assert now is not None
    assert (now["phase"], now["state"], now["transition_id"]) == ("prepare", "running", begun["transition_id"])
    assert now["deadline_s"] > 0
    with pytest.raises(AdminError) as refused:
        await first.drain("worker-0", "meanwhile")
    assert refused.value.code == "conflict"
    monkeypatch.setattr(PlayedComponents, "found", (*FOUND, ProcessFound("process-1", "worker-1")))
    second = make_controller(runtime)
    await second.watch(0, 0.0)
    await until(second, lambda: len(PlayedComponents.last.told) > 0 and len(PlayedComponents.last.serving) == 2)
    assert (await second.transition(begun["transition_id"]))["state"] in ("running", "done")
    kinds = {type(order) for order in PlayedComponents.last.members.orders}
    assert t.StartWorker not in kinds
    assert {t.Prepare, t.Commit} <= kinds


async def test_restarted_controller_answers_only_once_it_knows_what_runs(
    runtime: RuntimeDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    await watch_until(make_controller(runtime), "ready")
    monkeypatch.setattr(PlayedComponents, "found", FOUND)
    [worker] = (await make_controller(runtime).status())["workers"]
    assert (worker["component"], worker["worker_id"], worker["serving"]) == ("process-0", "worker-0", True)


async def test_next_gateway_is_told_the_workers(runtime: RuntimeDir) -> None:
    controller = make_controller(runtime)
    await watch_until(controller, "ready")
    played = PlayedComponents.last
    played.told.clear()
    played.send(Died("gateway", "killed"))
    await until(controller, lambda: played.told and played.serving == ["worker-0.1"])


async def test_lost_manager_costs_its_worker_which_starts_with_another_process(runtime: RuntimeDir) -> None:
    controller = make_controller(runtime)
    await watch_until(controller, "ready")
    played = PlayedComponents.last
    played.send(t.ManagerDied("worker-0", "killed"))
    await until(controller, lambda: played.told[-1].serving and played.serving == ["worker-0.2"])
    assert played.members.orders[-2].process == "process-1"
    assert (await controller.transition("t-2"))["kind"] == "reload"


async def test_replacement_is_told_with_the_time_it_took(runtime: RuntimeDir) -> None:
    controller = make_controller(runtime)
    await watch_until(controller, "ready")
    PlayedComponents.last.send(Died("process-0", "killed"))
    await until(controller, lambda: any(event["kind"] == "replaced" for event in read_events(runtime)))
    assert PlayedComponents.last.serving == ["worker-0.2"]
    [told] = [event for event in read_events(runtime) if event["kind"] == "replaced"]
    assert told["seconds"] >= 0


async def test_hopeless_start_is_given_up_with_kind_and_reason(runtime: RuntimeDir) -> None:
    controller = make_controller(runtime)
    watching = asyncio.create_task(watch_until(controller, "given_up"))
    while controller._running is None or not hasattr(controller, "_components"):
        await asyncio.sleep(0)
    failed = t.Failed("worker-0", "process-0", "start", "recurrent state", 0, True)
    PlayedComponents.last.members.refused = {"StartWorker": failed}
    state = await watching
    assert (state["given_up"]["kind"], "recurrent state" in state["given_up"]["reason"]) == ("model", True)
    assert "process-0" in PlayedComponents.last.killed


async def test_model_that_cannot_be_examined_is_given_up(runtime: RuntimeDir) -> None:
    controller = make_controller(runtime)
    watching = asyncio.create_task(watch_until(controller, "given_up"))
    while controller._running is None or not hasattr(controller, "_components"):
        await asyncio.sleep(0)
    PlayedComponents.last.refuse_shape = ShapeFailed("checkpoint", "cut short")
    assert (await watching)["given_up"] == {"component": "model", "kind": "checkpoint", "reason": "cut short"}


async def test_too_little_memory_is_given_up_before_anything_is_loaded(runtime: RuntimeDir) -> None:
    SMALL = 1 << 16
    controller = make_controller(runtime)
    controller._spec = dataclasses.replace(controller._spec, memory_bytes=SMALL)
    state = await watch_until(controller, "given_up")
    assert (state["given_up"]["kind"], "raise --memory" in state["given_up"]["reason"]) == ("memory", True)
    assert PlayedComponents.last.members.orders == []


# What an operator asks


async def finished(controller: Controller, transition_id: str) -> dict[str, Any]:
    async with asyncio.timeout(10):
        while (found := await controller.transition(transition_id))["state"] == "running":
            await controller.watch(0, 0.1)
    return found


async def test_scale_up_and_down_and_drain(runtime: RuntimeDir) -> None:
    controller = make_controller(runtime)
    await watch_until(controller, "ready")
    begun = await controller.scale(3, "a")
    assert begun["request_id"] == "a"
    done = await finished(controller, begun["transition_id"])
    assert (done["state"], done["to_workers"]) == ("done", ["worker-0", "worker-1", "worker-2"])
    assert done["seconds"] >= 0
    assert {member["worker_id"]: member.get("cold") for member in done["members"]} == {
        "worker-0": None, "worker-1": True, "worker-2": True,
    }  # fmt: skip
    assert PlayedComponents.last.needed[-1] == {"device-0", "device-1", "device-2"}
    done = await finished(controller, (await controller.drain("worker-1", "b"))["transition_id"])
    assert done["to_workers"] == ["worker-0", "worker-2"]
    assert PlayedComponents.last.serving == ["worker-0.1", "worker-2.1"]
    assert PlayedComponents.last.needed[-1] == {"device-0", "device-2"}
    done = await finished(controller, (await controller.scale(1, "c"))["transition_id"])
    assert done["to_workers"] == ["worker-0"]
    assert (await controller.transition("t-2"))["request_id"] == "a"
    status = await controller.status()
    assert (status["epoch"], status["standbys"]) == (4, 2)
    timings = await controller.timings()
    assert (timings["join_cold"]["count"], timings["commit_pause"]["count"]) == (3, 4)


async def test_worker_that_joins_with_a_standby_joins_warm(runtime: RuntimeDir) -> None:
    controller = make_controller(runtime)
    await watch_until(controller, "ready")
    for request, workers in enumerate((2, 1, 2)):
        done = await finished(controller, (await controller.scale(workers, str(request)))["transition_id"])
    assert [member["cold"] for member in done["members"] if member["role"] == "joins"] == [False]
    assert (await controller.timings())["join_warm"]["count"] == 1
    joined = [event for event in read_events(runtime) if event["kind"] == "joined"]
    assert [event["cold"] for event in joined] == [True, True, False]
    assert set(joined[-1]["phases"]) == {"process", "start", "prepare", "commit"}


async def test_same_request_twice_is_one_transition(runtime: RuntimeDir) -> None:
    controller = make_controller(runtime)
    await watch_until(controller, "ready")
    first, second = await asyncio.gather(controller.scale(2, "same"), controller.scale(2, "same"))
    assert first["transition_id"] == second["transition_id"]
    await finished(controller, first["transition_id"])
    assert (await controller.scale(2, "same"))["state"] == "done"
    with pytest.raises(AdminError) as refused:
        await controller.scale(3, "same")
    assert refused.value.code == "conflict"


@pytest.mark.parametrize(
    ("method", "target", "code"),
    [("scale", 9, "impossible"), ("scale", 0, "impossible"), ("drain", "worker-7", "not_found"), ("drain", "worker-0", "impossible")],
)  # fmt: skip
async def test_what_cannot_be_is_refused_and_changes_nothing(
    runtime: RuntimeDir, method: str, target: Any, code: str
) -> None:
    controller = make_controller(runtime)
    await watch_until(controller, "ready")
    before = len(PlayedComponents.last.members.orders)
    with pytest.raises(AdminError) as refused:
        await getattr(controller, method)(target, "r")
    assert refused.value.code == code
    assert len(PlayedComponents.last.members.orders) == before
    with pytest.raises(AdminError, match="no transition"):
        await controller.transition("t-99")


async def test_step_that_fails_aborts_and_the_next_scale_works(runtime: RuntimeDir) -> None:
    controller = make_controller(runtime)
    await watch_until(controller, "ready")
    members = PlayedComponents.last.members
    members.refused = {"Prepare": t.Failed("", "", "prepare", "no memory at the joiner")}
    ended = await finished(controller, (await controller.scale(2, "a"))["transition_id"])
    assert (ended["state"], "no memory at the joiner" in ended["reason"]) == ("aborted", True)
    assert PlayedComponents.last.serving == ["worker-0.1"]
    members.refused = {}
    assert (await finished(controller, (await controller.scale(2, "b"))["transition_id"]))["state"] == "done"


async def test_trouble_in_a_group_ends_the_suspect_and_repairs(runtime: RuntimeDir) -> None:
    controller = make_controller(runtime, workers=2)
    await watch_until(controller, "ready")
    await finished(controller, "t-1")
    PlayedComponents.last.send(t.Trouble("worker-0", "process-0", 1, ("worker-1",), "step 7 missed"))
    await until(controller, lambda: PlayedComponents.last.serving == ["worker-0.1", "worker-1.2"])
    assert "process-1" in PlayedComponents.last.killed


async def test_events_are_told_from_a_number_on(runtime: RuntimeDir) -> None:
    controller = make_controller(runtime)
    await watch_until(controller, "ready")
    told = await controller.events()
    assert told["last"] == told["events"][-1]["sequence"]
    assert [event["sequence"] for event in (await controller.events(told["last"] - 1))["events"]] == [told["last"]]
    [begun] = [event for event in told["events"] if event["kind"] == "begun"]
    assert begun["transition_id"] == "t-1"
    assert (list(begun["from_workers"]), list(begun["to_workers"])) == ([], ["worker-0"])


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
    await until(controller, lambda: played.told[-1].serving and played.serving == ["worker-0.2"])
    state = {"events": read_events(runtime)}
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
    assert (status["manager"], status["gateway"]) == ({"pid": 7}, {"component": "gateway"})
    [worker] = status["workers"]
    assert (worker["component"], worker["device_id"], worker["rank"], worker["experts"]) == (
        "process-0", "device-0", 0, 16,
    )  # fmt: skip
    assert status["devices"][0] == {"device": "device-0", "worker_id": "worker-0", "pid": 7}
    assert [device["worker_id"] for device in status["devices"]] == ["worker-0", None, None, None]
    assert status["ready"]


async def test_status_never_takes_the_manager_of_another_device_for_the_workers(runtime: RuntimeDir) -> None:
    """As while a new node agent has adopted one manager and not yet the other."""
    controller = make_controller(runtime)
    await watch_until(controller, "ready")
    PlayedComponents.last.answering = {"device-1": {"pid": 8}}
    status = await controller.status()
    assert status["manager"] == {}
    assert [device.get("pid") for device in status["devices"]] == [None, 8, None, None]


async def test_bug_in_the_controller_reaches_the_user(runtime: RuntimeDir) -> None:
    controller = make_controller(runtime)
    await watch_until(controller, "ready")
    PlayedComponents.last.send(ProcessWarm("process-0"))
    state = await watch_until(controller, "given_up")
    assert state["given_up"]["kind"] == "internal"
    assert "ImpossibleEvent" in state["given_up"]["reason"]


async def test_request_id_like_the_one_of_the_boot_ends_nothing(runtime: RuntimeDir) -> None:
    controller = make_controller(runtime)
    await watch_until(controller, "ready")
    with pytest.raises(AdminError):
        await controller.scale(99, "boot-x")
    assert (await controller.watch(0, 0.0))["given_up"] is None


async def test_times_go_on_with_the_next_controller_of_a_run(
    runtime: RuntimeDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = PlayedClock()
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=clock, time=time.time))
    first = make_controller(runtime)
    await watch_until(first, "ready")
    PlayedComponents.last.members.holds = {"Prepare"}
    begun = await first.scale(2, "up")
    began_s = first._journal.facts.began_s
    monkeypatch.setattr(PlayedComponents, "found", (*FOUND, ProcessFound("process-1", "worker-1")))
    second = make_controller(runtime)
    done = await finished(second, begun["transition_id"])
    assert second._journal.facts.began_s == began_s > 0
    assert done["seconds"] > 0
    [ended] = [event for event in read_events(runtime) if event["kind"] == "ended" and event["transition_id"] == "t-2"]
    assert ended["seconds"] == done["seconds"]
    assert second._journal.facts.transition_began_s == {}
    third = make_controller(runtime, token="another run")
    await third.watch(0, 0.0)
    assert third._journal.facts.began_s > began_s


async def test_transition_that_runs_at_the_end_is_told_as_aborted(runtime: RuntimeDir) -> None:
    controller = make_controller(runtime)
    await watch_until(controller, "ready")
    PlayedComponents.last.members.holds = {"Prepare"}
    begun = await controller.scale(2, "up")
    await controller.stop()
    state = await watch_until(controller, "stopped")
    last = [event for event in state["events"] if event["kind"] == "ended"][-1]
    assert last["transition_id"] == begun["transition_id"]
    assert last["text"] == "scale 2: aborted, the cluster is being ended"


async def test_controller_that_took_over_is_told(runtime: RuntimeDir) -> None:
    controller = make_controller(runtime)
    await watch_until(controller, "ready")
    await controller.replaced("no answer for 6 s", 7.25)
    died, replaced = (await controller.events())["events"][-2:]
    assert (died["kind"], died["text"]) == ("died", "controller: no answer for 6 s")
    assert (replaced["component"], replaced["seconds"]) == ("controller", 7.25)
    assert replaced["text"] == "controller replaced after 7.25 s"


# The journal


def fill_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(journal_module, "write_bytes", refuse)
    monkeypatch.setattr(journal_module, "os", SimpleNamespace(**{**vars(os), "write": refuse}))


async def test_full_disk_ends_nothing_and_is_made_up_for(runtime: RuntimeDir, monkeypatch: pytest.MonkeyPatch) -> None:
    controller = make_controller(runtime)
    await watch_until(controller, "ready")
    with monkeypatch.context() as full:
        fill_disk(full)
        done = await finished(controller, (await controller.scale(2, "a"))["transition_id"])
        assert done["state"] == "done"
        told = (await controller.events())["events"]
        assert sum(event["kind"] == "journal" for event in told) == 1
        assert read_events(runtime)[-1]["sequence"] < told[-1]["sequence"]
    await finished(controller, (await controller.scale(1, "b"))["transition_id"])
    assert (await controller.watch(0, 0.0))["given_up"] is None
    told = (await controller.events())["events"]
    assert [event["text"] for event in told if event["kind"] == "journal"][1:] == ["the journal is written again"]
    assert read_events(runtime) == told
    assert read_json(runtime.journal)["transitions"]["last_transition"] == 3


def test_numbers_of_events_go_on_when_the_file_is_full(runtime: RuntimeDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_module, "MAX_EVENTS_BYTES", 300)
    journal = Journal(runtime)
    for number in range(40):
        journal.tell("a", f"event {number}")
        assert runtime.events.stat().st_size < 600
    assert read_events(runtime)[-1]["sequence"] == 40
    runtime.events.write_bytes(b"")  # as right after it was begun anew
    assert Journal(runtime).tell("b", "next")["sequence"] == read_events(runtime)[-1]["sequence"] > 1


def test_event_line_cut_short_by_a_crash_is_left_out(runtime: RuntimeDir) -> None:
    journal = Journal(runtime)
    journal.tell("a", "first")
    with runtime.events.open("a") as file:
        file.write(json.dumps({"sequence": 2})[:-3])
    assert [event["text"] for event in read_events(runtime)] == ["first"]
    assert Journal(runtime).tell("b", "next")["sequence"] == 2
    assert [event["text"] for event in read_events(runtime)] == ["first", "next"]
