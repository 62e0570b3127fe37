"""The controller's answers to people, made of what the machines know and what the clock says; and who still waits for one.

Called by `controller` only; decides nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping
from typing import Any, Protocol

import msgspec

from flexpert.controller.conductor import Conductor
from flexpert.controller.spec import ClusterSpec, device_of
from flexpert.controller.supervision_types import GATEWAY
from flexpert.controller.timings import Timings
from flexpert.controller.transition import Transitions
from flexpert.controller.transition_types import Answer, Progress, Publish

KEPT = 200


class AskStatus(Protocol):
    """The components, as far as they tell of themselves."""

    async def device_status(self) -> dict[str, dict[str, Any]]: ...

    async def status(self, component: str) -> dict[str, Any]: ...


class Desk:
    def __init__(self) -> None:
        self._waiting: dict[str, asyncio.Future[Answer]] = {}
        self._deadlines: dict[str, float] = {}
        self._began_s: dict[str, float] = {}
        self._seconds: dict[str, float] = {}

    # Requests

    async def answer_to(self, request_id: str, ask: Callable[[], None]) -> Answer:
        """The machine's answer; two that ask with the same id at once get the same one."""
        waiting = self._waiting.get(request_id)
        if waiting is None:
            waiting = self._waiting[request_id] = asyncio.get_running_loop().create_future()
        ask()
        return await asyncio.shield(waiting)

    def answered(self, answer: Answer) -> None:
        waiting = self._waiting.pop(answer.request_id, None)
        if waiting is not None and not waiting.done():
            waiting.set_result(answer)

    # Times

    def deadline(self, deadline_id: str, at_s: float) -> None:
        self._deadlines = {deadline_id: at_s}  # one runs at a time

    def began(self, transition_id: str, *, now_s: float) -> None:
        self._began_s[transition_id] = now_s
        if len(self._began_s) > KEPT:
            self._began_s.pop(next(iter(self._began_s)))

    def finished(self, transition_id: str, *, now_s: float) -> float | None:
        """How long it took; None for one that an earlier controller saw begin."""
        began_s = self._began_s.pop(transition_id, None)
        if began_s is not None:
            self._seconds[transition_id] = round(now_s - began_s, 4)
        if len(self._seconds) > KEPT:
            self._seconds.pop(next(iter(self._seconds)))
        return self._seconds.get(transition_id)

    # Descriptions

    def progress(self, progress: Progress, timings: Timings, *, now_s: float) -> dict[str, Any]:
        """Progress as JSON, with deadline_s (left for this phase, None where nothing runs), seconds (so far; None for one that an earlier
        controller saw begin) and, of each joiner, whether its process had to be spawned ("cold")."""
        found: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(progress))
        at_s = self._deadlines.get(progress.deadline_id)
        found["deadline_s"] = None if at_s is None else round(max(0.0, at_s - now_s), 3)
        began_s = self._began_s.get(progress.transition_id)
        so_far = None if began_s is None else round(now_s - began_s, 4)
        found["seconds"] = self._seconds.get(progress.transition_id, so_far)
        for member in found["members"]:
            if member["role"] == "joins":
                member["cold"] = timings.is_cold(member["worker_id"])
        return found

    async def status(
        self, spec: ClusterSpec, conductor: Conductor, components: AskStatus, published: Publish
    ) -> dict[str, Any]:
        """What the machines know, and what each component tells of itself."""
        supervision, transitions = conductor.supervision, conductor.transitions
        processes = supervision.processes()
        serving = {name: worker for name, (phase, worker) in processes.items() if phase == "serving"}
        devices, gateway, *workers = await asyncio.gather(
            components.device_status(), *(components.status(name) for name in (GATEWAY, *serving))
        )
        epoch = None if transitions is None else transitions.current
        return {
            "name": spec.name,
            "phase": supervision.phase,
            "ready": conductor.ready,
            "epoch": 0 if epoch is None else epoch.number,
            "model": spec.model_id,
            "manager": self.manager(spec, devices, serving.values()),
            "gateway": gateway,
            "workers": self.workers(dict(zip(serving, workers, strict=True)), serving, transitions, published),
            "devices": self.devices(spec, devices, serving.values()),
            "max_workers": spec.max_workers,
            "standbys": sum(phase == "warm" for phase, _ in processes.values()),
            "timings": conductor.timings.to_json(),
            "processes": {name: {"phase": phase, "worker_id": worker} for name, (phase, worker) in processes.items()},
        }

    def workers(
        self,
        told: Mapping[str, dict[str, Any]],
        serving: Mapping[str, str],
        transitions: Transitions | None,
        published: Publish,
    ) -> list[dict[str, Any]]:
        """What each worker tells of itself, by worker id, with its device and its part in the current epoch."""
        epoch = None if transitions is None else transitions.current
        found = []
        for process, worker_id in sorted(serving.items(), key=lambda item: item[1]):
            answer = told.get(process) or {}
            rank = None if epoch is None else epoch.rank_of(worker_id)
            held = 0 if epoch is None or rank is None else sum(len(layer) for layer in epoch.held_by(rank))
            found.append(
                {
                    "experts": held,
                    **answer,
                    "worker_id": worker_id,
                    "process": process,
                    "device_id": device_of(worker_id),
                    "rank": rank,
                    "serving": any(worker.worker_id == worker_id for worker in published.serving),
                    "draining": worker_id in published.draining,
                }
            )
        return found

    def manager(
        self, spec: ClusterSpec, found: Mapping[str, dict[str, Any]], serving: Collection[str]
    ) -> dict[str, Any]:
        """The one of the first worker that serves, of the first device where none does; nothing while that one does not answer, even
        where another does."""
        first = next((worker_id for worker_id in spec.worker_ids if worker_id in serving), spec.worker_ids[0])
        return found.get(device_of(first), {})

    def devices(
        self, spec: ClusterSpec, found: Mapping[str, dict[str, Any]], serving: Collection[str]
    ) -> list[dict[str, Any]]:
        """Each device there is, with its manager's memory where one runs."""
        return [
            {"worker_id": worker_id if worker_id in serving else None, **found.get(device, {}), "device": device}
            for worker_id in spec.worker_ids
            for device in [device_of(worker_id)]
        ]
