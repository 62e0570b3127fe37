"""Cleans up after a cluster whose `up` was killed: ends the processes it recorded, and nobody else's.

Called with the cluster's lock in hand, so no `up` runs. The HBM manager is left alone unless asked for: the next `up` adopts it.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from flexpert.controller.processes import ProcessId, end_all
from flexpert.controller.runtime_dir import RuntimeDir

GRACE_S = 5.0
RAY_PREFIX = "flexpert-ray-"


def clean_up(runtime: RuntimeDir, *, stop_manager: bool) -> list[str]:
    """End what an earlier `up` left; returns a line for each thing done."""
    said = _end_processes(runtime)
    if stop_manager:
        said += _stop_manager(runtime)
    for path in (runtime.state, runtime.admin_socket, *runtime.path.glob("worker-*.sock*")):
        path.unlink(missing_ok=True)
    return said


def _end_processes(runtime: RuntimeDir) -> list[str]:
    state = runtime.read_state()
    if state is None:
        return []
    said = []
    recorded = [ProcessId.from_json(entry) for entry in (state["up"], *state.get("processes", []))]
    ended = end_all([process for process in recorded if process.pid != os.getpid()], grace_s=GRACE_S)
    if ended:
        said.append(
            f"ended {len(ended)} process{'es' * (len(ended) > 1)} that an earlier run left: {', '.join(p.name for p in ended)}"
        )
    if address := state.get("ray_address"):
        said += _kill_actors(address, runtime.name)
    temp_dir = state.get("ray_temp_dir")
    if temp_dir and Path(temp_dir).name.startswith(RAY_PREFIX):
        shutil.rmtree(temp_dir, ignore_errors=True)
    return said


def _kill_actors(address: str, name: str) -> list[str]:
    """In a Ray cluster that was joined, actors outlive the `up` that made them."""
    from flexpert.controller import ray_cluster

    try:
        cluster = ray_cluster.RayCluster.start(address=address, num_cpus=1)
    except ray_cluster.RayUnavailable as error:
        return [f"could not look for actors of an earlier run: {error}"]
    cluster.shutdown(f"{name}:")
    return [f"ended what an earlier run had in the Ray cluster at {address}"]


def _stop_manager(runtime: RuntimeDir) -> list[str]:
    from flexpert.hbm import stop_manager

    ended = [device for device in runtime.manager_names() if stop_manager(runtime.path, device)]
    return [f"ended the HBM manager{'s' * (len(ended) > 1)} of {', '.join(ended)}"] if ended else []
