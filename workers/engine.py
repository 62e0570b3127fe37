"""One worker's loop: take what arrived, decide a step, compute it, sample, emit; again.

The engine owns no policy and no arithmetic: the scheduler (pure) decides, the runner computes logits, the sampler draws tokens, the KV
memory backs and commits. It runs on one thread; `submit`, `cancel` and `call` may be used from any thread and take effect before the
next step. Nothing here knows about sockets: outputs go to the `emit` callback of the request's owner, one StepOutput a step and owner.

    alone     no group: it steps while it has requests
    grouped   it steps with its peers (workers.group): while it has requests, or when a peer has begun, and flips with them
    paused    a joiner before its epoch, a broken group, a leaver: requests are taken and kept (a leaver gives them back), none is computed
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import asdict
from typing import Any, TypeVar

import torch

from flexpert.workers.ep import EpochExperts
from flexpert.workers.group import NO_FLIP, Flipped, Group, Header, NextEpoch, Trouble
from flexpert.workers.live import LiveRequests, Owner
from flexpert.workers.memory import KvMemory
from flexpert.workers.messages import Cancel, Failed, Released, Stats, StepOutput, Submit, WorkerFrame
from flexpert.workers.runner import ModelRunner
from flexpert.workers.sampling import Sampled, Sampler
from flexpert.workers.scheduler import RequestRejected, Scheduler
from flexpert.workers.step import StepPlan, StepTimes
from flexpert.workers.transport import StepMissed

__all__ = ["MAX_FAILED_STEPS", "Engine", "Owner"]

log = logging.getLogger(__name__)

T = TypeVar("T")
STATS_INTERVAL_S = 0.25
MAX_FAILED_STEPS = 8
WAITING, BROKEN, LEFT = "waits for its epoch", "its group is broken", "has left"


class Engine:
    """emit(owner, frame) is called on the engine's thread and must not block. waiting: it computes nothing before its first epoch."""

    def __init__(
        self,
        *,
        scheduler: Scheduler,
        runner: ModelRunner,
        sampler: Sampler,
        memory: KvMemory,
        emit: Callable[[Owner, WorkerFrame], None],
        waiting: bool = False,
    ) -> None:
        self._scheduler = scheduler
        self._runner = runner
        self._memory = memory
        self._emit = emit
        self._live = LiveRequests(sampler=sampler, emit=emit, cancel=scheduler.cancel)
        self._inbox: deque[tuple[Owner, Submit | Cancel | None]] = deque()
        self._calls: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._stopping = False
        self._owners: set[Owner] = set()
        self._last_stats_s = 0.0
        self._failed_steps = 0
        self._group: Group | None = None
        self._next: NextEpoch | None = None
        self.paused = WAITING if waiting else ""
        self._pause_began_s: float | None = None
        self._pause_s = 0.0
        self.step_began_s: float | None = None
        self.times = StepTimes()
        self.on_step: Callable[[StepPlan, StepTimes], None] | None = None
        self.trouble: Trouble | None = None  # while the group is broken
        self.on_trouble: Callable[[Trouble], None] | None = None

    # Called from any thread

    def submit(self, owner: Owner, submit: Submit) -> None:
        self._put(owner, submit)

    def cancel(self, owner: Owner, cancel: Cancel) -> None:
        self._put(owner, cancel)

    def join(self, owner: Owner) -> None:
        """From here on `owner` gets Stats, also where nothing is computed: the first ones now."""
        self._owners.add(owner)
        if not self._stopping:
            self.call(lambda: self._send_stats(force=True))

    def leave(self, owner: Owner) -> None:
        """The owner is gone: cancel all that it has here."""
        self._owners.discard(owner)
        self._put(owner, None)

    def call(self, function: Callable[[], T]) -> Future[T]:
        """Run `function` on the engine's thread, between two steps."""
        answer: Future[T] = Future()

        def run() -> None:
            if not answer.set_running_or_notify_cancel():
                return
            try:
                answer.set_result(function())
            except Exception as error:
                answer.set_exception(error)

        with self._wake:
            if self._stopping:
                raise RuntimeError("the engine has stopped")
            self._calls.append(run)
            self._notify()
        return answer

    def enter(self, following: NextEpoch) -> Future[Flipped]:
        """Flip to this epoch after the first step in which all peers are ready for it; at once where it steps with nobody."""

        def ready() -> None:
            if not following.done.done():
                self._next = following

        self.call(ready)
        return following.done

    def release(self, targets: Mapping[str, str]) -> Future[list[str]]:
        """A leaver gives its requests back, each to be submitted to the worker `targets` names, elsewhere without one. Their ids."""
        return self.call(lambda: self._live.release(targets))

    def withdraw(self, number: int) -> Future[bool]:
        """Take `enter` back; False where the flip has taken place."""

        def unready() -> bool:
            if self._next is None or self._next.number != number:
                return False
            self._next = None
            return True

        return self.call(unready)

    def prime(self, experts: EpochExperts) -> Future[None]:
        """Prepare, before the first epoch, what would be prepared while serving alone with these experts."""

        def run() -> None:
            self._runner.use(experts, None)
            self._runner.warm_up()

        return self.call(run)

    def stop(self) -> None:
        with self._wake:
            self._stopping = True
            self._notify()

    # The engine's thread

    def run(self) -> None:
        """Step while there is work, here or at a peer; wait while there is none; return after `stop`."""
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._stopping or self._group is not None or not self._idle())
                if self._stopping:
                    self._run_calls()
                    return
                idle = self._idle()
            if idle and not self._peers_begin():
                continue
            self.step_began_s = time.monotonic()
            self.step()
            self.step_began_s = None

    def _idle(self) -> bool:
        return not (self._inbox or self._calls or (self._live and not self.paused))

    def _peers_begin(self) -> bool:
        """Wait until a peer begins a step (True) or something is to be done here."""
        assert self._group is not None
        try:
            return self._group.wait()
        except StepMissed as missed:
            self._break(missed)
            return False

    def step(self) -> bool:
        """One step; False where there was nothing to compute, or it came to nothing.

        What the model or the sampler cannot compute costs the requests of that step. An error in the books or in the memory
        operations is raised: after it they may contradict each other, and only a replacement's `restore` makes them whole again.
        """
        began_s = time.perf_counter()
        self._take_inbox()
        self._flip_if_alone()
        plan = None if self.paused else self._scheduler.schedule()
        if plan is None and not self._joins():
            self._send_stats(force=True)
            return False
        if plan is not None:
            self._memory.apply(plan.memory)
        scheduled_s = time.perf_counter()
        flips = False
        try:
            flips, logits = self._compute(plan)
        except StepMissed as missed:
            if plan is not None:
                self._scheduler.abandon(plan)
            self._break(missed)
            return False
        except Exception as error:
            self._fail(plan, error)
            if self._group is not None:
                self._break(error)
        else:
            if plan is not None:
                self._conclude(plan, logits, began_s=began_s, scheduled_s=scheduled_s)
        if flips:
            self._flip()
        self._send_stats(force=plan is not None and not self._live)
        return True

    def _joins(self) -> bool:
        """Without tokens of its own: whether there is a step to take part in."""
        if self._group is None:
            return False
        try:
            return self._group.must_begin(self._flip_to) or self._group.peers_began()
        except StepMissed as missed:
            self._break(missed)
            return False

    def _compute(self, plan: StepPlan | None) -> tuple[bool, Any]:
        """Whether the group flips after this step, and the logits of the plan's rows."""
        group = self._group
        flips = False
        logits = None
        if group is not None:
            begun = group.begin(Header(plan.num_tokens if plan is not None else 0, self._flip_to))
            self._end_pause()
            flips = begun.flips
            if plan is None and begun.num_tokens:
                self._runner.serve()
        if plan is not None:
            logits = self._runner.forward(plan.rows)
        if group is not None:
            group.end()
        return flips, logits

    def _conclude(self, plan: StepPlan, logits: torch.Tensor, *, began_s: float, scheduled_s: float) -> None:
        """Draw tokens; then the step is whole: its KV counts, its tokens go out."""
        try:
            sampled = self._live.sample(plan.rows, logits)
        except Exception as error:
            self._fail(plan, error)
            return
        self._failed_steps = 0
        sampled_s = time.perf_counter()
        self._finish(plan, sampled)
        ended_s = time.perf_counter()
        host_s = scheduled_s - began_s + self._runner.last_build_s + ended_s - sampled_s
        self.times = StepTimes(host_s=host_s, step_s=ended_s - began_s)
        if self.on_step is not None:
            self.on_step(plan, self.times)

    def _finish(self, plan: StepPlan, sampled: dict[str, Sampled]) -> None:
        self._memory.commit([(row.slot, row.end) for row in plan.rows])
        finished = self._scheduler.complete(plan, {name: token.token_id for name, token in sampled.items()})
        self._live.emit(plan, sampled, finished)

    def _fail(self, plan: StepPlan | None, error: Exception) -> None:
        self._failed_steps += 1
        # After an error of the device (an illegal access, a failed assertion) every later call fails too.
        if isinstance(error, torch.AcceleratorError) or self._failed_steps == MAX_FAILED_STEPS:
            raise error  # a replacement replays these requests
        if plan is None:
            log.error("a step for peers failed", exc_info=error)
            return
        log.error("step %d failed; its %d requests end with an error", plan.step, len(plan.rows), exc_info=error)
        text = f"the worker could not compute this request: {type(error).__name__}: {error}"
        for row in plan.rows:
            self._live.fail(row.request_id, "internal", text)
        self._scheduler.abandon(plan)

    # From epoch to epoch

    @property
    def _flip_to(self) -> int:
        return NO_FLIP if self._next is None else self._next.number

    def _flip_if_alone(self) -> None:
        if self._next is not None and self._group is None:
            self._flip()

    def _flip(self) -> None:
        """Between two steps: the next one is step 0 of the next epoch."""
        began_s = time.monotonic()
        following, self._next = self._next, None
        assert following is not None
        last_step = -1 if self._group is None else self._group.step - 1
        released: list[str] = []
        self._group, self.paused, self.trouble = following.group, "", None
        if following.leaves:
            self.paused = LEFT
            released = [] if following.keeps else self._live.release()
        elif following.experts is not None:
            self._runner.use(following.experts, following.exchange)
        if self._pause_began_s is None:
            self._pause_s = 0.0
            self._pause_began_s = began_s if self._live else None
        if self._group is None:
            self._end_pause()
        following.done.set_result(Flipped(last_step, time.monotonic() - began_s, tuple(released)))

    def _break(self, error: Exception) -> None:
        """The group can step no more; requests are kept until the next epoch, which is entered at once.

        Closing lets peers that wait for this rank, or that are idle, know at once.
        """
        group, self._group = self._group, None
        assert group is not None
        group.close()
        self.paused = BROKEN
        if self._live and self._pause_began_s is None:
            self._pause_began_s = time.monotonic()
        self.trouble = trouble = group.trouble(error)
        log.warning("epoch %d broke at step %d: %s", trouble.epoch, trouble.step, trouble.reason)
        if self.on_trouble is not None:
            self.on_trouble(trouble)
        self._flip_if_alone()

    @property
    def pause_s(self) -> float:
        """How long requests stood still at the last flip: from it, or from the step that was missed, to the first exchange of the
        new epoch. Goes on while they still do."""
        began_s = self._pause_began_s
        return self._pause_s if began_s is None else time.monotonic() - began_s

    def _end_pause(self) -> None:
        if self._pause_began_s is not None:
            self._pause_s = time.monotonic() - self._pause_began_s
            self._pause_began_s = None

    # The inbox

    def _put(self, owner: Owner, message: Submit | Cancel | None) -> None:
        with self._wake:
            self._inbox.append((owner, message))
            self._notify()

    def _notify(self) -> None:
        self._wake.notify()
        if (group := self._group) is not None:
            group.wake()

    def _run_calls(self) -> None:
        while self._calls:
            self._calls.popleft()()

    def _take_inbox(self) -> None:
        self._run_calls()
        while self._inbox:
            owner, message = self._inbox.popleft()
            if isinstance(message, Submit):
                self._admit(owner, message)
            elif isinstance(message, Cancel):
                self._live.drop(message.request_id)
            else:
                for name in self._live.of(owner):
                    self._live.drop(name)

    def _admit(self, owner: Owner, submit: Submit) -> None:
        if self.paused == LEFT:
            self._emit(owner, Released(request_ids=[submit.request_id]))
            return
        if self._live.owner_of(submit.request_id) not in (None, owner):
            self._live.drop(submit.request_id)  # its gateway came back before its old stream was seen to end
        try:
            ended = self._scheduler.submit(submit)
        except RequestRejected as error:
            self._emit(owner, Failed(request_id=submit.request_id, code="invalid_request", message=str(error)))
            return
        if ended is not None:
            self._emit(owner, StepOutput(step=0, finished=[ended]))
            return
        self._live.add(owner, submit)

    def _send_stats(self, *, force: bool = False) -> None:
        now_s = time.monotonic()
        if not self._owners or (now_s - self._last_stats_s < STATS_INTERVAL_S and not force):
            return
        self._last_stats_s = now_s
        stats = self.stats()
        for owner in list(self._owners):
            self._emit(owner, stats)

    def stats(self) -> Stats:
        """Load and times as of the last step."""
        return Stats(**asdict(self._scheduler.stats()), step_s=self.times.step_s, host_s=self.times.host_s)
