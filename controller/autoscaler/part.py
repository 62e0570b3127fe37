"""All of the autoscaler that the controller holds: its loop and its desk, around a bridge. Made once the controller's machines are there.

Without a policy nothing of it runs; sizes by hand pass through it all the same, since whether a policy holds them is known here.
"""

from __future__ import annotations

from typing import Any

from flexpert.controller import transition_types as t
from flexpert.controller.autoscaler.bridge import Bridge
from flexpert.controller.autoscaler.desk import PolicyDesk
from flexpert.controller.autoscaler.loop import Autoscaler
from flexpert.controller.runs import run_of


class PolicyPart:
    def __init__(self, bridge: Bridge) -> None:
        self._bridge, spec = bridge, bridge.spec
        self._autoscaler = Autoscaler(
            bridge, directory=spec.runtime.autoscaler, policy_path=spec.policy_path, run=run_of(spec)
        )
        self._desk = PolicyDesk(self._autoscaler, tell=bridge.tell)

    def start(self) -> None:
        self._autoscaler.start()

    async def stop(self) -> None:
        await self._autoscaler.stop()

    async def answer(self, word: str, arguments: dict[str, Any]) -> dict[str, Any]:
        """See PolicyDesk. Raises AdminError."""
        return await self._desk.answer(word, arguments)

    async def by_hand(self, request: t.Request, *, owner: str, for_s: float | None) -> dict[str, Any]:
        """A scale or drain that a person asked for. Raises AdminError."""
        workers = request.workers
        if request.kind == "drain":
            workers = max(1, self._bridge.size - 1)
        return await self._desk.by_hand(
            workers,
            lambda: self._bridge.request(request),
            owner=owner,
            for_s=for_s,
            again=self._bridge.known(request.request_id),
        )

    def summary(self) -> dict[str, Any] | None:
        """For status and metrics; None without a policy."""
        autoscaler, last = self._autoscaler, self._autoscaler.last
        policy = autoscaler.policy
        if policy is None:
            return None
        return {
            "name": policy.metadata.name,
            "mode": autoscaler.mode(policy.to_config(), autoscaler.clock()),
            "problem": autoscaler.source.problem or None,
            "min": policy.spec.workers.min,
            "max": policy.spec.workers.max,
            "desired": None if last is None else last.wanted,
            "reason": None if last is None else last.reason.value,
            "text": None if last is None else last.text,
            "decisions": dict(autoscaler.reasons),
            "ticks": autoscaler.tick_count,
            "tick_sum_s": round(autoscaler.tick_sum_s, 6),
        }
