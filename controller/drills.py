"""Drills: holds a transition at a step, so that something can be done to the cluster at exactly that moment.

While a file `hold-<step>` or `hold-<step>-<worker>` lies in the drill directory, orders of that step wait: start, prepare, commit,
retire or release, for all workers or for that one. They wait no longer than the step may take, and one that was overtaken by a later
order to the same process is dropped, as the machine of transitions expects of it nothing any more. While `lose-peers` lies there,
workers are told to read from managers that nobody reaches. Off unless a directory is given;
for tests and exercises only. Called by `members`.
"""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

from flexpert.controller.transition_types import Deadlines

LOOK_S = 0.02


class Drills:
    """folder: None where there are no drills; then nothing is looked for."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._latest: dict[str, Any] = {}  # process -> the last order to it

    async def passes(self, step: str, order: Any) -> bool:
        """Wait while the order is held; whether it shall still be carried out."""
        if self._folder is None:
            return True
        self._latest[order.process] = order
        files = (self._folder / f"hold-{step}", self._folder / f"hold-{step}-{order.worker_id}")
        limits = Deadlines()
        until_s = time.monotonic() + float(getattr(limits, f"{step}_s", limits.retire_s))
        while any(file.exists() for file in files) and time.monotonic() < until_s:
            await asyncio.sleep(LOOK_S)
        return self._latest[order.process] is order

    def socket(self, path: str) -> str:
        """Where a worker is told that a peer's manager listens."""
        lost = self._folder is not None and (self._folder / "lose-peers").exists()
        return f"{path}.lost" if lost else path
