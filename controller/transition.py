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

from flexpert.controller.planner import Plan, groups_held, keep, plan
from flexpert.controller.transition_requests import Refusal, capacity_slabs, choose, in_order, lacking_memory
from flexpert.controller.transition_state import Live, Part, State, Transition, from_journal, to_journal
from flexpert.controller.transition_types import (
    Abort,
    Aborted,
    Answer,
    Commit,
    Committed,
    Deadline,
    Event,
    Expired,
    Failed,
    Finished,
    GiveProcess,
    Instruction,
    KillProcess,
    LoadMeasured,
    ManagerDied,
    MemberDied,
    Moved,
    Note,
    Prepare,
    Prepared,
    ProcessReady,
    Progress,
    Publish,
    Release,
    Released,
    Request,
    Resumed,
    Retire,
    Retired,
    Serving,
    Source,
    StartWorker,
    TransitionConfig,
    Trouble,
    Withdraw,
    WorkerStarted,
)
from flexpert.workers.epoch import Epoch, Member


class Transitions:
    def __init__(self, config: TransitionConfig, state: State | None = None) -> None:
        self.config = config
        self.state = state or State()
        self._load: tuple[tuple[int, ...], ...] | None = None
        self._orders: list[Instruction] = []

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
        self._orders = []
        self._take(event)
        self._settle()
        return self._orders

    # Events

    def _take(self, event: Event) -> None:
        match event:
            case Request():
                self._request(event)
            case LoadMeasured(load):
                self._load = load
            case ProcessReady(worker, process):
                self._process_ready(worker, process)
            case WorkerStarted():
                self._started(event)
            case Moved(worker, process, moved_bytes):
                part = self._part(worker, process)
                if part:
                    part.moved_bytes = moved_bytes
            case Prepared(worker, process, number, moved_bytes, seconds):
                self._answered(worker, process, "prepare", number, moved_bytes=moved_bytes, seconds=seconds)
            case Committed(worker, process, number, pause_s):
                self._answered(worker, process, "commit", number, seconds=pause_s)
            case Retired(worker, process, number, freed_bytes):
                self._answered(worker, process, "retire", number)
                self._note("retired", f"{worker} freed {freed_bytes} bytes", worker=worker, freed_bytes=freed_bytes)
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
                self._order(Answer(event.request_id, known[1]))
            else:
                message = f'request id {event.request_id} was used for "{known[0]}" already: take another for "{asked}"'
                self._order(Answer(event.request_id, "", "invalid", message))
            return
        workers = choose(self.config, self.state, event)
        if isinstance(workers, Refusal):
            self._order(Answer(event.request_id, "", workers.code, workers.message))
            self._note("refused", f"{asked}: {workers.message}", code=workers.code, request_id=event.request_id)
            return
        if event.kind == "boot":
            self.state.boot_workers = event.workers
        self._begin(event.kind, workers, request_id=event.request_id, asked=asked)

    def _process_ready(self, worker: str, process: str) -> None:
        part = self._part(worker)
        if part and part.step == "process" and not part.done:
            self._assign(worker, part, process)
        elif self._known(worker) == process:
            return  # told twice
        elif self.state.missing.get(worker) == "":
            self.state.missing[worker] = process
        else:
            self._order(Release(worker, process))

    def _started(self, event: WorkerStarted) -> None:
        part = self._part(event.worker_id, event.process)
        if part and part.live and part.step == "start" and not part.done:
            part.live.exchange_address = event.exchange_address
            part.live.serve_address = event.serve_address
            part.live.manager_socket = event.manager_socket
            part.seconds["start"] = event.seconds
            part.finish()

    def _answered(
        self, worker: str, process: str, step: str, number: int, *, moved_bytes: int = 0, seconds: float = 0.0
    ) -> None:
        part, running = self._part(worker, process), self.state.running
        if not part or not running or part.step != step or part.done or number not in (0, running.number):
            return
        part.seconds[step] = seconds
        part.moved_bytes = max(part.moved_bytes, moved_bytes)
        part.finish()

    def _failed(self, event: Failed) -> None:
        worker, running = event.worker_id, self.state.running
        if event.step == "process" and worker in self.state.missing and not self._part(worker):
            del self.state.missing[worker]
            self._note("left_out", f"{worker} stays out: {event.reason}; scale to bring it back", worker=worker)
            return
        part = self._part(worker, event.process)
        if not running or not part or part.step != event.step or part.done:
            return
        if event.number not in (0, running.number):
            return
        reason = f"{worker} failed to {event.step}: {event.reason}"
        running.permanent = running.permanent or event.permanent
        self._note("failed", reason, worker=worker, step=event.step, transition=running.transition_id)
        if event.step in ("retire", "abort"):
            part.finish()
        elif event.step in ("release", "start", "commit"):
            self._kill(worker, event.process, reason)
        elif event.step == "process":
            self._unstarted(worker, part, reason, permanent=event.permanent)
        else:
            self._abort(reason, blame=[worker])

    def _gone(self, worker: str, process: str, reason: str) -> None:
        """A process ended: what it was to do is decided by the phase."""
        if self._known(worker) != process or not process:
            return
        self._note("died", f"{worker}: {reason}", worker=worker, process=process)
        self._lose(worker, process, reason)

    def _trouble(self, event: Trouble) -> None:
        """The first that reports a broken group names the suspects; others then missed the step because of it."""
        state, running = self.state, self.state.running
        live = state.live.get(event.worker_id)
        flipping = running is not None and running.phase == "commit" and event.number == running.number
        if state.current is None or live is None or live.process != event.process or state.broken or state.dead:
            return
        if event.number != state.current.number and not flipping:
            return
        self._note("trouble", f"{event.worker_id}: {event.reason}", worker=event.worker_id, suspects=event.suspects)
        state.broken = event.reason
        for suspect in event.suspects:
            if suspect in state.live and suspect != event.worker_id:
                self._kill(suspect, state.live[suspect].process, f"missed a step: {event.reason}")
        if state.running is running and running is not None:
            self._interrupt(f"the group missed a step: {event.reason}")

    def _manager_died(self, worker: str, reason: str) -> None:
        process = self._known(worker)
        self.state.lost.add(worker)
        self._note("manager_died", f"the HBM manager of {worker} died: {reason}", worker=worker)
        if process:
            self._kill(worker, process, f"its HBM manager died: {reason}")

    def _expired(self, deadline_id: str) -> None:
        state, running = self.state, self.state.running
        if state.pause_id and deadline_id == state.pause_id:
            state.pause_id = ""
            return
        if running is None or deadline_id != running.deadline_id:
            return
        late = sorted(worker for worker, part in running.parts.items() if not part.done)
        reason = f"{', '.join(late)} did not {running.phase} in time"
        self._note("expired", reason, transition=running.transition_id, workers=late)
        match running.phase:
            case "start":
                self._start_expired(running, reason)
            case "prepare":
                self._abort(reason, blame=late)
            case "commit":
                if all(running.parts[worker].role == "leaves" for worker in late):
                    for worker in late:
                        self._kill(worker, running.parts[worker].process, reason)
                else:
                    self._forward(reason)
            case _:
                for worker in late:
                    part = running.parts[worker]
                    if part.step == "release":
                        self._kill(worker, part.process, reason)
                    part.finish()

    def _start_expired(self, running: Transition, reason: str) -> None:
        """A boot or repair goes on without those that have no process; they may come later. One that starts gets its time."""
        if running.kind == "boot" or not running.mends:
            self._abort(reason)
            return
        late = [worker for worker, part in running.parts.items() if not part.done]
        without = [worker for worker in late if running.parts[worker].step == "process"]
        if running.waited:
            for worker in set(late) - set(without):
                self._kill(worker, running.parts[worker].process, reason)
        if not self._leave_out(running, without, reason):
            for worker in without:
                running.parts[worker].asked = False  # once more: an order may have been lost
        running.waited = True
        self._deadline(running)

    def _resume(self, live: Sequence[tuple[str, str]]) -> None:
        """What was asked may not have been heard: it is asked again. What died meanwhile is dead now."""
        state = self.state
        known = {(worker, self._known(worker)) for worker in {*state.live, *state.missing, *self._parts()}}
        for worker, process in sorted(known - set(live)):
            self._gone(worker, process, "gone while the controller was away")
        for worker, process in sorted(set(live)):
            if self._known(worker) != process:
                self._order(KillProcess(worker, process, "left over from before the controller's restart"))
        for worker, process in state.missing.items():
            if not process:
                self._order(GiveProcess(worker))
        for part in self._parts().values():
            part.asked = False
        if state.running:
            self._deadline(state.running)
        elif state.pause_id:
            self._pause()
        state.published = None

    # Losses

    def _kill(self, worker: str, process: str, reason: str) -> None:
        if process:
            self._order(KillProcess(worker, process, reason))
            self._note("killed", f"{worker} is ended: {reason}", worker=worker, process=process)
            self._lose(worker, process, reason)

    def _lose(self, worker: str, process: str, reason: str) -> None:
        """The process is gone from the books, then from the transition that counted on it."""
        state, part = self.state, self._part(worker, process)
        if worker in state.live and state.live[worker].process == process:
            del state.live[worker]
        if state.missing.get(worker) == process:
            state.missing[worker] = ""
            self._order(GiveProcess(worker, 1))
        running = state.running
        if part is None or running is None:
            return
        part.gone = True
        if running.phase == "start":
            self._unstarted(worker, part, reason, permanent=running.permanent)
        elif running.phase in ("prepare", "commit"):
            part.finish()
            self._interrupt(f"{worker} is gone: {reason}", blame=[worker])
        else:
            part.finish()
            if worker in state.members:
                self._interrupt(f"{worker} is gone: {reason}")

    def _unstarted(self, worker: str, part: Part, reason: str, *, permanent: bool) -> None:
        """A process is gone, or none can be had, before anything was prepared."""
        running = self.state.running
        if running is None:
            return
        if not running.mends:
            self._abort(reason)
            return
        if part.role == "leaves":
            del running.parts[worker]
            return
        part.role, part.live, part.gone, part.attempts = "joins", None, False, part.attempts + 1
        part.next("process")
        self._plan(running)  # its manager may be lost, too
        hopeless = permanent or part.attempts >= self.config.max_attempts
        if hopeless and (running.kind == "boot" or not self._leave_out(running, [worker], reason, for_good=True)):
            if running.kind == "boot":
                running.permanent = True
            self._abort(reason, blame=[worker])

    def _leave_out(self, running: Transition, workers: Sequence[str], reason: str, *, for_good: bool = False) -> bool:
        """Go on without them, where the others can hold the model."""
        rest = tuple(worker for worker in running.to_workers if worker not in workers)
        if not workers or not rest or lacking_memory(self.config, rest):
            return False
        for worker in workers:
            part = running.parts[worker]
            part.role = "left out"
            part.finish()
            if for_good:
                self._order(Withdraw(worker))
            else:
                self.state.missing[worker] = ""
            self._note("left_out", f"{worker} is left out: {reason}", worker=worker, transition=running.transition_id)
        running.to_workers = rest
        self._plan(running)
        return True

    def _interrupt(self, reason: str, *, blame: Sequence[str] = ()) -> None:
        """The group of the current epoch, or of the next, is not what the transition was made for."""
        running = self.state.running
        if running is None:
            return
        match running.phase:
            case "start" | "prepare":
                if running.phase == "prepare" or not running.mends:
                    self._abort(reason, blame=blame)
            case "commit":
                self._forward(reason)
            case "retire":
                self._cut_short(reason)

    def _abort(self, reason: str, *, blame: Sequence[str] = ()) -> None:
        """Back to the current epoch exactly as it is. blame: on whom it failed; where that mends and is not the first time, the next repair
        does without those that would have joined, and the others are ended to begin afresh."""
        running = self.state.running
        if running is None or running.phase in ("commit", "retire", "abort"):
            return
        asked_to_prepare = running.phase == "prepare"
        running.phase, running.reason = "abort", reason
        if running.mends and self.state.failures:
            for worker in blame:
                if running.parts[worker].role == "joins":
                    self.state.shunned.add(worker)
                else:
                    self._kill(worker, running.parts[worker].process, reason)
        for worker, part in running.parts.items():
            if part.role == "joins":
                if part.process:
                    part.next("release")
                else:
                    self._order(Withdraw(worker))
                    part.finish()
            elif part.role == "left out" or not part.process or not asked_to_prepare:
                part.finish()
            else:
                part.next("abort")
        self._note("aborting", f"{running.asked}: {reason}", transition=running.transition_id)
        self._deadline(running)

    def _forward(self, reason: str) -> None:
        """Some may have flipped: the new epoch is current, and what is wrong with it is repaired next."""
        running = self.state.running
        if running is None:
            return
        parts = [running.parts[worker] for worker in running.to_workers]
        behind = any(not part.done for part in parts)
        if behind or any(part.gone for part in parts):
            self._install(running)
            self.state.broken = reason if behind else ""
            self._end(running, "done", f"a repair follows: {reason}")

    def _cut_short(self, reason: str) -> None:
        """A repair must begin: leavers that did not answer yet are ended rather than waited for."""
        running = self.state.running
        if running is None:
            return
        self._end(running, "done", f"a repair follows: {reason}")
        for worker, part in running.parts.items():
            if part.role == "leaves" and not part.done:
                self._kill(worker, part.process, reason)

    # The way forward

    def _settle(self) -> None:
        """Go as far as the answers allow; begin what nobody has to ask for; tell the gateways."""
        self._advance()
        while self._begin_by_itself():
            self._advance()
        self._publish()

    def _begin_by_itself(self) -> bool:
        state = self.state
        if state.running or state.pause_id:
            return False
        if state.current is None:
            if not state.boot_workers:
                return False
            workers = tuple(device.worker_id for device in self.config.devices[: state.boot_workers])
            self._begin("boot", workers, asked=f"boot {state.boot_workers}")
        elif state.dead or state.broken:
            kind = "reload" if set(state.dead) & state.lost else "repair"
            fit = tuple(worker for worker in state.members if worker not in state.shunned - state.live.keys())
            if not fit or lacking_memory(self.config, fit):
                fit = state.members
            self._begin(kind, fit, asked=f"{kind} of {', '.join(state.dead) or 'the group'}")
        else:
            back = [worker for worker, process in state.missing.items() if process]
            if not back:
                return False
            self._begin("rejoin", in_order(self.config, (*state.members, *back)), asked=f"rejoin of {', '.join(back)}")
        return True

    def _begin(self, kind: str, workers: tuple[str, ...], *, request_id: str = "", asked: str) -> None:
        state = self.state
        state.last_transition += 1
        running = Transition(
            transition_id=f"t-{state.last_transition}",
            request_id=request_id,
            kind=kind,
            asked=asked,
            number=state.last_epoch + 1,
            from_workers=state.members,
            to_workers=workers,
        )
        if request_id:
            state.requests[request_id] = (asked, running.transition_id)
            self._order(Answer(request_id, running.transition_id))
        if workers == state.members and not state.dead and not state.broken:
            self._end(running, "done", f"{len(workers)} serve already")
            return
        state.running, state.last_epoch = running, running.number
        for worker in dict.fromkeys((*workers, *state.live)):
            live = state.live.get(worker)
            role = "joins" if live is None else "stays" if worker in workers else "leaves"
            running.parts[worker] = Part(role=role, live=live)
        for worker in [worker for worker in state.missing if worker in workers or request_id]:
            self._take_back(running, worker, state.missing.pop(worker))
        for part in running.parts.values():
            if part.role == "joins" and not part.step:
                part.next("process")
        self._plan(running)
        self._note(
            "begun",
            f"{asked}: epoch {running.number}, {', '.join(state.members) or 'none'} -> {', '.join(workers)}",
            transition=running.transition_id,
            total_bytes=running.total_bytes,
        )
        self._deadline(running)

    def _take_back(self, running: Transition, worker: str, process: str) -> None:
        """A worker that was missing joins now, with the process that waits for it; or is not wanted any more."""
        part = running.parts.get(worker)
        if part is None:
            self._order(Release(worker, process) if process else Withdraw(worker))
        elif process:
            self._assign(worker, part, process)

    def _assign(self, worker: str, part: Part, process: str) -> None:
        incarnation = self.state.incarnations.get(worker, 0) + 1
        self.state.incarnations[worker] = incarnation
        part.live = Live(
            process=process, incarnation=incarnation, exchange_address="", serve_address="", manager_socket=""
        )
        part.next("start")

    def _plan(self, running: Transition) -> None:
        """The placement of the next epoch, and who fetches what from where."""
        state, model = self.state, self.config.model
        held: dict[str, list[int]] = {}
        sockets: dict[str, str] = {}
        if state.current is not None:
            held = groups_held(state.current.holders, state.members, slabs_per_group=model.slabs_per_group)
            sockets = {member.worker_id: member.manager_socket for member in state.current.members}
        held = {worker: groups for worker, groups in held.items() if worker not in state.lost}
        if state.current is not None and running.to_workers == state.members and running.mends:
            found: Plan = keep(
                holders=state.current.holders,
                members=running.to_workers,
                held=held,
                slabs_per_group=model.slabs_per_group,
                slab_bytes=model.slab_bytes,
            )
        else:
            found = plan(
                layers=model.layers,
                experts=model.experts,
                members=[(worker, capacity_slabs(self.config, worker)) for worker in running.to_workers],
                held=held,
                load=self._load,
                slabs_per_group=model.slabs_per_group,
                slab_bytes=model.slab_bytes,
                replicas=self.config.replicas,
            )
        running.holders, running.total_bytes = found.holders, found.moved_bytes
        for worker, part in running.parts.items():
            fetches = found.fetches.get(worker, {})
            part.sources = [
                Source(source, sockets[source], tuple(groups)) for source, groups in fetches.items() if source
            ]

    def _advance(self) -> None:
        while self.state.running:
            running = self.state.running
            for worker, part in running.parts.items():
                if not part.done and not part.asked:
                    part.asked = True
                    self._ask(running, worker, part)
            if not all(part.done for part in running.parts.values()):
                return
            self._next_phase(running)

    def _ask(self, running: Transition, worker: str, part: Part) -> None:
        process, limits = part.process, self.config.deadlines
        match part.step:
            case "process":
                self._order(GiveProcess(worker, part.attempts))
            case "start" if part.live:
                draft, sources = self._epoch(running), tuple(part.sources)
                self._order(StartWorker(worker, process, part.live.incarnation, draft, sources))
            case "prepare":
                epoch, sources = self._epoch(running), tuple(part.sources)
                self._order(Prepare(worker, process, epoch, sources, limits.prepare_s))
            case "commit":
                self._order(Commit(worker, process, running.number, limits.commit_s))
            case "retire":
                self._order(Retire(worker, process, running.number))
            case "abort":
                self._order(Abort(worker, process, running.number))
            case "release":
                keep_weights = running.phase == "abort" and worker in self.state.members
                self._order(Release(worker, process, keep_weights))

    def _next_phase(self, running: Transition) -> None:
        match running.phase:
            case "start" | "prepare":
                running.phase = "prepare" if running.phase == "start" else "commit"
                for part in running.parts.values():
                    if part.role != "left out":
                        part.next(running.phase)
                self._deadline(running)
            case "commit":
                self._install(running)
                running.phase = "retire"
                for part in running.parts.values():
                    if part.process and part.role in ("stays", "leaves"):
                        part.next("retire" if part.role == "stays" else "release")
                self._deadline(running)
            case "retire":
                for worker, part in running.parts.items():
                    if part.role == "leaves":
                        self.state.live.pop(worker, None)
                self._end(running, "done")
            case _:
                self._end(running, "failed" if running.mends else "aborted", running.reason)

    def _install(self, running: Transition) -> None:
        """The next epoch is the current one."""
        state = self.state
        state.current = self._epoch(running)
        for worker, part in running.parts.items():
            if part.role == "joins" and part.live and not part.gone:
                state.live[worker] = part.live
        state.broken, state.boot_workers = "", 0
        state.lost = {worker for worker in state.lost if worker in running.to_workers and worker not in state.live}
        pauses = {w: part.seconds["commit"] for w, part in running.parts.items() if "commit" in part.seconds}
        self._note(
            "committed",
            f"epoch {running.number} is current: {', '.join(running.to_workers)}",
            transition=running.transition_id,
            pause_s=pauses,
        )

    def _epoch(self, running: Transition) -> Epoch:
        members = []
        for worker in running.to_workers:
            live = running.parts[worker].live
            members.append(
                Member(
                    worker_id=worker,
                    incarnation=live.incarnation if live else self.state.incarnations.get(worker, 0) + 1,
                    exchange_address=live.exchange_address if live else "",
                    manager_socket=live.manager_socket if live else "",
                )
            )
        return Epoch(number=running.number, members=tuple(members), holders=running.holders)

    def _end(self, running: Transition, result: str, reason: str = "") -> None:
        state = self.state
        running.phase, running.state, running.reason, running.deadline_id = "ended", result, reason, ""
        running.holders = ()
        for part in running.parts.values():
            part.sources = []
        state.running = None
        state.ended.append(running)
        for old in state.ended[: -self.config.max_history]:
            state.requests.pop(old.request_id, None)
        del state.ended[: -self.config.max_history]
        moved = sum(part.moved_bytes for part in running.parts.values())
        text = f"{running.asked}: {result}" + (f", {reason}" if reason else "")
        seconds = {worker: part.seconds for worker, part in running.parts.items() if part.seconds}
        self._note("ended", text, transition=running.transition_id, moved_bytes=moved, seconds=seconds)
        if running.mends and (result != "done" or reason):
            self._count_failure(running)
        elif running.mends:
            state.failures = 0
            state.shunned.clear()
        self._order(Finished(running.transition_id, result, reason, running.permanent))

    def _count_failure(self, running: Transition) -> None:
        """The first is tried again at once, others after a growing pause; a boot that cannot be is given up."""
        state = self.state
        state.failures += 1
        if running.kind == "boot" and (running.permanent or state.failures >= self.config.max_attempts):
            state.boot_workers, state.failures, running.permanent = 0, 0, True
        elif state.failures > 1:
            self._pause()

    def _pause(self) -> None:
        limits = self.config.deadlines
        delay_s = min(limits.pause_max_s, limits.pause_s * 2 ** min(self.state.failures - 2, 16))
        self.state.last_deadline += 1
        self.state.pause_id = f"pause/{self.state.last_deadline}"
        self._order(Deadline(self.state.pause_id, delay_s))

    # Helpers

    def _order(self, instruction: Instruction) -> None:
        self._orders.append(instruction)

    def _note(self, kind: str, text: str, **details: Any) -> None:
        self._order(Note(kind, text, details))

    def _limit_s(self, running: Transition) -> float:
        limits = self.config.deadlines
        if running.phase == "start" and running.mends and running.kind != "boot" and not running.waited:
            return limits.process_s
        return float(getattr(limits, f"{running.phase}_s"))

    def _deadline(self, running: Transition) -> None:
        self.state.last_deadline += 1
        running.deadline_id = f"{running.transition_id}/{running.phase}/{self.state.last_deadline}"
        self._order(Deadline(running.deadline_id, self._limit_s(running)))

    def _parts(self) -> dict[str, Part]:
        return self.state.running.parts if self.state.running else {}

    def _part(self, worker: str, process: str | None = None) -> Part | None:
        part = self._parts().get(worker)
        return part if part and (process is None or part.process == process) else None

    def _known(self, worker: str) -> str:
        """The process that runs, starts or waits as this worker, "" where there is none."""
        part, live = self._parts().get(worker), self.state.live.get(worker)
        if part and part.process:
            return part.process
        return live.process if live else self.state.missing.get(worker, "")

    def _publish(self) -> None:
        state, draining = self.state, set()
        if state.running and state.running.phase in ("prepare", "commit"):
            draining = {worker for worker, part in state.running.parts.items() if part.role == "leaves"}
        serving = tuple(
            sorted(
                Serving(worker, live.incarnation, live.serve_address)
                for worker, live in state.live.items()
                if worker in state.members or worker in draining
            )
        )
        told = (serving, tuple(sorted(draining & state.live.keys())))
        if state.current is not None and told != state.published:
            state.published = told
            self._order(Publish(*told))
