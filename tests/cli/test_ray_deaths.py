"""What the death of Ray's own processes means: a private Ray is replaced, and the cluster is back with its memory, on the same port with
the same keys. Without its GCS alone, the requests that ran end first; a raylet takes its processes with it (tried where
FLEXPERT_ALL_FAULTS is set).
"""

from __future__ import annotations

import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from tests.cli.harness import GREEDY, TOKENS, Cluster, stream_tokens, wait_until

from flexpert.cli.errors import CommandError
from flexpert.controller.processes import ProcessId, children
from flexpert.controller.runtime_dir import RuntimeDir

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


def strike(cluster: Cluster, name: str) -> None:
    (victim,) = [found for found in children(ProcessId.of(cluster.process.pid)) if found.name == name]
    os.kill(victim.pid, signal.SIGKILL)


def ready_again(cluster: Cluster, before: dict[str, Any]) -> dict[str, Any]:
    """The status under another controller."""

    def found() -> dict[str, Any] | None:
        assert cluster.process.poll() is None, cluster.text
        try:
            status = cluster.status()
        except CommandError:
            return None
        other = status["controller"]["pid"] != before["controller"]["pid"]
        return status if other and status["ready"] and status["workers"] else None

    return dict(wait_until(found, what=f"ready again\n{cluster.text}", timeout_s=90))


def test_cluster_outlives_its_private_ray(runtime: Path, tiny_model: Path) -> None:
    cluster = Cluster.up(runtime, tiny_model, "--standby", "0").wait_ready()
    try:
        first = cluster.status()
        expected = stream_tokens(cluster.client(), **GREEDY)
        assert len(expected) == TOKENS
        kill_gcs = partial(strike, cluster, "gcs_server")
        assert stream_tokens(cluster.client(), after=5, then=kill_gcs, **GREEDY) == expected
        lives = [ready_again(cluster, first)]
        if os.environ.get("FLEXPERT_ALL_FAULTS"):
            strike(cluster, "raylet")
            lives.append(ready_again(cluster, lives[0]))
        for now in lives:
            assert now["manager"]["pid"] == first["manager"]["pid"]
            assert not now["workers"][0]["weights_loaded"], "they are mapped again"
            assert now["uptime_s"] > first["uptime_s"]
        pids = [lives[-1][name]["pid"] for name in ("controller", "gateway", "manager")]
        others = [ProcessId.of(pid) for pid in (*pids, lives[-1]["workers"][0]["pid"])]
        signal_group = partial(os.killpg, cluster.process.pid, signal.SIGTERM)  # as a terminal and `timeout` do it
        drained = stream_tokens(cluster.client(), after=5, then=signal_group, **GREEDY)
        assert drained == expected, "on the same port, with the same key, and Ray lives until requests have ended"
        cluster.process.wait(60)
    finally:
        code = cluster.end()
    assert code == 0, cluster.text
    assert "controller replaced after" in cluster.text
    assert "ending at once" not in cluster.text
    assert all(process is None or process.wait(10) for process in others), "nothing is left running"
    assert not RuntimeDir(runtime / "default").state.exists()
