"""The course of a transition: from its beginning through its phases to its end, given that parts are told when they are done.

`controller.transition` takes the events in and marks the parts that answered, `controller.transition_losses` decides on failures; this
module asks the parts, goes to the next phase when all are done, makes the next epoch the current one, and begins the repairs that nobody
has to ask for. Pure: instructions are gathered in `orders`.
"""

from __future__ import annotations

from typing import Any

from flexpert.controller.transition_plan import next_epoch, plan_next, to_publish
from flexpert.controller.transition_requests import in_order, lacking_memory, limit_s
from flexpert.controller.transition_state import Live, Part, State, Transition
from flexpert.controller.transition_types import (
    Abort,
    Answer,
    Commit,
    Deadline,
    Finished,
    GiveProcess,
    Instruction,
    Note,
    Prepare,
    Release,
    Retire,
    StartWorker,
    TransitionConfig,
    Withdraw,
)

MAX_REQUESTS = 256  # ids that are remembered; the journal is written with all of them


class Course:
    """load: the last measured one, for the next plan."""

    def __init__(self, config: TransitionConfig, state: State) -> None:
        self.config = config
        self.state = state
        self.load: tuple[tuple[int, ...], ...] | None = None
        self.orders: list[Instruction] = []

    def settle(self) -> None:
        """Go as far as the answers allow; begin what nobody has to ask for; tell the gateways."""
        self.advance()
        while self._begin_by_itself():
            self.advance()
        self.publish()

    def _begin_by_itself(self) -> bool:
        state = self.state
        if state.running or state.pause_id:
            return False
        if state.current is None:
            if not state.boot_workers:
                return False
            workers = tuple(device.worker_id for device in self.config.devices[: state.boot_workers])
            self.begin("boot", workers, asked=f"boot {state.boot_workers}")
        elif state.dead or state.broken:
            kind = "reload" if set(state.dead) & state.lost else "repair"
            fit = tuple(worker for worker in state.members if worker not in state.shunned - state.live.keys())
            if not fit or lacking_memory(self.config, fit):
                fit = state.members
            self.begin(kind, fit, asked=f"{kind} of {', '.join(state.dead) or 'the group'}")
        else:
            back = [worker for worker, process in state.missing.items() if process]
            if not back:
                return False
            self.begin("rejoin", in_order(self.config, (*state.members, *back)), asked=f"rejoin of {', '.join(back)}")
        return True

    def begin(self, kind: str, workers: tuple[str, ...], *, request_id: str = "", asked: str) -> None:
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
            self.order(Answer(request_id, running.transition_id))
        if workers == state.members and not state.dead and not state.broken:
            running.number = 0 if state.current is None else state.current.number
            for worker in list(state.missing) if request_id else ():
                self._take_back(running, worker, state.missing.pop(worker))
            self.end(running, "done", f"{len(workers)} serve already")
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
        self.replan(running)
        self.note(
            "begun",
            f"{asked}: epoch {running.number}, {', '.join(state.members) or 'none'} -> {', '.join(workers)}",
            transition=running.transition_id,
            from_workers=state.members,
            to_workers=workers,
            total_bytes=running.total_bytes,
        )
        self.deadline(running)

    def _take_back(self, running: Transition, worker: str, process: str) -> None:
        """A worker that was missing joins now, with the process that waits for it; or is not wanted any more."""
        part = running.parts.get(worker)
        if part is None:
            self.order(Release(worker, process) if process else Withdraw(worker))
        elif process:
            self.assign(worker, part, process)

    def assign(self, worker: str, part: Part, process: str) -> None:
        incarnation = self.state.incarnations.get(worker, 0) + 1
        self.state.incarnations[worker] = incarnation
        part.live = Live(
            process=process, incarnation=incarnation, exchange_address="", serve_address="", manager_socket=""
        )
        part.next("start")

    def replan(self, running: Transition) -> None:
        plan_next(self.config, self.state, running, self.load)

    def advance(self) -> None:
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
                self.order(GiveProcess(worker, part.attempts))
            case "start" if part.live:
                draft, sources = next_epoch(self.state, running), tuple(part.sources)
                self.order(StartWorker(worker, process, part.live.incarnation, draft, sources))
            case "prepare":
                epoch, sources = next_epoch(self.state, running), tuple(part.sources)
                self.order(Prepare(worker, process, epoch, sources, limits.prepare_s))
            case "commit":
                self.order(Commit(worker, process, running.number, limits.commit_s))
            case "retire":
                self.order(Retire(worker, process, running.number))
            case "abort":
                self.order(Abort(worker, process, running.number))
            case "release":
                keep_weights = running.phase == "abort" and worker in self.state.members
                self.order(Release(worker, process, keep_weights))

    def _next_phase(self, running: Transition) -> None:
        match running.phase:
            case "start" | "prepare":
                running.phase = "prepare" if running.phase == "start" else "commit"
                for part in running.parts.values():
                    if part.role != "left out":
                        part.next(running.phase)
                self.deadline(running)
            case "commit":
                self.install(running)
                running.phase = "retire"
                for part in running.parts.values():
                    if part.process and part.role in ("stays", "leaves"):
                        part.next("retire" if part.role == "stays" else "release")
                self.deadline(running)
            case "retire":
                self.end(running, "done")
            case _:
                self.end(running, "failed" if running.mends else "aborted", running.reason)

    def install(self, running: Transition) -> None:
        """The next epoch is the current one."""
        state = self.state
        state.current = next_epoch(self.state, running)
        for worker, part in running.parts.items():
            if part.role == "joins" and part.live and not part.gone:
                state.live[worker] = part.live
        state.broken, state.boot_workers = "", 0
        state.lost = {worker for worker in state.lost if worker in running.to_workers and worker not in state.live}
        pauses = {w: part.seconds["commit"] for w, part in running.parts.items() if "commit" in part.seconds}
        self.note(
            "committed",
            f"epoch {running.number} is current: {', '.join(running.to_workers)}",
            transition=running.transition_id,
            to_workers=running.to_workers,
            pause_s=pauses,
        )

    def abort(self, running: Transition, reason: str) -> None:
        """Back to the current epoch exactly as it is; only before commit."""
        asked_to_prepare = running.phase == "prepare"
        running.phase, running.reason = "abort", reason
        for worker, part in running.parts.items():
            if part.role == "joins":
                if part.process:
                    part.next("release")
                else:
                    self.order(Withdraw(worker))
                    part.finish()
            elif part.role == "left out" or not part.process or not asked_to_prepare:
                part.finish()
            else:
                part.next("abort")
        self.note("aborting", f"{running.asked}: {reason}", transition=running.transition_id)
        self.deadline(running)

    def end(self, running: Transition, result: str, reason: str = "") -> None:
        state = self.state
        running.phase, running.state, running.reason, running.deadline_id = "ended", result, reason, ""
        running.holders = ()
        for part in running.parts.values():
            part.sources = []
        state.running = None
        state.ended.append(running)
        for request_id in list(state.requests)[:-MAX_REQUESTS]:
            del state.requests[request_id]
        del state.ended[: -self.config.max_history]
        moved = sum(part.moved_bytes for part in running.parts.values())
        kv_moved = sum(part.kv_moved_bytes for part in running.parts.values())
        text = f"{running.asked}: {result}" + (f", {reason}" if reason else "")
        seconds = {worker: part.seconds for worker, part in running.parts.items() if part.seconds}
        self.note(
            "ended", text, transition=running.transition_id, moved_bytes=moved, kv_moved_bytes=kv_moved, seconds=seconds
        )
        if running.kind == "rejoin" and result != "done":
            self._come_back(running)
        elif running.mends and (result != "done" or reason):
            self._count_failure(running)
        elif running.mends or running.kind == "rejoin":
            state.failures = 0
            state.shunned.clear()
        self.order(Finished(running.transition_id, result, reason, running.permanent))

    def _count_failure(self, running: Transition) -> None:
        """The first is tried again at once, others after a growing pause; a boot that cannot be is given up."""
        state = self.state
        state.failures += 1
        if running.kind == "boot" and (running.permanent or state.failures >= self.config.max_attempts):
            state.boot_workers, state.failures, running.permanent = 0, 0, True
        elif state.failures > 1:
            self.pause()

    def _come_back(self, running: Transition) -> None:
        """Those whose return failed are wanted all the same, in a while; not for ever."""
        state = self.state
        state.failures += 1
        workers = [worker for worker, part in running.parts.items() if part.role == "joins"]
        if running.permanent or state.failures >= self.config.max_attempts:
            state.failures = 0
            for worker in workers:
                self.note("left_out", f"{worker} stays out: {running.reason}; scale to bring it back", worker=worker)
            return
        for worker in workers:
            state.missing[worker] = ""
            self.order(GiveProcess(worker, state.failures))
        if state.failures > 1:
            self.pause()

    def pause(self) -> None:
        limits = self.config.deadlines
        delay_s = min(limits.pause_max_s, limits.pause_s * 2 ** min(self.state.failures - 2, 16))
        self.state.last_deadline += 1
        self.state.pause_id = f"pause/{self.state.last_deadline}"
        self.order(Deadline(self.state.pause_id, delay_s))

    def order(self, instruction: Instruction) -> None:
        self.orders.append(instruction)

    def note(self, kind: str, text: str, **details: Any) -> None:
        self.order(Note(kind, text, details))

    def deadline(self, running: Transition) -> None:
        self.state.last_deadline += 1
        running.deadline_id = f"{running.transition_id}/{running.phase}/{self.state.last_deadline}"
        self.order(Deadline(running.deadline_id, limit_s(self.config, running)))

    def publish(self) -> None:
        found = to_publish(self.state)
        if self.state.current is not None and (found.serving, found.draining) != self.state.published:
            self.state.published = (found.serving, found.draining)
            self.order(found)
