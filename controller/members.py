"""Carries out the instructions of transitions on worker processes and tells what came of it.

One method per instruction; each returns at once and leaves a task behind, so members work in parallel. An answer arrives as an event at
`send`, and so does an error; the death of a process is no answer (`components` tells of it), and neither is silence: deadlines are the
machine's. Every instruction may be given again. Besides, each started worker is asked to say when its group is in trouble, a question
that it leaves open until then. Called by the controller only.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

from flexpert.controller import ray_cluster
from flexpert.controller import transition_types as t
from flexpert.controller.drills import Drills
from flexpert.controller.placement import Place, reachable
from flexpert.controller.ray_cluster import ActorGone
from flexpert.controller.spec import ClusterSpec, device_of
from flexpert.workers.actor import StartFailure
from flexpert.workers.epoch import encode

log = logging.getLogger(__name__)

PROGRESS_PERIOD_S = 0.2
TROUBLE_AGAIN_S = 0.5


class Members:
    """places: worker -> where its device is. actor: process name -> its actor, None where it was ended. socket: device -> where its HBM
    manager listens."""

    def __init__(
        self,
        spec: ClusterSpec,
        places: Mapping[str, Place],
        *,
        actor: Callable[[str], Any],
        socket: Callable[[str], str],
        spawn: Callable[[Coroutine[Any, Any, None]], None],
        send: Callable[[t.Event], None],
        tell: Callable[..., None],
    ) -> None:
        self._spec, self._places, self._actor, self._socket = spec, places, actor, socket
        self._spawn, self._send, self._tell = spawn, send, tell
        self._drills = Drills(spec.drill_dir)
        self.progress: dict[str, tuple[int, int]] = {}
        self.failure_kinds: dict[str, str] = {}  # worker -> the kind of its last failure, for the exit code
        self._watched: dict[str, object] = {}  # process -> the watch that asks it

    # Instructions

    def start_worker(self, order: t.StartWorker) -> None:
        self._order(order, "start", self._start_worker(order))

    async def _start_worker(self, order: t.StartWorker) -> None:
        began_s = time.monotonic()
        answer = await self._call(order.process, "status")
        if not answer or (answer["worker_id"], answer["incarnation"]) != (order.worker_id, order.incarnation):
            with _Following(self, order):
                answer = await self._call(order.process, "start", self._config(order))
        if self._refused(order, "start", answer):
            return
        how = "weights loaded" if answer.get("weights_loaded") else "weights mapped, nothing loaded"
        seconds = answer.get("seconds", time.monotonic() - began_s)
        self._tell(
            "worker", f"{order.worker_id} started as incarnation {order.incarnation} (pid {answer['pid']}): {how}",
            seconds=seconds, worker_id=order.worker_id, incarnation=order.incarnation, process=order.process,
            pid=answer["pid"], weights_loaded=answer.get("weights_loaded"), start_s=answer.get("start_s", {}),
        )  # fmt: skip
        self._send(
            t.WorkerStarted(
                order.worker_id, order.process, answer.get("exchange_address", ""), answer["address"],
                self._socket(device_of(order.worker_id)), seconds, answer.get("fetched_bytes", 0),
            )
        )  # fmt: skip
        self.follow(order.worker_id, order.process)

    def _config(self, order: t.StartWorker) -> dict[str, Any]:
        spec, place = self._spec, self._places[order.worker_id]
        if all(found.local for found in self._places.values()):
            address = f"unix:{spec.runtime.worker_socket(order.worker_id, order.incarnation)}"
            exchange = f"unix:{spec.runtime.exchange_socket(order.worker_id, order.incarnation)}"
        else:
            address = exchange = f"tcp:{place.node.host}:0"
        return {
            "worker_id": order.worker_id,
            "incarnation": order.incarnation,
            "model_dir": spec.model_dir,
            "model_id": spec.model_id,
            "cluster_token": spec.cluster_token,
            "address": address,
            "device": spec.torch_device(place.index),
            "dtype": spec.dtype,
            "manager_socket": self._socket(device_of(order.worker_id)),
            "max_running": spec.max_running,
            "max_batch_tokens": spec.max_batch_tokens,
            "max_context_tokens": spec.max_context_tokens,
            "kv_bytes": spec.kv_bytes,
            "threads": spec.threads,
            "epoch": encode(order.draft),
            "exchange_address": exchange,
            "sources": self._sources(order),
            "step_timeout_s": spec.step_timeout_s,
            "transport": spec.transport,
        }

    def _sources(self, order: t.StartWorker | t.Prepare) -> list[tuple[str, tuple[int, ...]]]:
        """As workers take them: a manager's socket with the slab groups to read there. Only of its own machine: the rest is on disk."""
        there = reachable(order.worker_id, [source.worker_id for source in order.sources], self._places)
        return [
            (self._drills.socket(source.manager_socket), source.groups)
            for source in order.sources
            if source.worker_id in there
        ]

    def prepare(self, order: t.Prepare) -> None:
        self._order(order, "prepare", self._prepare(order))

    async def _prepare(self, order: t.Prepare) -> None:
        began_s = time.monotonic()
        with _Following(self, order):
            answer = await self._call(
                order.process, "prepare", encode(order.epoch), self._sources(order), order.deadline_s
            )
        if not self._refused(order, "prepare", answer, order.epoch.number):
            moved_bytes = answer.get("moved_bytes", 0) + answer.get("loaded_bytes", 0)
            seconds = time.monotonic() - began_s
            self._send(t.Prepared(order.worker_id, order.process, order.epoch.number, moved_bytes, seconds))

    def commit(self, order: t.Commit) -> None:
        self._order(order, "commit", self._commit(order))

    async def _commit(self, order: t.Commit) -> None:
        answer = await self._call(order.process, "commit", order.number, order.deadline_s)
        if not self._refused(order, "commit", answer, order.number):
            told = answer.get("pause_s", 0.0), answer.get("kv_moved_bytes", 0)
            self._send(t.Committed(order.worker_id, order.process, order.number, *told))

    def retire(self, order: t.Retire) -> None:
        self._order(order, "retire", self._retire(order))

    async def _retire(self, order: t.Retire) -> None:
        answer = await self._call(order.process, "retire", order.number)
        if not self._refused(order, "retire", answer, order.number):
            found = answer or {}
            freed_bytes, pause_s = found.get("freed_bytes", 0), found.get("pause_s", 0.0)
            self._send(t.Retired(order.worker_id, order.process, order.number, freed_bytes, pause_s))

    def abort(self, order: t.Abort) -> None:
        self._order(order, "abort", self._abort(order))

    async def _abort(self, order: t.Abort) -> None:
        answer = await self._call(order.process, "abort", order.number)
        if not self._refused(order, "abort", answer, order.number):
            self._send(t.Aborted(order.worker_id, order.process, order.number))

    def release(self, order: t.Release) -> None:
        self._order(order, "release", self._release(order))

    async def _release(self, order: t.Release) -> None:
        answer = await self._call(order.process, "release")
        if not self._refused(order, "release", answer):
            self.unfollow(order.process)
            self._send(t.Released(order.worker_id, order.process))

    # Between transitions

    def follow(self, worker_id: str, process: str) -> None:
        """Report whenever the worker's group is in trouble, until its process ends or is released."""
        if process not in self._watched:
            watch = self._watched[process] = object()
            self._spawn(self._follow(worker_id, process, watch))

    async def _follow(self, worker_id: str, process: str, watch: object) -> None:
        """Until the worker answers that it ends, or its process does; the same process may be watched anew before that is known here."""
        try:
            while self._watched.get(process) is watch:
                try:
                    found = await self._call(process, "wait_trouble")
                except ActorGone:
                    return
                except Exception as error:
                    log.warning("%s cannot be asked for trouble: %r", process, error)
                    return
                if found is None:
                    return
                if self._watched.get(process) is watch:
                    suspects = tuple(found["suspects"])
                    self._send(t.Trouble(worker_id, process, found["epoch"], suspects, found["reason"]))
                    await asyncio.sleep(TROUBLE_AGAIN_S)
        finally:
            if self._watched.get(process) is watch:
                del self._watched[process]

    def unfollow(self, process: str) -> None:
        self._watched.pop(process, None)

    async def expert_load(self, processes: list[str]) -> tuple[tuple[int, ...], ...] | None:
        """Tokens routed to [layer][expert] since the last time, over all these; None where there were none."""
        answers = await asyncio.gather(
            *(self._call(process, "expert_load") for process in processes), return_exceptions=True
        )
        found = [answer for answer in answers if answer and not isinstance(answer, BaseException)]
        if not found:
            return None
        return tuple(tuple(sum(counts) for counts in zip(*layers, strict=True)) for layers in zip(*found, strict=True))

    # Plumbing

    async def _call(self, process: str, method: str, *arguments: Any) -> Any:
        actor = self._actor(process)
        if actor is None:
            raise ActorGone(f"{process} was ended")
        return await ray_cluster.call(actor, method, *arguments)

    def _order(self, order: Any, step: str, work: Coroutine[Any, Any, None]) -> None:
        self._spawn(self._carry_out(order, step, work))

    async def _carry_out(self, order: Any, step: str, work: Coroutine[Any, Any, None]) -> None:
        if not await self._drills.passes(step, order):
            work.close()
            return
        try:
            await work
        except ActorGone as error:
            log.info("%s of %s: %s", step, order.worker_id, error)  # its death is told elsewhere
        except Exception as error:
            log.warning("%s of %s failed: %r", step, order.worker_id, error)
            self._refused(order, step, {"failure": StartFailure.of(error).to_json()}, _number_of(order))

    def _refused(self, order: Any, step: str, answer: Any, number: int = 0) -> bool:
        """Whether the worker answered that it cannot; then it is told."""
        failure = answer.get("failure") if isinstance(answer, dict) else None
        if failure is None:
            return False
        self.failure_kinds[order.worker_id] = failure["kind"]
        self._tell(
            "failed", f"{step} of {order.worker_id} failed: {failure['message']}", component=order.worker_id,
            failure_kind=failure["kind"], process=order.process,
        )  # fmt: skip
        self._send(t.Failed(order.worker_id, order.process, step, failure["message"], number, failure["permanent"]))
        return True

    async def report_progress(self, order: t.StartWorker | t.Prepare) -> None:
        """Until cancelled: how many bytes the worker has read, for the screen and for whoever follows the transition."""
        told, step = -1, "prepare" if isinstance(order, t.Prepare) else "start"
        while True:
            done_bytes, total_bytes = await self._call(order.process, "progress", step)
            self.progress[order.worker_id] = (done_bytes, total_bytes)
            if done_bytes != told:
                told = done_bytes
                self._send(t.Moved(order.worker_id, order.process, step, done_bytes, _number_of(order)))
            await asyncio.sleep(PROGRESS_PERIOD_S)


class _Following:
    """While a worker moves bytes: its progress is asked for again and again."""

    def __init__(self, members: Members, order: t.StartWorker | t.Prepare) -> None:
        self._members, self._order = members, order
        self._task: asyncio.Task[None] | None = None

    def __enter__(self) -> None:
        self._task = asyncio.create_task(self._members.report_progress(self._order))
        self._task.add_done_callback(lambda task: task.cancelled() or task.exception())

    def __exit__(self, *error: object) -> None:
        if self._task is not None:
            self._task.cancel()
        self._members.progress.pop(self._order.worker_id, None)


def _number_of(order: Any) -> int:
    return order.epoch.number if isinstance(order, t.Prepare) else getattr(order, "number", 0)
