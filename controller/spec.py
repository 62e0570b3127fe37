"""What a cluster is to be: everything `flexpert up` was told, as one value that is handed to the controller.

Made by the CLI, read by the controller and the actors it starts; imports nothing but the standard library.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from flexpert.controller.runtime_dir import RuntimeDir


@dataclass(frozen=True, kw_only=True)
class ClusterSpec:
    """memory_bytes: budget of the HBM manager (weights and KV), for an
    adopted one only where memory_exact. Settings that are None are left to the worker's defaults.

    cluster_token: what gateways show to workers. api_keys: empty lets everyone in. port 0 lets the kernel choose.
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

    @property
    def runtime(self) -> RuntimeDir:
        return RuntimeDir(self.runtime_path)
