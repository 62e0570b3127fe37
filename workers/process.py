"""One worker in a process: it comes up, serves, moves from epoch to epoch, and ends.

`workers.assembly` builds the parts; here they get their threads and their server. The Ray actor (`workers.actor`), the benchmarks and
the tests use it alike; it knows nothing of Ray.
"""

from __future__ import annotations

import gc
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

import torch

from flexpert.workers.assembly import Parts, StartTimes, assemble, discard
from flexpert.workers.devices import check_device, give_back_unused, is_cuda, use_device
from flexpert.workers.engine import Engine, Owner
from flexpert.workers.epoch import decode
from flexpert.workers.fetch import Progress, Source
from flexpert.workers.group import Trouble
from flexpert.workers.membership import Membership
from flexpert.workers.messages import Welcome, WorkerFrame
from flexpert.workers.model import check_servable
from flexpert.workers.prepared import MembershipError
from flexpert.workers.server import WorkerServer
from flexpert.workers.threads import run_apart
from flexpert.workers.worker_config import WorkerConfig, WorkerStartError

__all__ = ["BROKEN_EXIT_CODE", "WorkerConfig", "WorkerProcess", "WorkerStartError", "prepare"]

log = logging.getLogger(__name__)

T = TypeVar("T")
BROKEN_EXIT_CODE = 70
STEP_LIMIT_S = 120.0


def prepare(model_dir: Path, device: str) -> None:
    """What a worker can do before it is one: read the model's configuration, make the device's context. Raises as `start` does."""
    check_servable(model_dir)
    if is_cuda(device):
        if problem := check_device(device):
            raise WorkerStartError(problem)
        torch.zeros(1, device=device)


class WorkerProcess:
    """One worker: `start` brings it up, `address` is where gateways connect, `stop` ends its threads.

    Where `config.epoch` is given it joins that epoch: it serves once `prepare` and `commit` were called with the finished one.
    """

    def __init__(self, config: WorkerConfig) -> None:
        self.config = config
        self.address = config.address
        self.times = StartTimes()
        self._parts: Parts | None = None
        self._server: WorkerServer | None = None
        self._thread: threading.Thread | None = None
        self._stopped = threading.Event()
        self._taps: dict[Owner, Callable[[WorkerFrame], None]] = {}

    def start(self, on_progress: Progress | None = None) -> str:
        """Map or load the weights, open the KV arena, listen. Raises WorkerStartError, UnservableModelError, CheckpointError, HbmError."""
        if problem := check_device(self.config.device):
            raise WorkerStartError(problem)
        parts = self._parts = self._apart(
            lambda: assemble(self.config, emit=self._deliver, times=self.times, on_progress=on_progress)
        )
        engine = parts.engine
        welcome = Welcome(
            worker_id=self.config.worker_id,
            incarnation=self.config.incarnation,
            model_id=self.config.model_id,
            vocab_size=parts.vocab_size,
            max_context_tokens=parts.kv.context_tokens,
            max_running=self.config.max_running,
        )
        self._server = WorkerServer(
            address=self.config.address, cluster_token=self.config.cluster_token, welcome=welcome
        )
        self.address = self._server.start(engine)
        self._thread = threading.Thread(target=self._run_engine, args=(engine,), name="engine", daemon=True)
        self._thread.start()
        threading.Thread(target=self._watch, args=(engine,), name="watchdog", daemon=True).start()
        self.times.mark("listen")
        log.info(
            "worker %s serves %s at %s; %s",
            self.config.worker_id,
            self.config.model_id,
            self.address,
            self.times.phases,
        )
        return self.address

    def _run_engine(self, engine: Engine) -> None:
        """A worker whose books cannot be trusted any more ends as if killed: its replacement maps what was committed."""
        try:
            use_device(self.config.device)
            engine.run()
        except BaseException:
            log.critical("the engine cannot go on; this worker ends for a replacement", exc_info=True)
            _end_for_a_replacement()

    def _watch(self, engine: Engine) -> None:
        """A step that hangs (a device that does not answer) ends the worker too."""
        while not self._stopped.wait(STEP_LIMIT_S / 8):
            began_s = engine.step_began_s
            if began_s is not None and time.monotonic() - began_s > STEP_LIMIT_S:
                log.critical("a step takes longer than %g s; this worker ends for a replacement", STEP_LIMIT_S)
                _end_for_a_replacement()

    def stop(self) -> None:
        """End engine and server; weights, KV and records stay with the manager."""
        self._stopped.set()
        if self._thread is not None:
            self.engine.stop()
            self._thread.join()
        if self._server is not None:
            self._server.stop()
        if self._parts is not None:
            self._parts.close()

    # From epoch to epoch: see workers.membership

    def prepare(self, epoch: bytes, sources: Sequence[Source] = (), deadline_s: float = 120.0) -> dict[str, Any]:
        decoded = decode(epoch)
        return self._apart(lambda: self.membership.prepare(decoded, sources, deadline_s))

    def commit(self, number: int, deadline_s: float = 10.0) -> dict[str, Any]:
        return self.membership.commit(number, deadline_s)

    def retire(self, number: int) -> dict[str, Any]:
        return self.membership.retire(number)

    def abort(self, number: int) -> dict[str, Any]:
        return self.membership.abort(number)

    def release(self) -> dict[str, Any]:
        """Let go of everything, of the device's memory too: what is left is a process that can become a worker again."""
        parts = self._require_parts()
        if not parts.engine.paused:
            raise MembershipError(
                f"worker {self.config.worker_id} serves: only one that has left its epoch can be released"
            )
        self.stop()
        freed_bytes = discard(self.config, parts)
        if is_cuda(self.config.device):
            self._parts = None
            del parts
            gc.collect()  # engine, model and KV refer to each other
            give_back_unused(self.config.device)
        return {"freed_bytes": freed_bytes}

    def wait_trouble(self) -> Future[Trouble | None]:
        return self.membership.wait_trouble()

    def expert_load(self) -> list[list[int]]:
        """[layer][expert] -> how many of this worker's tokens picked it since the last call."""
        load = self.engine.call(self._require_parts().runner.take_load).result(STEP_LIMIT_S)
        return [[int(count) for count in layer] for layer in load]

    def status(self) -> dict[str, Any]:
        """What `flexpert status` shows of this worker."""
        config, parts = self.config, self._parts
        status: dict[str, Any] = {
            "worker_id": config.worker_id,
            "incarnation": config.incarnation,
            "pid": os.getpid(),
            "device": config.device,
            "dtype": config.dtype_name,
            "model_id": config.model_id,
            "address": self.address,
            "manager_socket": "" if config.manager_socket is None else str(config.manager_socket),
            "start_s": dict(self.times.phases),
            "stats": None,
        }
        if parts is None:
            return status
        stats = parts.engine.stats()
        member = parts.membership.status()
        return (
            status
            | member
            | {
                "exchange_address": parts.listener.address,
                "weights_loaded": parts.weights.loaded_from_disk,
                "fetched_bytes": parts.fetched_bytes,
                "weights_bytes": parts.dense_bytes + member["experts_bytes"],
                "stats": {name: getattr(stats, name) for name in stats.__struct_fields__},
            }
        )

    def _apart(self, function: Callable[[], T]) -> T:
        """In a thread of its own, with the worker's device."""

        def run() -> T:
            use_device(self.config.device)
            return function()

        return run_apart(run)

    @property
    def engine(self) -> Engine:
        """The running engine, for callers in this process (benchmarks, tests)."""
        return self._require_parts().engine

    @property
    def membership(self) -> Membership:
        return self._require_parts().membership

    def _require_parts(self) -> Parts:
        if self._parts is None:
            raise RuntimeError("the worker was not started: call start() first")
        return self._parts

    def tap(self, owner: Owner, take: Callable[[WorkerFrame], None]) -> None:
        """Frames for `owner` go to `take`, on the engine's thread, instead of to a stream."""
        self._taps[owner] = take

    def _deliver(self, owner: Owner, frame: WorkerFrame) -> None:
        take = self._taps.get(owner)
        if take is not None:
            take(frame)
        elif self._server is not None:
            self._server.emit(owner, frame)


def _end_for_a_replacement() -> None:
    logging.shutdown()
    os._exit(BROKEN_EXIT_CODE)
