"""The HBM managers of the devices, as the controller sees them: which runs where, started when needed, watched, stopped when not.

Each lives with the node agent of its device's node, which starts or adopts it. `ensure` answers at once for one that runs. The death of a
manager is told once, to `lost`; the death of an agent is not a manager's: the next agent adopts it. Called by `components` only.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

from flexpert.controller.ray_cluster import ActorGone
from flexpert.workers.actor import StartFailure

log = logging.getLogger(__name__)

Call = Callable[..., Coroutine[Any, Any, Any]]


class DeviceFailed(Exception):
    """No manager for this device."""

    def __init__(self, failure: StartFailure) -> None:
        super().__init__(failure.message)
        self.failure = failure


class Devices:
    """expected: device -> pid of the manager that an earlier controller knew. call(agent actor, method, *arguments). spawn: leaves a task
    behind. lost(device, reason): its memory is gone. unwatchable(agent actor, reason): the agent cannot do its work any more. tell: words
    for people."""

    def __init__(
        self,
        expected: Mapping[str, int],
        *,
        call: Call,
        spawn: Callable[[Coroutine[Any, Any, None]], None],
        lost: Callable[[str, str], None],
        unwatchable: Callable[[Any, str], None],
        tell: Callable[..., None],
    ) -> None:
        self._call, self._spawn, self._lost, self._unwatchable, self._tell = call, spawn, lost, unwatchable, tell
        self._expected = dict(expected)
        self._infos: dict[str, dict[str, Any]] = {}
        self._agents: dict[str, Any] = {}
        self._locks: dict[str, asyncio.Lock] = {}

    def running(self) -> list[str]:
        return list(self._infos)

    def pids(self) -> dict[str, int]:
        """Device -> pid of its manager."""
        return {**self._expected, **{device: int(info["pid"]) for device, info in self._infos.items()}}

    def socket(self, device: str) -> str:
        """Where its manager listens. Raises KeyError where none runs."""
        return str(self._infos[device]["socket"])

    async def ensure(self, device: str, agent: Any) -> dict[str, Any]:
        """The running manager, or a new one. Raises DeviceFailed, ActorGone (the agent's)."""
        async with self._locks.setdefault(device, asyncio.Lock()):
            known = self._infos.get(device)
            if known is not None and self._agents[device] is agent:
                return known
            began_s = time.monotonic()
            answer: dict[str, Any] = await self._call(agent, "ensure", device)
            if (failure := answer.get("failure")) is not None:
                raise DeviceFailed(StartFailure(**failure))
            self.found(answer, agent)
            if known is None:
                verb = "adopted, its memory is as it was" if answer["adopted"] else "started"
                text = f"HBM manager of {device} {verb} (pid {answer['pid']})"
                self._tell("manager", text, seconds=time.monotonic() - began_s, **answer)
            return answer

    def found(self, info: dict[str, Any], agent: Any) -> None:
        """Take note of a running manager and watch it. Where another one ran before it, that one is lost."""
        device = info["device"]
        before = self._infos[device]["pid"] if device in self._infos else self._expected.get(device)
        self._expected.pop(device, None)
        self._infos[device], self._agents[device] = info, agent
        if before is not None and before != info["pid"]:
            self._lost(device, f"the HBM manager of {device} ended; weights and KV it held are gone")
        self._spawn(self._watch(device, info["pid"], agent))

    async def _watch(self, device: str, pid: int, agent: Any) -> None:
        try:
            reason = await self._call(agent, "wait_manager_closed", device, pid)
        except ActorGone:
            return  # the agent's death is told elsewhere
        except Exception as error:
            self._unwatchable(agent, f"the HBM manager of {device} cannot be watched: {error}")
            return
        if self._infos.get(device, {}).get("pid") == pid and self._agents[device] is agent:
            self._forget(device)
            self._tell("died", reason, component="manager", device=device)
            self._lost(device, reason)

    def let_go(self) -> None:
        """All managers are about to be stopped: their ends are no losses."""
        self._infos.clear()
        self._agents.clear()

    def _forget(self, device: str) -> None:
        self._infos.pop(device, None)
        self._agents.pop(device, None)

    async def stop(self, device: str) -> None:
        """End a manager that nobody needs; its memory is free."""
        async with self._locks.setdefault(device, asyncio.Lock()):
            agent = self._agents.get(device)
            if agent is None:
                return
            self._forget(device)
            await self._call(agent, "stop", device)
            self._tell("manager", f"HBM manager of {device} stopped: no worker needs it", device=device)
