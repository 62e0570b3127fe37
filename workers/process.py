"""What one worker process is made of, and the order in which it comes up.

The composition root of `workers`: checkpoint, HBM manager's memory, scheduler, runner, sampler, engine and server are built here and
nowhere else. The Ray actor (`workers.actor`), the benchmarks and the tests use it alike; it knows nothing of Ray.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from flexpert.hbm import HbmClient, KvArena
from flexpert.workers.engine import Engine, Owner
from flexpert.workers.kv_books import KvBooks
from flexpert.workers.kv_geometry import KvGeometry
from flexpert.workers.memory import ArenaMemory, KvMemory, TorchMemory, bytes_at
from flexpert.workers.messages import Welcome, WorkerFrame
from flexpert.workers.model import (
    BoundModel,
    ServableModel,
    bind,
    check_servable,
    kv_token_bytes,
    load_into,
    plan_weights,
)
from flexpert.workers.runner import ModelRunner
from flexpert.workers.sampling import Sampler
from flexpert.workers.scheduler import Scheduler, SchedulerConfig
from flexpert.workers.server import WorkerServer
from flexpert.workers.threads import run_apart
from flexpert.workers.weights import drop_leftovers, weights_key

log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
DONOR_SLOTS_PER_RUNNING = 1


class WorkerStartError(RuntimeError):
    """The worker cannot come up with what it was given; starting it again changes nothing."""


@dataclass(frozen=True, kw_only=True)
class WorkerConfig:
    """How one worker runs.

    manager_socket: the device's HBM manager; None keeps weights and KV in plain torch memory of this process (nothing outlives it).
    incarnation: the fencing token, greater than that of any worker that held this device before. kv_bytes: memory for KV, None takes
    what the manager has left (at most MAX_DEFAULT_KV_BYTES). max_context_tokens None takes the model's own.
    """

    worker_id: str
    model_dir: Path
    model_id: str
    cluster_token: str
    address: str
    incarnation: int = 1
    device: str = "cpu"
    dtype: str | None = None
    manager_socket: Path | None = None
    max_running: int = 64
    max_batch_tokens: int = 512
    max_context_tokens: int | None = None
    kv_bytes: int | None = None
    threads: int | None = None


MAX_DEFAULT_KV_BYTES = 1 << 30
BROKEN_EXIT_CODE = 70
STEP_LIMIT_S = 120.0


@dataclass
class StartTimes:
    """Seconds of each phase of a start, for events and metrics."""

    phases: dict[str, float] = field(default_factory=dict)
    _began_s: float = field(default_factory=time.perf_counter)

    def mark(self, phase: str) -> None:
        now_s = time.perf_counter()
        self.phases[phase] = round(now_s - self._began_s, 4)
        self._began_s = now_s


def prepare(model_dir: Path, device: str) -> None:
    """What a worker can do before it is one: read the model's configuration, make the device's context. Raises as `start` does."""
    check_servable(model_dir)
    if torch.device(device).type == "cuda":
        if not torch.cuda.is_available():
            raise WorkerStartError(
                "device cuda: torch finds no CUDA device; install a CUDA build of torch and the driver, or use --device cpu"
            )
        torch.zeros(1, device=device)


class WorkerProcess:
    """One worker: `start` brings it up, `address` is where gateways connect, `stop` ends its threads."""

    def __init__(self, config: WorkerConfig) -> None:
        self.config = config
        self.address = config.address
        self.times = StartTimes()
        self.weights_loaded = False
        self._weights_bytes = self._kv_bytes = 0
        self._client: HbmClient | None = None
        self._engine: Engine | None = None
        self._server: WorkerServer | None = None
        self._thread: threading.Thread | None = None
        self._stopped = threading.Event()
        self._taps: dict[Owner, Callable[[WorkerFrame], None]] = {}

    def start(self, on_progress: Progress | None = None) -> str:
        """Map or load the weights, open the KV arena, listen. Raises WorkerStartError, UnservableModelError, CheckpointError, HbmError."""
        engine, max_context_tokens, vocab_size = run_apart(lambda: self._make_engine(on_progress))
        welcome = Welcome(
            worker_id=self.config.worker_id,
            incarnation=self.config.incarnation,
            model_id=self.config.model_id,
            vocab_size=vocab_size,
            max_context_tokens=max_context_tokens,
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

    def _make_engine(self, on_progress: Progress | None) -> tuple[Engine, int, int]:
        """The engine, the longest request it can hold, the size of the vocabulary."""
        torch.set_num_threads(self.config.threads or os.cpu_count() or 1)
        torch.set_grad_enabled(False)
        servable = check_servable(self.config.model_dir)
        self.times.mark("check_model")
        bound = self._bind(servable, on_progress)
        self.times.mark("weights")
        engine, max_context_tokens = self._build(servable, bound)
        self.times.mark("kv")
        self._runner.warm_up()
        self.times.mark("warm_up")
        return engine, max_context_tokens, servable.vocab_size

    def _run_engine(self, engine: Engine) -> None:
        """A worker whose books cannot be trusted any more ends as if killed: its replacement maps what was committed."""
        try:
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
        if self._engine is not None and self._thread is not None:
            self._engine.stop()
            self._thread.join()
        if self._server is not None:
            self._server.stop()
        if self._client is not None:
            self._client.close()

    def status(self) -> dict[str, Any]:
        """What `flexpert status` shows of this worker."""
        stats = self._engine.stats() if self._engine is not None else None
        return {
            "worker_id": self.config.worker_id,
            "incarnation": self.config.incarnation,
            "pid": os.getpid(),
            "device": self.config.device,
            "dtype": self._dtype_name(),
            "model_id": self.config.model_id,
            "address": self.address,
            "weights_loaded": self.weights_loaded,
            "weights_bytes": self._weights_bytes,
            "kv_bytes": self._kv_bytes,
            "start_s": dict(self.times.phases),
            "stats": None if stats is None else {name: getattr(stats, name) for name in stats.__struct_fields__},
        }

    @property
    def engine(self) -> Engine:
        """The running engine, for callers in this process (benchmarks, tests)."""
        if self._engine is None:
            raise RuntimeError("the worker was not started: call start() first")
        return self._engine

    def tap(self, owner: Owner, take: Callable[[WorkerFrame], None]) -> None:
        """Frames for `owner` go to `take`, on the engine's thread, instead of to a stream."""
        self._taps[owner] = take

    def _deliver(self, owner: Owner, frame: WorkerFrame) -> None:
        take = self._taps.get(owner)
        if take is not None:
            take(frame)
        elif self._server is not None:
            self._server.emit(owner, frame)

    # Weights

    @cached_property
    def _weights_key(self) -> str:
        return weights_key(self.config.model_dir, self._dtype_name())

    def _dtype_name(self) -> str:
        return self.config.dtype or ("float32" if self.config.device == "cpu" else "bfloat16")

    def _bind(self, servable: ServableModel, on_progress: Progress | None) -> BoundModel:
        if self.config.manager_socket is None:
            return self._bind_private(servable, on_progress)
        client = HbmClient.connect(
            self.config.manager_socket, client_name=self.config.worker_id, fencing_token=self.config.incarnation
        )
        self._client = client
        key = self._weights_key
        drop_leftovers(client, keep_weights=key, keep_arena=f"kv:{key}")
        state = client.weights_state(key)
        if state is None or state.state != "ready":
            plan = plan_weights(servable, self._dtype_name())
            client.load_weights(key, plan, on_progress=on_progress)
            self.weights_loaded = True
        mapped = client.map_weights(key)
        segments = {name: bytes_at(segment.address, segment.nbytes) for name, segment in mapped.segments.items()}
        return self._bind_on_device(servable, mapped.manifest, segments)

    def _bind_private(self, servable: ServableModel, on_progress: Progress | None) -> BoundModel:
        plan = plan_weights(servable, self._dtype_name())
        segments = {name: torch.empty(nbytes, dtype=torch.uint8) for name, nbytes in plan.segments.items()}
        load_into(plan, segments, on_progress)
        self.weights_loaded = True
        return self._bind_on_device(servable, plan.manifest, segments)

    def _bind_on_device(
        self, servable: ServableModel, manifest: bytes, segments: dict[str, torch.Tensor]
    ) -> BoundModel:
        device = torch.device(self.config.device)
        self._weights_bytes = sum(segment.numel() for segment in segments.values())
        if device.type != "cpu":
            segments = {name: segment.to(device) for name, segment in segments.items()}
        return bind(servable, manifest, segments, device=device)

    # KV, scheduler, engine

    def _build(self, servable: ServableModel, bound: BoundModel) -> tuple[Engine, int]:
        token_bytes = kv_token_bytes(servable, self._dtype_name())
        max_context_tokens = self._max_context(servable)
        memory, books = self._open_kv(token_bytes, max_context_tokens)
        self._kv_bytes = books.capacity_tokens * token_bytes
        books.restore(memory.records())
        scheduler_config = SchedulerConfig(
            max_running=self.config.max_running,
            max_batch_tokens=max(self.config.max_batch_tokens, self.config.max_running),
            vocab_size=servable.vocab_size,
        )
        scheduler = Scheduler(scheduler_config, books)
        self._runner = runner = ModelRunner(bound, memory.tensor)
        self._engine = Engine(scheduler=scheduler, runner=runner, sampler=Sampler(), memory=memory, emit=self._deliver)
        # What a single request can ever hold: the model's context, or all of the KV memory where that is less.
        return self._engine, min(max_context_tokens, books.capacity_tokens)

    def _max_context(self, servable: ServableModel) -> int:
        wanted = self.config.max_context_tokens
        if wanted is not None and wanted > servable.max_context_tokens:
            raise WorkerStartError(
                f"max context: found {wanted} tokens, the model was made for at most {servable.max_context_tokens}; "
                "give a smaller --max-context"
            )
        return wanted or servable.max_context_tokens

    def _open_kv(self, token_bytes: int, max_context_tokens: int) -> tuple[KvMemory, KvBooks]:
        slots = self.config.max_running * (1 + DONOR_SLOTS_PER_RUNNING)
        if self._client is None or self.config.device != "cpu":
            return self._open_private_kv(slots, token_bytes, max_context_tokens)
        info = self._client.info()
        name = f"kv:{self._weights_key}"
        slot_bytes = round_up(max_context_tokens * token_bytes, info.granule_bytes)
        # What an earlier incarnation holds under this name is handed over, or freed first.
        held_bytes = sum(arena.granules * info.granule_bytes for arena in info.arenas if arena.name == name)
        kv_bytes = self.config.kv_bytes or min(info.free_bytes + held_bytes, MAX_DEFAULT_KV_BYTES)
        granules = min(kv_bytes // info.granule_bytes, slots * slot_bytes // info.granule_bytes)
        self._require_kv(granules * info.granule_bytes, token_bytes)
        arena: KvArena = self._client.open_kv_arena(name, slots=slots, slot_bytes=slot_bytes, granules=granules)
        geometry = KvGeometry(
            slots=slots,
            max_context_tokens=max_context_tokens,
            kv_token_bytes=token_bytes,
            granule_bytes=info.granule_bytes,
            shareable=True,
        )
        memory = ArenaMemory(arena, slots=slots, slot_bytes=slot_bytes, token_bytes=token_bytes)
        return memory, KvBooks(geometry, arena.granules)

    def _open_private_kv(self, slots: int, token_bytes: int, max_context_tokens: int) -> tuple[KvMemory, KvBooks]:
        slot_bytes = max_context_tokens * token_bytes
        device = torch.device(self.config.device)
        if self.config.kv_bytes is not None:
            slots = min(slots, self.config.kv_bytes // slot_bytes)
        elif device.type == "cuda":
            slots = min(slots, int(torch.cuda.mem_get_info(device)[0] * 0.8) // slot_bytes)
        self._require_kv(slots * slot_bytes, max_context_tokens * token_bytes)
        geometry = KvGeometry(
            slots=slots,
            max_context_tokens=max_context_tokens,
            kv_token_bytes=token_bytes,
            granule_bytes=slot_bytes,
            shareable=False,
        )
        memory = TorchMemory(slots=slots, slot_bytes=slot_bytes, token_bytes=token_bytes, device=device)
        return memory, KvBooks(geometry)

    def _require_kv(self, found_bytes: int, needed_bytes: int) -> None:
        if found_bytes < needed_bytes:
            raise WorkerStartError(
                f"no memory for KV: found {found_bytes} bytes, at least {needed_bytes} are needed; "
                "raise --memory or --kv-memory, or lower --max-context"
            )


def _end_for_a_replacement() -> None:
    logging.shutdown()
    os._exit(BROKEN_EXIT_CODE)


def round_up(value: int, multiple: int) -> int:
    """The least multiple of `multiple` that is not below `value`."""
    return -(-value // multiple) * multiple
