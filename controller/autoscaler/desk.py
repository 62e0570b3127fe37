"""What people ask about the policy, and what they may change: the answers of the admin API's /policy and /decisions.

Each question is a method; `answer` finds it by its word. Refusals are `AdminError`. Called by the controller.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from flexpert.controller.autoscaler.dry_run import NothingRecorded, dry_run
from flexpert.controller.autoscaler.loop import Autoscaler, one_line, request_id
from flexpert.controller.autoscaler.override import HOLD_S, LONGEST_S, MODES
from flexpert.controller.autoscaler.source import UnusablePolicy, read_policy
from flexpert.controller.errors import AdminError
from flexpert.controller.policy.record import RecordError

NO_POLICY = "this cluster has no policy: start it with `flexpert up --policy FILE`, or put one by PUT /admin/v1/policy"
WORDS = ("show", "decisions", "decision", "pause", "resume", "mode", "put", "dry_run")


class PolicyDesk:
    def __init__(self, autoscaler: Autoscaler, *, tell: Callable[..., None]) -> None:
        self._autoscaler, self._tell = autoscaler, tell

    async def answer(self, word: str, arguments: dict[str, Any]) -> dict[str, Any]:
        if word not in WORDS:
            raise AdminError("invalid", f"{word!r} is no question: {', '.join(WORDS)} are")
        found: dict[str, Any] = await getattr(self, word)(**arguments)
        return found

    # Questions

    async def show(self) -> dict[str, Any]:
        """The policy in use, what stands against it, and the last decision."""
        autoscaler, now_s = self._autoscaler, self._autoscaler.clock()
        policy, source, last = autoscaler.policy, autoscaler.source, autoscaler.last
        found: dict[str, Any] = {
            "active": policy is not None,
            "file": None if source.path is None else str(source.path),
            "problem": source.problem or None,
        }
        if policy is None:
            return found
        lease = autoscaler.lease.read()
        entry = None if last is None else autoscaler.log.find(last.decision_id)
        return {
            **found,
            "name": policy.metadata.name,
            "origin": source.origin,
            "mode": autoscaler.mode(policy.to_config(), now_s),
            **autoscaler.controls.to_json(now_s),
            "leads": autoscaler.leads,
            "lease": None if lease is None else {"owner": lease.owner, "left_s": round(lease.until_s - now_s, 1)},
            "workers": {"min": policy.spec.workers.min, "max": policy.spec.workers.max},
            "desired": None if last is None else last.wanted,
            "last": None if entry is None else entry.to_json(),
            "policy": policy.as_written(),
            "text": source.text,
        }

    async def decisions(self, *, limit: int = 50, changes: bool = False) -> dict[str, Any]:
        """The last ones, newest first; changes: only those that ordered, or would have."""
        entries = [
            entry for entry in reversed(self._autoscaler.log.entries) if not changes or entry.decision.would is not None
        ]
        return {"decisions": [entry.to_json() for entry in entries[:limit]]}

    async def decision(self, *, decision_id: str) -> dict[str, Any]:
        """One, with its outcome once that is measured."""
        entry = self._autoscaler.log.find(decision_id)
        if entry is None:
            raise AdminError(
                "not_found",
                f"there is no decision {decision_id!r}, or it is too long ago; `flexpert policy show` names the last one",
            )
        return {**entry.to_json(), "request_id": request_id(decision_id) if entry.decision.action else None}

    async def dry_run(self, *, text: str) -> dict[str, Any]:
        """What that policy would have done with what this cluster recorded."""
        try:
            config = read_policy(text).to_config()
            lines = await asyncio.to_thread(self._autoscaler.log.lines)
            return await asyncio.to_thread(dry_run, lines, config)
        except (UnusablePolicy, RecordError) as error:
            raise AdminError("invalid", str(error)) from error
        except NothingRecorded as error:
            raise AdminError("conflict", str(error)) from error

    # Changes

    async def put(self, *, text: str | None = None, owner: str = "admin API") -> dict[str, Any]:
        """Use this text; without one, read the file again."""
        source = self._autoscaler.source
        if text is None:
            if source.path is None:
                raise AdminError("invalid", "this cluster was started without a policy file: send the text of a policy")
            change = source.poll(force=True)
            if change is not None:
                self._autoscaler.changed(change)
            if source.problem:
                raise AdminError("invalid", source.problem)
        else:
            try:
                change = source.put(text, origin=owner)
            except UnusablePolicy as error:
                kept = "; the policy that was in use stays" if self._autoscaler.policy else ""
                self._tell(
                    "policy",
                    f"a policy of {owner} cannot be used: {one_line(str(error))}{kept}",
                    failure_kind="settings",
                )
                raise AdminError("invalid", f"{error}{kept}") from error
            self._autoscaler.changed(change)
        self._autoscaler.begin()
        return await self.show()

    async def pause(self, *, for_s: float, owner: str = "admin API") -> dict[str, Any]:
        self._need_policy()
        _check_time(for_s)
        self._autoscaler.controls.pause(until_s=self._autoscaler.clock() + for_s, owner=owner)
        return await self._told(f"the policy is paused for {for_s:g} s by {owner}")

    async def resume(self, *, owner: str = "admin API") -> dict[str, Any]:
        self._need_policy()
        ended = self._autoscaler.controls.resume()
        return await self._told(f"the policy goes on, by {owner}: {', '.join(ended) or 'nothing was'} ended")

    async def mode(self, *, mode: str, owner: str = "admin API") -> dict[str, Any]:
        """mode: of MODES in any case, or "policy": what is written in it."""
        self._need_policy()
        found = {one.lower(): one for one in MODES}.get(mode.lower())
        if found is None and mode.lower() != "policy":
            raise AdminError(
                "invalid", f"mode {mode!r}: expected {', '.join(MODES)}, or policy for what the policy says"
            )
        self._autoscaler.controls.set_mode(found, owner=owner)
        return await self._told(f"mode {found or 'as the policy says'}, by {owner}")

    async def _told(self, text: str) -> dict[str, Any]:
        self._tell("policy", text)
        self._autoscaler.keep()
        return await self.show()

    def _need_policy(self) -> None:
        if self._autoscaler.policy is None:
            raise AdminError("not_found", NO_POLICY)

    # A size by hand

    async def by_hand(
        self,
        workers: int,
        request: Callable[[], Awaitable[dict[str, Any]]],
        *,
        owner: str,
        for_s: float | None,
        again: bool,
    ) -> dict[str, Any]:
        """Ask for a size in spite of the policy: where it is active, that size holds for a while. A size that the policy would undo is
        refused, with nothing done. again: this request began its transition before."""
        held = self._holds()
        if for_s is not None:
            _check_time(for_s)
        if held and not again:
            self._check_bounds(workers)
        progress = await request()
        if held and not again:
            now_s, hold_s = self._autoscaler.clock(), HOLD_S if for_s is None else for_s
            self._autoscaler.controls.hold(workers, until_s=now_s + hold_s, owner=owner)
            await self._told(
                f"{workers} workers by {owner} for {hold_s:g} s; then the policy decides again, or at once after `flexpert policy resume`"
            )
        return progress

    def _holds(self) -> bool:
        """Whether a policy would have a say, if not now then as soon as it has the lease."""
        autoscaler = self._autoscaler
        policy = autoscaler.policy
        return policy is not None and autoscaler.controls.effective(policy.spec.mode, autoscaler.clock()) == "Active"

    def _check_bounds(self, workers: int) -> None:
        from flexpert.controller.autoscaler.schedule import read_schedule
        from flexpert.controller.policy.spec import ScheduleSignal

        policy, now_s = self._autoscaler.policy, self._autoscaler.clock()
        assert policy is not None
        spec = policy.spec
        open_now = [read_schedule(one, now_s=now_s) for one in spec.signals if isinstance(one, ScheduleSignal)]
        low = max([spec.workers.min, *(reading.low for reading in open_now if reading.low is not None)])
        high = min(
            [
                spec.workers.max,
                *([] if spec.budget.devices is None else [spec.budget.devices]),
                *(reading.high for reading in open_now if reading.high is not None),
            ]
        )
        if not low <= workers <= high:
            raise AdminError(
                "conflict",
                f"policy {policy.metadata.name} keeps {low} to {high} workers now and would undo {workers}: choose one of these, change "
                "the policy, or pause it first with `flexpert policy pause --for 1h`",
            )


def _check_time(for_s: float) -> None:
    if not 0 < for_s <= LONGEST_S:
        raise AdminError("invalid", f"{for_s:g} s: expected more than 0 and at most {LONGEST_S:g} s (30 days)")
