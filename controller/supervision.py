"""What has to run, and what to do when something of it dies: the controller's decisions as a pure state machine.

The model: one node agent keeps the HBM manager; each worker (a lasting name such as "worker-0") is served by some worker process;
one gateway listens. Processes are disposable: a process is *spawned* (it imports what it needs, that is slow), is then *warm*,
and is *assigned* to a worker with an incarnation, the fencing token that the HBM manager checks. Incarnations of a worker only grow.
Spare warm processes are standbys: after a death one of them is assigned at once.

Events go in, instructions come out: an event changes what is known, then `_reconcile` compares that with what is wanted and orders
the difference. Everything may fail at any time; a failure is followed by a bounded, growing pause, and by giving up where a start failed
too often in a row, or for a reason that no second try can change. The module reads no clock, starts nothing and imports no Ray;
`controller.controller` carries the instructions out and turns what happens into events.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from flexpert.controller.supervision_types import (
    AGENT,
    GATEWAY,
    SPARE,
    AgentReady,
    Answered,
    AskProcess,
    AssignWorker,
    Begin,
    Died,
    DrainGateway,
    Event,
    Failed,
    GatewayDrained,
    GatewayReady,
    GiveUp,
    Instruction,
    KillProcess,
    ManagerLost,
    Pause,
    PauseOver,
    ProcessWarm,
    SetWorkers,
    SpawnProcess,
    StartAgent,
    StartGateway,
    StopAll,
    StopRequested,
    Tick,
    WorkerAddress,
    WorkerFound,
    WorkerReady,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SupervisionConfig:
    """standbys: warm processes kept beside the workers. A component that served for stable_s has its earlier failures forgiven.

    silence_s: a worker that serves and does not answer for so long is ended. No more than max_tick_s of it pass from one tick to the next:
    after a moment in which the controller itself stood still, its workers have their time to answer.
    """

    worker_ids: tuple[str, ...] = ("worker-0",)
    standbys: int = 0
    max_start_failures: int = 5
    backoff_base_s: float = 0.5
    backoff_max_s: float = 10.0
    stable_s: float = 60.0
    silence_s: float = 10.0
    max_tick_s: float = 4.0


class ImpossibleEvent(Exception):
    """An event that cannot follow what happened before; the message tells the story that led here."""


@dataclass(slots=True)
class _Process:
    phase: str = "spawning"  # spawning, warm, starting, serving
    worker_id: str = ""
    address: str = ""
    asked: bool = False  # whether an answer is awaited
    silent_s: float = 0.0


@dataclass(slots=True)
class _Trouble:
    """failures: ends in a row, forgiven after stable_s of service. start_failures: those since it last served.
    pausing: left alone for a moment. ready_at_s: since when it serves, None where it does not.
    """

    failures: int = 0
    start_failures: int = 0
    pausing: bool = False
    ready_at_s: float | None = None
    was_ready: bool = False


@dataclass
class Supervision:
    config: SupervisionConfig
    incarnations: Mapping[str, int] = field(default_factory=dict)
    first_process: int = 0
    first_generation: int = 0

    def __post_init__(self) -> None:
        self.phase = "new"  # new, running, draining, ended
        self._incarnations = {worker: self.incarnations.get(worker, 0) for worker in self.config.worker_ids}
        self._next_process = self.first_process
        self._generation = self.first_generation
        self._agent = "absent"  # absent, starting, ready
        self._gateway = "absent"
        self._processes: dict[str, _Process] = {}
        self._trouble: dict[str, _Trouble] = {}
        self._told: tuple[WorkerAddress, ...] | None = None
        self._ticked_at_s: float | None = None
        self._story: deque[str] = deque(maxlen=40)

    # What others may read

    @property
    def serving(self) -> tuple[WorkerAddress, ...]:
        """The workers that answer now, for the gateway."""
        found = [
            WorkerAddress(process.worker_id, self._incarnations[process.worker_id], process.address)
            for process in self._processes.values()
            if process.phase == "serving"
        ]
        return tuple(sorted(found))

    @property
    def ready(self) -> bool:
        """Whether every worker and the gateway serve."""
        return self._gateway == "ready" and len(self.serving) == len(self.config.worker_ids)

    def processes(self) -> dict[str, tuple[str, str]]:
        """Name of each process -> (phase, worker it serves or "")."""
        return {name: (process.phase, process.worker_id) for name, process in self._processes.items()}

    # The machine

    def handle(self, event: Event, *, now_s: float) -> list[Instruction]:
        """Take in one event; the instructions must be carried out in order, each may answer with events."""
        orders: list[Instruction] = []
        if self.phase != "ended":
            self._take(event, now_s, orders)
            self._reconcile(orders)
        if not isinstance(event, Tick | Answered) or any(not isinstance(order, AskProcess) for order in orders):
            self._story.append(f"{now_s:.3f} {event} -> {orders}")
        return orders

    def _take(self, event: Event, now_s: float, orders: list[Instruction]) -> None:
        match event:
            case Begin():
                self._expect(self.phase == "new", event)
                self.phase = "running"
            case AgentReady():
                self._agent = "ready"
                self._served(AGENT, now_s)
            case ManagerLost(reason):
                self._lose_manager(reason, now_s, orders)
            case ProcessWarm(process):
                if process in self._processes:
                    self._expect(self._processes[process].phase == "spawning", event)
                    self._processes[process].phase = "warm"
                    self._trouble_of(SPARE).start_failures, self._trouble_of(SPARE).was_ready = 0, True
            case WorkerReady(process, address):
                if process in self._processes:
                    self._expect(self._processes[process].phase == "starting", event)
                    self._processes[process].phase, self._processes[process].address = "serving", address
                    self._served(self._processes[process].worker_id, now_s)
            case GatewayReady(generation):
                if self.phase == "new":
                    self._generation = max(self._generation, generation)
                if generation == self._generation and self.phase != "draining":
                    self._gateway, self._told = "ready", None
                    self._served(GATEWAY, now_s)
            case WorkerFound(process, worker_id, incarnation, address):
                self._expect(self.phase == "new" and worker_id in self._incarnations, event)
                self._incarnations[worker_id] = max(incarnation, self._incarnations[worker_id])
                self._processes[process] = _Process("serving", worker_id, address)
                self._served(worker_id, now_s)
            case Failed(component, kind, reason, permanent):
                self._failed(component, kind=kind, reason=reason, permanent=permanent, now_s=now_s, orders=orders)
            case Died(component, reason):
                self._failed(component, kind="internal", reason=reason, permanent=False, now_s=now_s, orders=orders)
            case Tick():
                self._tick(now_s, orders)
            case Answered(process):
                if process in self._processes:
                    self._processes[process].asked = False
            case PauseOver(component):
                self._trouble_of(component).pausing = False
            case StopRequested():
                self._request_stop(orders)
            case GatewayDrained():
                self._end(orders)

    def _request_stop(self, orders: list[Instruction]) -> None:
        if self.phase == "draining":
            return
        if self._gateway == "ready":
            self.phase = "draining"
            orders.append(DrainGateway())
        else:
            self._end(orders)

    def _end(self, orders: list[Instruction]) -> None:
        self.phase = "ended"
        self._processes.clear()
        orders.append(StopAll())

    def _lose_manager(self, reason: str, now_s: float, orders: list[Instruction]) -> None:
        """Weights and KV are gone: a process that mapped them must end, or it would keep the old memory alive."""
        self._agent = "absent"
        for name, process in list(self._processes.items()):
            if process.worker_id:
                del self._processes[name]
                orders.append(KillProcess(name))
        self._count(AGENT, kind="internal", reason=reason, permanent=False, now_s=now_s, orders=orders)

    def _failed(
        self, component: str, *, kind: str, reason: str, permanent: bool, now_s: float, orders: list[Instruction]
    ) -> None:
        """One component is gone; a process that only failed to start is killed, so that nothing half-made stays."""
        if component == AGENT:
            self._agent, counted = "absent", AGENT
        elif component == GATEWAY:
            if self.phase == "draining":
                self._end(orders)
                return
            self._gateway, counted = "absent", GATEWAY
        elif component in self._processes:
            counted = self._processes.pop(component).worker_id or SPARE
            orders.append(KillProcess(component))
        else:
            return  # killed before, by us
        self._count(counted, kind=kind, reason=reason, permanent=permanent, now_s=now_s, orders=orders)

    def _tick(self, now_s: float, orders: list[Instruction]) -> None:
        """Ask those that serve, one question at a time, and end those that left theirs unanswered for too long."""
        passed_s = 0.0 if self._ticked_at_s is None else min(now_s - self._ticked_at_s, self.config.max_tick_s)
        self._ticked_at_s = now_s
        for name, process in list(self._processes.items()):
            if process.phase != "serving":
                continue
            if not process.asked:
                process.asked, process.silent_s = True, 0.0
                orders.append(AskProcess(name))
                continue
            process.silent_s += passed_s
            if process.silent_s >= self.config.silence_s:
                reason = f"no answer for {process.silent_s:.0f} s; ended"
                del self._processes[name]
                orders.append(KillProcess(name, reason))
                self._count(
                    process.worker_id, kind="internal", reason=reason, permanent=False, now_s=now_s, orders=orders
                )

    def _count(
        self, component: str, *, kind: str, reason: str, permanent: bool, now_s: float, orders: list[Instruction]
    ) -> None:
        """Decide between trying again at once, after a pause, and giving up."""
        trouble = self._trouble_of(component)
        served_s = 0.0 if trouble.ready_at_s is None else now_s - trouble.ready_at_s
        started, trouble.ready_at_s = trouble.ready_at_s is not None, None
        trouble.failures = 1 if served_s >= self.config.stable_s else trouble.failures + 1
        trouble.start_failures += not started
        hopeless = (permanent and not trouble.was_ready) or trouble.start_failures >= self.config.max_start_failures
        if hopeless and not started and not self.ready:  # what serves is never ended for want of a spare part
            self.phase = "ended"
            orders.append(GiveUp(component, kind, reason))
            return
        if started and trouble.failures == 1:
            return  # it had been fine: replace it at once
        delay_s = min(self.config.backoff_max_s, self.config.backoff_base_s * 2 ** min(trouble.failures - 1, 16))
        delay_s -= served_s  # what keeps restarts apart is the time between them, not the time down
        if delay_s > 0 and not trouble.pausing:
            trouble.pausing = True
            orders.append(Pause(component, delay_s))

    def _served(self, component: str, now_s: float) -> None:
        trouble = self._trouble_of(component)
        trouble.ready_at_s, trouble.was_ready, trouble.start_failures = now_s, True, 0

    def _reconcile(self, orders: list[Instruction]) -> None:
        """Order the difference between what is wanted and what is known."""
        if self.phase not in ("running", "draining"):
            return
        if self._agent == "absent" and not self._pausing(AGENT):
            self._agent = "starting"
            orders.append(StartAgent())
        self._reconcile_workers(orders)
        if self._gateway == "absent" and self.phase == "running" and not self._pausing(GATEWAY):
            self._generation += 1
            self._gateway = "starting"
            orders.append(StartGateway(self._generation))
        if self._gateway == "ready" and self.serving != self._told:
            self._told = self.serving
            orders.append(SetWorkers(self.serving))

    def _reconcile_workers(self, orders: list[Instruction]) -> None:
        taken = {process.worker_id for process in self._processes.values()}
        vacant = [worker for worker in self.config.worker_ids if worker not in taken and not self._pausing(worker)]
        if self._agent == "ready":
            for name in [name for name, process in self._processes.items() if process.phase == "warm"]:
                if vacant:
                    self._assign(name, vacant.pop(0), orders)
        spare = sum(not process.worker_id for process in self._processes.values())
        wanted = len(vacant) + (self.config.standbys if self.ready and self.phase == "running" else 0)
        while spare < wanted and not self._pausing(SPARE):
            name = f"process-{self._next_process}"
            orders.append(SpawnProcess(name, urgent=spare < len(vacant)))
            self._next_process, spare = self._next_process + 1, spare + 1
            self._processes[name] = _Process()

    def _assign(self, name: str, worker_id: str, orders: list[Instruction]) -> None:
        self._incarnations[worker_id] += 1
        self._processes[name].phase, self._processes[name].worker_id = "starting", worker_id
        orders.append(AssignWorker(name, worker_id, self._incarnations[worker_id]))

    def _trouble_of(self, component: str) -> _Trouble:
        return self._trouble.setdefault(component, _Trouble())

    def _pausing(self, component: str) -> bool:
        return self._trouble_of(component).pausing

    def _expect(self, possible: bool, event: Event) -> None:
        if not possible:
            raise ImpossibleEvent(f"{event} cannot follow:\n" + "\n".join(self._story))
