"""How one epoch becomes the next: every change of who serves, as a pure state machine that events drive.

There is one current epoch, and at most one transition to another. A transition gives each worker a part (it joins, stays, leaves or is left
out) and goes through phases; a phase asks each part one thing and ends when all have answered:

    start      joiners get a process and start beside those that serve
    prepare    all get the next epoch and fetch what it needs; the current one serves on
    commit     all flip between two steps; from here there is no way back
    retire     stayers let go of what they no longer hold, leavers become standbys
    abort      before commit: what was prepared is dropped, the current epoch goes on exactly as it was

What fails before commit aborts an operator's transition; what mends (boot, repair, reload) is tried again, with another process, after a
pause, or without that worker where memory allows. What fails after commit began leads forward: the new epoch is current, and a repair
follows. A member that died, or a group that missed a step, is repaired without being asked.

The module reads no clock, starts nothing and imports no Ray. `handle` takes an event and gives instructions; the caller writes `snapshot()`
to the journal, then carries them out. A restarted controller restores, sends Resumed, and gets what is still to be done again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from flexpert.controller.transition_course import Course
from flexpert.controller.transition_losses import Losses
from flexpert.controller.transition_progress import Progress
from flexpert.controller.transition_requests import Refusal, choose
from flexpert.controller.transition_state import State, Transition, from_journal, to_journal
from flexpert.controller.transition_types import (
    Aborted,
    Answer,
    Committed,
    Event,
    Expired,
    Failed,
    GiveProcess,
    Instruction,
    KillProcess,
    LoadMeasured,
    ManagerDied,
    MemberDied,
    Moved,
    Prepared,
    ProcessReady,
    Release,
    Released,
    Request,
    Resumed,
    Retired,
    TransitionConfig,
    Trouble,
    WorkerStarted,
)
from flexpert.workers.epoch import Epoch


class Transitions:
    def __init__(self, config: TransitionConfig, state: State | None = None) -> None:
        self.config = config
        self.state = state or State()
        self.course = Course(self.config, self.state)
        self.losses = Losses(self.course)

    @classmethod
    def restore(cls, config: TransitionConfig, snapshot: dict[str, Any]) -> Transitions:
        """As the snapshot left it; send Resumed next. Raises ValueError for what is no snapshot of this version."""
        return cls(config, from_journal(snapshot))

    def snapshot(self) -> dict[str, Any]:
        return to_journal(self.state)

    @property
    def current(self) -> Epoch | None:
        return self.state.current

    @property
    def healthy(self) -> bool:
        """Whether the current epoch has all its members and nothing runs."""
        state = self.state
        return state.current is not None and not state.running and not state.dead and not state.broken

    def progress(self, transition_id: str | None = None) -> Progress | None:
        """Of this transition; of the one that runs, or the last one, where no id is given."""
        state = self.state
        if transition_id is None:
            found = state.running or (state.ended[-1] if state.ended else None)
        else:
            found = state.find(transition_id)
        return found.progress() if found else None

    def handle(self, event: Event) -> list[Instruction]:
        """Take in one event; the instructions are to be carried out in order, after the snapshot is written."""
        self.course.orders = []
        self._take(event)
        self.course.settle()
        return self.course.orders

    # Events

    def _take(self, event: Event) -> None:
        match event:
            case Request():
                self._request(event)
            case LoadMeasured(load):
                self.course.load = load
            case ProcessReady(worker, process):
                self._process_ready(worker, process)
            case WorkerStarted():
                self._started(event)
            case Moved():
                self._moved(event)
            case Prepared(worker, process, number, moved_bytes, seconds):
                self._answered(worker, process, "prepare", number, moved_bytes=moved_bytes, seconds=seconds)
            case Committed(worker, process, number, pause_s, kv_moved_bytes):
                if (part := self.losses.part(worker, process)) and part.step == "commit":
                    part.kv_moved_bytes = kv_moved_bytes
                self._answered(worker, process, "commit", number, seconds=pause_s)
            case Retired(worker, process, number, freed_bytes, pause_s):
                self._note_pause(worker, pause_s)
                self._answered(worker, process, "retire", number)
                self.course.note(
                    "retired",
                    f"{worker} freed {freed_bytes} bytes; its requests stood still for {1e3 * pause_s:.1f} ms",
                    worker=worker,
                    freed_bytes=freed_bytes,
                    pause_s=round(pause_s, 6),
                )
            case Aborted(worker, process, number):
                self._answered(worker, process, "abort", number)
            case Released(worker, process):
                self._answered(worker, process, "release", 0)
            case Failed():
                self._failed(event)
            case MemberDied(worker, process, reason):
                self._gone(worker, process, reason)
            case Trouble():
                self._trouble(event)
            case ManagerDied(worker, reason):
                self._manager_died(worker, reason)
            case Expired(deadline_id):
                self._expired(deadline_id)
            case Resumed(live):
                self._resume(live)

    def _request(self, event: Request) -> None:
        asked = f"{event.kind} {event.worker_id or event.workers}"
        known = self.state.requests.get(event.request_id)
        if known is not None:
            if known[0] == asked:
                self.course.order(Answer(event.request_id, known[1]))
            else:
                message = f'request id {event.request_id} was used for "{known[0]}" already: take another for "{asked}"'
                self.course.order(Answer(event.request_id, "", "conflict", message))
            return
        workers = choose(self.config, self.state, event)
        if isinstance(workers, Refusal):
            self.course.order(Answer(event.request_id, "", workers.code, workers.message))
            self.course.note("refused", f"{asked}: {workers.message}", code=workers.code, request_id=event.request_id)
            return
        if event.kind == "boot":
            self.state.boot_workers = event.workers
        self.course.begin(event.kind, workers, request_id=event.request_id, asked=asked)

    def _process_ready(self, worker: str, process: str) -> None:
        part = self.losses.part(worker)
        if part and part.step == "process" and not part.done:
            self.course.assign(worker, part, process)
        elif self.losses.known(worker) == process:
            return  # told twice
        elif self.state.missing.get(worker) == "":
            self.state.missing[worker] = process
        else:
            self.course.order(Release(worker, process))

    def _moved(self, event: Moved) -> None:
        """Of another step or epoch it came late, and is counted already. Only experts count."""
        part, running = self.losses.part(event.worker_id, event.process), self.state.running
        if not part or not running or part.done or part.step != event.step or event.number not in (0, running.number):
            return
        dense_bytes = self.config.model.dense_bytes if event.step == "start" else 0
        part.moved_bytes = max(part.moved_bytes, part.settled_bytes + event.moved_bytes - dense_bytes)

    def _started(self, event: WorkerStarted) -> None:
        part = self.losses.part(event.worker_id, event.process)
        if part and part.live and part.step == "start" and not part.done:
            part.live.exchange_address = event.exchange_address
            part.live.serve_address = event.serve_address
            part.live.manager_socket = event.manager_socket
            part.seconds["start"] = event.seconds
            part.settle(event.moved_bytes)
            part.finish()

    def _note_pause(self, worker: str, pause_s: float) -> None:
        running = self.state.running
        if running is not None and worker in running.parts:
            running.parts[worker].seconds["pause"] = pause_s

    def _answered(
        self, worker: str, process: str, step: str, number: int, *, moved_bytes: int = 0, seconds: float = 0.0
    ) -> None:
        part, running = self.losses.part(worker, process), self.state.running
        if not part or not running or part.step != step or part.done or number not in (0, running.number):
            return
        part.seconds[step] = seconds
        part.settle(moved_bytes)
        part.finish()
        if step == "release":
            self.state.live.pop(worker, None)

    def _failed(self, event: Failed) -> None:
        worker, running = event.worker_id, self.state.running
        part = self.losses.part(worker)
        if event.step == "process" and worker in self.state.missing and (not part or part.role == "left out"):
            del self.state.missing[worker]
            self.course.note("left_out", f"{worker} stays out: {event.reason}; scale to bring it back", worker=worker)
            return
        part = self.losses.part(worker, event.process)
        if not running or not part or part.step != event.step or part.done:
            return
        if event.number not in (0, running.number):
            return
        reason = f"{worker} failed to {event.step}: {event.reason}"
        running.permanent = running.permanent or event.permanent
        self.course.note("failed", reason, worker=worker, step=event.step, transition=running.transition_id)
        if event.step in ("retire", "abort"):
            part.finish()
        elif event.step in ("release", "start", "commit"):
            self.losses.kill(worker, event.process, reason)
        elif event.step == "process":
            self.losses.unstarted(worker, part, reason, permanent=event.permanent)
        else:
            self.losses.abort(reason, blame=[worker])

    def _gone(self, worker: str, process: str, reason: str) -> None:
        """A process ended: what it was to do is decided by the phase."""
        if self.losses.known(worker) != process or not process:
            return
        self.course.note("died", f"{worker}: {reason}", worker=worker, process=process)
        self.losses.lose(worker, process, reason)

    def _trouble(self, event: Trouble) -> None:
        """The first that reports a broken group names the suspects; others then missed the step because of it."""
        state, running = self.state, self.state.running
        live = state.live.get(event.worker_id)
        flipping = running is not None and running.phase == "commit" and event.number == running.number
        if state.current is None or live is None or live.process != event.process or state.broken or state.dead:
            return
        if event.number != state.current.number and not flipping:
            return
        self.course.note(
            "trouble", f"{event.worker_id}: {event.reason}", worker=event.worker_id, suspects=event.suspects
        )
        state.broken = event.reason
        for suspect in event.suspects:
            if suspect != event.worker_id and (flipping or suspect in state.live):
                self.losses.kill(suspect, self.losses.known(suspect), f"missed a step: {event.reason}")
        if state.running is running and running is not None:
            self.losses.interrupt(f"the group missed a step: {event.reason}")

    def _manager_died(self, worker: str, reason: str) -> None:
        process = self.losses.known(worker)
        self.state.lost.add(worker)
        self.course.note("manager_died", f"the HBM manager of {worker} died: {reason}", worker=worker)
        if process:
            self.losses.kill(worker, process, f"its HBM manager died: {reason}")
        if self.state.running and self.state.running.phase == "start":
            self.course.replan(self.state.running)  # nobody reads there

    def _expired(self, deadline_id: str) -> None:
        state, running = self.state, self.state.running
        if state.pause_id and deadline_id == state.pause_id:
            state.pause_id = ""
            return
        if running is None or deadline_id != running.deadline_id:
            return
        late = sorted(worker for worker, part in running.parts.items() if not part.done)
        reason = f"{', '.join(late)} did not {running.phase} in time"
        self.course.note("expired", reason, transition=running.transition_id, workers=late)
        match running.phase:
            case "start":
                self._start_expired(running, reason)
            case "prepare":
                self.losses.abort(reason, blame=late)
            case "commit":
                if all(running.parts[worker].role == "leaves" for worker in late):
                    for worker in late:
                        self.losses.kill(worker, running.parts[worker].process, reason)
                else:
                    self.losses.forward(reason)
            case _:
                for worker in late:
                    part = running.parts[worker]
                    if part.step == "release":
                        self.losses.kill(worker, part.process, reason)
                    part.finish()

    def _start_expired(self, running: Transition, reason: str) -> None:
        """A boot or repair goes on without those that have no process; they may come later. One that starts gets its time."""
        if running.kind == "boot" or not running.mends:
            self.losses.abort(reason)
            return
        late = [worker for worker, part in running.parts.items() if not part.done]
        without = [worker for worker in late if running.parts[worker].step == "process"]
        if running.waited:
            for worker in late:
                self.losses.kill(worker, running.parts[worker].process, reason)
        if not self.losses.leave_out(running, without, reason):
            for worker in without:
                running.parts[worker].asked = False  # once more: an order may have been lost
        running.waited = True
        self.course.deadline(running)

    def _resume(self, live: Sequence[tuple[str, str]]) -> None:
        """What was asked may not have been heard: it is asked again. What died meanwhile is dead now."""
        state = self.state
        known = {(worker, self.losses.known(worker)) for worker in {*state.live, *state.missing, *self.losses.parts()}}
        for worker, process in sorted(known - set(live)):
            self._gone(worker, process, "gone while the controller was away")
        for worker, process in sorted(set(live)):
            if self.losses.known(worker) != process:
                self.course.order(KillProcess(worker, process, "left over from before the controller's restart"))
        for worker, process in state.missing.items():
            if not process:
                self.course.order(GiveProcess(worker))
        for part in self.losses.parts().values():
            part.asked = False
        if state.running:
            self.course.deadline(state.running)
        elif state.pause_id:
            self.course.pause()
        state.published = None

    # Losses
