"""What the death of Ray's own processes means: a private Ray takes the cluster with it, in order and with the reason;
without its GCS alone, once the requests that ran have ended."""

from __future__ import annotations

import os
import signal
from functools import partial
from pathlib import Path

import pytest
from tests.cli.harness import GREEDY, TOKENS, Cluster, stream_tokens

from flexpert.controller.processes import ProcessId, children

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]
RAY_LOST = 10


@pytest.mark.parametrize("name", ["raylet", "gcs_server"])
def test_death_of_a_private_ray_ends_the_cluster_with_the_reason(runtime: Path, tiny_model: Path, name: str) -> None:
    cluster = Cluster.up(runtime, tiny_model, "--standby", "0").wait_ready()
    try:
        status = cluster.status()
        pids = [
            status["controller"]["pid"],
            status["gateway"]["pid"],
            status["workers"][0]["pid"],
            status["manager"]["pid"],
        ]
        others = [ProcessId.of(pid) for pid in pids]
        (victim,) = [found for found in children(ProcessId.of(cluster.process.pid)) if found.name == name]
        if name == "raylet":
            os.kill(victim.pid, signal.SIGKILL)
        else:  # the others go on without it for as long as requests run
            expected = stream_tokens(cluster.client(), **GREEDY)
            strike = partial(os.kill, victim.pid, signal.SIGKILL)
            assert stream_tokens(cluster.client(), after=5, then=strike, **GREEDY) == expected
            assert len(expected) == TOKENS
        assert cluster.process.wait(60) == RAY_LOST, cluster.text
    finally:
        cluster.end()
    assert "Ray's processes ended unexpectedly" in cluster.text
    assert all(process is None or process.wait(10) for process in others), "nothing is left running"
    assert not (runtime / "default" / "state.json").exists()
