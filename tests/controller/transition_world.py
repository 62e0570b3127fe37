"""A small model of the cluster: it carries out the instructions of the transitions, checks each, and offers what could come next."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

from flexpert.controller.planner import groups_held
from flexpert.controller.transition import Transitions
from flexpert.controller.transition_types import (
    Abort,
    Aborted,
    Answer,
    Commit,
    Committed,
    Deadline,
    Device,
    Event,
    Expired,
    Failed,
    Finished,
    GiveProcess,
    Instruction,
    KillProcess,
    ManagerDied,
    MemberDied,
    ModelShape,
    Note,
    Prepare,
    Prepared,
    ProcessReady,
    Publish,
    Release,
    Released,
    Request,
    Resumed,
    Retire,
    Retired,
    StartWorker,
    TransitionConfig,
    Trouble,
    Withdraw,
    WorkerStarted,
)

MODEL = ModelShape(layers=2, experts=8, slab_bytes=10, dense_bytes=50, kv_min_bytes=50)


def config(devices: int = 4, *, memory_bytes: int = 1000, **options: object) -> TransitionConfig:
    """With 1000 bytes a device holds the whole model, with 180 half of it."""
    found = tuple(Device(worker_id=f"worker-{i}", memory_bytes=memory_bytes) for i in range(devices))
    return TransitionConfig(**{"devices": found, "model": MODEL, "max_workers": devices, **options})  # type: ignore[arg-type]


@dataclass
class Process:
    """current: the epoch it serves, 0 for none."""

    worker: str = ""
    incarnation: int = 0
    started: bool = False
    current: int = 0
    share: set[int] = field(default_factory=set)
    prepared: dict[int, set[int]] = field(default_factory=dict)
    stopped: bool = False


class World:
    """orders: instructions that were not answered yet, by (worker, kind). Processes carry on while the controller is away."""

    def __init__(self, configured: TransitionConfig | None = None) -> None:
        self.config = configured or config()
        self.machine = Transitions(self.config)
        self.processes: dict[str, Process] = {}
        self.contents: dict[str, set[int]] = {device.worker_id: set() for device in self.config.devices}
        self.incarnations: dict[str, int] = {}
        self.orders: dict[tuple[str, str], Instruction] = {}
        self.deadline = ""
        self.told: Publish | None = None
        self.notes: list[Note] = []
        self.answers: dict[str, Answer] = {}
        self.finished: dict[str, Finished] = {}
        self.story: list[str] = []
        self.restarting = False
        self.sent: list[Instruction] = []
        self.next_process = 0
        self.number = 0

    # Events go in

    def send(self, event: Event) -> list[Instruction]:
        before = self.machine.state.current
        self.story.append(f"{event}"[:150])
        orders = self.machine.handle(event)
        self.sent = orders
        self.story += [f"    {order}"[:150] for order in orders]
        for order in orders:
            self.carry_out(order)
        self.check(before)
        return orders

    def request(self, kind: str, target: int | str, request_id: str = "") -> Answer:
        request_id = request_id or f"r{len(self.answers)}"
        number, worker = (target, "") if isinstance(target, int) else (0, target)
        self.send(Request(kind, request_id, number, worker))
        return self.answers[request_id]

    def settle(self, *, limit: int = 400) -> None:
        """Everything that can go well does, until nothing is left to be done."""
        for _ in range(limit):
            events = self.good_events()
            if not events:
                return
            self.happen(events[0])
        raise AssertionError(f"does not settle: {events[0]}, {self.machine.state}")

    def restart(self) -> None:
        """The controller dies after it wrote its journal; nothing of what it knew else stays."""
        journal = json.loads(json.dumps(self.machine.snapshot()))
        self.machine = Transitions.restore(self.config, journal)
        assert json.loads(json.dumps(self.machine.snapshot())) == journal
        found = tuple((process.worker, name) for name, process in self.processes.items() if process.worker)
        self.restarting = True
        self.send(Resumed(found))
        self.restarting = False

    # Instructions come out

    def carry_out(self, order: Instruction) -> None:
        match order:
            case Answer():
                self.answers[order.request_id] = order
            case Note():
                self.notes.append(order)
            case Finished():
                assert order.transition_id not in self.finished, "ended twice"
                self.finished[order.transition_id] = order
            case Deadline(deadline_id, after_s):
                assert after_s > 0
                self.deadline = deadline_id
            case Publish():
                self.told = order
            case KillProcess(_, process, reason):
                assert reason
                self.forget(process)
            case Withdraw(worker):
                self.orders.pop((worker, "GiveProcess"), None)
            case _:
                self.orders[order.worker_id, type(order).__name__] = order
                self.check_order(order)

    def check_order(self, order: Instruction) -> None:
        match order:
            case StartWorker(worker, name, incarnation, draft, _):
                process = self.processes[name]
                assert process.worker == worker
                assert incarnation >= self.incarnations.get(worker, 0)
                assert draft.rank_of(worker) is not None
                if incarnation > self.incarnations.get(worker, 0):
                    process.incarnation = self.incarnations[worker] = incarnation
                assert process.incarnation == incarnation, "an incarnation given twice"
            case Prepare(worker, name, epoch, sources, deadline_s):
                assert deadline_s > 0
                current = self.machine.current
                assert current is None or epoch.number > current.number
                assert all(member.exchange_address and member.manager_socket for member in epoch.members)
                assert [m.incarnation for m in epoch.members if m.worker_id == worker] in (
                    [],
                    [self.processes[name].incarnation],
                )
                for source in sources:
                    if self.lost(source.worker_id):  # known too late: since then only a restarted controller asks again
                        assert self.restarting, "a lost manager is to be read"
                    else:
                        assert set(source.groups) <= self.contents[source.worker_id]
                    assert source.worker_id != worker
            case Commit(_, name, number, _):
                process = self.processes[name]
                assert number in process.prepared or process.current == number, "commit of what was not prepared"

    def lost(self, worker: str) -> bool:
        return worker in self.machine.state.lost

    def forget(self, name: str) -> None:
        process = self.processes.pop(name, None)
        for key, order in list(self.orders.items()):
            if process and getattr(order, "process", None) == name:
                del self.orders[key]

    # What could happen

    def good_events(self) -> list[Event]:
        found = [event for order in list(self.orders.values()) if (event := self.good_answer(order))]
        if not found and self.deadline and (self.machine.state.running or self.machine.state.pause_id):
            found = [Expired(self.deadline)]
        return found

    def good_answer(self, order: Instruction) -> Event | None:
        name = getattr(order, "process", None)
        if name is not None and (name not in self.processes or self.processes[name].stopped):
            return None
        return Answered(order)  # type: ignore[return-value]

    def bad_events(self) -> list[object]:
        found: list[object] = []
        for order in self.orders.values():
            found.append(Refused(order))
        for name, process in self.processes.items():
            if process.worker:
                found += [Dies(name), Stops(name)]
        current = self.machine.current
        if current is not None:
            for member in current.members:
                live = self.machine.state.live.get(member.worker_id)
                if live and live.process in self.processes:
                    others = [m.worker_id for m in current.members if m.worker_id != member.worker_id]
                    found += [
                        Trouble(member.worker_id, live.process, current.number, suspects, "a step was missed")
                        for suspects in ((), tuple(others[:1]), tuple(others))
                    ]
        found += [ManagerDied(worker, "killed") for worker in self.contents]
        if self.deadline:
            found.append(Expired(self.deadline))
        return found

    def happen(self, event: object) -> None:
        match event:
            case Answered(order):
                self.answer(order)
            case Refused(order):
                self.refuse(order)
            case Dies(name):
                worker = self.processes[name].worker
                self.forget(name)
                self.send(MemberDied(worker, name, "killed"))
            case Stops(name):
                self.processes[name].stopped = True
            case ManagerDied(worker, _):
                self.contents[worker].clear()
                self.send(event)
            case _:
                self.send(event)  # type: ignore[arg-type]

    def answer(self, order: Instruction) -> None:
        self.orders.pop((order.worker_id, type(order).__name__), None)  # type: ignore[union-attr]
        self.send(self.do(order))

    def do(self, order: Instruction) -> Event:
        """Carry an order out as a worker would; doing it again gives the same answer."""
        match order:
            case GiveProcess(worker):
                held = next((name for name, p in self.processes.items() if p.worker == worker and not p.started), "")
                name = held if held and not self.machine.state.live.get(worker) else f"process-{self.next_process}"
                self.next_process += 1
                self.processes.setdefault(name, Process(worker))
                return ProcessReady(worker, name)
            case StartWorker(worker, name):
                self.processes[name].started = True
                return WorkerStarted(worker, name, f"x:{name}", f"s:{name}", f"m:{worker}")
            case Prepare(worker, name, epoch):
                process, rank = self.processes[name], epoch.rank_of(worker)
                held = groups_held(epoch.holders, [member.worker_id for member in epoch.members])
                share = set(held[worker]) if rank is not None else set()
                if epoch.number > process.current:
                    process.prepared[epoch.number] = share
                    self.contents[worker] |= share
                return Prepared(worker, name, epoch.number, 10)
            case Commit(worker, name, number):
                process = self.processes[name]
                if number > process.current:
                    process.current, process.share = number, process.prepared[number]
                process.prepared = {n: share for n, share in process.prepared.items() if n > number}
                return Committed(worker, name, number, 0.01)
            case Retire(worker, name, number):
                process = self.processes[name]
                self.contents[worker] &= process.share.union(*process.prepared.values())
                return Retired(worker, name, number, 10)
            case Abort(worker, name, number):
                self.processes[name].prepared.pop(number, None)
                return Aborted(worker, name, number)
            case Release(worker, name, keep):
                process = self.processes.pop(name)
                if process.started and not keep:
                    self.contents[worker].clear()
                return Released(worker, name)
        raise AssertionError(order)

    def refuse(self, order: Instruction) -> None:
        self.orders.pop((order.worker_id, type(order).__name__), None)  # type: ignore[union-attr]
        step = {"GiveProcess": "process", "StartWorker": "start"}.get(
            type(order).__name__, type(order).__name__.lower()
        )
        name, number = getattr(order, "process", ""), getattr(order, "number", 0)
        if isinstance(order, Prepare):
            number = order.epoch.number
        self.send(Failed(order.worker_id, name, step, "no memory", number))  # type: ignore[union-attr]

    # What must always hold

    def check(self, before: object) -> None:
        state = self.machine.state
        current = self.machine.current
        if current is not None:
            assert current.number >= self.number
            if current.number == self.number:
                assert current == before or before is None
            self.number = current.number
            slots = [ranks for layer in current.holders for ranks in layer]
            assert len(slots) == MODEL.slabs
            assert all(ranks and set(ranks) <= set(range(current.size)) for ranks in slots), "an expert has no holder"
            self.check_contents()
            told = self.told
            assert told is not None
            assert {found.worker_id for found in told.serving} <= set(state.live)
        assert not (state.running and state.running.state != "running")
        for transition in state.ended:
            assert transition.state in ("done", "aborted", "failed")
        if not state.running and not state.pause_id and current is not None:
            assert not state.dead and not state.broken, "nobody repairs"

    def check_contents(self) -> None:
        """Whoever serves the current epoch and is alive has all experts of its share, wherever the manager lives."""
        current, state = self.machine.current, self.machine.state
        assert current is not None
        held = groups_held(current.holders, [member.worker_id for member in current.members])
        for worker, live in state.live.items():
            if worker in held and worker not in state.lost and live.process in self.processes:
                assert set(held[worker]) <= self.contents[worker], f"{worker} lost experts"


@dataclass(frozen=True)
class Answered:
    order: Instruction


@dataclass(frozen=True)
class Refused:
    order: Instruction


@dataclass(frozen=True)
class Dies:
    process: str


@dataclass(frozen=True)
class Stops:
    """Stands still: answers nothing, dies not."""

    process: str
