"""The fault matrix: every process killed or stopped at every step of a transition, in one cluster under load, run as a user runs it.

What each cell does is in benchmarks/fault_cells.py. Here it must be right: a fresh request is answered, requests that ran end with exactly
the text of the undisturbed cluster, `up` is never restarted, and a later scale works.
Three cells run always, all with FLEXPERT_ALL_FAULTS=1.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from elasticity import free_port
from fault_cells import FAULTS, Cell, Trial, all_cells, wait_until
from local_cluster import LocalCluster

from flexpert.hbm import GRANULE_BYTES, HbmClient

QUICK = {"kill worker / none", "kill controller / prepare", "kill manager / commit"}


@pytest.fixture(scope="module")
def trial(tiny_model: Path) -> Iterator[Trial]:
    """One cluster for all cells; it must run to the end."""
    drills = tempfile.TemporaryDirectory(prefix="fxd-", dir="/tmp")
    os.environ["FLEXPERT_DRILL_DIR"] = drills.name
    cluster = LocalCluster(
        str(tiny_model), "--workers", "2", "--standby", "2", "--max-workers", "3", "--memory", "64MiB", "--device", "cpu",
        port=free_port(),
    )  # fmt: skip
    try:
        made = Trial(cluster.start(), Path(drills.name))
        try:
            yield made
        finally:
            made.close()
        assert cluster.running, "`flexpert up` ended meanwhile"
    finally:
        cluster.close()
        del os.environ["FLEXPERT_DRILL_DIR"]
        drills.cleanup()


def chosen() -> list[object]:
    wanted = [cell for cell in all_cells() if cell.name in QUICK or os.environ.get("FLEXPERT_ALL_FAULTS")]
    return [pytest.param(cell, id=cell.name) for cell in wanted]


def test_quick_cells_are_cells() -> None:
    names = {cell.name for cell in all_cells()}
    assert names >= QUICK
    assert {cell.fault for cell in all_cells()} == set(FAULTS)


@pytest.mark.parametrize("cell", chosen())
def test_fault_ends_no_request_and_no_later_transition(trial: Trial, cell: Cell) -> None:
    outcome = trial.run(cell)
    assert outcome.failed == []
    assert outcome.finished > 0
    assert outcome.lost == 0 or cell.fault == "kill gateway"


def test_peer_that_cannot_be_read_is_done_without(trial: Trial) -> None:
    """The joiner cannot copy from the managers of those that serve: it reads the disk."""
    trial.settle()
    trial.scale(3)
    assert not joined(trial)["weights_loaded"], "what the others have is read from them"
    trial.scale(2)
    failed = len(trial.load.failed)
    (trial.drills / "lose-peers").touch()
    try:
        trial.scale(3)
    finally:
        (trial.drills / "lose-peers").unlink()
    assert joined(trial)["weights_loaded"], "from disk"
    trial.scale(2)
    trial.load.round()
    assert trial.load.failed[failed:] == []


def test_metrics_count_the_transitions_and_what_they_took(trial: Trial) -> None:
    trial.settle()

    def count(metric: str) -> float:
        lines = httpx.get(f"{trial.cluster.url}/metrics").text.splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(metric))

    done = 'flexpert_transitions_total{kind="scale",state="done"}'
    names = [done, 'flexpert_join_seconds_count{start="warm"}', "flexpert_commit_pause_seconds_count"]
    before = [count(name) for name in names]
    trial.scale(3)
    wait_until(lambda: count(done) == before[0] + 1, "the transition in /metrics", 20)
    assert all(count(name) > earlier for name, earlier in zip(names, before, strict=True))
    trial.scale(2)


def joined(trial: Trial) -> dict[str, Any]:
    """What was told of the worker that started last."""
    return [event for event in trial.events() if event["kind"] == "worker"][-1]


def test_joiner_without_memory_is_refused_and_nothing_changes(trial: Trial) -> None:
    """Somebody else holds nearly all of the memory of its device."""
    before = trial.settle()
    failed = len(trial.load.failed)
    device = next(device for device in before["devices"] if not device["worker_id"])
    with HbmClient.connect(device["socket"], client_name="hoarder") as hoarder:
        granules = hoarder.info().free_bytes // GRANULE_BYTES - 1
        arena = hoarder.open_kv_arena("hoard", slots=1, slot_bytes=granules * GRANULE_BYTES, granules=granules)
        begun = trial.begin("/scale", workers=3)
        assert begun is not None
        ended = trial.ended(begun["transition_id"])
        assert arena.granules
        arena.close()
        hoarder.drop_kv_arena("hoard")
    assert ended["state"] == "aborted", ended
    assert "memory" in ended["reason"] or "granules" in ended["reason"], ended["reason"]
    after = trial.calm()
    assert (after["epoch"], len(after["workers"])) == (before["epoch"], 2)
    trial.load.round()
    assert trial.load.failed[failed:] == []
    wait_until(lambda: trial.scale(3), "the next scale", 60)
