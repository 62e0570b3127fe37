"""The loop: once an interval it looks, has the decision core decide, writes the decision down, then orders what it says.

It is the one writer of sizes (see `lease`) and acts only through the controller's transitions, each order with a request id made of the
decision's: an order that is repeated, also by a restarted controller, begins nothing new. What people say against the policy (`override`)
reaches the core as its mode or as an `Override`. Without a policy nothing runs. Made by the controller; `desk` answers people about it.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import secrets
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from flexpert.controller.autoscaler.lease import Lease
from flexpert.controller.autoscaler.log import DecisionLog
from flexpert.controller.autoscaler.observe import ClusterFacts, Observer
from flexpert.controller.autoscaler.override import Controls
from flexpert.controller.autoscaler.source import Change, PolicySource
from flexpert.controller.errors import AdminError
from flexpert.controller.policy.decide import decide
from flexpert.controller.policy.types import Decision, Mode, Observation, Plan, PolicyConfig, Reason, State
from flexpert.controller.runtime_dir import read_json, write_bytes

if TYPE_CHECKING:
    from flexpert.controller.autoscaler.signals import Expect, Signals
    from flexpert.controller.policy.spec import ScalingPolicy

log = logging.getLogger(__name__)

LOAD_TIMEOUT_S = 2.0
ORDER_TIMEOUT_S = 10.0
SHORTEST_WINDOW_S = 10.0
OUTCOME_AFTER_S = 300.0
OUTCOMES_EVERY_S = 15.0
TROUBLE = {Reason.MISSING_DATA, Reason.STALE_DATA, Reason.INSUFFICIENT_CAPACITY, Reason.CAPPED}  # told when they begin


class Cluster(Protocol):
    """What the loop sees of the controller, and all that it can do."""

    def facts(self) -> ClusterFacts | None:
        """None while no size can be decided: the cluster has not started yet, or ends."""

    def memory_floor(self, kv_used_tokens: int) -> int: ...

    def transition_state(self, transition_id: str) -> str:
        """ "running", "done", "aborted", "failed"; "" for one that is not known any more."""

    async def load(
        self, *, window_s: float, slo: tuple[float | None, float | None] | None, long_s: float | None
    ) -> dict[str, Any]:
        """The gateway's answer; {} or any exception where there is none."""

    async def scale(self, workers: int, request_id: str) -> dict[str, Any]:
        """Raises AdminError where it is refused."""

    def give_up(self, transition_id: str) -> bool:
        """Abort that transition where it can still be."""

    def tell(self, kind: str, text: str, **details: Any) -> None: ...


class Autoscaler:
    """directory: where state, decisions and lease are kept. run: names the `up`; what an earlier one left is not taken over.

    clock: unix time. Everything below `tick` is given the time, so that tests play hours in moments."""

    def __init__(
        self,
        cluster: Cluster,
        *,
        directory: Path,
        policy_path: Path | None,
        run: str,
        clock: Callable[[], float] | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        expect: Expect | None = None,
    ) -> None:
        self._cluster, self._directory, self._run = cluster, directory, run
        self.clock, self._sleep, self._expect = clock or steady_clock(), sleep, expect
        self.source = PolicySource(policy_path)
        self.controls = Controls()
        self.state = State(run_id=secrets.token_hex(3))
        self.log = DecisionLog(directory)
        self.lease = Lease(directory / "lease.json", owner=f"controller-{secrets.token_hex(4)}", period_s=30.0)
        self.leads = False
        self.last: Decision | None = None
        self.reasons: Counter[str] = Counter()
        self.tick_count, self.tick_sum_s = 0, 0.0
        self._signals: Signals | None = None
        self._observer = Observer(restarted_at_s=self.clock())
        self._restored: dict[str, Any] = {}
        self._confirmed = ""
        self._trouble: Reason | None = None
        self._outcomes_at_s = 0.0
        self._failing = ""
        self._task: asyncio.Task[None] | None = None

    # Life

    @property
    def policy(self) -> ScalingPolicy | None:
        return self.source.policy

    def start(self) -> None:
        """Take over what an earlier controller of this run left, read the policy, and begin where there is one."""
        try:
            self._restore()
        except (KeyError, TypeError, ValueError, AttributeError, OSError):
            log.exception("what an earlier controller left cannot be read; the autoscaler begins without it")
        change = self.source.poll()
        if change is not None:
            self.changed(change)
        elif self.policy is not None:
            self._use(self.policy)
        self.begin()

    def begin(self) -> None:
        """Let the loop run where there is a policy; does nothing where it runs."""
        if self._task is None and (self.policy is not None or self.source.path is not None):
            self._task = asyncio.get_running_loop().create_task(self._loop(), name="autoscaler")

    async def stop(self) -> None:
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        if self._signals is not None:
            await self._signals.close()
        if self.leads:
            self.lease.release()
            self.leads = False

    async def _loop(self) -> None:
        while True:
            began_s = time.monotonic()
            try:
                await self.tick()
                self._failing = ""
            except Exception as error:
                log.exception("a tick of the autoscaler failed")
                if (text := f"{type(error).__name__}: {error}") != self._failing:
                    self._cluster.tell("policy", f"the policy could not be followed: {text}", failure_kind="internal")
                self._failing = text
            took_s = time.monotonic() - began_s
            interval_s = self.policy.spec.interval_s if self.policy else 1.0
            await self._sleep(max(0.05, interval_s - took_s))

    # A tick

    async def tick(self) -> Decision | None:
        """Look, decide, write down, order. None where there is nothing to decide about."""
        began_s = time.monotonic()
        change = self.source.poll()
        if change is not None:
            self.changed(change)
        for text in self.controls.expire(self.clock()):
            self._cluster.tell("policy", text)
        facts = self._cluster.facts()
        if self.policy is None or facts is None:
            return None
        config = self.policy.to_config()
        self._take_lease()
        observation = await self._observe(config, facts)
        config = dataclasses.replace(config, mode=self.mode(config, observation.now_s))
        before = self.state
        decision, self.state = decide(observation, before, config)
        self.last = decision
        self.reasons[decision.reason.value] += 1
        self.log.add(before, observation, decision, config)
        self._save()  # before the order: a restarted controller repeats this one, and not another
        self._tell_trouble(decision)
        if decision.action is not None:
            await self._order(decision, decision.action)
        else:
            await self._repeat_order(config)
        self.tick_count, self.tick_sum_s = self.tick_count + 1, self.tick_sum_s + time.monotonic() - began_s
        return decision

    def mode(self, config: PolicyConfig, now_s: float) -> Mode:
        """Whoever has no lease only says what it would do."""
        mode = self.controls.effective(config.mode, now_s)
        return "Advisory" if mode == "Active" and not self.leads else mode

    async def _observe(self, config: PolicyConfig, facts: ClusterFacts) -> Observation:
        window_s = max(SHORTEST_WINDOW_S, config.panic.window_s, 2 * config.interval_s)
        slo = None if config.slo is None else (config.slo.ttft_s, config.slo.tpot_s)
        asked_s = self.clock()
        long_s = OUTCOME_AFTER_S if asked_s - self._outcomes_at_s >= OUTCOMES_EVERY_S else None
        told: dict[str, Any] = {}
        try:
            async with asyncio.timeout(LOAD_TIMEOUT_S):
                told = await self._cluster.load(window_s=window_s, slo=slo, long_s=long_s)
        except Exception as error:
            log.warning("the gateway does not tell its load: %r", error)
        now_s = self.clock()
        self._observer.hear(told, now_s=now_s, window_s=window_s)
        if told.get("long"):
            self._outcomes_at_s = now_s
            self.log.measure(
                told["long"],
                workers=len(facts.serving),
                state_of=self._cluster.transition_state,
                now_s=now_s,
                after_s=OUTCOME_AFTER_S,
            )
        if told and self._signals is not None:
            traffic = told["traffic"]
            self._signals.saw(
                now_s,
                prompt_tokens_per_s=traffic["prompt_tokens_per_s"],
                output_tokens_per_s=traffic["output_tokens_per_s"],
            )
        readings = {} if self._signals is None else await self._signals.read(join_s=self.state.join_ewma_s)
        return self._observer.observe(
            now_s=self.clock(),
            facts=facts,
            readings=readings,
            override=self.controls.override(now_s),
            memory_floor=self._cluster.memory_floor(self._observer.kv_used_tokens),
        )

    def _take_lease(self) -> None:
        led = self.leads
        self.lease.period_s = max(30.0, 6 * self.policy.spec.interval_s if self.policy else 0.0)
        try:
            self.leads = self.lease.renew(self.clock())
            why = f"{holder.owner} has the lease now" if (holder := self.lease.read()) else "the lease is gone"
        except OSError as error:
            self.leads, why = False, f"the lease cannot be written: {error.strerror}"
        if led and not self.leads:
            self._cluster.tell("policy", f"{why}; only looking on")

    # Orders

    async def _order(self, decision: Decision, plan: Plan) -> None:
        policy, text = decision.policy, decision.text
        details = {"decision_id": decision.decision_id, "reason": decision.reason.value}
        if plan.kind == "abort":
            if self._cluster.give_up(plan.transition_id):
                self._cluster.tell("scaling", f"policy {policy} gives up {plan.transition_id}: {text}", **details)
            else:
                self.log.refused(
                    decision.decision_id, f"{plan.transition_id} has ended, or gone too far to be given up"
                )
            return
        self._cluster.tell(
            "scaling", f"policy {policy}: {plan.from_workers} -> {plan.target} workers: {text}",
            from_workers=plan.from_workers, to_workers=plan.target, **details,
        )  # fmt: skip
        await self._send(decision.decision_id, plan)

    async def _repeat_order(self, config: PolicyConfig) -> None:
        """An order whose answer was not seen, by this controller or the one before."""
        order = self.state.order
        if (
            order is not None
            and order.decision_id != self._confirmed
            and order.plan.kind != "abort"
            and config.mode == "Active"
        ):
            await self._send(order.decision_id, order.plan)

    async def _send(self, decision_id: str, plan: Plan) -> None:
        try:
            async with asyncio.timeout(ORDER_TIMEOUT_S):
                progress = await self._cluster.scale(plan.target, request_id(decision_id))
            self._confirmed = decision_id
            self.log.ordered(decision_id, str(progress.get("transition_id") or ""))
            self._save()
        except AdminError as error:
            self.log.refused(decision_id, error.message)
            if (
                error.code == "conflict"
            ):  # a repair, most likely: this order is given again after it, or given up at its deadline
                log.info("the order of %s has to wait: %s", decision_id, error.message)
                return
            self._confirmed = decision_id
            self._save()
            self._observer.refused(
                order_id=decision_id, from_workers=plan.from_workers, to_workers=plan.target, reason=error.message,
                now_s=self.clock(),
            )  # fmt: skip
            self._cluster.tell(
                "scaling",
                f"the order of {decision_id} was refused: {error.message}",
                decision_id=decision_id,
                code=error.code,
            )
        except TimeoutError:
            log.warning("the order of %s was not answered; it is given again", decision_id)

    def _tell_trouble(self, decision: Decision) -> None:
        trouble = decision.reason if decision.reason in TROUBLE else None
        if trouble is not None and trouble != self._trouble:
            self._cluster.tell("scaling", decision.text, decision_id=decision.decision_id, reason=decision.reason.value)
        self._trouble = trouble

    # The policy in use

    def changed(self, change: Change) -> None:
        """What `source` found."""
        if change.policy is None:
            kept = (
                f"; {self.policy.metadata.name} of {self.source.origin} stays in use"
                if self.policy
                else "; no policy is in use"
            )
            self._cluster.tell(
                "policy", f"the policy cannot be used: {one_line(change.text)}{kept}", failure_kind="settings"
            )
            return
        self._use(change.policy)
        workers = change.policy.spec.workers
        self._cluster.tell(
            "policy", f"policy {change.policy.metadata.name} of {self.source.origin} is in use: {workers.min} to {workers.max} workers, "
            f"mode {change.policy.spec.mode}",
        )  # fmt: skip
        self._save()

    def _use(self, policy: ScalingPolicy) -> None:
        from flexpert.controller.autoscaler.signals import Signals

        saved = self._restored.get("history") if self._signals is None else self._signals.to_json()
        if self._signals is not None:
            self._closing = asyncio.get_running_loop().create_task(self._signals.close())
        self._signals = Signals(policy, clock=self.clock, saved=saved, expect=self._expect)

    # What survives the controller

    def keep(self) -> None:
        """What people said is on disk before they are told that it is done."""
        self._save()

    def _save(self) -> None:
        kept = {
            "run": self._run,
            "state": self.state,
            "controls": self.controls,
            "source": self.source.to_json(),
            "observer": self._observer.to_json(),
            "orders": self.log.orders(),
            "history": None if self._signals is None else self._signals.to_json(),
        }
        try:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_bytes(self._directory / "state.json", msgspec.json.encode(kept))
        except OSError:
            log.exception("the autoscaler's state could not be written down")

    def _restore(self) -> None:
        found = read_json(self._directory / "state.json") or {}
        if found.get("run") != self._run:
            if found:
                self.log.forget()
            return
        self._restored = found
        self.log.load(found.get("orders"))
        self.source.restore(found.get("source"))
        self.controls = msgspec.convert(found["controls"], Controls)
        self._observer = Observer(restarted_at_s=self.clock(), saved=found.get("observer"))
        state = msgspec.convert(found["state"], State)
        if state.last_s is None or state.last_s <= self.clock():  # else the clock was put back: its times mean nothing
            self.state = state


def steady_clock() -> Callable[[], float]:
    """Unix time as it was at the call, going on evenly: whoever sets the machine's clock moves no window."""
    offset_s = time.time() - time.monotonic()
    return lambda: offset_s + time.monotonic()


def one_line(problems: str) -> str:
    """For events: each is a line."""
    return "; ".join(problems.splitlines())


def request_id(decision_id: str) -> str:
    """Of the order that this decision gives."""
    return f"policy-{decision_id}"
