"""How `up` follows its controller, with the controller played."""

from __future__ import annotations

import asyncio
import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from flexpert.cli.screen import Screen
from flexpert.cli.up import UpOptions, _Up
from flexpert.controller import ray_cluster
from flexpert.controller.runtime_dir import make


class PlayedController:
    """Drains when asked to stop; is restarted while it drains, and the new one knows of no stop."""

    def __init__(self) -> None:
        self.stops, self.watches, self.draining, self.restarted = 0, 0, False, False

    async def call(self, actor: object, method: str, *arguments: Any) -> Any:
        if method == "stop":
            self.stops, self.draining = self.stops + 1, True
            return None
        assert method == "watch"
        self.watches += 1
        if self.draining and not self.restarted:
            self.restarted, self.draining = True, False
            raise ray_cluster.ActorGone("killed")
        return {
            "events": [], "last": 0, "progress": {}, "ready": False, "port": 0, "given_up": None, "stopped": self.draining,
        }  # fmt: skip


async def test_controller_restarted_while_draining_is_asked_to_stop_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLEXPERT_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setattr("flexpert.controller.runtime_dir.MAX_SOCKET_PATH_BYTES", 1000)
    controller, out = PlayedController(), io.StringIO()
    monkeypatch.setattr(ray_cluster, "call", controller.call)
    up = _Up(UpOptions(), make("default"), Screen(out))
    up._ray = SimpleNamespace(alive=True)
    up._stop_asked.set()
    await asyncio.wait_for(up._follow(), 20)
    assert (controller.restarted, controller.stops) == (True, 2)
    assert out.getvalue().count("once more Ctrl-C") == 1
