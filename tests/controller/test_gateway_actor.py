"""The actor around the gateway: how it reaches the controller and what it is told of the workers. Ray is played."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from flexpert.controller import ray_cluster
from flexpert.controller.errors import AdminError
from flexpert.controller.gateway import ControllerAway, WorkerAddress
from flexpert.controller.gateway_actor import ControllerCalls, GatewayActor


class PlayedRay:
    """The actors there are by name, and what a call to one does."""

    def __init__(self) -> None:
        self.actors: dict[str, str] = {"c:controller": "first"}
        self.looked: list[str] = []
        self.result: Any = {"epoch": 1}

    def find_actor(self, name: str) -> str | None:
        self.looked.append(name)
        return self.actors.get(name)

    async def call(self, actor: str, method: str, *arguments: Any) -> Any:
        if isinstance(self.result, Exception):
            raise self.result
        return actor, method, arguments


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> PlayedRay:
    ray = PlayedRay()
    monkeypatch.setattr(ray_cluster, "find_actor", ray.find_actor)
    monkeypatch.setattr(ray_cluster, "call", ray.call)
    return ray


async def test_controller_is_looked_up_once_and_again_after_it_ended(played: PlayedRay) -> None:
    call = ControllerCalls("c:controller")
    assert await call("scale", 2, "r") == ("first", "scale", (2, "r"))
    assert await call("status") == ("first", "status", ())
    assert played.looked == ["c:controller"]
    played.result = ray_cluster.ActorGone("killed")
    with pytest.raises(ControllerAway, match="killed"):
        await call("status")
    played.result, played.actors = None, {"c:controller": "second"}
    assert await call("status") == ("second", "status", ())


async def test_controller_that_is_not_there_is_away(played: PlayedRay) -> None:
    with pytest.raises(ControllerAway, match="c:other"):
        await ControllerCalls("c:other")("status")


async def test_refusal_comes_without_rays_traceback(played: PlayedRay) -> None:
    class RaysOwn(AdminError):
        def __str__(self) -> str:
            return "Traceback of another process"

    played.result = RaysOwn("conflict", "t-1 runs")
    with pytest.raises(AdminError) as caught:
        await ControllerCalls("c:controller")("scale", 2, "r")
    assert (type(caught.value), caught.value.code, str(caught.value)) == (AdminError, "conflict", "t-1 runs")


async def test_workers_come_with_or_without_the_word_that_they_drain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flexpert.controller.gateway_actor.open_process_log", lambda *_: None)
    told: list[list[WorkerAddress]] = []
    actor = GatewayActor(log_path=str(tmp_path / "gateway.log"), log_level="info")
    actor._gateway = SimpleNamespace(set_workers=told.append)
    await actor.set_workers([("worker-0", "unix:/a"), ("worker-1", "unix:/b", True), ("worker-2", "unix:/c", False)])
    assert [(worker.worker_id, worker.draining) for worker in told[0]] == [
        ("worker-0", False),
        ("worker-1", True),
        ("worker-2", False),
    ]
