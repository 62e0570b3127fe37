"""The controller actor: runs supervision and transitions, keeps their journal, answers `flexpert up` and the operator.

It decides nothing itself: events are taken from a queue one by one, the `conductor` turns them into actions, the journal is written, then
`components` and `members` carry the actions out. It is restarted by Ray when it dies; gateway and workers go on meanwhile, and the new one
finds them by their names and goes on with the transition that ran.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from pathlib import Path
from typing import Any

from flexpert.controller import supervision_types as s
from flexpert.controller import transition_types as t
from flexpert.controller.autoscaler.bridge import Bridge
from flexpert.controller.autoscaler.part import PolicyPart
from flexpert.controller.components import Components, ShapeFailed, ShapeKnown
from flexpert.controller.conductor import Action, Conductor
from flexpert.controller.desk import Desk
from flexpert.controller.errors import AdminError
from flexpert.controller.journal import Journal
from flexpert.controller.processes import ProcessId
from flexpert.controller.runs import first_state, forget_other_run, make_conductor, needed_devices, transition_config
from flexpert.controller.runtime_dir import write_json
from flexpert.controller.spec import ClusterSpec
from flexpert.controller.timers import Timers
from flexpert.controller.transition import Transitions
from flexpert.workers.heap import give_back_free_memory
from flexpert.workers.process_log import open_process_log

log = logging.getLogger(__name__)

TICK_S = 0.5
BEGIN_S = 1.0  # then `up` is told that this controller lives, and does not know yet
LOAD_PERIOD_TICKS = 10
CONTROLLER = "controller"
ENDING = "the cluster is being ended"
NEED_RAY = (s.StartAgent, s.SpawnProcess, s.StartGateway, s.KillProcess)
QUIET = (s.Tick, s.Answered, t.Moved, t.LoadMeasured)  # events that change nothing worth a write


class Controller:
    """An async actor; its first call brings the cluster up."""

    def __init__(self, *, spec: ClusterSpec, log_path: str) -> None:
        open_process_log(Path(log_path), spec.log_level)
        with contextlib.suppress(OSError):  # a full disk: `up` learns it from the first answer
            write_json(spec.runtime.controller_pid, ProcessId.own(CONTROLLER).to_json())
        self._spec = spec
        self._journal = Journal(spec.runtime)
        self._conductor: Conductor
        self._desk = Desk()
        self._running: asyncio.Task[None] | None = None
        self._begun = asyncio.Event()
        self._queue: asyncio.Queue[s.Event | t.Event | ShapeKnown | ShapeFailed] = asyncio.Queue()
        self._timers = Timers[s.Event | t.Event](self._queue.put_nowait)
        self._changed = asyncio.Event()
        self._components: Components
        self._policy: PolicyPart
        self._published = t.Publish((), ())
        self._given_up: dict[str, str] | None = None
        self._stopped = self._finishing = False
        self._ticks = 0

    # What `flexpert up` calls

    async def watch(self, after: int, timeout_s: float) -> dict[str, Any]:
        """Wait for what is newer than event number `after`, at most timeout_s; tells where the cluster stands, once that has "begun"."""
        try:
            await asyncio.wait_for(self._ensure_running(), BEGIN_S)
        except TimeoutError:
            return {"begun": False}
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._changed.wait(), timeout_s)
        self._changed.clear()
        return {
            "begun": True, "events": self._journal.since(after), "last": self._journal.last,
            "progress": dict(self._components.progress), "ready": self._conductor.ready, "port": self._components.port,
            "given_up": self._given_up, "stopped": self._stopped, "pid": os.getpid(),
        }  # fmt: skip

    async def replaced(self, reason: str, seconds: float) -> None:
        """This controller took the place of one that is gone for that reason, so long after its last answer."""
        self._tell("died", f"controller: {reason}", component=CONTROLLER)
        text = f"{CONTROLLER} replaced after {seconds:.2f} s"
        self._tell("replaced", text, component=CONTROLLER, seconds=round(seconds, 3))

    async def stop(self) -> None:
        """Begin to end the cluster: drained first, then all processes. `watch` tells when it is done. May be asked again and again."""
        await self._ensure_running()
        if self._conductor.supervision.phase == "running":
            self._queue.put_nowait(s.StopRequested())

    async def finish(self) -> None:
        """Ray can make and end no actor any more (its GCS is gone): have new requests refused; returns when those that run have ended."""
        await self._ensure_running()
        self._finishing = True
        await self._policy.stop()
        self._tell("drain", "Ray's GCS ended: new requests are refused, running ones finish")
        await self._components.finish_requests()

    # What the operator asks, through `up` or the gateway

    async def status(self) -> dict[str, Any]:
        """Everything `flexpert status` shows."""
        await self._ensure_running()
        return {
            **await self._desk.status(self._spec, self._conductor, self._components, self._published),
            "uptime_s": round(time.time() - self._journal.facts.began_s, 1),
            "controller": {"pid": os.getpid()},
            "transition": self._progress(None),
            "policy": self._policy.summary(),
        }

    async def scale(
        self, workers: int, request_id: str, owner: str = "admin API", for_s: float | None = None
    ) -> dict[str, Any]:
        """Begin the transition to so many workers; returns its progress. Raises AdminError. The same request_id begins nothing new.
        Where a policy is active that size holds against it for for_s."""
        await self._ensure_running()
        return await self._policy.by_hand(t.Request("scale", request_id, workers=workers), owner=owner, for_s=for_s)

    async def drain(
        self, worker_id: str, request_id: str, owner: str = "admin API", for_s: float | None = None
    ) -> dict[str, Any]:
        """Begin the transition in which this worker leaves; as scale."""
        await self._ensure_running()
        return await self._policy.by_hand(t.Request("drain", request_id, worker_id=worker_id), owner=owner, for_s=for_s)

    async def policy(self, word: str, arguments: dict[str, Any]) -> dict[str, Any]:
        """About the scaling policy: see autoscaler.desk. Raises AdminError."""
        await self._ensure_running()
        return await self._policy.answer(word, arguments)

    async def transition(self, transition_id: str | None = None) -> dict[str, Any] | None:
        """Progress of that transition; without an id of the one that runs, or else the last one, None where there was none yet.
        Raises AdminError for an id that is not known."""
        await self._ensure_running()
        found = self._progress(transition_id)
        if found is None and transition_id is not None:
            raise AdminError("not_found", f"there is no transition {transition_id!r}, or it is too long ago")
        return found

    async def events(self, after: int = 0) -> dict[str, Any]:
        """What happened after event number `after`, oldest first, and the number of the newest."""
        await self._ensure_running()
        return {"events": self._journal.since(after), "last": self._journal.last}

    async def timings(self) -> dict[str, Any]:
        """Numbers for metrics: see controller.timings."""
        return self._conductor.timings.to_json()

    async def _request(self, request: t.Request) -> dict[str, Any]:
        await self._ensure_running()
        if self._conductor.transitions is None or self._conductor.supervision.phase != "running":
            phase = self._conductor.supervision.phase
            what = (
                "is being ended" if phase in ("draining", "ended") else "has not started yet; ask again once it serves"
            )
            raise AdminError("conflict", f"the cluster {what}")
        answer = await self._desk.answer_to(request.request_id, lambda: self._queue.put_nowait(request))
        if answer.code:
            raise AdminError(answer.code, answer.message)
        found = self._progress(answer.transition_id)
        if found is None:
            raise AdminError("not_found", f"transition {answer.transition_id} of this request is too long ago")
        return found

    def _progress(self, transition_id: str | None) -> dict[str, Any] | None:
        transitions = self._conductor.transitions
        found = None if transitions is None else transitions.progress(transition_id)
        return None if found is None else self._desk.progress(found, self._conductor.timings, now_s=time.monotonic())

    # Inside

    async def _ensure_running(self) -> None:
        """Start at the first call; no call is answered before it is known what an earlier controller left running."""
        if self._running is None:
            self._running = asyncio.create_task(self._run())
        await self._begun.wait()

    async def _run(self) -> None:
        try:
            facts = self._journal.facts
            forget_other_run(self._spec, facts)
            for transition_id, began_s in facts.transition_began_s.items():
                self._desk.began(transition_id, now_s=began_s)
            self._components = Components(
                self._spec, send=self._queue.put_nowait, tell=self._tell_of_components, shape=facts.model, managers=facts.managers
            )  # fmt: skip
            self._conductor = make_conductor(self._spec, facts, await self._components.place(facts.nodes))
            self._components.need_devices(needed_devices(self._spec, self._conductor))
            found = await self._components.find(dict(facts.processes), facts.generation)
            for event in found:
                self._take(event)
            self._take(s.Begin())
            if self._conductor.transitions is not None:
                workers = {event.worker_id: event.process for event in found if isinstance(event, s.ProcessFound)}
                workers.pop("", None)
                self._take(t.Resumed(tuple(workers.items())))
                for worker_id, process in workers.items():
                    self._components.members.follow(worker_id, process)
            self._policy = PolicyPart(Bridge(
                spec=self._spec, journal=self._journal, conductor=self._conductor, ask=self._components.ask, progress=self._progress,
                request=self._request, send=self._queue.put_nowait, tell=self._tell,
            ))  # fmt: skip
            self._policy.start()
            self._begun.set()
            self._ticking = asyncio.create_task(self._tick())
            while True:
                self._take(await self._queue.get())
        except Exception as error:
            log.exception("the controller failed")
            self._give_up("controller", "internal", f"{type(error).__name__}: {error}")
            self._begun.set()

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            self._queue.put_nowait(s.Tick())
            self._ticks += 1
            if self._ticks % LOAD_PERIOD_TICKS == 0:
                processes = self._conductor.supervision.processes()
                self._components.measure_load([name for name, (phase, _) in processes.items() if phase == "serving"])

    def _take(self, event: s.Event | t.Event | ShapeKnown | ShapeFailed) -> None:
        now_s = time.monotonic()
        log.debug("event %s", event)
        if isinstance(event, ShapeKnown):
            actions = self._begin_transitions(event, now_s)
        elif isinstance(event, ShapeFailed):
            self._give_up("model", event.kind, event.reason)
            actions = []
        else:
            actions = self._conductor.handle(event, now_s=now_s)
        if actions or not isinstance(event, QUIET):
            self._write_down(actions)
        for action in actions:
            log.debug("action %s", action)
            self._carry_out(action)
        if isinstance(event, s.GatewayReady) and self._published.serving:
            self._components.set_workers(self._published)
        if actions or not isinstance(event, QUIET):
            self._changed.set()

    def _begin_transitions(self, event: ShapeKnown, now_s: float) -> list[Action]:
        if self._conductor.transitions is not None:
            return []
        facts = self._journal.facts
        facts.model = event.shape
        transitions = Transitions(transition_config(self._spec, event.shape), first_state(facts))
        request = t.Request("boot", f"boot-{facts.run}", workers=self._spec.workers)
        return self._conductor.begin(transitions, request, now_s=now_s)

    def _write_down(self, actions: list[Action]) -> None:
        """Facts that must survive this process, before anything is done that depends on them."""
        facts, supervision = self._journal.facts, self._conductor.supervision
        for action in actions:
            match action:
                case s.SpawnProcess(process):
                    facts.next_process = int(process.rpartition("-")[2]) + 1
                case s.StartGateway(generation):
                    facts.generation = generation
                case t.Note("begun", _, details):
                    facts.transition_began_s = {dict(details)["transition"]: time.monotonic()}
                case t.Note("ended"):
                    facts.transition_began_s = {}
        facts.processes = {
            name: (worker, supervision.agent_of(name)) for name, (_, worker) in supervision.processes().items()
        }
        facts.managers = self._components.devices.pids()
        if self._conductor.transitions is not None:
            facts.transitions = self._conductor.transitions.snapshot()
        self._journal.save()

    def _carry_out(self, action: Action) -> None:
        if isinstance(action, s.Instruction):
            self._carry_out_supervision(action)
        else:
            self._carry_out_transitions(action)

    def _carry_out_supervision(self, action: s.Instruction) -> None:
        components = self._components
        if self._finishing and isinstance(action, NEED_RAY):
            log.warning("not carried out without Ray's GCS: %s", action)
            return
        match action:
            case s.StartAgent(agent):
                components.start_agent(agent)
            case s.SpawnProcess():
                components.spawn_process(action)
            case s.GiveProcess(worker_id, process):
                self._components.need_devices(needed_devices(self._spec, self._conductor))
                components.give_process(worker_id, process)
            case s.KillProcess(process, reason):
                if not process.startswith("process-"):  # what befalls workers is told by the transitions
                    self._tell("died", f"{process}: {reason}", component=process)
                components.kill(process)
            case s.AskProcess(process):
                components.ask_process(process)
            case s.StartGateway(generation):
                components.start_gateway(generation)
            case s.Pause(component, delay_s):
                self._tell("pause", f"{component}: next try in {delay_s:g} s", component=component)
                self._timers.set(component, s.PauseOver(component), after_s=delay_s)
            case s.DrainGateway():
                self._tell("drain", "draining: new requests are refused, running ones finish")
                components.drain_gateway()
            case s.StopAll():
                if (running := self._progress(None)) is not None and running["state"] == "running":
                    self._note(
                        "ended", f"{running['asked']}: aborted, {ENDING}", {"transition": running["transition_id"]}
                    )
                self._stopping = asyncio.create_task(self._stop_all())
            case s.GiveUp(component, kind, reason):
                self._give_up(component, kind, reason)

    def _carry_out_transitions(self, action: t.Instruction) -> None:
        members = self._components.members
        match action:
            case t.StartWorker():
                members.start_worker(action)
            case t.Prepare():
                members.prepare(action)
            case t.Commit():
                members.commit(action)
            case t.Retire():
                members.retire(action)
            case t.Abort():
                members.abort(action)
            case t.Release():
                members.release(action)
            case t.Publish():
                self._published = action
                self._components.set_workers(action)
            case t.Deadline(deadline_id, after_s):
                self._desk.deadline(deadline_id, time.monotonic() + after_s)
                self._timers.set(deadline_id.partition("/")[0], t.Expired(deadline_id), after_s=after_s)
            case t.Answer():
                self._desk.answered(action)
                if action.code and action.request_id == f"boot-{self._journal.facts.run}":
                    self._give_up("boot", "memory" if action.code == "impossible" else "internal", action.message)
            case t.Note(kind, text, details):
                self._note(kind, text, dict(details))
            case t.Finished():
                self._finished(action)

    def _note(self, kind: str, text: str, details: dict[str, Any]) -> None:
        if "transition" in details:
            details["transition_id"] = details.pop("transition")
        if kind == "ended":
            details["phases"] = details.pop("seconds", {})
            details["seconds"] = self._desk.finished(details["transition_id"], now_s=time.monotonic())
        self._tell(kind, text, **details)
        if kind == "begun":
            self._desk.began(details["transition_id"], now_s=time.monotonic())

    def _finished(self, action: t.Finished) -> None:
        self._timers.drop(action.transition_id)
        self._components.need_devices(needed_devices(self._spec, self._conductor))
        give_back_free_memory()
        transitions = self._conductor.transitions
        unborn = transitions is not None and transitions.current is None and not transitions.state.boot_workers
        if unborn and action.state == "failed":  # the boot, and it is not tried again
            kinds = self._components.members.failure_kinds.values()
            self._give_up("boot", next(reversed(list(kinds)), "internal"), action.reason)

    def _give_up(self, component: str, kind: str, reason: str) -> None:
        if self._given_up is None:
            self._tell("gave_up", f"giving up on {component}: {reason}", component=component, failure_kind=kind)
            self._given_up = {"component": component, "kind": kind, "reason": reason}
            self._changed.set()

    async def _stop_all(self) -> None:
        try:
            await self._policy.stop()
            await self._components.stop_all()
        except Exception:
            log.exception("not everything could be ended; `flexpert up` ends what is left")
        self._stopped = True
        self._tell("stopped", "everything has ended")

    def _tell_of_components(self, kind: str, text: str, **details: Any) -> None:
        """The death of a worker's process is told by the transitions, by the name of the worker."""
        if kind == "died" and self._conductor.transitions is not None:
            _, worker_id = self._conductor.supervision.processes().get(details["component"], ("", ""))
            if worker_id:
                log.info("%s", text)
                return
        self._tell(kind, text, **details)

    def _tell(self, kind: str, text: str, **details: Any) -> None:
        log.info("%s", text)
        self._journal.tell(kind, text, **details)
        self._changed.set()
