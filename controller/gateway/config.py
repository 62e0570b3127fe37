"""What a gateway is told when it is made. Values only; the composition root fills them in."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


class GatewayError(Exception):
    """The gateway cannot start or go on; the text says what was found, what was expected and what to do."""


@dataclass(frozen=True, slots=True)
class WorkerAddress:
    """Where a worker listens: "unix:/path" or "tcp:host:port". A draining worker finishes what it has and gets nothing new."""

    worker_id: str
    address: str
    draining: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayConfig:
    """`port` 0 lets the kernel choose. No `api_keys`: no key is asked for; no `admin_keys`: the admin API is off.
    `max_queued` counts choices that wait beyond what the workers run at once; the next one gets 429."""

    model_id: str
    model_dir: Path
    cluster_token: str = field(repr=False)
    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    admin_keys: tuple[str, ...] = field(default=(), repr=False)
    worker_addresses: tuple[WorkerAddress, ...] = ()
    gateway_id: str = "gateway-0"
    max_queued: int = 512
    max_body_bytes: int = 4 << 20
    drain_timeout_s: float = 30.0
    cors_allow_origins: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise GatewayError(f"port {self.port}: expected 0 (any free port) to 65535")
        if self.max_queued < 0 or self.max_body_bytes < 1 or self.drain_timeout_s < 0:
            raise GatewayError(
                f"max_queued {self.max_queued}, max_body_bytes {self.max_body_bytes}, drain_timeout_s {self.drain_timeout_s}: "
                "expected at least 0, 1 and 0"
            )
        if any(not key for key in (*self.api_keys, *self.admin_keys)):
            raise GatewayError("an API key is empty; remove it, or pass no keys at all to serve without authentication")
        if set(self.api_keys) & set(self.admin_keys):
            raise GatewayError(
                "a key is both an API key and an admin key; whoever may ask the model could end it: draw another"
            )
