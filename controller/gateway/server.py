"""The gateway as one object: binds the port, serves, follows the list of workers, drains, stops.

Made inside the gateway actor (or a test) on the loop that will run it. `set_workers` may be called from any thread; everything else
belongs to that loop. Signals are left to the process that starts it.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import socket
import time
from collections.abc import Iterable, Iterator
from typing import Any

import uvicorn
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from flexpert.controller.gateway.admin import CallController, ControllerDesk
from flexpert.controller.gateway.admission import Admission
from flexpert.controller.gateway.app import Parts, build_app
from flexpert.controller.gateway.cluster import ClusterFacts
from flexpert.controller.gateway.config import GatewayConfig, GatewayError, WorkerAddress
from flexpert.controller.gateway.errors import shutting_down
from flexpert.controller.gateway.front import Front
from flexpert.controller.gateway.keys import AdminKeys, ApiKeys
from flexpert.controller.gateway.load import gateway_load
from flexpert.controller.gateway.metrics import GatewayMetrics
from flexpert.controller.gateway.pool import WorkerPool
from flexpert.controller.gateway.tokenizer import ModelTokenizer

log = logging.getLogger("flexpert.gateway")

_BACKLOG = 2048
# After the drain: for the last bytes to reach slow clients, then for connections that never finished their request.
_LAST_WORDS_S = 5.0
_HANG_UP_S = 1


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class Gateway:
    """`await start()`, then `port` is bound and serves; `await drain_and_stop()` ends it. `await serve()` does the first and waits.

    call_controller: how the admin API and the metrics reach the controller; without it they know of none."""

    def __init__(self, config: GatewayConfig, *, call_controller: CallController | None = None) -> None:
        self.config = config
        self._call_controller = call_controller
        self.port = config.port
        self._workers = tuple(config.worker_addresses)
        self._draining = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopped = asyncio.Event()

    @property
    def url(self) -> str:
        host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(self.config.host, self.config.host)
        return f"http://{host}:{self.port}"

    async def start(self) -> None:
        """Raises GatewayError where the port cannot be had or the tokenizer cannot be read."""
        self._loop = asyncio.get_running_loop()
        sock = _bind(self.config.host, self.config.port)
        try:
            tokenizer = await asyncio.to_thread(ModelTokenizer.load, self.config.model_dir)
        except BaseException:
            sock.close()
            raise
        self.port = sock.getsockname()[1]
        self._pool = WorkerPool(
            cluster_token=self.config.cluster_token, gateway_id=self.config.gateway_id, model_id=self.config.model_id
        )
        settings = uvicorn.Config(
            self._build(tokenizer),
            log_config=None,
            access_log=False,
            lifespan="off",
            ws="none",
            timeout_graceful_shutdown=_HANG_UP_S,
            timeout_keep_alive=75,
            server_header=False,
        )
        self._server = _Server(settings)
        self._serving = self._loop.create_task(self._server.serve(sockets=[sock]), name="uvicorn")
        self._pool.set_desired(self._workers)
        while not self._server.started and not self._serving.done():
            await asyncio.sleep(0)
        if self._serving.done():
            await self._serving
            raise GatewayError(f"the HTTP server on {self.url} ended while it started")
        log.info("serving %s on %s", self.config.model_id, self.url)

    async def serve(self) -> None:
        """Start, and return after somebody called drain_and_stop."""
        await self.start()
        await self._stopped.wait()

    def set_workers(self, workers: Iterable[WorkerAddress]) -> None:
        """The workers there should be from now on. From any thread, also before start; returns at once."""
        self._workers = tuple(workers)
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._apply_workers)

    def _apply_workers(self) -> None:
        if hasattr(self, "_pool"):
            self._pool.set_desired(self._workers)

    def load(
        self, *, window_s: float, slo: tuple[float | None, float | None] | None, long_s: float | None = None
    ) -> dict[str, Any]:
        """See `load`; on this object's loop, after start."""
        window = self._parts.metrics.window
        return gateway_load(self._pool, window, now_s=time.monotonic(), window_s=window_s, slo=slo, long_s=long_s)

    async def drain_and_stop(self) -> None:
        """Take nothing new, let live requests end within drain_timeout_s, end the rest with an error, close. May be called again."""
        if self._draining:
            await self._stopped.wait()
            return
        self._draining = True
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._admission.idle(), self.config.drain_timeout_s)
        self._pool.fail_all(shutting_down())
        await self._pool.close()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._admission.idle(), _LAST_WORDS_S)
        self._server.should_exit = True
        await self._serving
        self._stopped.set()

    def _build(self, tokenizer: ModelTokenizer) -> ASGIApp:
        pool = self._pool
        self._admission = Admission(max_queued=self.config.max_queued, capacity=lambda: pool.capacity_choices)
        metrics = GatewayMetrics(
            live=lambda: len(pool.live),
            waiting=lambda: len(pool.live.waiting),
            links=lambda: pool.links,
            connections=pool.connections,
        )
        self._parts = parts = Parts(
            model_id=self.config.model_id,
            created=int(time.time()),
            tokenizer=tokenizer,
            pool=pool,
            admission=self._admission,
            metrics=metrics,
            desk=ControllerDesk(self._call_controller),
            cluster=ClusterFacts(self._call_controller, registry=metrics.registry),
        )
        keys = ApiKeys(self.config.api_keys)
        app: ASGIApp = Front(
            build_app(parts, draining=lambda: self._draining),
            keys=keys,
            admin_keys=AdminKeys(self.config.admin_keys, api_keys=keys),
            max_body_bytes=self.config.max_body_bytes,
            draining=lambda: self._draining,
            metrics=metrics,
        )
        if self.config.cors_allow_origins:
            app = CORSMiddleware(
                app, allow_origins=self.config.cors_allow_origins, allow_methods=["*"], allow_headers=["*"]
            )
        return app


def _bind(host: str, port: int) -> socket.socket:
    try:
        # With its protocol named: asyncio turns Nagle's algorithm off only then, and a first byte would wait 40 ms otherwise.
        family, kind, protocol, _, _ = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[
            0
        ]
        sock = socket.socket(family, kind, protocol)
    except OSError as error:
        raise GatewayError(
            f"host {host!r} cannot be served on: {error}; expected an address of this machine, e.g. 127.0.0.1"
        ) from error
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
        sock.listen(_BACKLOG)
    except OSError as error:
        sock.close()
        if error.errno == errno.EADDRINUSE:
            raise GatewayError(
                f"port {port} on {host} is in use by another program; stop it, or choose another port"
            ) from error
        raise GatewayError(
            f"port {port} on {host} cannot be bound: {error.strerror or error}; choose another host or port"
        ) from error
    sock.setblocking(False)
    return sock
