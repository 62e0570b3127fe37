"""The Ray actor around the gateway: starts it, tells it the workers, drains it. The gateway itself is `controller.gateway`."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flexpert.controller import ray_cluster
from flexpert.controller.errors import AdminError
from flexpert.workers.actor import StartFailure
from flexpert.workers.process_log import open_process_log

log = logging.getLogger(__name__)


class ControllerCalls:
    """What the admin API asks, asked of the controller by its name: a restarted one is found by the next call."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._actor: Any = None

    async def __call__(self, method: str, *arguments: Any) -> Any:
        """Raises AdminError, or ControllerAway where there is none just now."""
        from flexpert.controller.gateway import ControllerAway

        if self._actor is None:
            self._actor = await asyncio.to_thread(
                ray_cluster.find_actor, self._name
            )  # may wait for Ray; streams do not
        if self._actor is None:
            raise ControllerAway(f"no actor {self._name!r}")
        try:
            return await ray_cluster.call(self._actor, method, *arguments)
        except AdminError as error:  # in Ray's own class, whose text is a traceback
            raise AdminError(error.code, error.message) from None
        except ray_cluster.ActorGone as error:
            self._actor = None
            raise ControllerAway(str(error)) from error


class GatewayActor:
    """An async actor: HTTP, worker streams and these methods share its loop."""

    def __init__(self, *, log_path: str, log_level: str) -> None:
        open_process_log(Path(log_path), log_level)
        self._gateway: Any = None

    async def start(self, config: dict[str, Any]) -> dict[str, Any]:
        """Listen with `config` (fields of GatewayConfig); returns the port, or the failure."""
        from flexpert.controller.gateway import Gateway, GatewayConfig, GatewayError

        controller = config.pop("controller", "")
        try:
            gateway = Gateway(GatewayConfig(**config), call_controller=ControllerCalls(controller))
            await gateway.start()
        except GatewayError as error:
            log.error("the gateway did not start: %s", error)
            kind = "model" if str(config["model_dir"]) in str(error) else "port"
            return {"failure": StartFailure(kind=kind, message=str(error), permanent=True).to_json()}
        except Exception as error:
            log.exception("the gateway did not start")
            return {"failure": StartFailure.of(error).to_json()}
        self._gateway = gateway
        return {"pid": os.getpid(), "port": gateway.port}

    async def set_workers(self, workers: Sequence[tuple[str, str] | tuple[str, str, bool]]) -> None:
        """The workers that serve now: (worker id, address), and True behind them where it drains. One that is left out is gone."""
        from flexpert.controller.gateway import WorkerAddress

        self._gateway.set_workers([WorkerAddress(*worker) for worker in workers])

    async def pid(self) -> int:
        return os.getpid()

    async def status(self) -> dict[str, Any] | None:
        """Port and load; None before it listens."""
        if self._gateway is None:
            return None
        return {"pid": os.getpid(), "port": self._gateway.port}

    async def load(
        self, window_s: float, slo: tuple[float | None, float | None] | None, long_s: float | None = None
    ) -> dict[str, Any]:
        """Traffic of the last window_s and what each worker told last: see controller.gateway.load; {} before it listens."""
        return {} if self._gateway is None else dict(self._gateway.load(window_s=window_s, slo=slo, long_s=long_s))

    async def drain(self) -> None:
        """Refuse new requests, finish those there are, stop listening."""
        if self._gateway is not None:
            await self._gateway.drain_and_stop()

    async def wait_closed(self) -> None:
        """Never returns: a pending call that Ray fails as soon as this process ends."""
        await asyncio.Event().wait()
