"""A cluster of its own for a benchmark: `flexpert up` as a user starts it, on free ports, ended with the program."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx

API_KEY, ADMIN_KEY = "benchmark", "benchmark-admin"
READY_TIMEOUT_S = 180.0


class LocalCluster:
    """url: where the gateway listens. `start` returns when it is ready; `ready_s` is what that took."""

    def __init__(self, *options: str, port: int) -> None:
        self.options = options
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self.runtime = Path(tempfile.mkdtemp(prefix="fxb-", dir="/tmp"))
        self.log = self.runtime.with_suffix(".log")
        self._environment = dict(
            os.environ,
            FLEXPERT_RUNTIME_DIR=str(self.runtime),
            FLEXPERT_API_KEY=API_KEY,
            FLEXPERT_ADMIN_KEY=ADMIN_KEY,
        )
        self._process: subprocess.Popen[bytes] | None = None
        self.ready_s = 0.0

    def start(self) -> LocalCluster:
        began_s = time.monotonic()
        command = [sys.executable, "-m", "flexpert.cli", "up", "--port", str(self.port), *self.options]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                command, env=self._environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        with httpx.Client(base_url=self.url, timeout=2) as client:
            while time.monotonic() - began_s < READY_TIMEOUT_S:
                if self._process.poll() is not None:
                    raise RuntimeError(
                        f"`flexpert up` ended with {self._process.returncode}:\n{self.log.read_text()[-2000:]}"
                    )
                try:
                    if client.get("/ready").status_code == 200:
                        self.ready_s = time.monotonic() - began_s
                        return self
                except httpx.HTTPError:
                    pass
                time.sleep(0.02)
        raise TimeoutError(f"the cluster is not ready after {READY_TIMEOUT_S:g} s:\n{self.log.read_text()[-2000:]}")

    @property
    def running(self) -> bool:
        """Whether `up` itself still runs."""
        return self._process is not None and self._process.poll() is None

    def command(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "flexpert.cli", *arguments], env=self._environment, capture_output=True, text=True
        )

    def stop(self) -> None:
        """Drained, by the command a user has."""
        if self._process is not None:
            self.command("down")
            self._process.wait(60)
            self._process = None

    def close(self) -> None:
        self.stop()
        shutil.rmtree(self.runtime, ignore_errors=True)
        self.log.unlink(missing_ok=True)


class Admin:
    """The admin API, as `flexpert scale` uses it."""

    def __init__(self, cluster: LocalCluster) -> None:
        self._http = httpx.AsyncClient(
            base_url=f"{cluster.url}/admin/v1", headers={"authorization": f"Bearer {ADMIN_KEY}"}, timeout=60
        )

    async def status(self) -> dict[str, Any]:
        return (await self._http.get("/status")).raise_for_status().json()

    async def scale(self, workers: int, request_id: str) -> dict[str, Any]:
        return await self._begin("/scale", {"workers": workers, "request_id": request_id})

    async def drain(self, worker_id: str, request_id: str) -> dict[str, Any]:
        return await self._begin(f"/workers/{worker_id}/drain", {"request_id": request_id})

    async def _begin(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        answer = await self._http.post(path, json=body)
        if answer.status_code >= 400:
            raise RuntimeError(f"{path} {body}: {answer.status_code} {answer.text}")
        return answer.json()

    async def finished(self, transition_id: str, timeout_s: float = 60.0) -> dict[str, Any]:
        """The transition once it is done, aborted or failed."""
        ends_s = time.monotonic() + timeout_s
        while time.monotonic() < ends_s:
            found = (await self._http.get(f"/transitions/{transition_id}")).raise_for_status().json()
            if found["state"] != "running":
                return found
            await asyncio.sleep(0.05)
        raise TimeoutError(f"transition {transition_id} runs for more than {timeout_s:g} s: {found}")

    async def events(self, after: int = 0) -> list[dict[str, Any]]:
        return (await self._http.get("/events", params={"after": after})).raise_for_status().json()["events"]

    async def close(self) -> None:
        await self._http.aclose()
