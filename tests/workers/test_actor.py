"""The actor around a worker process, without Ray: warming, starting, and how errors are sorted."""

from __future__ import annotations

import asyncio
import concurrent.futures
import gc
import os
import sys
import threading
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from flexpert.hbm.errors import BudgetError, LimitError, LoadError, ManagerGoneError
from flexpert.workers import actor as module
from flexpert.workers.actor import StartFailure, WorkerActor


class UnservableModelError(Exception):
    """Named like the one of workers.model, which imports torch."""


class WorkerStartError(Exception):
    """Named like the one of workers.process."""


@pytest.mark.parametrize(
    ("error", "kind", "permanent"),
    [
        (UnservableModelError("no experts"), "model", True),
        (LoadError("short file"), "checkpoint", True),
        (BudgetError("no granules"), "memory", True),
        (LimitError("descriptors"), "limits", True),
        (WorkerStartError("max context: found 9"), "settings", True),
        (WorkerStartError("no memory for KV: found 0"), "memory", True),
        (WorkerStartError("device cuda: torch finds none"), "device", True),
        (MemoryError("no"), "memory", True),
        (ManagerGoneError("gone"), "internal", False),
        (RuntimeError("boom"), "internal", False),
        (ModuleNotFoundError("no torch"), "internal", True),
    ],
)
def test_errors_are_sorted_by_class(error: Exception, kind: str, permanent: bool) -> None:
    failure = StartFailure.of(error)
    assert (failure.kind, failure.permanent) == (kind, permanent)
    assert str(error) in failure.message


@dataclass
class WorkerConfig:
    worker_id: str
    incarnation: int
    fails: bool = False
    loading: threading.Event | None = None
    loaded: threading.Event | None = None


class PlayedProcess:
    def __init__(self, config: WorkerConfig) -> None:
        self.config, self.address, self.stopped = config, "unix:/played", False

    def start(self, on_progress: Any) -> None:
        on_progress(5, 10)
        if self.config.loading and self.config.loaded:
            self.config.loading.set()
            assert self.config.loaded.wait(10)
        if self.config.fails:
            raise UnservableModelError("recurrent")

    def status(self) -> dict[str, Any]:
        return {"worker_id": self.config.worker_id, "incarnation": self.config.incarnation}

    def stop(self) -> None:
        self.stopped = True


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> WorkerActor:
    found = types.ModuleType("played_process")
    found.WorkerConfig, found.PlayedProcess = WorkerConfig, PlayedProcess  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "played_process", found)
    monkeypatch.setattr(module, "open_process_log", lambda path, level: None)
    monkeypatch.setenv("FLEXPERT_TEST_VARIABLE", "before")
    return WorkerActor(
        log_path="/unused",
        log_level="info",
        environment={"FLEXPERT_TEST_VARIABLE": "set"},
        process="played_process:PlayedProcess",
    )


async def test_warm_process_becomes_a_worker(played: WorkerActor) -> None:
    assert os.environ["FLEXPERT_TEST_VARIABLE"] == "set"
    assert (await played.warm("/model", "cpu"))["pid"] == os.getpid()
    assert await played.status() is None
    answer = await played.start({"worker_id": "worker-0", "incarnation": 3})
    assert (answer["address"], answer["incarnation"]) == ("unix:/played", 3)
    assert await played.progress("start") == (5, 10)
    assert await played.progress("prepare") == (0, 0)
    await played.stop()


async def test_no_garbage_is_looked_for_while_a_worker_imports(
    played: WorkerActor, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "played_needs.py").write_text("import gc\ncollects = gc.isenabled()\n")
    monkeypatch.syspath_prepend(tmp_path)
    played._module = "played_needs"
    try:
        assert "failure" not in await played.warm("/model", "cpu")
        assert (sys.modules["played_needs"].collects, gc.isenabled()) == (False, True)
    finally:
        sys.modules.pop("played_needs", None)


async def test_start_that_fails_answers_with_the_failure(played: WorkerActor) -> None:
    answer = await played.start({"worker_id": "worker-0", "incarnation": 1, "fails": True})
    assert answer == {"failure": {"kind": "model", "message": "recurrent", "permanent": True}}


async def test_process_is_no_worker_until_it_serves(played: WorkerActor) -> None:
    loading, loaded = threading.Event(), threading.Event()
    starting = asyncio.create_task(
        played.start({"worker_id": "worker-0", "incarnation": 1, "loading": loading, "loaded": loaded})
    )
    try:
        assert await asyncio.to_thread(loading.wait, 10)
        assert await played.status() is None
    finally:
        loaded.set()
    await starting
    assert await played.status() == {"worker_id": "worker-0", "incarnation": 1, "address": "unix:/played"}


async def test_process_whose_start_failed_is_no_worker(played: WorkerActor) -> None:
    await played.start({"worker_id": "worker-0", "incarnation": 1, "fails": True})
    assert await played.status() is None
    await played.stop()  # what it had begun is ended all the same


def test_process_log_takes_prints_and_rotates(tmp_path: Path) -> None:
    code = (
        "import sys, os, logging; from pathlib import Path; from flexpert.workers import process_log as p; p.MAX_LOG_BYTES = 2000\n"
        "p.open_process_log(Path(sys.argv[1]), 'info')\n"
        "for n in range(60): logging.info('line %d', n)\n"
        "print('printed'); os.write(2, b'from a library\\n')"
    )
    path = tmp_path / "x.log"
    assert os.spawnv(os.P_WAIT, sys.executable, [sys.executable, "-c", code, str(path)]) == 0
    text = path.read_text()
    assert "printed" in text
    assert "from a library" in text
    assert path.with_name("x.log.1").exists()
    assert path.stat().st_mode & 0o077 == 0


class PlayedMember(PlayedProcess):
    """Answers the steps of a transition."""

    def __init__(self, config: WorkerConfig) -> None:
        super().__init__(config)
        self.trouble: concurrent.futures.Future[Trouble] = concurrent.futures.Future()

    def prepare(self, epoch: bytes, sources: list[Any], deadline_s: float) -> dict[str, Any]:
        if epoch == b"bad":
            raise BudgetError("no granules")
        return {"moved_bytes": len(epoch), "loaded_bytes": 0, "seconds": {}}

    def commit(self, number: int, deadline_s: float) -> dict[str, Any]:
        return {"pause_s": 0.0, "step": 4, "released": []}

    def release(self) -> dict[str, Any]:
        self.stopped = True
        return {"freed_bytes": 3}

    def wait_trouble(self) -> concurrent.futures.Future[Trouble]:
        return self.trouble

    def expert_load(self) -> list[list[int]]:
        return [[1, 2]]


@dataclass
class Trouble:
    epoch: int
    step: int
    suspects: tuple[str, ...]
    reason: str


@pytest.fixture
def member(played: WorkerActor) -> WorkerActor:
    sys.modules["played_process"].PlayedProcess = PlayedMember  # type: ignore[attr-defined]
    return played


async def test_steps_of_a_transition_reach_the_worker(member: WorkerActor) -> None:
    assert "start it first" in (await member.prepare(b"epoch", [], 1.0))["failure"]["message"]
    await member.start({"worker_id": "worker-0", "incarnation": 1})
    assert (await member.prepare(b"epoch", [("/socket", (0,))], 1.0))["moved_bytes"] == 5
    assert [await member.progress(step) for step in ("start", "prepare")] == [(0, 0), (0, 0)], "those were of the start"
    assert (await member.commit(1, 1.0))["step"] == 4
    assert await member.expert_load() == [[1, 2]]


async def test_step_that_fails_answers_with_the_failure(member: WorkerActor) -> None:
    await member.start({"worker_id": "worker-0", "incarnation": 1})
    answer = await member.prepare(b"bad", [], 1.0)
    assert answer == {"failure": {"kind": "memory", "message": "no granules", "permanent": True}}


async def test_trouble_is_awaited_until_it_comes(member: WorkerActor) -> None:
    await member.start({"worker_id": "worker-0", "incarnation": 1})
    waiting = asyncio.create_task(member.wait_trouble())
    await asyncio.sleep(0)
    assert not waiting.done()
    member._worker.trouble.set_result(Trouble(3, 7, ("worker-1",), "missed"))
    assert await asyncio.wait_for(waiting, 10) == {"epoch": 3, "step": 7, "suspects": ("worker-1",), "reason": "missed"}


async def test_released_worker_is_a_warm_process_that_can_start_again(member: WorkerActor) -> None:
    await member.start({"worker_id": "worker-0", "incarnation": 1})
    assert await member.release() == {"freed_bytes": 3}
    assert await member.status() is None
    assert await member.release() == {"freed_bytes": 0}
    assert (await member.start({"worker_id": "worker-3", "incarnation": 1}))["worker_id"] == "worker-3"


async def test_question_for_trouble_ends_with_the_worker(member: WorkerActor) -> None:
    """Else each release would leave a call behind, and an actor answers only so many at a time."""
    assert await asyncio.wait_for(member.wait_trouble(), 10) is None
    await member.start({"worker_id": "worker-0", "incarnation": 1})
    waiting = asyncio.create_task(member.wait_trouble())
    await asyncio.sleep(0)
    member._worker.trouble.set_result(None)
    assert await asyncio.wait_for(waiting, 10) is None
