"""The node agent with real HBM managers, without Ray: one for each device, watched, adopted, stopped, and ended where they hang."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from flexpert.controller import node_agent as module
from flexpert.controller.node_agent import NodeAgent
from flexpert.controller.processes import ProcessId
from flexpert.hbm import stop_manager

BUDGET_BYTES = 1 << 22


@pytest.fixture
async def runtime(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Path]:
    monkeypatch.setattr(module, "open_process_log", lambda path, level: None)
    path = Path(tempfile.mkdtemp(prefix="fx-", dir="/tmp"))
    yield path
    for lock in path.glob("device-*.lock"):
        await asyncio.to_thread(stop_manager, path, lock.stem)
    shutil.rmtree(path, ignore_errors=True)


def make(runtime: Path, *, budget_bytes: int = BUDGET_BYTES, exact: bool = True) -> NodeAgent:
    return NodeAgent(
        runtime_path=str(runtime), budget_bytes=budget_bytes, exact=exact, log_path="/unused", log_level="info"
    )


async def test_each_device_has_a_manager_of_its_own(runtime: Path) -> None:
    agent = make(runtime)
    first, second = await asyncio.gather(agent.ensure("device-0"), agent.ensure("device-1"))
    assert first["pid"] != second["pid"]
    assert (first["adopted"], (await agent.ensure("device-0"))["pid"]) == (False, first["pid"])
    status = await agent.status()
    assert {name: found["budget_bytes"] for name, found in status["devices"].items()} == {
        "device-0": BUDGET_BYTES, "device-1": BUDGET_BYTES,
    }  # fmt: skip
    assert await agent.stop("device-0")
    assert list((await agent.status())["devices"]) == ["device-1"]
    assert await agent.stop_managers() == 1


async def test_next_agent_adopts_the_managers_and_another_budget_starts_one_anew(runtime: Path) -> None:
    first = await make(runtime).ensure("device-0")
    adopted = await make(runtime).ensure("device-0")
    assert (adopted["adopted"], adopted["pid"]) == (True, first["pid"])
    larger = await make(runtime, budget_bytes=4 * BUDGET_BYTES).ensure("device-0")
    assert larger["pid"] != first["pid"]
    assert (await make(runtime, exact=False).ensure("device-0"))["pid"] == larger["pid"]


async def test_end_of_a_manager_is_told_and_the_next_is_watched_too(runtime: Path) -> None:
    agent = make(runtime)
    for _ in range(2):
        found = await agent.ensure("device-0")
        waiting = asyncio.create_task(agent.wait_manager_closed("device-0", found["pid"]))
        await asyncio.sleep(0)
        os.kill(found["pid"], signal.SIGKILL)
        assert "device-0" in await asyncio.wait_for(waiting, 10)
    assert "device-0" in await agent.wait_manager_closed("device-0", found["pid"]), "also where it ended before"


async def test_manager_that_stands_still_is_ended(runtime: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PROBE_PERIOD_S", 0.05)
    monkeypatch.setattr(module, "PROBE_TIMEOUT_S", 0.5)
    agent = make(runtime)
    found, other = await asyncio.gather(agent.ensure("device-0"), agent.ensure("device-1"))
    process = ProcessId.of(found["pid"])
    assert process is not None
    os.kill(found["pid"], signal.SIGSTOP)
    told = await asyncio.wait_for(agent.wait_manager_closed("device-0", found["pid"]), 20)
    assert "did not answer and was ended" in told
    assert not process.alive
    assert ProcessId.of(other["pid"]) is not None, "the one that answers lives"
