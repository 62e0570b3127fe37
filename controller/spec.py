"""What a cluster is to be: everything `flexpert up` was told, as one value that is handed to the controller.

Made by the CLI, read by the controller and the actors it starts; imports nothing heavy.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from flexpert.controller.runtime_dir import RuntimeDir
from flexpert.workers.actor import WORKER_PROCESS


@dataclass(frozen=True, kw_only=True)
class ClusterSpec:
    """workers: how many serve at first; max_workers: how many devices there are, one for each. standbys: warm
    processes kept beside them. memory_bytes: budget of each device's HBM manager (weights and KV), for an adopted one only where
    memory_exact. Settings that are None are left to the worker's defaults. threads: of each worker, for computing on the CPU.

    cluster_token: what gateways show to workers. api_keys: empty lets everyone in. admin_keys: empty lets nobody use
    the admin API. port 0 lets the kernel choose. step_timeout_s: after which the ranks of an epoch drop a step that one of them misses.
    worker_process: the class that a worker's actor runs, "module:Class". num_gpus: those of the node that the cluster uses; with fewer than
    max_workers, workers share them. transport: how workers exchange tokens, see workers.worker_config. drill_dir: see controller.drills.
    policy_path: the scaling policy, watched for changes; None: sizes change by hand alone, until one is put by the admin API.
    """

    name: str
    runtime_path: Path
    model_dir: Path
    model_id: str
    device: str
    dtype: str | None
    memory_bytes: int
    memory_exact: bool
    kv_bytes: int | None
    max_context_tokens: int | None
    max_running: int
    max_batch_tokens: int
    host: str
    port: int
    api_keys: tuple[str, ...]
    cluster_token: str
    log_level: str
    standbys: int
    threads: int
    drain_timeout_s: float
    num_gpus: int = 0
    workers: int = 1
    max_workers: int = 1
    admin_keys: tuple[str, ...] = ()
    step_timeout_s: float = 2.0
    worker_process: str = WORKER_PROCESS
    transport: str = "auto"
    drill_dir: Path | None = None
    policy_path: Path | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.workers <= self.max_workers:
            raise ValueError(
                f"workers {self.workers}: expected at least 1 and at most max_workers, which is {self.max_workers}"
            )

    @property
    def worker_ids(self) -> tuple[str, ...]:
        """All names that a worker may have, by device: worker-i runs on device-i."""
        return tuple(f"worker-{number}" for number in range(self.max_workers))

    def torch_device(self, index: int) -> str:
        """Where a worker computes, as torch names it; index: which of its node's devices it has."""
        return f"cuda:{index % max(1, self.num_gpus)}" if self.device == "cuda" else self.device

    @property
    def runtime(self) -> RuntimeDir:
        return RuntimeDir(self.runtime_path)


def device_of(worker_id: str) -> str:
    """The device that a worker runs on; also the name of that device's HBM manager."""
    return f"device-{worker_id.rpartition('-')[2]}"
