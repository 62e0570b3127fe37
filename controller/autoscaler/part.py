"""All of the autoscaler that the controller holds: its bridge, its loop, its desk. Made once the controller's machines are there.

Without a policy nothing of it runs; sizes by hand pass through it all the same, since whether a policy holds them is known here.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from flexpert.controller import transition_types as t
from flexpert.controller.autoscaler.bridge import AskGateway, Bridge, Progress
from flexpert.controller.autoscaler.desk import PolicyDesk
from flexpert.controller.autoscaler.loop import Autoscaler
from flexpert.controller.conductor import Conductor
from flexpert.controller.journal import Journal
from flexpert.controller.runs import run_of
from flexpert.controller.spec import ClusterSpec


class PolicyPart:
    """As Bridge; request: begin a transition, whoever asks for it."""

    def __init__(
        self,
        *,
        spec: ClusterSpec,
        journal: Journal,
        conductor: Conductor,
        ask: AskGateway,
        progress: Progress,
        request: Callable[[t.Request], Awaitable[dict[str, Any]]],
        send: Callable[[t.Event], None],
        tell: Callable[..., None],
    ) -> None:
        self._conductor, self._request = conductor, request
        self._bridge = Bridge(
            spec=spec, journal=journal, conductor=conductor, ask=ask, progress=progress, request=request, send=send, tell=tell
        )  # fmt: skip
        self._autoscaler = Autoscaler(
            self._bridge, directory=spec.runtime.autoscaler, policy_path=spec.policy_path, run=run_of(spec)
        )
        self._desk = PolicyDesk(self._autoscaler, tell=tell)

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
        if request.kind == "drain" and self._conductor.transitions is not None:
            workers = max(1, len(self._conductor.transitions.state.members) - 1)
        return await self._desk.by_hand(
            workers,
            lambda: self._request(request),
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
