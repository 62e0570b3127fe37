"""Carries out supervision's instructions with Ray actors and tells what came of it; `members` does so for the transitions.

One method per instruction. Each returns at once and leaves a task behind; what happens later arrives as events at `send`, together with
words for people at `tell`. How actors are kept, watched and ended is in `actors`. Called by the controller only.
"""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Callable, Mapping
from typing import Any

from flexpert.controller import ray_cluster
from flexpert.controller import transition_types as t
from flexpert.controller.actors import FIND_TIMEOUT_S, STOP_TIMEOUT_S, Actors, Tell
from flexpert.controller.devices import DeviceFailed, Devices
from flexpert.controller.gateway_actor import GatewayActor
from flexpert.controller.members import Members
from flexpert.controller.node_agent import NodeAgent
from flexpert.controller.placement import Node, Place, bundle, places
from flexpert.controller.ray_cluster import ActorGone
from flexpert.controller.shape_events import ShapeFailed as ShapeFailed
from flexpert.controller.shape_events import ShapeKnown as ShapeKnown
from flexpert.controller.spec import ClusterSpec, device_of
from flexpert.controller.supervision_types import (
    AGENT,
    GATEWAY,
    AgentReady,
    Answered,
    Event,
    GatewayDrained,
    GatewayReady,
    ProcessFound,
    ProcessWarm,
    SpawnProcess,
)
from flexpert.workers.actor import WorkerActor
from flexpert.workers.threads import worker_environment

log = logging.getLogger(__name__)

DRAIN_GRACE_S = 5.0  # beyond the time in which the gateway itself ends what is left
AGAIN_S = 0.5
PLACE_TIMEOUT_S = 5.0
AGENT_CPUS = 0.01


class Components(Actors):
    """send: where events go. tell(kind, text, **details): where words go. shape, managers: what an earlier controller knew."""

    def __init__(
        self,
        spec: ClusterSpec,
        *,
        send: Callable[[Event | t.Event | ShapeKnown | ShapeFailed], None],
        tell: Tell,
        shape: Mapping[str, int],
        managers: Mapping[str, int],
    ) -> None:
        super().__init__(send=send, tell=tell, on_kill=lambda component: self.members.unfollow(component))
        self.spec = spec
        self.port = spec.port
        self._send = send
        self._shape_known = bool(shape)
        self._telling_workers = asyncio.Lock()
        self._needed_devices: set[str] = set()
        self._places: dict[str, Place] = {}
        self.devices = Devices(
            managers, call=ray_cluster.call, spawn=self._background, tell=tell,
            lost=lambda device, reason: send(t.ManagerDied(worker_of(device), reason)),
            unwatchable=self._lose_agent,
        )  # fmt: skip
        self.members = Members(
            spec, self._places, actor=self._actors.get, socket=self.devices.socket, spawn=self._background, send=send, tell=tell
        )  # fmt: skip

    @property
    def progress(self) -> dict[str, tuple[int, int]]:
        """Worker -> bytes loaded, bytes in all, while it loads."""
        return self.members.progress

    async def place(self, known: list[tuple[str, str]]) -> dict[str, str]:
        """Find out where the devices are; worker -> agent. Where Ray cannot hold them all, they are those of this node. known: (node id,
        host) of each as an earlier controller found them, brought up to date here."""
        workers, own = self.spec.worker_ids, ray_cluster.own_node()
        try:
            gpus_each = min(1.0, self.spec.num_gpus / len(workers))
            bundles = [bundle(self.spec.device, gpus_each=gpus_each)] * len(workers)
            before = [Node(*node) for node in known]
            name = self._name("devices")
            nodes = await ray_cluster.place_devices(name, bundles, known=before, timeout_s=PLACE_TIMEOUT_S)
        except ray_cluster.RayUnavailable as error:
            self._tell("placement", f"{error}; all devices are taken to be on this node")
            nodes = [own] * len(workers)
        known[:] = [(node.node_id, node.host) for node in nodes]
        self._places.update(places(workers, nodes, own=own))
        for agent in sorted(set(self._agents()) - {AGENT}):
            found = [worker for worker, place in self._places.items() if place.agent == agent]
            self._tell("placement", f"{', '.join(found)} on node {self._places[found[0]].node.host} ({agent})")
        return {worker: place.agent for worker, place in self._places.items()}

    def _agents(self) -> list[str]:
        return list(dict.fromkeys([AGENT, *(place.agent for place in self._places.values())]))

    def _agent_of(self, device: str) -> str:
        return self._places[worker_of(device)].agent

    def _node_of(self, agent: str) -> str | None:
        """The id of an agent's node; None for our own."""
        return next((place.node.node_id for place in self._places.values() if place.agent == agent), None)

    def _is_local(self, agent: str) -> bool:
        """Whether the pids of that node are pids here."""
        return all(place.local for place in self._places.values() if place.agent == agent)

    def _lose_agent(self, actor: Any, reason: str) -> None:
        agent = next((agent for agent in self._agents() if self._actors.get(agent) is actor), "")
        if agent:
            self._lost(agent, actor, reason)

    # Instructions

    def start_agent(self, agent: str) -> None:
        self._order(agent, self._start_agent(agent))

    async def _start_agent(self, agent: str) -> None:
        if agent not in self._actors:
            arguments = {
                "runtime_path": str(self.spec.runtime_path),
                "budget_bytes": self.spec.memory_bytes,
                "exact": self.spec.memory_exact,
                **self._log(agent),
            }
            actor = ray_cluster.create_actor(
                NodeAgent, self._name(agent), arguments, num_cpus=AGENT_CPUS, node=self._node_of(agent)
            )
            self._keep(agent, actor)
        actor = self._actors[agent]
        self._note_pid(agent, await ray_cluster.call(actor, "pid"), agent)
        try:
            needed = [device for device in sorted(self._needed_devices) if self._agent_of(device) == agent]
            await asyncio.gather(*(self.devices.ensure(device, actor) for device in needed))
        except DeviceFailed as error:
            self._refused(agent, {"failure": error.failure.to_json()})
            return
        self._send(AgentReady(agent))

    def need_devices(self, devices: set[str]) -> None:
        """These have a manager from now on; others do not."""
        self._needed_devices = set(devices)
        for agent in self._agents():
            if agent in self._actors and agent not in self._orders:
                self._background(self._adjust_devices(agent, self._actors[agent]))

    async def _adjust_devices(self, agent: str, actor: Any) -> None:
        for device in sorted({*self.devices.running(), *self._needed_devices}):
            if self._agent_of(device) != agent:
                continue
            try:
                if device in self._needed_devices:
                    await self.devices.ensure(device, actor)
                else:
                    await self.devices.stop(device)
            except DeviceFailed as error:
                log.warning("%s: %s", device, error)  # told when a worker wants it

    def spawn_process(self, order: SpawnProcess) -> None:
        self._order(order.process, self._spawn_process(order.process, order.agent, order.urgent))

    async def _spawn_process(self, name: str, agent: str, urgent: bool) -> None:
        environment = worker_environment(threads=self.spec.threads)
        arguments = {"environment": environment, "process": self.spec.worker_process, **self._log(name)}
        actor = ray_cluster.create_actor(WorkerActor, self._name(name), arguments, node=self._node_of(agent))
        self._keep(name, actor)
        answer = await ray_cluster.call(actor, "warm", str(self.spec.model_dir), self.spec.device, urgent)
        if not self._refused(name, answer):
            self._note_pid(name, answer["pid"], agent)
            self._tell("warm", f"{name} is warm (pid {answer['pid']})", seconds=answer["warm_s"], process=name)
            self._send(ProcessWarm(name))

    def give_process(self, worker_id: str, process: str) -> None:
        """See that the worker's device has a manager; ProcessReady tells, or Failed."""
        self._background(self._give_process(worker_id, process))

    async def _give_process(self, worker_id: str, process: str) -> None:
        try:
            if not self._shape_known:
                await self._ask_shape(process)
            device = device_of(worker_id)
            await self.devices.ensure(device, self._actors[self._agent_of(device)])
        except DeviceFailed as error:
            failure = error.failure
            text = f"{worker_id} gets no process: {failure.message}"
            self._tell("failed", text, component=worker_id, failure_kind=failure.kind)
            self.members.failure_kinds[worker_id] = failure.kind
            await asyncio.sleep(AGAIN_S)
            self._send(t.Failed(worker_id, "", "process", failure.message, permanent=failure.permanent))
        except (ActorGone, KeyError) as error:  # the agent ended: there will be another
            await asyncio.sleep(AGAIN_S)
            self._send(t.Failed(worker_id, "", "process", f"an actor ended: {error}"))
        else:
            self._send(t.ProcessReady(worker_id, process))

    async def _ask_shape(self, process: str) -> None:
        dtype = self.spec.dtype or ("float32" if self.spec.device == "cpu" else "bfloat16")
        answer = await ray_cluster.call(self._actors[process], "model_shape", str(self.spec.model_dir), dtype)
        if (failure := answer.get("failure")) is not None:
            self._send(ShapeFailed(failure["kind"], failure["message"]))
        elif not self._shape_known:
            self._shape_known = True
            self._send(ShapeKnown(answer))

    def start_gateway(self, generation: int) -> None:
        self._order(GATEWAY, self._start_gateway(generation))

    async def _start_gateway(self, generation: int) -> None:
        name = f"{GATEWAY}-{generation}"
        actor = ray_cluster.create_actor(GatewayActor, self._name(name), self._log(GATEWAY))
        self._keep(GATEWAY, actor)
        spec = self.spec
        config = {
            "model_id": spec.model_id,
            "model_dir": spec.model_dir,
            "cluster_token": spec.cluster_token,
            "host": spec.host,
            "port": self.port,
            "api_keys": spec.api_keys,
            "admin_keys": spec.admin_keys,
            "controller": self._name("controller"),
            "gateway_id": name,
            "drain_timeout_s": spec.drain_timeout_s,
        }
        answer = await ray_cluster.call(actor, "start", config)
        if self._refused(GATEWAY, answer):
            return
        self.port = answer["port"]
        self._note_pid(GATEWAY, answer["pid"], AGENT)
        self._tell("gateway", f"gateway listens on port {self.port} (pid {answer['pid']})", **answer)
        self._send(GatewayReady(generation))

    def set_workers(self, publish: t.Publish) -> None:
        self._background(self._set_workers(publish))

    async def _set_workers(self, publish: t.Publish) -> None:
        async with self._telling_workers:
            if GATEWAY in self._actors:
                told = [
                    (worker.worker_id, worker.address, worker.worker_id in publish.draining)
                    for worker in publish.serving
                ]
                await ray_cluster.call(self._actors[GATEWAY], "set_workers", told)

    def ask_process(self, name: str) -> None:
        """Whether a component still answers; `Answered` comes when it does, and never where it does not."""
        self._background(self._ask_process(name))

    async def _ask_process(self, name: str) -> None:
        if name not in self._actors:
            return
        try:
            await ray_cluster.call(self._actors[name], "pid")
        except ActorGone:
            return  # told by _watch
        except Exception as error:
            log.warning("%s does not tell its status: %r", name, error)  # an answer all the same: its loop runs
        self._send(Answered(name))

    def drain_gateway(self) -> None:
        self._background(self._drain_gateway())

    async def _drain_gateway(self) -> None:
        try:
            await self.finish_requests()
        finally:
            self._send(GatewayDrained())  # whatever went wrong: a stop that was asked for comes

    async def finish_requests(self) -> None:
        """Have the gateway refuse new requests; returns when those that ran have ended, or time is up."""
        timeout_s = self.spec.drain_timeout_s + DRAIN_GRACE_S
        try:
            await asyncio.wait_for(ray_cluster.call(self._actors[GATEWAY], "drain"), timeout_s)
            self._tell("drained", "all requests have ended")
        except TimeoutError:
            self._tell("drained", f"requests were still running after {timeout_s:g} s; ending them")
        except ActorGone as error:
            self._tell("drained", f"the gateway ended while draining: {error}")

    async def stop_all(self) -> None:
        """Gateway and workers first, then the managers, then the agent."""
        self.devices.let_go()
        agents = {agent: self._actors.pop(agent) for agent in self._agents() if agent in self._actors}
        workers = {name: self._actors.pop(name) for name in list(self._actors) if name != GATEWAY}
        self.kill(GATEWAY)
        await self._stop_workers(workers)
        for name, agent in agents.items():
            try:
                await asyncio.wait_for(ray_cluster.call(agent, "stop_managers"), STOP_TIMEOUT_S)
            except Exception as error:
                log.warning("the HBM managers of %s were not stopped by it: %r", name, error)
            ray_cluster.kill_actor(agent)
        ray_cluster.remove_placement(self._name("devices"))

    # What is there

    async def find(self, processes: Mapping[str, tuple[str, str]], generation: int) -> list[Event]:
        """Take over the actors that an earlier controller left, as events for before Begin. processes: name -> (worker or "", agent); one
        that was to be a worker and is none yet is ended, since nobody knows how far it came."""
        names = {
            **{agent: agent for agent in self._agents()},
            f"{GATEWAY}-{generation}": GATEWAY,
            **{name: name for name in processes},
        }
        events = await asyncio.gather(
            *(self._take_over(name, component, generation, processes) for name, component in names.items())
        )
        # Made, or struck off the books, by a controller that ended before it could write or end them.
        pool = (self._name("process-"), self._name(f"{GATEWAY}-"))
        known = {self._name(name) for name in names}
        if ended := await asyncio.to_thread(ray_cluster.kill_actors, *pool, keep=known):
            log.warning("ended %s, which nobody knows any more", ", ".join(ended))
        return [event for event in events if event is not None]

    async def _take_over(
        self, name: str, component: str, generation: int, processes: Mapping[str, tuple[str, str]]
    ) -> Event | None:
        actor = ray_cluster.find_actor(self._name(name))
        if actor is None:
            return None
        event: Event | None = None
        try:
            event = await asyncio.wait_for(self._identify(component, actor, generation, processes), FIND_TIMEOUT_S)
        except Exception as error:
            log.warning("%s was found and does not answer: %r", component, error)
        if event is None:
            if component in self._pids:
                self._pids.pop(component).signal(signal.SIGKILL)
            ray_cluster.kill_actor(actor)
        else:
            self._keep(component, actor)
        return event

    async def _identify(
        self, component: str, actor: Any, generation: int, processes: Mapping[str, tuple[str, str]]
    ) -> Event | None:
        worker_id, agent = processes.get(component, ("", component if component in self._agents() else AGENT))
        self._note_pid(component, await ray_cluster.call(actor, "pid"), agent)
        if component in processes:
            status = await ray_cluster.call(actor, "status")
            if status and status["worker_id"] == worker_id:
                return ProcessFound(component, worker_id, agent)
            warm = not status and not worker_id and await ray_cluster.call(actor, "is_warm")
            return ProcessFound(component, "", agent) if warm else None
        status = await ray_cluster.call(actor, "status")
        if not status:
            return None
        if component == GATEWAY:
            self.port = status["port"]
            return GatewayReady(generation)
        for info in status["devices"].values():
            self.devices.found(info, actor)
        for device in sorted(self._needed_devices):
            if self._agent_of(device) == component:
                await self.devices.ensure(device, actor)
        return AgentReady(component)

    async def device_status(self) -> dict[str, dict[str, Any]]:
        """Device -> what its manager tells."""
        agents = await asyncio.gather(*(self.status(agent) for agent in self._agents()))
        found = {device: info for agent in agents for device, info in agent.get("devices", {}).items()}
        return dict(sorted(found.items()))

    def measure_load(self, processes: list[str]) -> None:
        """LoadMeasured follows, where there was any."""
        self._background(self._measure_load(processes))

    async def _measure_load(self, processes: list[str]) -> None:
        load = await self.members.expert_load(processes)
        if load is not None:
            self._send(t.LoadMeasured(load))

    def _note_pid(self, component: str, pid: int, agent: str) -> None:
        """So that one that is stopped can be ended: where its pid means something here."""
        if self._is_local(agent):
            self._keep_pid(component, pid)

    # Names

    def _name(self, component: str) -> str:
        return f"{self.spec.name}:{component}"

    def _log(self, component: str) -> dict[str, str]:
        return {"log_path": str(self.spec.runtime.logs / f"{component}.log"), "log_level": self.spec.log_level}


def worker_of(device: str) -> str:
    """The worker that runs on a device."""
    return f"worker-{device.rpartition('-')[2]}"
