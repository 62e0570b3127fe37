"""The controller actor: runs the supervision machine, keeps its journal, and answers `flexpert up`.

It decides nothing itself: events are taken from a queue one by one, `supervision` turns them into instructions, `components` carries
those out. It is restarted by Ray when it dies; gateway and workers go on meanwhile, and the new one finds them by their names.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from pathlib import Path
from typing import Any

from flexpert.controller.components import Components
from flexpert.controller.journal import Journal
from flexpert.controller.spec import ClusterSpec
from flexpert.controller.supervision import Supervision, SupervisionConfig
from flexpert.controller.supervision_types import (
    AGENT,
    GATEWAY,
    AskProcess,
    AssignWorker,
    Begin,
    Died,
    DrainGateway,
    Event,
    GatewayReady,
    GiveUp,
    Instruction,
    KillProcess,
    Pause,
    PauseOver,
    SetWorkers,
    SpawnProcess,
    StartAgent,
    StartGateway,
    StopAll,
    StopRequested,
    Tick,
    WorkerReady,
)
from flexpert.workers.process_log import open_process_log

log = logging.getLogger(__name__)

TICK_S = 2.0


class Controller:
    """An async actor; its first call brings the cluster up."""

    def __init__(self, *, spec: ClusterSpec, log_path: str) -> None:
        open_process_log(Path(log_path), spec.log_level)
        self._spec = spec
        self._journal = Journal(spec.runtime)
        facts = self._journal.facts
        self._machine = Supervision(
            SupervisionConfig(standbys=spec.standbys),
            incarnations=facts.incarnations,
            first_process=facts.next_process,
            first_generation=facts.generation,
        )
        self._running: asyncio.Task[None] | None = None
        self._begun = asyncio.Event()
        self._queue: asyncio.Queue[Event] = asyncio.Queue()
        self._changed = asyncio.Event()
        self._components: Components
        self._given_up: dict[str, str] | None = None
        self._stopped = False
        self._began_s = time.time()
        self._died_at_s: dict[str, float] = {}

    # What `flexpert up` calls

    async def watch(self, after: int, timeout_s: float) -> dict[str, Any]:
        """Wait until something happened that is newer than event number `after`, at most timeout_s; tells where the cluster stands."""
        await self._ensure_running()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._changed.wait(), timeout_s)
        self._changed.clear()
        return {
            "events": [event for event in self._journal.events if event["sequence"] > after],
            "last": self._journal.last,
            "progress": dict(self._components.progress),
            "ready": self._machine.ready,
            "port": self._components.port,
            "given_up": self._given_up,
            "stopped": self._stopped,
        }

    async def status(self) -> dict[str, Any]:
        """Everything `flexpert status` shows."""
        await self._ensure_running()
        processes = self._machine.processes()
        agent, gateway, *workers = await asyncio.gather(
            *(
                self._components.status(name)
                for name in (AGENT, GATEWAY, *(name for name, (_, w) in processes.items() if w))
            )
        )
        return {
            "name": self._spec.name,
            "phase": self._machine.phase,
            "ready": self._machine.ready,
            "epoch": 0,
            "model": self._spec.model_id,
            "uptime_s": round(time.time() - self._began_s, 1),
            "controller": {"pid": os.getpid()},
            "manager": next(iter(agent.get("devices", {}).values()), agent),
            "gateway": gateway,
            "workers": workers,
            "processes": {name: {"phase": phase, "worker_id": worker} for name, (phase, worker) in processes.items()},
        }

    async def stop(self) -> None:
        """Begin to end the cluster: drained first, then all processes. `watch` tells when it is done. May be asked again and again."""
        await self._ensure_running()
        if self._machine.phase == "running":
            self._queue.put_nowait(StopRequested())

    # Inside

    async def _ensure_running(self) -> None:
        """Start at the first call; no call is answered before it is known what an earlier controller left running."""
        if self._running is None:
            self._components = Components(self._spec, send=self._queue.put_nowait, tell=self._tell)
            self._running = asyncio.create_task(self._run())
        await self._begun.wait()

    async def _run(self) -> None:
        try:
            facts = self._journal.facts
            for event in await self._components.find(facts.live, facts.generation):
                self._take(event)
            self._take(Begin())
            self._begun.set()
            self._ticking = asyncio.create_task(self._tick())
            while True:
                self._take(await self._queue.get())
        except Exception as error:
            log.exception("the controller failed")
            self._given_up = {
                "component": "controller",
                "kind": "internal",
                "reason": f"{type(error).__name__}: {error}",
            }
            self._begun.set()
            self._changed.set()

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            self._queue.put_nowait(Tick())

    def _take(self, event: Event) -> None:
        now_s = time.monotonic()
        log.debug("event %s", event)
        orders = self._machine.handle(event, now_s=now_s)
        self._note_recovery(event, orders, now_s)
        self._write_down(orders)
        for order in orders:
            log.debug("order %s", order)
            self._carry_out(order)
        self._changed.set()

    def _write_down(self, orders: list[Instruction]) -> None:
        """Facts that must survive this process, before anything is done that depends on them."""
        facts = self._journal.facts
        for order in orders:
            match order:
                case AssignWorker(_, worker_id, incarnation):
                    facts.incarnations[worker_id] = incarnation
                case SpawnProcess(process):
                    facts.next_process = int(process.rpartition("-")[2]) + 1
                case StartGateway(generation):
                    facts.generation = generation
        facts.live = list(self._machine.processes())
        self._journal.save()

    def _carry_out(self, order: Instruction) -> None:
        match order:
            case StartAgent():
                self._components.start_agent()
            case SpawnProcess(process, urgent):
                self._components.spawn_process(process, urgent=urgent)
            case AssignWorker():
                self._components.assign_worker(order)
            case KillProcess(process, reason):
                if reason:
                    self._tell("died", f"{process}: {reason}", component=process)
                self._components.kill(process)
            case AskProcess(process):
                self._components.ask_process(process)
            case StartGateway(generation):
                self._components.start_gateway(generation)
            case SetWorkers(workers):
                self._components.set_workers(workers)
            case Pause(component, delay_s):
                self._tell("pause", f"{component}: next try in {delay_s:g} s", component=component)
                asyncio.get_running_loop().call_later(delay_s, self._queue.put_nowait, PauseOver(component))
            case DrainGateway():
                self._tell("drain", "draining: new requests are refused, running ones finish")
                self._components.drain_gateway()
            case StopAll():
                self._stopping = asyncio.create_task(self._stop_all())
            case GiveUp(component, kind, reason):
                self._tell("gave_up", f"giving up on {component}: {reason}", component=component, failure_kind=kind)
                self._given_up = {"component": component, "kind": kind, "reason": reason}

    async def _stop_all(self) -> None:
        try:
            await self._components.stop_all()
        except Exception:
            log.exception("not everything could be ended; `flexpert up` ends what is left")
        self._stopped = True
        self._tell("stopped", "everything has ended")

    def _note_recovery(self, event: Event, orders: list[Instruction], now_s: float) -> None:
        """How long each component was missing, for `flexpert events`."""
        if any(isinstance(order, KillProcess) and order.reason for order in orders):
            self._died_at_s.setdefault("worker", now_s)
        match event:
            case Died():
                self._died_at_s.setdefault(GATEWAY if event.component == GATEWAY else "worker", now_s)
            case WorkerReady() | GatewayReady():
                component = GATEWAY if isinstance(event, GatewayReady) else "worker"
                if (died_at_s := self._died_at_s.pop(component, None)) is not None:
                    self._tell(
                        "replaced",
                        f"{component} replaced after {now_s - died_at_s:.2f} s",
                        seconds=round(now_s - died_at_s, 3),
                    )

    def _tell(self, kind: str, text: str, **details: Any) -> None:
        log.info("%s", text)
        self._journal.tell(kind, text, **details)
        self._changed.set()
