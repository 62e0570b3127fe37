"""What a loss means for the transition that runs: processes that end, workers that do not start, groups that break.

A loss is first taken out of the books, then the phase decides: before anything was prepared a mend tries again or goes on without that
worker, anything else is aborted; after commit began the way is forward, and a repair follows. Pure; called by `controller.transition`.
"""

from __future__ import annotations

from collections.abc import Sequence

from flexpert.controller.transition_course import Course
from flexpert.controller.transition_requests import lacking_memory
from flexpert.controller.transition_state import Part, Transition
from flexpert.controller.transition_types import GiveProcess, KillProcess, Withdraw


class Losses:
    def __init__(self, course: Course) -> None:
        self.course = course
        self.config = course.config
        self.state = course.state

    def kill(self, worker: str, process: str, reason: str) -> None:
        if process:
            self.course.order(KillProcess(worker, process, reason))
            self.course.note("killed", f"{worker} is ended: {reason}", worker=worker, process=process)
            self.lose(worker, process, reason)

    def lose(self, worker: str, process: str, reason: str) -> None:
        """The process is gone from the books, then from the transition that counted on it."""
        state, part = self.state, self.part(worker, process)
        if worker in state.live and state.live[worker].process == process:
            del state.live[worker]
        if state.missing.get(worker) == process:
            state.missing[worker] = ""
            self.course.order(GiveProcess(worker, 1))
        running = state.running
        if part is None or running is None:
            return
        part.gone = True
        if running.phase == "start":
            self.unstarted(worker, part, reason, permanent=running.permanent)
        elif running.phase in ("prepare", "commit"):
            part.finish()
            self.interrupt(f"{worker} is gone: {reason}", blame=[worker])
        else:
            part.finish()
            if worker in state.members:
                self.interrupt(f"{worker} is gone: {reason}")

    def unstarted(self, worker: str, part: Part, reason: str, *, permanent: bool) -> None:
        """A process is gone, or none can be had, before anything was prepared."""
        running = self.state.running
        if running is None:
            return
        if not running.mends:
            self.abort(reason)
            return
        if part.role == "leaves":
            del running.parts[worker]
            return
        part.role, part.live, part.gone, part.attempts = "joins", None, False, part.attempts + 1
        part.next("process")
        hopeless = permanent or part.attempts >= self.config.max_attempts
        if hopeless and (running.kind == "boot" or not self.leave_out(running, [worker], reason, for_good=True)):
            if running.kind == "boot":
                running.permanent = True
            self.abort(reason, blame=[worker])

    def leave_out(self, running: Transition, workers: Sequence[str], reason: str, *, for_good: bool = False) -> bool:
        """Go on without them, where the others can hold the model."""
        rest = tuple(worker for worker in running.to_workers if worker not in workers)
        if not workers or not rest or lacking_memory(self.config, rest):
            return False
        for worker in workers:
            part = running.parts[worker]
            part.role = "left out"
            part.finish()
            if for_good:
                self.course.order(Withdraw(worker))
            else:
                self.state.missing[worker] = ""
            self.course.note(
                "left_out", f"{worker} is left out: {reason}", worker=worker, transition=running.transition_id
            )
        running.to_workers = rest
        self.course.replan(running)
        return True

    def interrupt(self, reason: str, *, blame: Sequence[str] = ()) -> None:
        """The group of the current epoch, or of the next, is not what the transition was made for."""
        running = self.state.running
        if running is None:
            return
        match running.phase:
            case "start" | "prepare":
                if running.phase == "prepare" or not running.mends:
                    self.abort(reason, blame=blame)
            case "commit":
                self.forward(reason)
            case "retire":
                self.cut_short(reason)

    def abort(self, reason: str, *, blame: Sequence[str] = ()) -> None:
        """blame: on whom it failed. Where that mends and is not the first time, the next repair does without those that would have joined,
        and the others are ended to begin afresh."""
        running = self.state.running
        if running is None or running.phase not in ("start", "prepare"):
            return
        self.course.abort(running, reason)
        if running.mends and self.state.failures:
            for worker in blame:
                if running.parts[worker].role == "joins":
                    self.state.shunned.add(worker)
                else:
                    self.kill(worker, running.parts[worker].process, reason)

    def forward(self, reason: str) -> None:
        """Some may have flipped: the new epoch is current, and what is wrong with it is repaired next."""
        running = self.state.running
        if running is None:
            return
        parts = [running.parts[worker] for worker in running.to_workers]
        behind = any(not part.done for part in parts)
        if behind or any(part.gone for part in parts):
            self.course.install(running)
            self.state.broken = reason if behind else ""
            self.course.end(running, "done", f"a repair follows: {reason}")

    def cut_short(self, reason: str) -> None:
        """A repair must begin: leavers that did not answer yet are ended rather than waited for."""
        running = self.state.running
        if running is None:
            return
        self.course.end(running, "done", f"a repair follows: {reason}")
        for worker, part in running.parts.items():
            if part.role == "leaves" and not part.done:
                self.kill(worker, part.process, reason)

    def parts(self) -> dict[str, Part]:
        return self.state.running.parts if self.state.running else {}

    def part(self, worker: str, process: str | None = None) -> Part | None:
        part = self.parts().get(worker)
        return part if part and (process is None or part.process == process) else None

    def known(self, worker: str) -> str:
        """The process that runs, starts or waits as this worker, "" where there is none."""
        part, live = self.parts().get(worker), self.state.live.get(worker)
        if part and part.process:
            return part.process
        return live.process if live else self.state.missing.get(worker, "")
