"""The actor that stands for a node: it holds the node's reservation with Ray and keeps the device's HBM manager running.

The manager is a daemon of its own (`flexpert.hbm`), started here or adopted from an earlier cluster; it outlives this actor and every
worker. Only an orderly end of the cluster stops it (`stop_manager`). Workers ask Ray for nothing: the device belongs to the node.
"""

from __future__ import annotations

import asyncio
import logging
import os
from pathlib import Path
from typing import Any

from flexpert.controller.processes import ProcessId
from flexpert.workers.actor import StartFailure
from flexpert.workers.process_log import open_process_log

MANAGER_NAME = "device-0"
BUDGET_TOLERANCE_BYTES = 2 << 20  # budgets are rounded to whole granules
log = logging.getLogger(__name__)


class NodeAgent:
    """An async actor; what blocks runs in threads. exact: a manager with another budget is not adopted but started anew."""

    def __init__(self, *, runtime_path: str, budget_bytes: int, exact: bool, log_path: str, log_level: str) -> None:
        open_process_log(Path(log_path), log_level)
        self._runtime_path, self._budget_bytes = Path(runtime_path), budget_bytes
        self._exact = exact
        self._manager: ProcessId | None = None
        self._socket: Path | None = None

    async def ensure(self) -> dict[str, Any]:
        """Start the manager or adopt the running one; returns its socket and process, or the failure."""
        try:
            return await asyncio.to_thread(self._ensure)
        except Exception as error:
            log.exception("the HBM manager did not start")
            return {"failure": StartFailure.of(error).to_json()}

    def _ensure(self) -> dict[str, Any]:
        from flexpert.hbm import ManagerConfig, ensure_manager, stop_manager

        config = ManagerConfig(runtime_dir=self._runtime_path, name=MANAGER_NAME, budget_bytes=self._budget_bytes)
        handle = ensure_manager(config)
        if handle.adopted and self._exact and abs(handle.budget_bytes - self._budget_bytes) >= BUDGET_TOLERANCE_BYTES:
            log.info(
                "the manager found has a budget of %d bytes, wanted is %d: starting it anew",
                handle.budget_bytes,
                self._budget_bytes,
            )
            stop_manager(config.runtime_dir, config.name)
            handle = ensure_manager(config)
        self._manager = ProcessId.of(handle.pid, "manager")
        self._socket = handle.socket_path
        return {
            "agent_pid": os.getpid(),
            "pid": handle.pid,
            "socket": str(handle.socket_path),
            "adopted": handle.adopted,
        }

    def _info(self, socket_path: Path) -> Any:
        from flexpert.hbm import HbmClient

        client = HbmClient.connect(socket_path, client_name="node-agent")
        try:
            return client.info()
        finally:
            client.close()

    async def pid(self) -> int:
        return os.getpid()

    async def status(self) -> dict[str, Any] | None:
        """What the manager tells of its memory; None where there is no manager yet."""
        if self._manager is None or self._socket is None or not self._manager.alive:
            return None
        info = await asyncio.to_thread(self._info, self._socket)
        known = {name: getattr(info, name) for name in ("budget_bytes", "free_bytes", "granule_bytes")}
        return {"pid": self._manager.pid, "agent_pid": os.getpid(), "socket": str(self._socket), **known}

    async def wait_manager_closed(self) -> str:
        """Returns when the manager has ended: its memory is gone."""
        pidfd = None if self._manager is None else self._manager.open()
        if pidfd is not None:
            ended = asyncio.Event()
            loop = asyncio.get_running_loop()
            loop.add_reader(pidfd, ended.set)
            try:
                await ended.wait()
            finally:
                loop.remove_reader(pidfd)
                os.close(pidfd)
        return "the HBM manager ended; weights and KV it held are gone"

    async def stop_manager(self) -> bool:
        """End the manager and free its memory."""
        from flexpert.hbm import stop_manager

        return await asyncio.to_thread(stop_manager, self._runtime_path, MANAGER_NAME)

    async def wait_closed(self) -> None:
        """Never returns: a pending call that Ray fails as soon as this process ends."""
        await asyncio.Event().wait()
