"""The actor that stands for a node: it holds the node's reservation with Ray and keeps the HBM managers of the node's devices running.

A manager is a daemon of its own (`flexpert.hbm`), one for each device in use, started here or adopted from an earlier cluster; it outlives
this actor and every worker. Only an orderly end of the cluster, or a device that is no longer used, stops it. Workers ask Ray for
nothing: the devices belong to the node. A manager that runs and does not answer (stopped, or it hangs) is killed: whoever needs its memory
waits for it in vain, and a new one is filled within seconds.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexpert.controller.processes import ProcessId
from flexpert.workers.actor import StartFailure
from flexpert.workers.process_log import open_process_log

MANAGER_NAME = "device-0"
PROBE_PERIOD_S = 1.0
PROBE_TIMEOUT_S = 2.0  # twice in a row
BUDGET_TOLERANCE_BYTES = 2 << 20  # budgets are rounded to whole granules
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Manager:
    process: ProcessId
    socket: Path


class NodeAgent:
    """An async actor; what blocks runs in threads. exact: a manager with another budget is not adopted but started anew."""

    def __init__(self, *, runtime_path: str, budget_bytes: int, exact: bool, log_path: str, log_level: str) -> None:
        open_process_log(Path(log_path), log_level)
        self._runtime_path, self._budget_bytes = Path(runtime_path), budget_bytes
        self._exact = exact
        self._managers: dict[str, _Manager] = {}
        self._locks: dict[str, asyncio.Lock] = {}
        self._probes: dict[str, asyncio.Task[None]] = {}
        self._silent: set[int] = set()  # pids of managers that were ended because they did not answer

    async def ensure(self, device: str) -> dict[str, Any]:
        """Start the device's manager or adopt the running one; returns its socket and process, or the failure."""
        async with self._locks.setdefault(device, asyncio.Lock()):
            try:
                answer = await asyncio.to_thread(self._ensure, device)
            except Exception as error:
                log.exception("the HBM manager of %s did not start", device)
                return {"failure": StartFailure.of(error).to_json()}
            self._probes[device] = asyncio.create_task(self._probe(device, self._managers[device]))
            return answer

    def _ensure(self, device: str) -> dict[str, Any]:
        from flexpert.hbm import ManagerConfig, ensure_manager, stop_manager

        config = ManagerConfig(runtime_dir=self._runtime_path, name=device, budget_bytes=self._budget_bytes)
        handle = ensure_manager(config)
        if handle.adopted and self._exact and abs(handle.budget_bytes - self._budget_bytes) >= BUDGET_TOLERANCE_BYTES:
            log.info(
                "the manager found for %s has a budget of %d bytes, wanted is %d: starting it anew",
                device,
                handle.budget_bytes,
                self._budget_bytes,
            )
            stop_manager(config.runtime_dir, config.name)
            handle = ensure_manager(config)
        process = ProcessId.of(handle.pid, device)
        if process is None:
            raise RuntimeError(f"the HBM manager of {device} (pid {handle.pid}) ended as soon as it had started")
        self._managers[device] = _Manager(process, handle.socket_path)
        return {
            "device": device,
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

    async def _probe(self, device: str, manager: _Manager) -> None:
        """Ask again and again, until the manager ends or is another's business."""
        while self._managers.get(device) is manager and manager.process.alive:
            await asyncio.sleep(PROBE_PERIOD_S)
            for _ in range(2):  # the first time it may have been this process that stood still
                answered = await asyncio.to_thread(self._answers, manager.socket)
                if answered:
                    break
            if not answered and self._managers.get(device) is manager and manager.process.alive:
                self._silent.add(manager.process.pid)
                manager.process.signal(signal.SIGKILL)
                log.error("the HBM manager of %s (pid %d) did not answer; killed", device, manager.process.pid)

    def _answers(self, socket_path: Path) -> bool:
        from flexpert.hbm import HbmClient, HbmError

        try:
            with HbmClient.connect(socket_path, client_name="node-agent", timeout_s=PROBE_TIMEOUT_S) as client:
                client.info()
        except (HbmError, OSError) as error:
            log.warning("the HBM manager at %s: %s", socket_path, error)
            return False
        return True

    async def pid(self) -> int:
        return os.getpid()

    async def status(self) -> dict[str, Any]:
        """What each manager tells of its memory, by device; one that does not answer only says that it runs."""
        return {
            "agent_pid": os.getpid(),
            "devices": {device: await self._device(device) for device in self._managers if self._alive(device)},
        }

    def _alive(self, device: str) -> bool:
        return self._managers[device].process.alive

    async def _device(self, device: str) -> dict[str, Any]:
        manager = self._managers[device]
        known = {"device": device, "pid": manager.process.pid, "agent_pid": os.getpid(), "socket": str(manager.socket)}
        try:
            info = await asyncio.to_thread(self._info, manager.socket)
        except Exception as error:
            log.warning("the HBM manager of %s does not answer: %r", device, error)
            return known
        return {**known, **{name: getattr(info, name) for name in ("budget_bytes", "free_bytes", "granule_bytes")}}

    async def wait_manager_closed(self, device: str, pid: int) -> str:
        """Returns when this manager of the device has ended: its memory is gone."""
        known = self._managers.get(device)
        pidfd = known.process.open() if known is not None and known.process.pid == pid else None
        if pidfd is not None:
            ended = asyncio.Event()
            loop = asyncio.get_running_loop()
            loop.add_reader(pidfd, ended.set)
            try:
                await ended.wait()
            finally:
                loop.remove_reader(pidfd)
                os.close(pidfd)
        what = "did not answer and was ended" if pid in self._silent else "ended"
        return f"the HBM manager of {device} {what}; weights and KV it held are gone"

    async def stop(self, device: str) -> bool:
        """End the manager of a device and free its memory."""
        from flexpert.hbm import stop_manager

        async with self._locks.setdefault(device, asyncio.Lock()):
            self._managers.pop(device, None)
            if (probe := self._probes.pop(device, None)) is not None:
                probe.cancel()
            return await asyncio.to_thread(stop_manager, self._runtime_path, device)

    async def stop_managers(self) -> int:
        """End the managers of all devices; returns how many ran."""
        return sum(await asyncio.gather(*(self.stop(device) for device in list(self._managers))))

    async def wait_closed(self) -> None:
        """Never returns: a pending call that Ray fails as soon as this process ends."""
        await asyncio.Event().wait()
