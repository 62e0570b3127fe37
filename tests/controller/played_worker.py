"""A worker process without a model, for tests of the controller with real Ray: it does at once what it is told, and listens for gateways.

Files in the directory that FLEXPERT_PLAYED names change what it does: "slow-STEP" makes a step wait until the file is gone,
"refuse-STEP.WORKER" makes it fail.
"""

from __future__ import annotations

import os
import threading
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from flexpert.workers.epoch import decode

TICK = threading.Event()


@dataclass(frozen=True, kw_only=True)
class WorkerConfig:
    worker_id: str
    incarnation: int
    address: str
    exchange_address: str
    manager_socket: str
    epoch: bytes
    sources: Any
    model_dir: Path
    model_id: str
    cluster_token: str
    device: str
    dtype: str | None
    max_running: int
    max_batch_tokens: int
    max_context_tokens: int | None
    kv_bytes: int | None
    threads: int
    step_timeout_s: float
    transport: str = "auto"


def model_shape(model_dir: Path, dtype: str) -> dict[str, int]:
    return {
        "layers": 2, "experts": 8, "slab_bytes": 1 << 16, "slabs_per_group": 1, "dense_bytes": 1 << 16, "kv_token_bytes": 256,
    }  # fmt: skip


class PlayedWorker:
    def __init__(self, config: WorkerConfig) -> None:
        self.config, self.address = config, config.address
        self.directory = config.model_dir / "played"
        self.number = 0
        self.trouble: Future[Any] = Future()

    def _do(self, step: str) -> None:
        while (self.directory / f"slow-{step}").exists():
            TICK.wait(0.02)
        if (self.directory / f"refuse-{step}.{self.config.worker_id}").exists():
            raise RuntimeError(f"{step} is refused")

    def start(self, on_progress: Any = None) -> str:
        self._do("start")
        decode(self.config.epoch)
        return self.address

    def prepare(self, epoch: bytes, sources: Any, deadline_s: float) -> dict[str, Any]:
        self._do("prepare")
        self.prepared = decode(epoch).number
        return {"moved_bytes": 5, "loaded_bytes": 2, "seconds": {}}

    def commit(self, number: int, deadline_s: float) -> dict[str, Any]:
        self._do("commit")
        self.number = number
        return {"pause_s": 0.001, "step": 0, "released": []}

    def retire(self, number: int) -> dict[str, Any]:
        self._do("retire")
        return {"freed_bytes": 0, "kv_bytes": 0}

    def abort(self, number: int) -> dict[str, Any]:
        self._do("abort")
        return {}

    def release(self) -> dict[str, Any]:
        self._do("release")
        return {}

    def wait_trouble(self) -> Future[Any]:
        return self.trouble

    def expert_load(self) -> list[list[int]]:
        return [[1] * 8] * 2

    def status(self) -> dict[str, Any]:
        return {
            "worker_id": self.config.worker_id,
            "incarnation": self.config.incarnation,
            "pid": os.getpid(),
            "node_id": ray.get_runtime_context().get_node_id(),
            "epoch": self.number,
            "exchange_address": self.config.exchange_address,
            "weights_loaded": False,
            "start_s": {},
        }

    def stop(self) -> None:
        pass
