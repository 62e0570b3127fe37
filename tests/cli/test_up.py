"""How `up` follows its controller, with the controller played."""

from __future__ import annotations

import asyncio
import io
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from flexpert.cli.contact import BUSY_S, BUSY_SHARE, IDLE_S, STOPPED_S, Contact
from flexpert.cli.errors import CommandError
from flexpert.cli.screen import Screen
from flexpert.cli.up import UpOptions, _Up
from flexpert.controller import ray_cluster
from flexpert.controller.processes import ProcessId
from flexpert.controller.runtime_dir import make, write_json


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
            "pid": os.getpid(), "begun": True,
        }  # fmt: skip


async def test_controller_restarted_while_draining_is_asked_to_stop_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLEXPERT_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setattr("flexpert.controller.runtime_dir.MAX_SOCKET_PATH_BYTES", 1000)
    controller, out = PlayedController(), io.StringIO()
    monkeypatch.setattr(ray_cluster, "call", controller.call)
    up = _Up(UpOptions(), make("default"), Screen(out))
    up._ray, up._controller = SimpleNamespace(lost=set()), object()
    up._stop_asked.set()
    await asyncio.wait_for(up._follow(), 20)
    assert (controller.restarted, controller.stops) == (True, 2)
    assert out.getvalue().count("once more Ctrl-C") == 1


class SilentController:
    """Answers once, under the pid of a stopped process, and again from another one when that is ended."""

    def __init__(self, stopped: subprocess.Popen[bytes]) -> None:
        self.stopped, self.watches = stopped, 0
        self.replaced: tuple[str, float] | None = None

    async def call(self, actor: object, method: str, *arguments: Any) -> Any:
        if method == "replaced":
            self.replaced = (str(arguments[0]), float(arguments[1]))
            return None
        self.watches += 1
        if self.watches > 1 and self.stopped.poll() is None:
            await asyncio.Event().wait()
        pid = self.stopped.pid if self.watches == 1 else os.getpid()
        return {
            "events": [], "last": 0, "progress": {}, "ready": False, "port": 0, "given_up": None,
            "stopped": self.replaced is not None, "pid": pid, "begun": True,
        }  # fmt: skip


async def test_controller_that_is_stopped_is_ended_and_its_replacement_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLEXPERT_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setattr("flexpert.controller.runtime_dir.MAX_SOCKET_PATH_BYTES", 1000)
    monkeypatch.setattr("flexpert.cli.up.LOOK_S", 0.05)
    monkeypatch.setattr("flexpert.cli.contact.STOPPED_S", 0.1)
    out = io.StringIO()
    with subprocess.Popen(["sleep", "600"]) as stopped:
        try:
            stopped.send_signal(signal.SIGSTOP)
            controller = SilentController(stopped)
            monkeypatch.setattr(ray_cluster, "call", controller.call)
            up = _Up(UpOptions(), make("default"), Screen(out))
            up._ray, up._controller = SimpleNamespace(lost=set()), object()
            await asyncio.wait_for(up._follow(), 20)
        finally:
            stopped.kill()
    assert controller.replaced is not None
    assert controller.replaced[0].startswith("a signal stopped it")
    assert f"(pid {stopped.pid}) is ended" in out.getvalue()


@pytest.fixture
def controller(tmp_path: Path) -> Iterator[tuple[Contact, ProcessId]]:
    """One that sleeps, has written which process it is, and has not answered yet."""
    with subprocess.Popen(["sleep", "600"]) as process:
        try:
            found = ProcessId.of(process.pid, "controller")
            assert found is not None
            write_json(tmp_path / "pid", found.to_json())
            yield Contact(tmp_path / "pid"), found
        finally:
            process.kill()


def silent(contact: Contact, waited_s: float) -> str | None:
    """Nobody answers for so long."""
    contact.unanswered(0.0)
    return contact.unanswered(waited_s)


def test_controller_that_answers_in_between_is_let_live(controller: tuple[Contact, ProcessId]) -> None:
    contact, process = controller
    for _ in range(3):
        assert contact.answered(process.pid) is None
        assert silent(contact, IDLE_S - 0.1) is None
        contact.heard()
        assert silent(contact, IDLE_S - 0.1) is None
    assert process.alive


def test_controller_that_is_stopped_is_ended_soon_and_not_at_once(controller: tuple[Contact, ProcessId]) -> None:
    contact, process = controller
    contact.answered(process.pid)
    process.signal(signal.SIGSTOP)
    while not process.stopped:
        pass
    assert silent(contact, STOPPED_S - 0.1) is None
    process.signal(signal.SIGCONT)
    while process.stopped:
        pass
    assert contact.unanswered(0.0) is None, "it was let go on: the time begins anew"
    process.signal(signal.SIGSTOP)
    while not process.stopped:
        pass
    assert contact.unanswered(STOPPED_S - 0.1) is None
    assert "a signal stopped it" in str(contact.unanswered(0.1))
    assert process.wait(10)


def test_controller_that_hangs_before_its_first_answer_is_ended(controller: tuple[Contact, ProcessId]) -> None:
    contact, process = controller
    assert silent(contact, IDLE_S - 0.1) is None
    assert "no answer for 5 s" in str(contact.unanswered(0.1))
    assert process.wait(10)


def test_replacement_that_hangs_before_its_first_answer_is_ended(
    controller: tuple[Contact, ProcessId], tmp_path: Path
) -> None:
    contact, process = controller
    contact.answered(process.pid)
    process.signal(signal.SIGKILL)
    assert process.wait(10)
    with subprocess.Popen(["sleep", "600"]) as second:
        try:
            found = ProcessId.of(second.pid)
            assert found is not None
            write_json(tmp_path / "pid", found.to_json())
            assert silent(contact, IDLE_S) is not None
            assert found.wait(10)
        finally:
            second.kill()


def test_controller_that_computes_is_given_more_time(
    controller: tuple[Contact, ProcessId], monkeypatch: pytest.MonkeyPatch
) -> None:
    contact, process = controller
    active_s = {1: 7.0, 2: 0.0}
    monkeypatch.setattr(ProcessId, "active_s", lambda self: dict(active_s))
    assert silent(contact, 0.0) is None
    active_s[2] += BUSY_SHARE * IDLE_S
    assert contact.unanswered(IDLE_S) is None
    active_s[2] += BUSY_S
    assert contact.unanswered(BUSY_S - IDLE_S - 0.1) is None
    assert process.alive
    assert contact.unanswered(0.1) is not None
    assert process.wait(10)


@pytest.mark.parametrize(
    ("ready", "losses", "words"), [(False, 0, "raylet ended unexpectedly, before"), (True, 3, "too often")]
)
async def test_ray_that_dies_early_or_often_is_not_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ready: bool, losses: int, words: str
) -> None:
    monkeypatch.setenv("FLEXPERT_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setattr("flexpert.controller.runtime_dir.MAX_SOCKET_PATH_BYTES", 1000)
    monkeypatch.setattr("flexpert.cli.up.WATCH_S", 0)
    up = _Up(UpOptions(), make("default"), Screen(io.StringIO()))
    begun: list[int] = []

    async def begin_anew() -> None:
        begun.append(1)

    monkeypatch.setattr(up, "_begin_anew", begin_anew)
    up._ray = SimpleNamespace(lost={"raylet"})
    up._ready = True
    for _ in range(losses):
        assert await up._go_on_without_ray()
    up._ready = ready
    with pytest.raises(CommandError, match=words):
        await up._go_on_without_ray()
    assert len(begun) == losses
    up._stop_asked.set()
    assert not await up._go_on_without_ray()
