"""Orders that a drill holds: until the file goes, for one worker or for all, and dropped where a later order overtook them."""

from __future__ import annotations

import asyncio
from pathlib import Path

from flexpert.controller.drills import Drills
from flexpert.controller.transition_types import Abort, Commit


async def settled(task: asyncio.Task[bool]) -> bool:
    """Whether it is done after some looks at the files."""
    done, _ = await asyncio.wait({task}, timeout=0.2)
    return bool(done)


async def test_without_a_directory_every_order_passes_at_once() -> None:
    assert await Drills(None).passes("commit", Commit("worker-0", "process-0", 1, 1.0))


async def test_order_waits_for_the_file_to_go(tmp_path: Path) -> None:
    (tmp_path / "hold-commit").touch()
    drills = Drills(tmp_path)
    held = asyncio.create_task(drills.passes("commit", Commit("worker-0", "process-0", 1, 1.0)))
    assert await drills.passes("retire", Commit("worker-1", "process-1", 1, 1.0)), "another step is not held"
    assert not await settled(held)
    (tmp_path / "hold-commit").unlink()
    assert await asyncio.wait_for(held, 5)


def test_peers_are_lost_while_the_file_is_there(tmp_path: Path) -> None:
    assert Drills(tmp_path).socket("/device-0.sock") == "/device-0.sock"
    (tmp_path / "lose-peers").touch()
    assert Drills(tmp_path).socket("/device-0.sock") != "/device-0.sock"
    assert Drills(None).socket("/device-0.sock") == "/device-0.sock"


async def test_one_worker_is_held_alone(tmp_path: Path) -> None:
    (tmp_path / "hold-commit-worker-1").touch()
    drills = Drills(tmp_path)
    held = asyncio.create_task(drills.passes("commit", Commit("worker-1", "process-1", 1, 1.0)))
    assert await drills.passes("commit", Commit("worker-0", "process-0", 1, 1.0))
    assert not await settled(held)
    held.cancel()


async def test_order_that_was_overtaken_is_dropped(tmp_path: Path) -> None:
    (tmp_path / "hold-commit").touch()
    drills = Drills(tmp_path)
    held = asyncio.create_task(drills.passes("commit", Commit("worker-0", "process-0", 1, 1.0)))
    assert not await settled(held)
    assert await drills.passes("abort", Abort("worker-0", "process-0", 1))
    (tmp_path / "hold-commit").unlink()
    assert not await asyncio.wait_for(held, 5)
