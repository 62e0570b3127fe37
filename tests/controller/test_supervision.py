"""The supervision machine alone: scripted stories, and chaos against a small model of the world."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexpert.controller.supervision import ImpossibleEvent, Supervision
from flexpert.controller.supervision_types import (
    AGENT,
    GATEWAY,
    AgentReady,
    Answered,
    AskProcess,
    Begin,
    Died,
    DrainGateway,
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

WHOLE = Settled(serving=True, calm=True)
BROKEN = Settled(serving=False, calm=False)


def started(**config: object) -> Supervision:
    """A machine whose agent, gateway and worker serve, at time 0."""
    machine = Supervision(SupervisionConfig(**config))
    for event in (Begin(), ProcessWanted("worker-0"), AgentReady(), GatewayReady(1), ProcessWarm("process-0")):
        machine.handle(event, now_s=0)
    serves(machine, "process-0")
    assert machine.ready
    return machine


def serves(machine: Supervision, process: str, *, now_s: float = 0) -> list[Instruction]:
    """The process that was given becomes its worker, and the epoch is whole again."""
    events = (WorkerStarting(process), WorkerServes(process), WHOLE)
    return [order for event in events for order in machine.handle(event, now_s=now_s)]


def dies(machine: Supervision, process: str, *, now_s: float) -> list[Instruction]:
    """The worker's process dies, and a transition wants another one."""
    orders = machine.handle(Died(process, "crash"), now_s=now_s)
    assert WorkerLost("worker-0", process, "crash") in orders
    machine.handle(BROKEN, now_s=now_s)
    return orders + machine.handle(ProcessWanted("worker-0"), now_s=now_s)


def test_agent_and_gateway_start_at_once_and_processes_when_wanted() -> None:
    machine = Supervision(SupervisionConfig(standbys=1))
    assert machine.handle(Begin(), now_s=0) == [StartAgent(), StartGateway(1)]
    assert machine.handle(ProcessWanted("worker-0"), now_s=0) == [SpawnProcess("process-0")]
    assert machine.handle(ProcessWanted("worker-1"), now_s=0) == [SpawnProcess("process-1")]


@pytest.mark.parametrize("agent_first", [True, False])
def test_process_is_given_when_it_is_warm_and_the_agent_is_there(agent_first: bool) -> None:
    machine = Supervision(SupervisionConfig())
    machine.handle(Begin(), now_s=0)
    machine.handle(ProcessWanted("worker-0"), now_s=0)
    first, second = (
        (AgentReady(), ProcessWarm("process-0")) if agent_first else (ProcessWarm("process-0"), AgentReady())
    )
    assert machine.handle(first, now_s=1) == []
    assert machine.handle(second, now_s=2) == [GiveProcess("worker-0", "process-0")]


def test_process_comes_from_the_node_of_the_workers_device() -> None:
    machine = Supervision(SupervisionConfig(agents={"worker-1": "agent-1"}))
    machine.handle(Begin(), now_s=0)
    for worker in ("worker-1", "worker-0"):
        machine.handle(ProcessWanted(worker), now_s=0)
    for event in (AgentReady(), AgentReady("agent-1"), ProcessWarm("process-1")):
        orders = machine.handle(event, now_s=0)
    assert orders == [GiveProcess("worker-0", "process-1")], "the one on the node of the first agent"
    assert machine.handle(ProcessWarm("process-0"), now_s=0) == [GiveProcess("worker-1", "process-0")]


def test_process_that_is_not_wanted_any_more_is_a_standby_for_the_next() -> None:
    machine = started(standbys=1)
    machine.handle(ProcessWarm("process-1"), now_s=1)
    assert machine.handle(ProcessWanted("worker-1"), now_s=2) == [GiveProcess("worker-1", "process-1"), *spawned(2)]
    assert machine.handle(ProcessNotWanted("worker-1"), now_s=3) == []
    assert machine.handle(ProcessWanted("worker-2"), now_s=4) == [GiveProcess("worker-2", "process-1")]


def test_released_process_is_a_standby() -> None:
    machine = started()
    machine.handle(ProcessReleased("process-0"), now_s=1)
    assert machine.handle(ProcessWanted("worker-3"), now_s=2) == [GiveProcess("worker-3", "process-0")]


def give_back(machine: Supervision, *workers: str) -> None:
    """They serve for a moment, each in a process of its own, and leave again."""
    for number, worker_id in enumerate(workers, start=1):
        machine.handle(ProcessWanted(worker_id), now_s=0)
        machine.handle(ProcessWarm(f"process-{number}"), now_s=0)
        serves(machine, f"process-{number}")
    for number in range(1, len(workers) + 1):
        machine.handle(ProcessReleased(f"process-{number}"), now_s=0)


def test_standbys_beyond_those_wanted_end_after_a_while() -> None:
    machine = started(surplus_s=10)
    give_back(machine, "worker-1", "worker-2")
    assert ticks(machine, *range(10), answering=True, silent="none") == []
    reason = "idle for 10 s, and more than the standbys wanted"
    assert set(ticks(machine, 10, answering=True, silent="none")) == {
        KillProcess("process-1", reason), KillProcess("process-2", reason)
    }  # fmt: skip
    assert machine.processes() == {"process-0": ("serving", "worker-0")}


def test_as_many_standbys_as_wanted_stay() -> None:
    machine = started(surplus_s=10, standbys=1)
    machine.handle(ProcessWarm("process-1"), now_s=0)
    assert ticks(machine, *range(100), answering=True, silent="none") == []


def test_surplus_is_kept_while_a_transition_runs_and_a_used_process_starts_anew() -> None:
    machine = started(surplus_s=10)
    give_back(machine, "worker-1", "worker-2")
    machine.handle(Settled(serving=True, calm=False), now_s=0)
    assert ticks(machine, *range(20), answering=True, silent="none") == []
    assert machine.handle(ProcessWanted("worker-1"), now_s=20) == [GiveProcess("worker-1", "process-1")]
    serves(machine, "process-1", now_s=20)
    machine.handle(ProcessReleased("process-1"), now_s=20)
    (order,) = ticks(machine, 21, answering=True, silent="none")
    assert order == KillProcess("process-2", "idle for 20 s, and more than the standbys wanted")


def test_process_that_a_transition_ends_is_killed_and_no_loss() -> None:
    machine = started()
    assert machine.handle(ProcessEnded("process-0", "missed a step"), now_s=1) == [
        KillProcess("process-0", "missed a step")
    ]
    assert machine.handle(Died("process-0", "killed"), now_s=1) == []


def spawned(number: int) -> list[Instruction]:
    return [SpawnProcess(f"process-{number}", urgent=False)]


def test_dead_worker_gets_another_process_at_once() -> None:
    machine = started()
    orders = dies(machine, "process-0", now_s=10)
    assert orders == [
        KillProcess("process-0", "crash"),
        WorkerLost("worker-0", "process-0", "crash"),
        SpawnProcess("process-1"),
    ]
    assert machine.handle(ProcessWarm("process-1"), now_s=11) == [GiveProcess("worker-0", "process-1")]


def test_standby_takes_over_in_the_same_step() -> None:
    machine = started(standbys=1)
    machine.handle(ProcessWarm("process-1"), now_s=1)
    orders = dies(machine, "process-0", now_s=10)
    assert GiveProcess("worker-0", "process-1") in orders
    assert not any(isinstance(order, SpawnProcess) for order in orders), (
        "the next standby waits until the worker serves"
    )
    assert SpawnProcess("process-2", urgent=False) in serves(machine, "process-1", now_s=11)


def test_gateway_death_restarts_it() -> None:
    machine = started()
    assert machine.handle(Died(GATEWAY, "killed"), now_s=10) == [StartGateway(2)]
    machine.handle(GatewayReady(2), now_s=11)
    assert machine.ready


def test_permanent_failure_of_the_first_process_gives_up_at_once() -> None:
    machine = Supervision(SupervisionConfig())
    for event in (Begin(), ProcessWanted("worker-0"), AgentReady()):
        machine.handle(event, now_s=0)
    orders = machine.handle(Failed("process-0", "model", "not a Mixture of Experts", True), now_s=1)
    assert orders[-1] == GiveUp("standby", "model", "not a Mixture of Experts")
    assert machine.handle(PauseOver("standby"), now_s=2) == []


def test_repeated_failure_pauses_longer_each_time_and_then_gives_up() -> None:
    config = SupervisionConfig(max_start_failures=4, backoff_base_s=1, backoff_max_s=2)
    machine = Supervision(config)
    machine.handle(Begin(), now_s=0)
    delays = []
    for _ in range(3):
        [pause] = machine.handle(Failed(AGENT, "internal", "boom", False), now_s=0)
        assert isinstance(pause, Pause)
        delays.append(pause.delay_s)
        assert machine.handle(PauseOver(AGENT), now_s=0) == [StartAgent()]
    assert delays == [1, 2, 2]
    assert machine.handle(Failed(AGENT, "internal", "boom", False), now_s=0) == [GiveUp(AGENT, "internal", "boom")]


def test_worker_that_dies_again_soon_is_started_after_a_pause_and_never_given_up() -> None:
    machine = started(backoff_base_s=1, backoff_max_s=4)
    delays = []
    for number in range(8):
        orders = dies(machine, f"process-{number}", now_s=0)
        pauses = [order for order in orders if isinstance(order, Pause)]
        delays.append(pauses[0].delay_s if pauses else 0)
        if pauses:
            machine.handle(PauseOver("worker-0"), now_s=0)
        machine.handle(ProcessWarm(f"process-{number + 1}"), now_s=0)
        serves(machine, f"process-{number + 1}")
    assert delays == [0, 2, 4, 4, 4, 4, 4, 4]
    assert machine.ready


def test_time_served_counts_against_the_pause() -> None:
    machine = started(backoff_base_s=1, backoff_max_s=4)
    delays = []
    for number, now_s in enumerate((0, 1, 2, 6, 7)):  # served for 0, 1, 1, 4 and 1 s
        orders = dies(machine, f"process-{number}", now_s=now_s)
        pauses = [order for order in orders if isinstance(order, Pause)]
        delays.append(pauses[0].delay_s if pauses else 0)
        machine.handle(PauseOver("worker-0"), now_s=now_s)
        machine.handle(ProcessWarm(f"process-{number + 1}"), now_s=now_s)
        serves(machine, f"process-{number + 1}", now_s=now_s)
    assert delays == [0, 1, 3, 0, 3]


def test_long_service_forgives_earlier_deaths() -> None:
    machine = started(stable_s=60)
    for number, now_s in enumerate((1, 100, 200)):
        orders = dies(machine, f"process-{number}", now_s=now_s)
        assert not any(isinstance(order, Pause) for order in orders)
        machine.handle(ProcessWarm(f"process-{number + 1}"), now_s=now_s)
        serves(machine, f"process-{number + 1}", now_s=now_s)


def test_standby_that_cannot_start_never_ends_what_serves() -> None:
    machine = started(standbys=1, max_start_failures=3)
    for number in range(1, 10):
        orders = machine.handle(Failed(f"process-{number}", "model", "checkpoint deleted", True), now_s=number)
        assert not any(isinstance(order, GiveUp) for order in orders)
        assert SpawnProcess(f"process-{number + 1}", urgent=False) in machine.handle(PauseOver("standby"), now_s=number)
    assert machine.ready
    dies(machine, "process-0", now_s=20)
    orders = machine.handle(Failed("process-10", "model", "checkpoint deleted", True), now_s=21)
    assert orders[-1] == GiveUp("standby", "model", "checkpoint deleted"), "now a worker is missing and cannot be had"


def test_stop_drains_first_and_still_replaces_a_dead_worker_meanwhile() -> None:
    machine = started()
    assert machine.handle(StopRequested(), now_s=1) == [DrainGateway()]
    assert SpawnProcess("process-1") in dies(machine, "process-0", now_s=2)
    assert machine.handle(GatewayDrained(), now_s=3) == [StopAll()]
    assert machine.handle(Died("process-1", "killed"), now_s=4) == []


def test_gateway_death_while_draining_ends_the_drain() -> None:
    machine = started()
    machine.handle(StopRequested(), now_s=1)
    assert machine.handle(Died(GATEWAY, "killed"), now_s=2) == [StopAll()]


def test_stop_before_anything_serves_ends_at_once() -> None:
    machine = Supervision(SupervisionConfig())
    machine.handle(Begin(), now_s=0)
    assert machine.handle(StopRequested(), now_s=1) == [StopAll()]


def test_restarted_controller_takes_over_what_is_there() -> None:
    machine = Supervision(SupervisionConfig(), first_process=5, first_generation=2)
    for event in (AgentReady(), GatewayReady(2), ProcessFound("process-4", "worker-0"), ProcessFound("process-3")):
        machine.handle(event, now_s=0)
    assert machine.handle(Begin(), now_s=0) == []
    assert machine.processes() == {"process-4": ("serving", "worker-0"), "process-3": ("warm", "")}
    assert machine.handle(ProcessWanted("worker-1"), now_s=0) == [GiveProcess("worker-1", "process-3")]


def ticks(machine: Supervision, *times_s: float, answering: bool = False, silent: str = "process") -> list[Instruction]:
    """All orders of ticks at these times that concern those whose name begins so. They answer at once or not at all, others always do."""
    found: list[Instruction] = []
    for now_s in times_s:
        for order in machine.handle(Tick(), now_s=now_s):
            asked = order.process if isinstance(order, AskProcess) else ""
            if not asked or asked.startswith(silent):
                found.append(order)
            if asked and (answering or not asked.startswith(silent)):
                assert machine.handle(Answered(asked), now_s=now_s) == []
    return found


def test_worker_that_does_not_answer_is_ended_and_replaced() -> None:
    machine = started(silence_s=10, max_tick_s=4)
    assert ticks(machine, 20) == [AskProcess("process-0")], "asked from its first tick, however long it served"
    assert ticks(machine, 22, 24, 26, 28, 29.9) == [], "one question at a time, and time to answer it"
    orders = ticks(machine, 30)
    assert orders == [
        KillProcess("process-0", "no answer for 10 s; ended"),
        WorkerLost("worker-0", "process-0", "no answer for 10 s; ended"),
    ]


def test_late_answer_is_an_answer() -> None:
    machine = started(silence_s=10, max_tick_s=4)
    ticks(machine, 0, 2, 4, 6, 8)
    machine.handle(Answered("process-0"), now_s=9.9)
    assert ticks(machine, 10) == [AskProcess("process-0")]
    assert ticks(machine, 12, 14, 16, 18) == [], "counted from the newest question on"
    assert isinstance(ticks(machine, 20)[0], KillProcess)


def test_worker_that_answers_is_left_alone() -> None:
    machine = started()
    assert set(ticks(machine, *range(0, 200, 2), answering=True)) == {AskProcess("process-0")}
    assert machine.ready


def test_process_that_starts_as_a_worker_must_answer() -> None:
    """However long that takes; one that stands still meanwhile would hold the transition up."""
    machine = Supervision(SupervisionConfig(silence_s=3, service_silence_s=10, max_tick_s=4))
    for event in (Begin(), ProcessWanted("worker-0"), AgentReady(), GatewayReady(1)):
        machine.handle(event, now_s=0)
    assert set(ticks(machine, *range(0, 100, 2))) == {AskProcess("process-0")}, "spawning: two minutes"
    for event in (Answered("process-0"), ProcessWarm("process-0"), WorkerStarting("process-0")):
        machine.handle(event, now_s=100)
    assert set(ticks(machine, *range(100, 1000, 2), answering=True)) == {AskProcess("process-0")}, "loading for long"
    assert ticks(machine, 1000, 1002, 1004, 1006, 1008) == [AskProcess("process-0")], (
        "it has more time than one that serves"
    )
    machine.handle(WorkerServes("process-0"), now_s=1009)
    assert ticks(machine, 1009, 1010) == [], "and is counted anew once it serves"
    assert isinstance(ticks(machine, 1012)[0], KillProcess)


def test_worker_that_stands_still_while_it_starts_is_ended() -> None:
    machine = Supervision(SupervisionConfig(silence_s=3, service_silence_s=10, max_tick_s=4))
    for event in (Begin(), ProcessWanted("worker-0"), AgentReady(), GatewayReady(1), ProcessWarm("process-0")):
        machine.handle(event, now_s=0)
    machine.handle(WorkerStarting("process-0"), now_s=0)
    assert ticks(machine, 0, 2, 4, 6, 8) == [AskProcess("process-0")]
    reason = "no answer for 10 s; ended"
    assert ticks(machine, 10)[:2] == [KillProcess("process-0", reason), WorkerLost("worker-0", "process-0", reason)]


@pytest.mark.parametrize(("component", "next"), [(GATEWAY, StartGateway(2)), (AGENT, StartAgent())])
def test_gateway_or_agent_that_does_not_answer_is_ended_and_started_anew(component: str, next: Instruction) -> None:
    machine = started(silence_s=3, service_silence_s=10, max_tick_s=4)
    assert ticks(machine, 20, 22, 24, 26, 28, silent=component) == [AskProcess(component)]
    assert ticks(machine, 30, silent=component) == [KillProcess(component, "no answer for 10 s; ended"), next]
    found = ticks(machine, *range(32, 32 + 124, 4), silent=component)
    killed = KillProcess(component, "no answer for 120 s; ended")
    assert found == [AskProcess(component), killed, Pause(component, 1.0)], "two minutes while it starts"


def test_standby_or_spawning_process_that_stands_still_is_replaced() -> None:
    machine = started(standbys=1, max_tick_s=4)
    found = ticks(machine, *range(0, 128, 4), silent="process-1")
    assert KillProcess("process-1", "no answer for 120 s; ended") in found
    machine.handle(PauseOver("standby"), now_s=130)
    machine.handle(ProcessWarm("process-2"), now_s=130)
    found = ticks(machine, *range(130, 146, 4), silent="process-2")
    assert KillProcess("process-2", "no answer for 12 s; ended") in found


def test_what_served_is_not_given_up_for_a_node_that_is_lost() -> None:
    """Its agent cannot be started anew, and a worker elsewhere dies meanwhile."""
    machine = Supervision(SupervisionConfig(agents={"worker-1": "agent-1"}, max_start_failures=3))
    for event in (
        Begin(), ProcessWanted("worker-0"), AgentReady(), AgentReady("agent-1"), GatewayReady(1), ProcessWarm("process-0"),
    ):  # fmt: skip
        machine.handle(event, now_s=0)
    serves(machine, "process-0")
    machine.handle(Died("agent-1", "node lost"), now_s=1)
    for now_s in range(20, 120, 20):
        machine.handle(PauseOver("agent-1"), now_s=now_s)
        machine.handle(Failed("agent-1", "internal", "no such node", False), now_s=now_s)
    machine.handle(BROKEN, now_s=120)
    machine.handle(PauseOver("agent-1"), now_s=120)
    orders = machine.handle(Failed("agent-1", "internal", "no such node", True), now_s=120)
    assert not any(isinstance(order, GiveUp) for order in orders)
    machine.handle(WHOLE, now_s=121)
    assert machine.ready


def test_gateway_that_drains_is_not_asked() -> None:
    machine = started()
    machine.handle(StopRequested(), now_s=1)
    assert ticks(machine, 2, 4, silent=GATEWAY) == []


def test_controller_that_stood_still_blames_nobody() -> None:
    machine = started(silence_s=10, max_tick_s=4)
    ticks(machine, 0, 2)
    assert ticks(machine, 500) == []
    machine.handle(Answered("process-0"), now_s=500)
    assert ticks(machine, 502) == [AskProcess("process-0")]


def test_found_worker_is_asked_too_and_ended_while_draining() -> None:
    machine = Supervision(SupervisionConfig(silence_s=10, max_tick_s=4), first_process=5, first_generation=2)
    for event in (AgentReady(), GatewayReady(2), ProcessFound("process-4", "worker-0"), Begin()):
        machine.handle(event, now_s=0)
    machine.handle(StopRequested(), now_s=1)
    assert ticks(machine, 2, 4, 6, 8, 10) == [AskProcess("process-4")]
    assert [type(order) for order in ticks(machine, 12)] == [KillProcess, WorkerLost]
    machine.handle(GatewayDrained(), now_s=13)
    assert ticks(machine, 14, 100) == []


def test_ticks_do_not_crowd_out_the_story() -> None:
    machine = started()
    ticks(machine, *range(0, 1000, 2), answering=True)
    with pytest.raises(ImpossibleEvent, match="GiveProcess"):
        machine.handle(ProcessWarm("process-0"), now_s=1)


def test_impossible_event_tells_the_story() -> None:
    machine = started()
    with pytest.raises(ImpossibleEvent, match=r"ProcessWarm.*cannot follow(.|\n)*GiveProcess"):
        machine.handle(ProcessWarm("process-0"), now_s=1)


@dataclass(frozen=True)
class Stopped:
    """A process stands still: no event of the machine's, it finds out by itself."""

    process: str


class World:
    """Carries out instructions, checks each of them, and offers the events that could come next."""

    def __init__(self, standbys: int) -> None:
        config = SupervisionConfig(standbys=standbys, max_start_failures=3, silence_s=10, max_tick_s=4)
        self.machine = Supervision(config)
        self.agent = self.gateway = "absent"
        self.generation = 0
        self.processes: dict[str, str] = {}  # name -> spawning | warm | starting | serving
        self.worker_of: dict[str, str] = {}
        self.without = ["worker-0", "worker-1"]  # of a process
        self.pauses: list[str] = []
        self.asked_at_s: dict[str, float] = {}  # questions without an answer
        self.stopped: set[str] = set()
        self.settled = BROKEN
        self.over = False
        self.now_s = 0.0
        self.send(Begin())
        self.want()

    def want(self) -> None:
        """As the transitions do: each worker without a process wants one."""
        settled = Settled(*[len(self.serving()) == 2] * 2)
        if settled != self.settled:
            self.settled = settled
            self.send(settled)
        while self.without and not self.over:
            self.send(ProcessWanted(self.without.pop()))

    def serving(self) -> list[str]:
        return [name for name, phase in self.processes.items() if phase == "serving"]

    def send(self, event: object) -> None:
        self.now_s += 1
        for order in self.machine.handle(event, now_s=self.now_s):  # type: ignore[arg-type]
            assert not self.over, f"{order} after the end"
            self.carry_out(order)

    def carry_out(self, order: Instruction) -> None:
        assert not (isinstance(order, GiveUp) and self.machine.ready), "gave up what serves"
        match order:
            case StartAgent():
                assert self.agent == "absent"
                self.agent = "starting"
            case SpawnProcess(process):
                assert process not in self.processes
                self.processes[process] = "spawning"
            case GiveProcess(worker_id, process):
                assert self.agent == "ready"
                assert self.processes[process] == "warm"
                assert worker_id not in self.worker_of.values(), "two processes for one worker"
                self.processes[process], self.worker_of[process] = "given", worker_id
            case WorkerLost(worker_id):
                self.without.append(worker_id)
            case AskProcess(process):
                services = {AGENT: self.agent, GATEWAY: self.gateway}
                assert process in self.processes or services.get(process) in ("starting", "ready")
                assert process not in self.asked_at_s, "asked twice"
                self.asked_at_s[process] = self.now_s
            case KillProcess(process, reason):
                silent_s = self.now_s - self.asked_at_s.get(process, self.now_s)
                assert not reason.startswith("no answer") or silent_s >= 10
                self.forget(process)
            case StartGateway(generation):
                assert self.gateway == "absent"
                assert generation > self.generation
                self.gateway, self.generation = "starting", generation
            case Pause(component, delay_s):
                assert 0 < delay_s <= 10
                assert component not in self.pauses
                self.pauses.append(component)
            case GiveUp() | StopAll():
                self.over = True

    def forget(self, process: str) -> None:
        if process in (AGENT, GATEWAY):
            setattr(self, process, "absent")
        self.processes.pop(process, None)
        self.worker_of.pop(process, None)
        self.asked_at_s.pop(process, None)
        self.stopped.discard(process)

    def good_events(self) -> list[object]:
        found: list[object] = [PauseOver(component) for component in self.pauses]
        found += [AgentReady()] if self.agent == "starting" else []
        found += [GatewayReady(self.generation)] if self.gateway == "starting" else []
        found += [ProcessWarm(name) for name, phase in self.processes.items() if phase == "spawning"]
        found += [WorkerStarting(name) for name, phase in self.processes.items() if phase == "given"]
        found += [WorkerServes(name) for name, phase in self.processes.items() if phase == "starting"]
        found += [Answered(name) for name in self.asked_at_s if name not in self.stopped]
        return found + ([Tick()] if self.stopped else [])

    def bad_events(self) -> list[object]:
        found: list[object] = [Died(AGENT, "killed")] if self.agent == "ready" else []
        found += [Failed(AGENT, "internal", "no", False)] if self.agent == "starting" else []
        found += [Died(GATEWAY, "killed")] if self.gateway == "ready" else []
        found += [
            Tick(),
            *(Stopped(name) for name, phase in self.processes.items() if phase in ("starting", "serving")),
        ]
        for name, phase in self.processes.items():
            found.append(Died(name, "killed"))
            found += [Failed(name, "memory", "no", True)] if phase == "starting" else []
        return found

    def happen(self, event: object) -> None:
        match event:
            case PauseOver(component):
                self.pauses.remove(component)
            case AgentReady():
                self.agent = "ready"
            case GatewayReady():
                self.gateway = "ready"
            case ProcessWarm(process):
                self.processes[process] = "warm"
            case WorkerStarting(process):
                self.processes[process] = "starting"
            case WorkerServes(process):
                self.processes[process] = "serving"
            case Stopped(process):
                self.stopped.add(process)
                return
            case Answered(process):
                del self.asked_at_s[process]
            case Died(process) | Failed(process):
                self.forget(process)
        self.send(event)
        self.want()


@settings(max_examples=150, deadline=None)
@given(data=st.data(), standbys=st.integers(0, 2))
def test_chaos_never_breaks_the_rules_and_calm_brings_everything_back(data: st.DataObject, standbys: int) -> None:
    world = World(standbys)
    for _ in range(data.draw(st.integers(0, 60))):
        events = world.good_events() + world.bad_events()
        if world.over or not events:
            break
        world.happen(data.draw(st.sampled_from(events)))
    for _ in range(200):
        if world.over or not (events := world.good_events()):
            break
        world.happen(events[0])
    assert world.over or world.machine.ready
    if not world.over:
        spare = [name for name in world.processes if name not in world.worker_of]
        assert len(spare) == standbys
        world.send(StopRequested())
        world.send(GatewayDrained())
        assert world.over
