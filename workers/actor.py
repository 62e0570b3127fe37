"""The Ray actor around one worker process: warms up, starts the worker it is assigned, answers questions about it.

A thin shell over `workers.process`, which knows nothing of Ray; this class in turn is plain Python and is made an actor by
`controller.ray_cluster`. It is *warmed* first (the imports, which take seconds, and the checks of the model) and then, maybe much
later, *started* as a worker with an incarnation. Torch is imported while warming and not before, so creating the actor is quick.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import importlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flexpert.workers.heap import give_back_free_memory
from flexpert.workers.process_log import open_process_log

log = logging.getLogger(__name__)

STANDBY_NICE = 10
WORKER_PROCESS = "flexpert.workers.process:WorkerProcess"
MODEL_SHAPE = "flexpert.workers.shape"

# Which errors of a start are of which kind (exit code and advice), by the name of the class: most live in modules that import torch.
# The second value: trying again changes nothing.
ERROR_KINDS = {
    "UnservableModelError": ("model", True),
    "CheckpointError": ("checkpoint", True),
    "LoadError": ("checkpoint", True),
    "WorkerStartError": ("settings", True),
    "MembershipError": ("conflict", False),
    "ConnectError": ("peers", False),
    "BudgetError": ("memory", True),
    "LimitError": ("limits", True),
    "MemoryError": ("memory", True),
    "ImportError": ("internal", True),
    "OutOfMemoryError": ("memory", True),
    "HbmError": ("internal", False),
}
# A worker's own objections, told apart by how they begin.
SETTINGS_KINDS = (("no memory", "memory"), ("device", "device"))


@dataclass(frozen=True, kw_only=True)
class StartFailure:
    """Why a worker, manager or gateway did not start; kinds as in ERROR_KINDS, besides "internal" and "port"."""

    kind: str
    message: str
    permanent: bool

    @classmethod
    def of(cls, error: BaseException) -> StartFailure:
        """Classified by the nearest base class that is known."""
        for base in type(error).__mro__:
            if base.__name__ in ERROR_KINDS:
                kind, permanent = ERROR_KINDS[base.__name__]
                if kind == "settings":
                    kind = next((found for start, found in SETTINGS_KINDS if str(error).startswith(start)), kind)
                return cls(kind=kind, message=str(error), permanent=permanent)
        return cls(kind="internal", message=f"{type(error).__name__}: {error}", permanent=False)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@contextlib.contextmanager
def _no_collections() -> Iterator[None]:
    """Imports make many objects and next to no garbage: looking for it takes a sixth of their time."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


class WorkerActor:
    """One process that can become a worker. Made an async actor: its methods run on one loop, slow work in threads."""

    def __init__(
        self, *, log_path: str, log_level: str, environment: dict[str, str], process: str = WORKER_PROCESS
    ) -> None:
        os.environ.update(environment)
        open_process_log(Path(log_path), log_level)
        self._module, _, self._class = process.partition(":")
        self._worker: Any = None
        self._is_warm = False
        self._serving = False  # a worker that is still loading, or could not start, is none yet
        self._progress = ("", 0, 0)  # of this step

    async def warm(self, model_dir: str, device: str, urgent: bool = True) -> dict[str, Any]:
        """Do all that needs no memory of the device manager; returns the process id and the seconds it took.

        Not urgent: at a lower priority than those that serve.
        """
        began_s = time.monotonic()
        with ThreadPoolExecutor(max_workers=1) as thread:  # one of its own: a thread keeps its priority
            warming = thread.submit(self._warm, Path(model_dir), device, urgent)
            failure = await asyncio.wrap_future(warming)
        if failure is not None:
            return {"failure": failure.to_json()}
        self._is_warm = True
        return {"pid": os.getpid(), "warm_s": time.monotonic() - began_s}

    def _warm(self, model_dir: Path, device: str, urgent: bool) -> StartFailure | None:
        if not urgent:
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), STANDBY_NICE)
        try:
            with _no_collections():
                module = importlib.import_module(self._module)
            prepare = getattr(module, "prepare", None)
            if prepare is not None:
                prepare(model_dir, device)
        except Exception as error:
            log.exception("the worker process could not be prepared")
            return StartFailure.of(error)
        return None

    async def model_shape(self, model_dir: str, dtype: str) -> dict[str, Any]:
        """What the planner must know of the model (fields of workers.shape.model_shape), or the failure."""
        try:
            module = importlib.import_module(self._module)
            shape = getattr(module, "model_shape", None) or importlib.import_module(MODEL_SHAPE).model_shape
            return dict(await asyncio.to_thread(shape, Path(model_dir), dtype))
        except Exception as error:
            log.exception("the model could not be examined")
            return {"failure": StartFailure.of(error).to_json()}

    async def start(self, config: dict[str, Any]) -> dict[str, Any]:
        """Become the worker that `config` (fields of workers.process.WorkerConfig) describes; returns its status, or the failure."""
        began_s = time.monotonic()
        self._progress = ("start", 0, 0)
        failure = await asyncio.to_thread(self._start, config)
        if failure is not None:
            return {"failure": failure.to_json()}
        return {**self._worker.status(), "address": self._worker.address, "seconds": time.monotonic() - began_s}

    def _start(self, config: dict[str, Any]) -> StartFailure | None:
        module = importlib.import_module(self._module)
        try:
            self._worker = getattr(module, self._class)(module.WorkerConfig(**config))
            self._worker.start(self._note_progress)
            self._serving = True
        except Exception as error:
            log.exception("worker %s incarnation %s did not start", config["worker_id"], config["incarnation"])
            return StartFailure.of(error)
        return None

    def _note_progress(self, done_bytes: int, total_bytes: int) -> None:
        self._progress = ("start", done_bytes, total_bytes)

    async def is_warm(self) -> bool:
        """Whether it was warmed and is no worker."""
        return self._is_warm and self._worker is None

    async def progress(self, step: str) -> tuple[int, int]:
        """Bytes of weights loaded in this step ("start" or "prepare"), bytes in all; (0, 0) before that or at another step."""
        at, done_bytes, total_bytes = self._progress
        return (done_bytes, total_bytes) if at == step else (0, 0)

    async def pid(self) -> int:
        return os.getpid()

    async def status(self) -> dict[str, Any] | None:
        """What the worker tells of itself; None where this process is no worker, or not one that serves yet."""
        return dict(self._worker.status(), address=self._worker.address) if self._serving else None

    # From epoch to epoch (workers.membership): each can be repeated; an error is answered as {"failure": ...}

    async def prepare(self, epoch: bytes, sources: list[Any], deadline_s: float) -> dict[str, Any]:
        """Make this epoch ready beside the current one: {"moved_bytes", "loaded_bytes", "seconds": {phase: s}}."""
        self._progress = ("prepare", 0, 0)
        return await self._step(lambda worker: worker.prepare(epoch, sources, deadline_s))

    async def commit(self, epoch_number: int, deadline_s: float) -> dict[str, Any]:
        """Flip to it together with the peers: {"pause_s", "step", "released"}."""
        return await self._step(lambda worker: worker.commit(epoch_number, deadline_s))

    async def retire(self, epoch_number: int) -> dict[str, Any]:
        """Let go of what earlier epochs needed: {"freed_bytes", "kv_bytes", "pause_s"}."""
        return await self._step(lambda worker: worker.retire(epoch_number))

    async def abort(self, epoch_number: int) -> dict[str, Any]:
        """Forget an epoch that was not committed, or is being prepared: {"freed_bytes"}."""
        return await self._step(lambda worker: worker.abort(epoch_number))

    async def release(self) -> dict[str, Any]:
        """Let go of everything and become a warm process again: {"freed_bytes"}."""
        if self._worker is None:
            return {"freed_bytes": 0}
        answer = await self._step(lambda worker: worker.release())
        if "failure" not in answer:
            self._worker, self._serving, self._progress = None, False, ("", 0, 0)
            # modules refer to each other: a process that waits may wait for long
            await asyncio.to_thread(give_back_free_memory, collect=True)
        return answer

    async def wait_trouble(self) -> dict[str, Any] | None:
        """Pending until this worker's group breaks: {"epoch", "step", "suspects", "reason"}. None where the worker ends, or is none."""
        if self._worker is None:
            return None
        trouble = await asyncio.wrap_future(self._worker.wait_trouble())
        return None if trouble is None else asdict(trouble)

    async def expert_load(self) -> list[list[int]]:
        """[layer][expert] -> tokens routed there since the last call."""
        return [] if self._worker is None else await asyncio.to_thread(self._worker.expert_load)

    async def _step(self, call: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        worker = self._worker
        try:
            if worker is None:
                raise RuntimeError("this process is no worker: start it first")
            return await asyncio.to_thread(call, worker)
        except Exception as error:
            log.warning("a step of a transition failed", exc_info=True)
            return {"failure": StartFailure.of(error).to_json()}

    async def stop(self) -> None:
        """End the worker's threads; its memory stays with the manager."""
        if self._worker is not None:
            await asyncio.to_thread(self._worker.stop)

    async def wait_closed(self) -> None:
        """Never returns: a pending call that Ray fails as soon as this process ends."""
        await asyncio.Event().wait()
