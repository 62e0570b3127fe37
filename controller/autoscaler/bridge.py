"""The autoscaler's view of the controller: facts from its machines, loads from the gateway, orders through its transitions.

Made by the controller, which lends it what it needs. Everything is read at the moment it is asked.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

from flexpert.controller import transition_types as t
from flexpert.controller.autoscaler.memory import memory_floor
from flexpert.controller.autoscaler.observe import ClusterFacts
from flexpert.controller.conductor import Conductor
from flexpert.controller.journal import Journal
from flexpert.controller.spec import ClusterSpec
from flexpert.controller.supervision_types import GATEWAY

Progress = Callable[[str | None], dict[str, Any] | None]


class AskGateway(Protocol):
    async def __call__(self, component: str, method: str, *arguments: Any) -> Any: ...


class Bridge:
    """ask: a call to a component's actor. progress: of a transition, as people are told. request: begin a transition; raises AdminError.
    send: an event for the machines."""

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
        self.spec, self.request, self.tell = spec, request, tell
        self._journal, self._conductor = journal, conductor
        self._ask, self._progress, self._send = ask, progress, send

    @property
    def size(self) -> int:
        """Members of the epoch."""
        transitions = self._conductor.transitions
        return 0 if transitions is None else len(transitions.state.members)

    def facts(self) -> ClusterFacts | None:
        transitions = self._conductor.transitions
        if transitions is None or transitions.state.current is None or self._conductor.supervision.phase != "running":
            return None
        progress = self._progress(None)
        if progress is not None:
            progress = {**progress, **self._times(progress["transition_id"])}
        return ClusterFacts(
            serving=transitions.state.members,
            absent=frozenset(transitions.state.dead),
            progress=progress,
            devices=min(self.spec.max_workers, len(self.spec.worker_ids)),
            timings=self._conductor.timings.to_json(),
        )

    def transition_state(self, transition_id: str) -> str:
        """ "running", "done", "aborted", "failed"; "" for one that is not known any more."""
        found = self._progress(transition_id)
        return "" if found is None else str(found["state"])

    def known(self, request_id: str) -> bool:
        """Whether that request began a transition before."""
        transitions = self._conductor.transitions
        return transitions is not None and request_id in transitions.state.requests

    def memory_floor(self, kv_used_tokens: int) -> int:
        transitions = self._conductor.transitions
        if transitions is None:
            return 1
        return memory_floor(
            transitions.config,
            kv_used_tokens=kv_used_tokens,
            kv_token_bytes=self._journal.facts.model.get("kv_token_bytes", 0),
            kv_bytes_max=self.spec.kv_bytes,
        )

    async def load(
        self, *, window_s: float, slo: tuple[float | None, float | None] | None, long_s: float | None
    ) -> dict[str, Any]:
        return dict(await self._ask(GATEWAY, "load", window_s, slo, long_s) or {})

    async def scale(self, workers: int, request_id: str) -> dict[str, Any]:
        """Once it was asked for, it is seen to its answer also where nobody waits any longer: a size is never half asked for."""
        return await asyncio.shield(
            asyncio.ensure_future(self.request(t.Request("scale", request_id, workers=workers)))
        )

    def give_up(self, transition_id: str) -> bool:
        """Its deadline is now. After the first order to commit there is no way back, and nothing is done."""
        found = self._progress(transition_id)
        if found is None or found["state"] != "running" or found["phase"] not in ("start", "prepare"):
            return False
        self._send(t.Expired(found["deadline_id"]))
        return True

    def _times(self, transition_id: str) -> dict[str, float]:
        """When it began and ended, in unix time, as the journal's events say; also of one that an earlier controller saw."""
        times: dict[str, float] = {}
        for event in self._journal.backwards():
            if event.get("transition_id") == transition_id:
                if event["kind"] == "ended":
                    times.setdefault("ended_s", event["time_s"])
                elif event["kind"] == "begun":
                    times["began_s"] = event["time_s"]
                    break
        return times
