"""Supervision and transitions together, against a small world of actors: whatever dies, calm brings everything back."""

from __future__ import annotations

import random
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from flexpert.controller import supervision_types as s
from flexpert.controller import transition_types as t
from flexpert.controller.conductor import Conductor
from flexpert.controller.supervision import Supervision
from flexpert.controller.supervision_types import SupervisionConfig
from flexpert.controller.transition import Transitions

MODEL = t.ModelShape(layers=2, experts=4, slab_bytes=10, dense_bytes=5, kv_min_bytes=5)
WORKERS = tuple(f"worker-{number}" for number in range(3))
CONFIG = t.TransitionConfig(
    devices=tuple(t.Device(worker_id=worker, memory_bytes=1000) for worker in WORKERS), model=MODEL, max_workers=3
)


class World:
    """Orders become answers that may come in any order; a process that is gone answers nothing."""

    def __init__(self, *, workers: int, standbys: int) -> None:
        self.workers, self.standbys = workers, standbys
        self.now_s = 0.0
        self.processes: dict[str, str] = {}  # name -> "spawning", "alive"
        self.answers: list[Any] = []
        self.deadline: t.Deadline | None = None
        self.published: t.Publish | None = None
        self.gave_up = False
        self.finished: list[t.Finished] = []
        self.answered: list[t.Answer] = []
        self.notes: list[t.Note] = []
        self.conductor = self._conductor(Supervision(SupervisionConfig(standbys=standbys)), None)
        self.send(s.Begin())

    def _conductor(self, supervision: Supervision, transitions: Transitions | None) -> Conductor:
        return Conductor(supervision, boot_workers=WORKERS[: self.workers], transitions=transitions)

    def send(self, event: Any) -> None:
        self.now_s += 0.01
        self.carry_out(self.conductor.handle(event, now_s=self.now_s))

    def carry_out(self, actions: list[Any]) -> None:
        for action in actions:
            self.answer(action)

    def answer(self, action: Any) -> None:
        """What the action leads to, sooner or later."""
        match action:
            case s.StartAgent(agent):
                self.answers.append(s.AgentReady(agent))
            case s.StartGateway(generation):
                self.answers.append(s.GatewayReady(generation))
            case s.SpawnProcess(process):
                self.processes[process] = "spawning"
                self.answers.append(s.ProcessWarm(process))
            case s.GiveProcess(worker_id, process):
                assert self.processes.get(process) == "alive", (
                    f"{process} was given and is {self.processes.get(process)}"
                )
                self.answers.append(t.ProcessReady(worker_id, process))
            case s.KillProcess(process):
                self.processes.pop(process, None)
            case s.Pause(component):
                self.answers.append(s.PauseOver(component))
            case s.GiveUp():
                self.gave_up = True
            case t.StartWorker(worker_id, process):
                self.answers.append(t.WorkerStarted(worker_id, process, f"x:{process}", f"s:{process}", "m"))
            case t.Prepare(worker_id, process, epoch):
                self.answers.append(t.Prepared(worker_id, process, epoch.number))
            case t.Commit(worker_id, process, number):
                self.answers.append(t.Committed(worker_id, process, number, 0.001))
            case t.Retire(worker_id, process, number):
                self.answers.append(t.Retired(worker_id, process, number))
            case t.Abort(worker_id, process, number):
                self.answers.append(t.Aborted(worker_id, process, number))
            case t.Release(worker_id, process):
                self.answers.append(t.Released(worker_id, process))
            case t.Deadline():
                self.deadline = action
            case t.Publish():
                self.published = action
            case t.Finished():
                self.finished.append(action)
            case t.Answer():
                self.answered.append(action)
            case t.Note():
                self.notes.append(action)

    def step(self, index: int) -> bool:
        """One answer arrives; False where there is none to come."""
        self.answers = [answer for answer in self.answers if getattr(answer, "process", "") in ("", *self.processes)]
        if not self.answers:
            return False
        event = self.answers.pop(index % len(self.answers))
        if isinstance(event, s.ProcessWarm):
            self.processes[event.process] = "alive"
        if isinstance(event, t.ProcessReady) and self.conductor.transitions is None:
            request = t.Request("boot", "boot", workers=self.workers)
            self.carry_out(self.conductor.begin(Transitions(CONFIG), request, now_s=self.now_s))
        self.send(event)
        return True

    def die(self, name: str) -> None:
        if self.processes.pop(name, None):
            self.send(s.Died(name, "killed"))

    def expire(self) -> None:
        if self.deadline is not None:
            deadline, self.deadline = self.deadline, None
            self.now_s += deadline.after_s
            self.send(t.Expired(deadline.deadline_id))

    def restart(self) -> None:
        """The controller dies and comes back: what it waited for is lost, what runs is found."""
        old, transitions = self.conductor.supervision, self.conductor.transitions
        if transitions is None:
            return
        found = [
            s.ProcessFound(name, worker_id if phase == "serving" else "")
            for name, (phase, worker_id) in old.processes().items()
            if name in self.processes and phase in ("warm", "serving")
        ]
        self.processes = {event.process: "alive" for event in found}
        self.answers, self.deadline = [], None
        supervision = Supervision(SupervisionConfig(standbys=self.standbys), first_process=old._next_process)
        self.conductor = self._conductor(supervision, Transitions.restore(CONFIG, transitions.snapshot()))
        for event in (s.AgentReady(), s.GatewayReady(old._generation), *found, s.Begin()):
            self.send(event)
        self.send(t.Resumed(tuple((event.worker_id, event.process) for event in found if event.worker_id)))

    def calm(self) -> None:
        """Everything answers, pauses end, time passes where nothing else is to come."""
        for _ in range(400):
            if not self.step(0):
                transitions = self.conductor.transitions
                if transitions is not None and transitions.healthy:
                    return
                assert self.deadline is not None, "nothing is to come, and something is missing"
                self.expire()
        raise AssertionError(f"does not come to rest: {self.notes[-20:]}")


def serving(world: World) -> list[str]:
    assert world.published is not None
    return [worker.worker_id for worker in world.published.serving]


def note(world: World, kind: str) -> list[t.Note]:
    return [found for found in world.notes if found.kind == kind]


def test_boot_scale_and_drain() -> None:
    world = World(workers=1, standbys=1)
    world.calm()
    assert (serving(world), world.conductor.ready) == (["worker-0"], True)
    world.send(t.Request("scale", "a", workers=3))
    world.calm()
    assert serving(world) == list(WORKERS)
    world.send(t.Request("drain", "b", worker_id="worker-0"))
    world.calm()
    assert serving(world) == ["worker-1", "worker-2"]
    phases = [phase for phase, _ in world.conductor.supervision.processes().values()]
    assert sorted(phases) == ["serving", "serving", "warm", "warm"], "the leaver is a standby now"
    assert [found.details["cold"] for found in note(world, "joined")] == [True, False, True]


def test_killed_process_is_never_given_again() -> None:
    world = World(workers=1, standbys=1)
    world.calm()
    world.send(t.ManagerDied("worker-0", "killed"))
    world.calm()
    assert world.conductor.supervision.process_of("worker-0") == "process-1"
    assert [found.details["component"] for found in note(world, "replaced")] == ["worker-0"]


def test_joiner_that_is_aborted_while_it_starts_is_ended() -> None:
    world = World(workers=2, standbys=1)
    world.calm()
    world.send(t.Request("scale", "a", workers=3))
    while not any(isinstance(answer, t.WorkerStarted) for answer in world.answers):
        world.step(0)
    world.expire()
    world.calm()
    assert world.finished[-1].state == "aborted"
    assert "process-2" not in world.processes
    assert serving(world) == ["worker-0", "worker-1"]


def test_restart_in_each_moment_of_a_scale_up_ends_in_three_workers_or_in_two() -> None:
    for moment in range(14):
        world = World(workers=2, standbys=1)
        world.calm()
        world.send(t.Request("scale", "a", workers=3))
        for _ in range(moment):
            world.step(0)
        world.restart()
        world.calm()
        assert len(serving(world)) == (3 if world.finished[-1].state == "done" else 2)
        world.send(t.Request("scale", "b", workers=1))
        world.calm()
        assert serving(world) == ["worker-0"]


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 10**9), workers=st.integers(1, 3), standbys=st.integers(0, 2))
def test_whatever_happens_calm_brings_a_whole_epoch_back(seed: int, workers: int, standbys: int) -> None:
    chance = random.Random(seed)
    world = World(workers=workers, standbys=standbys)
    world.calm()
    for number in range(chance.randrange(60)):
        what = chance.random()
        members = world.conductor.supervision.processes()
        if what < 0.6:
            world.step(chance.randrange(100))
        elif what < 0.72 and world.processes:
            world.die(chance.choice(sorted(world.processes)))
        elif what < 0.78:
            target = chance.randrange(1, 4)
            world.send(t.Request("scale", f"r{number}", workers=target))
        elif what < 0.83:
            world.send(t.Request("drain", f"r{number}", worker_id=chance.choice(WORKERS)))
        elif what < 0.87:
            world.send(t.ManagerDied(chance.choice(WORKERS), "killed"))
        elif what < 0.9 and members:
            name = chance.choice(sorted(members))
            world.send(t.Failed(members[name][1], name, chance.choice(["start", "prepare", "commit", "release"]), "no"))
        elif what < 0.94:
            world.expire()
        elif what < 0.97:
            world.restart()
        if world.gave_up:
            return
    world.calm()
    transitions = world.conductor.transitions
    assert transitions is not None
    assert transitions.current is not None
    assert serving(world) == list(transitions.state.members)
    held = {worker: name for name, (phase, worker) in world.conductor.supervision.processes().items() if worker}
    for worker in transitions.state.members:
        assert transitions.state.live[worker].process == held[worker]
    assert set(held.values()) <= set(world.processes)
