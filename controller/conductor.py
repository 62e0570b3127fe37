"""Joins the two machines of the controller: supervision (which processes run) and transitions (who serves). Pure, as they are.

An event goes to the machine it belongs to. What one machine orders of the other is handed over here as an event, until nothing is left that
concerns only the two; the rest is for the controller to carry out. Transitions begin once it is known what the model is made of, which
a first warm process tells (`begin`); until then the processes for the workers of the boot are asked for already. What takes how
long is noted on the way.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from flexpert.controller import supervision_types as s
from flexpert.controller import transition_types as t
from flexpert.controller.supervision import Supervision
from flexpert.controller.timings import Timings
from flexpert.controller.transition import Transitions

Event = s.Event | t.Event
Action = s.Instruction | t.Instruction


class Conductor:
    """boot_workers: those that serve first. transitions: of an earlier controller; None before the model is known."""

    def __init__(
        self, supervision: Supervision, *, boot_workers: Sequence[str], transitions: Transitions | None = None
    ) -> None:
        self.supervision, self.transitions = supervision, transitions
        self.timings = Timings()
        self._boot_workers = tuple(boot_workers)
        self._settled = s.Settled(serving=False, calm=False)
        self._lost_at_s: dict[str, float] = {}

    @property
    def ready(self) -> bool:
        """Whether the gateway and every worker of the current epoch serve."""
        return self.supervision.ready

    def begin(self, transitions: Transitions, request: t.Request, *, now_s: float) -> list[Action]:
        """The model is known: bring the first epoch up."""
        self.transitions = transitions
        return self.handle(request, now_s=now_s)

    def handle(self, event: Event, *, now_s: float) -> list[Action]:
        """Take in one event; the actions are to be carried out in order."""
        pending: deque[Event] = deque([event])
        if isinstance(event, s.Begin) and self.transitions is None:
            pending += [s.ProcessWanted(worker_id) for worker_id in self._boot_workers]
        actions: list[Action] = []
        while pending:
            found = pending.popleft()
            self._note_before(found, actions, now_s)
            if isinstance(found, s.Event):
                for order in self.supervision.handle(found, now_s=now_s):
                    self._from_supervision(order, pending, actions, now_s)
                if isinstance(found, s.ProcessWanted):
                    self._note_wanted(found.worker_id, now_s)
            elif self.supervision.phase == "ended":
                continue  # nobody is left to carry anything out
            elif isinstance(found, t.ProcessReady) and not self._owns(found.worker_id, found.process):
                continue  # it was taken back meanwhile, and may be another worker's by now
            elif self.transitions is not None:
                self._pass_on(found, pending)
                for instruction in self.transitions.handle(found):
                    self._from_transitions(instruction, pending, actions, now_s)
                self._tell_how_it_stands(pending)
            elif isinstance(found, t.MemberDied | t.Failed):
                pending += [s.ProcessNotWanted(found.worker_id), s.ProcessWanted(found.worker_id)]
        return actions

    # From machine to machine

    def _from_supervision(
        self, order: s.Instruction, pending: deque[Event], actions: list[Action], now_s: float
    ) -> None:
        if isinstance(order, s.WorkerLost):
            pending.append(t.MemberDied(order.worker_id, order.process, order.reason))
        else:
            actions.append(order)

    def _pass_on(self, event: t.Event, pending: deque[Event]) -> None:
        """What supervision must know of events for the transitions."""
        match event:
            case t.WorkerStarted(worker_id, process) if self._owns(worker_id, process):
                pending.append(s.WorkerServes(process))
            case t.Released(worker_id, process) if self._owns(worker_id, process):
                pending.append(s.ProcessReleased(process))
            case t.Failed(worker_id, _, "process"):
                pending.append(s.ProcessNotWanted(worker_id))

    def _from_transitions(
        self, order: t.Instruction, pending: deque[Event], actions: list[Action], now_s: float
    ) -> None:
        match order:
            case t.GiveProcess(worker_id):
                pending.append(s.ProcessWanted(worker_id))
            case t.Withdraw(worker_id):
                self.timings.forget(worker_id)
                pending.append(s.ProcessNotWanted(worker_id))
            case t.KillProcess(worker_id, process, reason):
                self._note_lost(worker_id, now_s)
                if self._owns(worker_id, process):
                    pending.append(s.ProcessEnded(process, reason))
            case t.StartWorker(_, process):
                pending.append(s.WorkerStarting(process))
                actions.append(order)
            case t.Release(worker_id, process):
                self._release(order, pending, actions)
            case t.Publish(serving):
                actions.append(order)
                for worker in serving:
                    self._note_back(worker.worker_id, actions, now_s)
            case _:
                actions.append(order)

    def _release(self, order: t.Release, pending: deque[Event], actions: list[Action]) -> None:
        """One that only has a name is free at once; one in the middle of its start is ended, which is sooner than waiting for it."""
        phase, worker_id = self.supervision.processes().get(order.process, ("", ""))
        self.timings.forget(order.worker_id)
        if worker_id != order.worker_id:
            phase = ""  # another worker's by now
        if phase == "serving":
            actions.append(order)
            return
        if phase == "starting":
            pending.append(s.ProcessEnded(order.process, f"{order.worker_id} is not wanted any more"))
        pending.append(t.Released(order.worker_id, order.process))

    def _owns(self, worker_id: str, process: str) -> bool:
        """Whether the process is still that worker's."""
        return self.supervision.processes().get(process, ("", ""))[1] == worker_id

    def _tell_how_it_stands(self, pending: deque[Event]) -> None:
        if self.transitions is None:
            return
        state = self.transitions.state
        serving = state.current is not None and not state.dead and not state.broken
        settled = s.Settled(serving=serving, calm=self.transitions.healthy)
        if settled != self._settled:
            self._settled = settled
            pending.append(settled)

    # What took how long

    def _note_wanted(self, worker_id: str, now_s: float) -> None:
        cold = not self.supervision.process_of(worker_id)
        self.timings.wanted(worker_id, cold=cold, now_s=now_s)

    def _note_before(self, event: Event, actions: list[Action], now_s: float) -> None:
        match event:
            case s.Died(component) if component == s.GATEWAY:
                self._lost_at_s.setdefault(component, now_s)
            case s.GatewayReady():
                self._note_back(s.GATEWAY, actions, now_s)
            case t.MemberDied(worker_id):
                self._note_lost(worker_id, now_s)
            case t.ProcessReady(worker_id):
                self.timings.mark(worker_id, "process", now_s=now_s)
            case t.WorkerStarted():
                self.timings.mark(event.worker_id, "start", now_s=now_s)
            case t.Prepared(worker_id):
                self.timings.mark(worker_id, "prepare", now_s=now_s)
            case t.Retired(pause_s=pause_s):
                self.timings.add("commit_pause", pause_s)
            case t.Committed(worker_id, _, number):
                self.timings.mark(worker_id, "commit", now_s=now_s)
                self._note_committed(worker_id, number, actions, now_s)

    def _note_committed(self, worker_id: str, number: int, actions: list[Action], now_s: float) -> None:
        joined = self.timings.joined(worker_id, now_s=now_s)
        if joined is None:
            return
        join, seconds = joined
        phases = ", ".join(f"{name} {phase_s:.2f} s" for name, phase_s in join.phases.items())
        details = {
            "worker_id": worker_id, "epoch": number, "cold": join.cold, "seconds": round(seconds, 4), "phases": join.phases,
        }  # fmt: skip
        actions.append(t.Note("joined", f"{worker_id} joined {join.kind}: {phases}", details))

    def _note_lost(self, worker_id: str, now_s: float) -> None:
        if self.transitions is not None and worker_id in self.transitions.state.members:
            self._lost_at_s.setdefault(worker_id, now_s)

    def _note_back(self, component: str, actions: list[Action], now_s: float) -> None:
        lost_at_s = self._lost_at_s.pop(component, None)
        if lost_at_s is not None:
            seconds = round(now_s - lost_at_s, 3)
            details = {"component": component, "seconds": seconds}
            actions.append(t.Note("replaced", f"{component} replaced after {seconds:.2f} s", details))
