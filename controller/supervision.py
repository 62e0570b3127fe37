"""Which processes have to run, and what to do when one dies: the controller's decisions about processes as a pure state machine.

The model: a node agent on each node keeps the HBM managers of its devices; one gateway listens; there is a pool of worker processes.
Processes are disposable: one is *spawned* (it imports what it needs, that is slow), is then *warm*, and is *given* to a worker when a
transition wants one (`controller.transition` decides who serves and what the process does from then on). Spare warm processes are
standbys: after a death one of them is given at once.

Events go in, instructions come out: an event changes what is known, then `_reconcile` compares that with what is wanted and orders
the difference. Everything may fail at any time; a failure is followed by a bounded, growing pause, and by giving up where a start failed
too often in a row, or for a reason that no second try can change. The module reads no clock, starts nothing and imports no Ray;
`controller.controller` carries the instructions out and turns what happens into events.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from flexpert.controller.supervision_types import (
    AGENT,
    GATEWAY,
    SPARE,
    AgentReady,
    Answered,
    AskProcess,
    Begin,
    Died,
    DrainGateway,
    Event,
    Failed,
    GatewayDrained,
    GatewayReady,
    GiveProcess,
    GiveUp,
    Instruction,
    KillProcess,
    Pause,
    PauseOver,
    ProcessEnded,
    ProcessFound,
    ProcessNotWanted,
    ProcessReleased,
    ProcessWanted,
    ProcessWarm,
    Settled,
    SpawnProcess,
    StartAgent,
    StartGateway,
    StopAll,
    StopRequested,
    SupervisionConfig,
    Tick,
    WorkerLost,
    WorkerServes,
    WorkerStarting,
)
from flexpert.controller.troubles import Troubles


class ImpossibleEvent(Exception):
    """An event that cannot follow what happened before; the message tells the story that led here."""


@dataclass(slots=True)
class _Process:
    phase: str  # spawning, warm, given, starting, serving
    agent: str = AGENT
    worker_id: str = ""
    idle_s: float = 0.0  # warm, by the ticks


@dataclass
class Supervision:
    config: SupervisionConfig
    first_process: int = 0
    first_generation: int = 0

    def __post_init__(self) -> None:
        self.phase = "new"  # new, running, draining, ended
        self._next_process = self.first_process
        self._generation = self.first_generation
        self._agents = dict.fromkeys([AGENT, *self.config.agents.values()], "absent")  # absent, starting, ready
        self._gateway = "absent"
        self._processes: dict[str, _Process] = {}
        self._wanted: list[str] = []  # workers that wait for a process, in the order in which they began to
        self._serving = self._calm = self._served_once = False
        self._troubles = Troubles(self.config)
        self._silent_s: dict[str, float] = {}  # components whose answer is awaited -> for how long
        self._ticked_at_s: float | None = None
        self._story: deque[str] = deque(maxlen=40)

    @property
    def ready(self) -> bool:
        """Whether the gateway and the workers serve."""
        return self._gateway == "ready" and self._serving

    def processes(self) -> dict[str, tuple[str, str]]:
        """Name of each process -> (phase, worker it was given to or "")."""
        return {name: (process.phase, process.worker_id) for name, process in self._processes.items()}

    def process_of(self, worker_id: str) -> str:
        """The process that was given to the worker, "" where there is none."""
        return next((name for name, process in self._processes.items() if process.worker_id == worker_id), "")

    def agent_of(self, process: str) -> str:
        """The agent of the node that the process runs on."""
        return self._processes[process].agent

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
            case AgentReady(agent):
                self._expect(agent in self._agents, event)
                self._agents[agent] = "ready"
                self._heard(agent)
                self._troubles.served(agent, now_s)
            case GatewayReady(generation):
                if self.phase == "new":
                    self._generation = max(self._generation, generation)
                if generation == self._generation and self.phase != "draining":
                    self._gateway = "ready"
                    self._heard(GATEWAY)
                    self._troubles.served(GATEWAY, now_s)
            case ProcessFound(name, worker_id, agent):
                self._expect(self.phase == "new", event)
                self._processes[name] = _Process("serving" if worker_id else "warm", agent, worker_id)
                if worker_id:
                    self._troubles.served(worker_id, now_s)
            case ProcessWanted(worker_id):
                self._want(worker_id, orders)
            case Settled(serving, calm):
                self._serving, self._calm = serving, calm
                self._served_once = self._served_once or serving
            case Failed(component, kind, reason, permanent):
                self._failed(component, kind=kind, reason=reason, permanent=permanent, now_s=now_s, orders=orders)
            case Died(component, reason):
                self._failed(component, kind="internal", reason=reason, permanent=False, now_s=now_s, orders=orders)
            case Tick():
                self._tick(now_s, orders)
            case PauseOver(component):
                self._troubles.of(component).pausing = False
            case StopRequested():
                self._request_stop(orders)
            case GatewayDrained():
                self._end(orders)
            case _:
                self._take_process(event, now_s, orders)

    def _take_process(self, event: Event, now_s: float, orders: list[Instruction]) -> None:
        """What concerns one process of the pool. One that is not known was ended by us."""
        match event:
            case ProcessWarm(name):
                if (process := self._processes.get(name)) is not None:
                    self._expect(process.phase == "spawning", event)
                    process.phase = "warm"
                    self._heard(name)
                    self._troubles.succeeded(SPARE)
            case ProcessNotWanted(worker_id):
                if worker_id in self._wanted:
                    self._wanted.remove(worker_id)
                for process in self._processes.values():
                    if process.worker_id == worker_id and process.phase == "given":
                        process.phase, process.worker_id = "warm", ""
            case WorkerStarting(name):
                if (process := self._processes.get(name)) is not None and process.phase == "given":
                    process.phase = "starting"
            case WorkerServes(name):
                if (process := self._processes.get(name)) is not None:
                    self._expect(process.phase in ("starting", "serving"), event)
                    process.phase = "serving"
                    self._heard(name)
                    self._troubles.served(process.worker_id, now_s)
            case ProcessReleased(name):
                if (process := self._processes.get(name)) is not None:
                    self._expect(process.phase != "spawning", event)
                    self._troubles.of(process.worker_id).ready_at_s = None
                    process.phase, process.worker_id, process.idle_s = "warm", "", 0.0
                    self._silent_s.pop(name, None)
            case ProcessEnded(name, reason):
                if (process := self._processes.pop(name, None)) is not None:
                    orders.append(KillProcess(name, reason))
                    self._count(
                        process.worker_id or SPARE, kind="internal", reason=reason, permanent=False, now_s=now_s, orders=orders
                    )  # fmt: skip
            case Answered(name):
                self._silent_s.pop(name, None)

    def _want(self, worker_id: str, orders: list[Instruction]) -> None:
        name = self.process_of(worker_id)
        if name and self._processes[name].phase == "given":
            orders.append(GiveProcess(worker_id, name))  # it was given, and whoever asked may not have heard of it
        elif worker_id not in self._wanted:
            self._wanted.append(worker_id)

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

    def _failed(
        self, component: str, *, kind: str, reason: str, permanent: bool, now_s: float, orders: list[Instruction]
    ) -> None:
        """One component is gone; a process that only failed to start is killed, so that nothing half-made stays."""
        self._silent_s.pop(component, None)
        if component in self._agents:
            self._agents[component], counted = "absent", component
        elif component == GATEWAY:
            if self.phase == "draining":
                self._end(orders)
                return
            self._gateway, counted = "absent", GATEWAY
        elif component in self._processes:
            counted = self._lose_process(component, reason, orders)
        else:
            return  # killed before, by us
        self._count(counted, kind=kind, reason=reason, permanent=permanent, now_s=now_s, orders=orders)

    def _lose_process(self, name: str, reason: str, orders: list[Instruction]) -> str:
        """Returns what the loss counts against."""
        worker_id = self._processes.pop(name).worker_id
        orders.append(KillProcess(name, reason))
        if worker_id:
            orders.append(WorkerLost(worker_id, name, reason))
        return worker_id or SPARE

    def _tick(self, now_s: float, orders: list[Instruction]) -> None:
        """Ask those that serve, one question at a time, and end those that left theirs unanswered for too long."""
        passed_s = 0.0 if self._ticked_at_s is None else min(now_s - self._ticked_at_s, self.config.max_tick_s)
        self._ticked_at_s = now_s
        self._end_surplus(passed_s, orders)
        limits_s = self._limits_s()
        self._silent_s = {name: self._silent_s[name] for name in self._silent_s if name in limits_s}
        for name, limit_s in limits_s.items():
            if self.phase == "ended":
                return
            if name not in self._silent_s:
                self._silent_s[name] = 0.0
                orders.append(AskProcess(name))
                continue
            self._silent_s[name] += passed_s
            if self._silent_s[name] >= limit_s:
                reason = f"no answer for {self._silent_s.pop(name):.0f} s; ended"
                if name not in self._processes:
                    orders.append(KillProcess(name, reason))
                self._failed(name, kind="internal", reason=reason, permanent=False, now_s=now_s, orders=orders)

    def _end_surplus(self, passed_s: float, orders: list[Instruction]) -> None:
        """Standbys beyond those wanted cost memory: the longest idle go first."""
        for process in self._processes.values():
            process.idle_s = process.idle_s + passed_s if process.phase == "warm" else 0.0
        if not self._calm or self._wanted or self.phase != "running":
            return
        for agent in self._agents:
            spare = {n: p.idle_s for n, p in self._processes.items() if p.agent == agent and not p.worker_id}
            surplus = sorted(spare, key=lambda name: -spare[name])[: max(0, len(spare) - self.config.standbys)]
            for name in [name for name in surplus if spare[name] >= self.config.surplus_s]:
                del self._processes[name]
                orders.append(KillProcess(name, f"idle for {spare[name]:.0f} s, and more than the standbys wanted"))

    def _heard(self, component: str) -> None:
        """It came so far: its silence counts anew, and by another limit."""
        if component in self._silent_s:
            self._silent_s[component] = 0.0

    def _limits_s(self) -> dict[str, float]:
        """Who must answer -> within how long."""
        config, services = self.config, dict(self._agents)
        if self.phase == "running":
            services[GATEWAY] = self._gateway
        slow = {"serving": config.silence_s, "spawning": config.start_silence_s}
        found = {name: slow.get(process.phase, config.service_silence_s) for name, process in self._processes.items()}
        limits = {"ready": config.service_silence_s, "starting": config.start_silence_s}
        return found | {name: limits[phase] for name, phase in services.items() if phase in limits}

    def _count(
        self, component: str, *, kind: str, reason: str, permanent: bool, now_s: float, orders: list[Instruction]
    ) -> None:
        """Decide between trying again at once, after a pause, and giving up. Whether a worker is given up is a transition's decision."""
        hopeless, delay_s = self._troubles.failed(component, permanent=permanent, now_s=now_s)
        if hopeless and self._ends_with(component):
            self.phase = "ended"
            orders.append(GiveUp(component, kind, reason))
        elif delay_s > 0:
            orders.append(Pause(component, delay_s))

    def _ends_with(self, component: str) -> bool:
        """Whether nothing can serve without it: at the beginning, later only where the last worker finds no process."""
        if not self._served_once:
            return component in (GATEWAY, SPARE, *self._agents)
        serving = any(process.phase == "serving" for process in self._processes.values())
        return component == SPARE and bool(self._wanted) and not serving

    def _reconcile(self, orders: list[Instruction]) -> None:
        """Order the difference between what is wanted and what is known."""
        if self.phase not in ("running", "draining"):
            return
        for agent, phase in self._agents.items():
            if phase == "absent" and not self._troubles.pausing(agent):
                self._agents[agent] = "starting"
                orders.append(StartAgent(agent))
        self._give_processes(orders)
        self._spawn_processes(orders)
        if self._gateway == "absent" and self.phase == "running" and not self._troubles.pausing(GATEWAY):
            self._generation += 1
            self._gateway = "starting"
            orders.append(StartGateway(self._generation))

    def _give_processes(self, orders: list[Instruction]) -> None:
        for worker_id in list(self._wanted):
            agent = self._agent_of(worker_id)
            if self._troubles.pausing(worker_id) or self._agents[agent] != "ready":
                continue
            for name, process in self._processes.items():
                if process.phase == "warm" and process.agent == agent:
                    process.phase, process.worker_id = "given", worker_id
                    self._wanted.remove(worker_id)
                    orders.append(GiveProcess(worker_id, name))
                    break

    def _spawn_processes(self, orders: list[Instruction]) -> None:
        """As many as workers wait for; standbys besides, once there is time for them."""
        standbys = self.config.standbys if self.ready and self._calm and self.phase == "running" else 0
        for agent in self._agents:
            waiting = sum(
                self._agent_of(worker_id) == agent and not self._troubles.pausing(worker_id)
                for worker_id in self._wanted
            )
            spare = sum(not process.worker_id and process.agent == agent for process in self._processes.values())
            while spare < waiting + standbys and not self._troubles.pausing(SPARE):
                name = f"process-{self._next_process}"
                orders.append(SpawnProcess(name, urgent=spare < waiting, agent=agent))
                self._next_process, spare = self._next_process + 1, spare + 1
                self._processes[name] = _Process("spawning", agent)

    def _agent_of(self, worker_id: str) -> str:
        return self.config.agents.get(worker_id, AGENT)

    def _expect(self, possible: bool, event: Event) -> None:
        if not possible:
            raise ImpossibleEvent(f"{event} cannot follow:\n" + "\n".join(self._story))
