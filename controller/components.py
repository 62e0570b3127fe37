"""Carries out supervision's instructions with Ray actors and tells what came of it.

One method per instruction. Each returns at once and leaves a task behind; what happens later arrives as events at `send`, together with
words for people at `tell`. An actor that was told to end is forgotten first, so its death is no event. An order that fails ends its
component and is told as Failed: nothing half-made stays, and supervision never waits for what cannot come. Called by the controller only.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import time
from collections.abc import Callable, Coroutine
from typing import Any

from flexpert.controller import ray_cluster
from flexpert.controller.gateway_actor import GatewayActor
from flexpert.controller.node_agent import NodeAgent
from flexpert.controller.processes import ProcessId
from flexpert.controller.ray_cluster import ActorGone
from flexpert.controller.spec import ClusterSpec, device_of
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
    WorkerAddress,
    WorkerFound,
    WorkerReady,
)
from flexpert.workers.actor import WorkerActor
from flexpert.workers.threads import worker_environment

log = logging.getLogger(__name__)

FIND_TIMEOUT_S = 5.0
STOP_TIMEOUT_S = 10.0
DRAIN_GRACE_S = 5.0  # beyond the time in which the gateway itself ends what is left
PROGRESS_PERIOD_S = 0.2

Tell = Callable[..., None]


class Components:
    """send: where events go. tell(kind, text, **details): where words go."""

    def __init__(self, spec: ClusterSpec, *, send: Callable[[Event], None], tell: Tell) -> None:
        self.spec = spec
        self.port = spec.port
        self.progress: dict[str, tuple[int, int]] = {}
        self.manager: dict[str, Any] = {}
        self._send, self._tell = send, tell
        self._actors: dict[str, Any] = {}  # component (agent, gateway, process name) -> actor
        self._pids: dict[str, ProcessId] = {}  # of worker processes: one that is stopped ends by its pid at once
        self._orders: dict[str, Coroutine[Any, Any, None]] = {}  # component -> the order that is being carried out
        self._tasks: set[asyncio.Task[None]] = set()
        self._telling_workers = asyncio.Lock()

    # Instructions

    def start_agent(self) -> None:
        self._order(AGENT, self._start_agent())

    async def _start_agent(self) -> None:
        began_s = time.monotonic()
        if AGENT not in self._actors:
            arguments = {
                "runtime_path": str(self.spec.runtime_path),
                "budget_bytes": self.spec.memory_bytes,
                "exact": self.spec.memory_exact,
                **self._log(AGENT),
            }
            actor = ray_cluster.create_actor(
                NodeAgent, self._name(AGENT), arguments, num_cpus=1, num_gpus=self.spec.num_gpus
            )
            self._keep(AGENT, actor)
        actor = self._actors[AGENT]
        answer = await ray_cluster.call(actor, "ensure", device_of(self.spec.worker_ids[0]))
        if self._refused(AGENT, answer):
            return
        self._manager_found(answer, actor)
        verb = "adopted, its memory is as it was" if answer["adopted"] else "started"
        self._tell("manager", f"HBM manager {verb} (pid {answer['pid']})", seconds=time.monotonic() - began_s, **answer)
        self._send(AgentReady())

    def spawn_process(self, name: str, *, urgent: bool) -> None:
        self._order(name, self._spawn_process(name, urgent))

    async def _spawn_process(self, name: str, urgent: bool) -> None:
        environment = worker_environment(threads=self.spec.threads)
        actor = ray_cluster.create_actor(WorkerActor, self._name(name), {"environment": environment, **self._log(name)})
        self._keep(name, actor)
        answer = await ray_cluster.call(actor, "warm", str(self.spec.model_dir), self.spec.device, urgent)
        if not self._refused(name, answer):
            self._note_pid(name, answer["pid"])
            self._tell("warm", f"{name} is warm (pid {answer['pid']})", seconds=answer["warm_s"], process=name)
            self._send(ProcessWarm(name))

    def assign_worker(self, order: AssignWorker) -> None:
        self._order(order.process, self._assign_worker(order))

    async def _assign_worker(self, order: AssignWorker) -> None:
        actor = self._actors[order.process]
        watching = asyncio.create_task(self._follow_progress(order.worker_id, actor))
        try:
            answer = await ray_cluster.call(actor, "start", self._worker_config(order))
        finally:
            watching.cancel()
            self.progress.pop(order.worker_id, None)
        if self._refused(order.process, answer):
            return
        how = "weights loaded" if answer["weights_loaded"] else "weights mapped, nothing loaded"
        self._tell(
            "worker", f"{order.worker_id} serves as incarnation {order.incarnation} (pid {answer['pid']}): {how}",
            seconds=answer["seconds"], worker_id=order.worker_id, incarnation=order.incarnation, process=order.process,
            pid=answer["pid"], weights_loaded=answer["weights_loaded"], start_s=answer["start_s"],
        )  # fmt: skip
        self._send(WorkerReady(order.process, answer["address"]))

    def _worker_config(self, order: AssignWorker) -> dict[str, Any]:
        spec = self.spec
        socket = spec.runtime.worker_socket(order.worker_id, order.incarnation)
        return {
            "worker_id": order.worker_id,
            "incarnation": order.incarnation,
            "model_dir": spec.model_dir,
            "model_id": spec.model_id,
            "cluster_token": spec.cluster_token,
            "address": f"unix:{socket}",
            "device": spec.device,
            "dtype": spec.dtype,
            "manager_socket": self.manager["socket"],
            "max_running": spec.max_running,
            "max_batch_tokens": spec.max_batch_tokens,
            "max_context_tokens": spec.max_context_tokens,
            "kv_bytes": spec.kv_bytes,
            "threads": spec.threads,
        }

    async def _follow_progress(self, worker_id: str, actor: Any) -> None:
        while True:
            self.progress[worker_id] = tuple(await ray_cluster.call(actor, "progress"))
            await asyncio.sleep(PROGRESS_PERIOD_S)

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
        self._tell("gateway", f"gateway listens on port {self.port} (pid {answer['pid']})", **answer)
        self._send(GatewayReady(generation))

    def set_workers(self, workers: tuple[WorkerAddress, ...]) -> None:
        self._background(self._set_workers(workers))

    async def _set_workers(self, workers: tuple[WorkerAddress, ...]) -> None:
        async with self._telling_workers:
            if GATEWAY in self._actors:
                told = [(worker.worker_id, worker.address) for worker in workers]
                await ray_cluster.call(self._actors[GATEWAY], "set_workers", told)

    def kill(self, component: str) -> None:
        """End a component's process at once; its death is no event any more."""
        actor, process = self._actors.pop(component, None), self._pids.pop(component, None)
        self._orders.pop(component, None)
        if process is not None:
            process.signal(signal.SIGKILL)
        if actor is not None:
            ray_cluster.kill_actor(actor)

    def ask_process(self, name: str) -> None:
        """Whether a worker's process still answers; `Answered` comes when it does, and never where it does not."""
        self._background(self._ask_process(name))

    async def _ask_process(self, name: str) -> None:
        if name not in self._actors:
            return
        try:
            await ray_cluster.call(self._actors[name], "status")
        except ActorGone:
            return  # told by _watch
        except Exception as error:
            log.warning("%s does not tell its status: %r", name, error)  # an answer all the same: its loop runs
        self._send(Answered(name))

    def drain_gateway(self) -> None:
        self._background(self._drain_gateway())

    async def _drain_gateway(self) -> None:
        timeout_s = self.spec.drain_timeout_s + DRAIN_GRACE_S
        try:
            await asyncio.wait_for(ray_cluster.call(self._actors[GATEWAY], "drain"), timeout_s)
            self._tell("drained", "all requests have ended")
        except TimeoutError:
            self._tell("drained", f"requests were still running after {timeout_s:g} s; ending them")
        except ActorGone as error:
            self._tell("drained", f"the gateway ended while draining: {error}")
        finally:
            self._send(GatewayDrained())  # whatever went wrong: a stop that was asked for comes

    async def stop_all(self) -> None:
        """Gateway and workers first, then the manager, then the agent."""
        agent = self._actors.pop(AGENT, None)
        workers = {name: self._actors.pop(name) for name in list(self._actors) if name != GATEWAY}
        self.kill(GATEWAY)
        stops = (asyncio.wait_for(ray_cluster.call(actor, "stop"), STOP_TIMEOUT_S) for actor in workers.values())
        for answer in await asyncio.gather(*stops, return_exceptions=True):
            if isinstance(answer, Exception) and not isinstance(answer, ActorGone):
                log.warning("a worker process did not stop in order: %r", answer)
        for name, actor in workers.items():
            self.kill(name)
            ray_cluster.kill_actor(actor)
        if agent is not None:
            try:
                await asyncio.wait_for(ray_cluster.call(agent, "stop_managers"), STOP_TIMEOUT_S)
            except Exception as error:
                log.warning("the HBM managers were not stopped by its agent: %r", error)
            ray_cluster.kill_actor(agent)

    # What is there

    async def find(self, live: list[str], generation: int) -> list[Event]:
        """Take over the actors that an earlier controller left, as events for before Begin; those that serve nothing are ended."""
        found: list[Event] = []
        names = {AGENT: AGENT, f"{GATEWAY}-{generation}": GATEWAY, **{name: name for name in live}}
        for name, component in names.items():
            actor = ray_cluster.find_actor(self._name(name))
            if actor is None:
                continue
            event = await self._take_over(component, actor, generation)
            if event is None:
                ray_cluster.kill_actor(actor)
            else:
                self._keep(component, actor)
                found.append(event)
        return found

    async def _take_over(self, component: str, actor: Any, generation: int) -> Event | None:
        try:
            status = await asyncio.wait_for(ray_cluster.call(actor, "status"), FIND_TIMEOUT_S)
        except Exception as error:
            log.warning("%s was found and does not answer: %r", component, error)
            return None
        if not status:
            return None
        if component == AGENT:
            device = status["devices"].get(device_of(self.spec.worker_ids[0]))
            if device is None:
                return None
            self._manager_found(device, actor)
            return AgentReady()
        if component == GATEWAY:
            self.port = status["port"]
            return GatewayReady(generation)
        self._note_pid(component, status["pid"])
        return WorkerFound(component, status["worker_id"], status["incarnation"], status["address"])

    async def status(self, component: str) -> dict[str, Any]:
        """What a component tells of itself; {} where it cannot, so that one in trouble never hides the others."""
        actor = self._actors.get(component)
        if actor is None:
            return {}
        try:
            return await asyncio.wait_for(ray_cluster.call(actor, "status"), FIND_TIMEOUT_S) or {}
        except Exception as error:
            log.warning("%s does not tell its status: %r", component, error)
            return {}

    # Plumbing

    def _name(self, component: str) -> str:
        return f"{self.spec.name}:{component}"

    def _log(self, component: str) -> dict[str, str]:
        return {"log_path": str(self.spec.runtime.logs / f"{component}.log"), "log_level": self.spec.log_level}

    def _keep(self, component: str, actor: Any) -> None:
        self._actors[component] = actor
        self._background(self._watch(component, actor))

    async def _watch(self, component: str, actor: Any) -> None:
        """Report the death of an actor that is still ours."""
        try:
            await ray_cluster.call(actor, "wait_closed")
        except Exception as error:
            self._lost(component, actor, str(error))

    def _lost(self, component: str, actor: Any, reason: str) -> None:
        """End it before it is forgotten: Ray may only have lost sight of it, and one that lives keeps its port and its memory."""
        if self._actors.get(component) is actor:
            self.kill(component)
            self._tell("died", f"{component}: {reason}", component=component)
            self._send(Died(component, reason))

    def _note_pid(self, component: str, pid: int) -> None:
        process = ProcessId.of(pid, component)
        if process is not None:
            self._pids[component] = process

    def _manager_found(self, answer: dict[str, Any], agent: Any) -> None:
        self.manager = answer
        self._background(self._watch_manager(agent))

    async def _watch_manager(self, agent: Any) -> None:
        try:
            reason = await ray_cluster.call(agent, "wait_manager_closed", self.manager["device"], self.manager["pid"])
        except Exception as error:
            self._lost(AGENT, agent, f"the HBM manager cannot be watched: {error}")
            return
        if self._actors.get(AGENT) is agent:
            self._tell("died", reason, component="manager")
            self._send(ManagerLost(reason))

    def _refused(self, component: str, answer: dict[str, Any]) -> bool:
        """Whether the component answered that it cannot start; then it is ended and reported."""
        failure = answer.get("failure")
        if failure is None:
            return False
        self._tell(
            "failed",
            f"{component} did not start: {failure['message']}",
            component=component,
            failure_kind=failure["kind"],
        )
        self.kill(component)
        self._send(Failed(component, failure["kind"], failure["message"], failure["permanent"]))
        return True

    def _order(self, component: str, work: Coroutine[Any, Any, None]) -> None:
        self._orders[component] = work
        self._background(self._carry_out(component, work))

    async def _carry_out(self, component: str, work: Coroutine[Any, Any, None]) -> None:
        """See an order to its end. A failure is told unless the component was ended meanwhile: then it is no news, or told already."""
        try:
            await work
        except ActorGone as error:
            if self._orders.get(component) is work:
                self._lost(component, self._actors.get(component), str(error))
        except Exception as error:
            log.exception("an order to %s failed", component)
            if self._orders.get(component) is work:
                self.kill(component)
                reason = f"{type(error).__name__}: {error}"
                self._tell(
                    "failed", f"{component} did not start: {reason}", component=component, failure_kind="internal"
                )
                self._send(Failed(component, "internal", reason, False))
        finally:
            if self._orders.get(component) is work:
                del self._orders[component]

    def _background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(self._shielded(work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _shielded(self, work: Coroutine[Any, Any, None]) -> None:
        """For what is no order: a death in the middle of a call is reported by _watch, anything else is written down."""
        try:
            await work
        except ActorGone as error:
            log.info("%r ended: %s", work, error)
        except Exception:
            log.exception("%r failed", work)
