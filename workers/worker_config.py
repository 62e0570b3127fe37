"""How one worker runs, as data. Made by the controller, benchmarks and tests; read by `workers.process` and what it is composed of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from flexpert.workers.fetch import Source

MAX_DEFAULT_KV_BYTES = 1 << 30


class WorkerStartError(RuntimeError):
    """The worker cannot come up with what it was given; starting it again changes nothing."""


@dataclass(frozen=True, kw_only=True)
class WorkerConfig:
    """How one worker runs.

    manager_socket: the device's HBM manager; None keeps weights and KV in plain torch memory of this process (nothing outlives it).
    incarnation: the fencing token, greater than that of any worker that held this device before. kv_bytes: memory for KV beside all
    experts of the model, None takes what the manager has left (at most MAX_DEFAULT_KV_BYTES); a worker that holds fewer experts has so
    much more for KV. max_context_tokens None takes the model's own.

    epoch: None serves alone at once; else the draft of the epoch that this worker joins, encoded: it loads its share of it, from the
    managers `sources` (sockets, or (socket, slab groups)) where they have it, and serves once an epoch was prepared and committed.
    exchange_address: where ranks connect; None derives it from `address`. step_timeout_s: how long a rank waits within a step for a peer
    that is silent. transport: "mapped" (peer memory, ranks on the CPU of one host), "distributed" (torch.distributed), or "auto": mapped
    where that is possible. All ranks of an epoch must have the same.
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
    epoch: bytes | None = None
    sources: Sequence[Source] = ()
    exchange_address: str | None = None
    step_timeout_s: float = 5.0
    transport: str = "auto"

    @property
    def dtype_name(self) -> str:
        return self.dtype or ("float32" if self.device == "cpu" else "bfloat16")

    @property
    def batch_tokens(self) -> int:
        """What a step computes at most, on any rank."""
        return max(self.max_batch_tokens, self.max_running)

    @property
    def listen_for_peers(self) -> str:
        if self.exchange_address is not None:
            return self.exchange_address
        kind, _, rest = self.address.partition(":")
        return f"unix:{rest}.x" if kind == "unix" else f"tcp:{rest.rpartition(':')[0]}:0"
