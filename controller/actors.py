"""The actors that a controller has: kept by name, watched, ended; and the orders that are under way to them.

An actor that was told to end is forgotten first, so its death is no event. An order that fails ends its component and is told as Failed:
nothing half-made stays, and nobody waits for what cannot come. The base of `components`.
"""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

from flexpert.controller import ray_cluster
from flexpert.controller.processes import ProcessId
from flexpert.controller.ray_cluster import ActorGone
from flexpert.controller.supervision_types import Died, Event, Failed

log = logging.getLogger(__name__)

FIND_TIMEOUT_S = 5.0
STOP_TIMEOUT_S = 10.0

Tell = Callable[..., None]


class Actors:
    """send: where events go. tell(kind, text, **details): where words go. on_kill(component): called before one is ended."""

    def __init__(self, *, send: Callable[[Event], None], tell: Tell, on_kill: Callable[[str], None]) -> None:
        self._report, self._tell, self.on_kill = send, tell, on_kill
        self._actors: dict[str, Any] = {}  # component (agent, gateway, process name) -> actor
        self._pids: dict[str, ProcessId] = {}  # of worker processes: one that is stopped ends by its pid at once
        self._orders: dict[str, Coroutine[Any, Any, None]] = {}  # component -> the order that is being carried out
        self._tasks: set[asyncio.Task[None]] = set()

    def kill(self, component: str) -> None:
        """End a component's process at once; its death is no event any more."""
        self.on_kill(component)
        actor, process = self._actors.pop(component, None), self._pids.pop(component, None)
        self._orders.pop(component, None)
        if process is not None:
            process.signal(signal.SIGKILL)
        if actor is not None:
            ray_cluster.kill_actor(actor)

    async def status(self, component: str) -> dict[str, Any]:
        """What a component tells of itself; {} where it cannot, so that one in trouble never hides the others."""
        actor = self._actors.get(component)
        if actor is None:
            return {}
        try:
            return await asyncio.wait_for(ray_cluster.call(actor, "status"), FIND_TIMEOUT_S) or {}
        except Exception as error:
            log.warning("%s does not tell its status: %r", component, error)
            return {}

    async def ask(self, component: str, method: str, *arguments: Any) -> Any:
        """A method of a component's actor; None where there is no such component now. Raises ActorGone."""
        actor = self._actors.get(component)
        return None if actor is None else await ray_cluster.call(actor, method, *arguments)

    async def _stop_workers(self, workers: Mapping[str, Any]) -> None:
        """In order where they answer, and all of them."""
        stops = (asyncio.wait_for(ray_cluster.call(actor, "stop"), STOP_TIMEOUT_S) for actor in workers.values())
        for answer in await asyncio.gather(*stops, return_exceptions=True):
            if isinstance(answer, Exception) and not isinstance(answer, ActorGone):
                log.warning("a worker process did not stop in order: %r", answer)
        for name, actor in workers.items():
            self.kill(name)
            ray_cluster.kill_actor(actor)

    def _keep(self, component: str, actor: Any) -> None:
        self._actors[component] = actor
        self._background(self._watch(component, actor))

    async def _watch(self, component: str, actor: Any) -> None:
        """Report the death of an actor that is still ours."""
        try:
            await ray_cluster.call(actor, "wait_closed")
        except Exception as error:
            self._lost(component, actor, str(error))

    def _lost(self, component: str, actor: Any, reason: str) -> None:
        """End it before it is forgotten: Ray may only have lost sight of it, and one that lives keeps its port and its memory."""
        if self._actors.get(component) is actor:
            self.kill(component)
            self._tell("died", f"{component}: {reason}", component=component)
            self._report(Died(component, reason))

    def _keep_pid(self, component: str, pid: int) -> None:
        process = ProcessId.of(pid, component)
        if process is not None:
            self._pids[component] = process

    def _refused(self, component: str, answer: dict[str, Any]) -> bool:
        """Whether the component answered that it cannot start; then it is ended and reported."""
        failure = answer.get("failure")
        if failure is None:
            return False
        self._tell(
            "failed",
            f"{component} did not start: {failure['message']}",
            component=component,
            failure_kind=failure["kind"],
        )
        self.kill(component)
        self._report(Failed(component, failure["kind"], failure["message"], failure["permanent"]))
        return True

    def _order(self, component: str, work: Coroutine[Any, Any, None]) -> None:
        self._orders[component] = work
        self._background(self._carry_out(component, work))

    async def _carry_out(self, component: str, work: Coroutine[Any, Any, None]) -> None:
        """See an order to its end. A failure is told unless the component was ended meanwhile: then it is no news, or told already."""
        try:
            await work
        except ActorGone as error:
            if self._orders.get(component) is work:
                self._lost(component, self._actors.get(component), str(error))
        except Exception as error:
            log.exception("an order to %s failed", component)
            if self._orders.get(component) is work:
                self.kill(component)
                reason = f"{type(error).__name__}: {error}"
                self._tell(
                    "failed", f"{component} did not start: {reason}", component=component, failure_kind="internal"
                )
                self._report(Failed(component, "internal", reason, False))
        finally:
            if self._orders.get(component) is work:
                del self._orders[component]

    def _background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(self._shielded(work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _shielded(self, work: Coroutine[Any, Any, None]) -> None:
        """For what is no order: a death in the middle of a call is reported by _watch, anything else is written down."""
        try:
            await work
        except ActorGone as error:
            log.info("%r ended: %s", work, error)
        except Exception:
            log.exception("%r failed", work)
