"""What an operator may ask of the cluster, and what is possible instead: requests become a set of workers, or a refusal. Pure.

Called by `controller.transition` for each Request, before anything changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flexpert.controller.transition_state import State, Transition
from flexpert.controller.transition_types import Request, TransitionConfig


@dataclass(frozen=True, slots=True)
class Refusal:
    """code: "invalid", "conflict", "impossible" or "not_found"."""

    code: str
    message: str


def limit_s(config: TransitionConfig, running: Transition) -> float:
    """How long the phase may take. A repair waits a short time for processes at first, then as long as any."""
    if running.phase == "start" and running.mends and running.kind != "boot" and not running.waited:
        return config.deadlines.process_s
    return float(getattr(config.deadlines, f"{running.phase}_s", 0.0))


def capacity_slabs(config: TransitionConfig, worker_id: str) -> int:
    """Expert slabs that fit on the worker's device beside the dense weights and the least KV; whole groups."""
    model = config.model
    memory = next((device.memory_bytes for device in config.devices if device.worker_id == worker_id), 0)
    group_bytes = model.slabs_per_group * model.slab_bytes
    left = memory - model.dense_bytes - model.kv_min_bytes
    return max(0, left // group_bytes * model.slabs_per_group) if group_bytes else model.slabs


def in_order(config: TransitionConfig, workers: Sequence[str]) -> tuple[str, ...]:
    """Rank order: that of the devices."""
    return tuple(device.worker_id for device in config.devices if device.worker_id in workers)


def lacking_memory(config: TransitionConfig, workers: Sequence[str]) -> str:
    """Why these workers cannot hold the model, "" where they can."""
    model = config.model
    groups = -(-model.slabs // model.slabs_per_group)
    there = sum(capacity_slabs(config, worker) // model.slabs_per_group for worker in workers)
    if there >= groups:
        return ""
    group_bytes = model.slabs_per_group * model.slab_bytes
    each = _bytes(model.dense_bytes + model.kv_min_bytes)
    return (
        f"{_count(len(workers))} cannot hold the model: its experts need {_bytes(groups * group_bytes)} and "
        f"{_bytes(there * group_bytes)} are there (each worker keeps {each} of its memory for dense weights and the least KV)"
    )


def choose(config: TransitionConfig, state: State, request: Request) -> tuple[str, ...] | Refusal:
    """The workers that the request asks for, in rank order, or why it cannot be."""
    if not request.request_id:
        return Refusal("invalid", "a request needs an id: it makes sending it twice safe")
    match request.kind:
        case "boot":
            return _boot(config, state, request.workers)
        case "scale":
            return _bounds(config, request.workers) or _busy(config, state) or _scale(config, state, request.workers)
        case "drain":
            return _drain(config, state, request.worker_id)
    return Refusal("invalid", f'"{request.kind}" is no request: boot, scale and drain are')


def _bounds(config: TransitionConfig, workers: int) -> Refusal | None:
    if workers < 1:
        return Refusal(
            "impossible", f"{workers} workers cannot serve: scale to at least 1; 'flexpert down' ends the cluster"
        )
    most = min(config.max_workers, len(config.devices))
    if workers <= most:
        return None
    if most == config.max_workers:
        why = f"the cluster was started with --max-workers {most}"
    else:
        why = f"there are {len(config.devices)} devices and each worker needs one"
    return Refusal("impossible", f"{workers} workers are too many: {why}; scale to {most} or fewer")


def _busy(config: TransitionConfig, state: State) -> Refusal | None:
    found = state.running
    if found is not None:
        return Refusal(
            "conflict",
            f"transition {found.transition_id} ({found.asked}, to epoch {found.number}) is running: phase {found.phase}, which "
            f"ends by itself within {limit_s(config, found):g} s; ask again after it, or follow it with 'flexpert status'",
        )
    if state.current is None:
        return Refusal("conflict", "the cluster has not started yet; ask again once it serves")
    if state.dead or state.broken:
        why = f"{', '.join(state.dead)} died" if state.dead else state.broken
        return Refusal("conflict", f"a repair comes first ({why}); ask again after it")
    return None


def _boot(config: TransitionConfig, state: State, workers: int) -> tuple[str, ...] | Refusal:
    if state.current is not None or state.running is not None:
        return Refusal("conflict", "the cluster is started already: scale it")
    refusal = _bounds(config, workers)
    chosen = tuple(device.worker_id for device in config.devices[:workers])
    return refusal or _with_memory(config, chosen)


def _scale(config: TransitionConfig, state: State, workers: int) -> tuple[str, ...] | Refusal:
    """Workers join in the order of the devices, those that were left out first, and leave from the end."""
    stay = state.members[:workers]
    others = [device.worker_id for device in config.devices if device.worker_id not in stay]
    others.sort(key=lambda worker: worker not in state.missing)
    return _with_memory(config, in_order(config, (*stay, *others[: workers - len(stay)])))


def _drain(config: TransitionConfig, state: State, worker_id: str) -> tuple[str, ...] | Refusal:
    busy = _busy(config, state)
    if busy:
        return busy
    if worker_id in state.missing:
        return state.members  # it is not wanted back any more
    if worker_id not in state.members:
        verb = "serves" if len(state.members) == 1 else "serve"
        return Refusal("not_found", f'there is no worker "{worker_id}": {", ".join(state.members)} {verb}')
    rest = tuple(worker for worker in state.members if worker != worker_id)
    if not rest:
        return Refusal(
            "impossible", f"{worker_id} is the last worker: scale up first, or end the cluster with 'flexpert down'"
        )
    return _with_memory(config, rest)


def _with_memory(config: TransitionConfig, workers: tuple[str, ...]) -> tuple[str, ...] | Refusal:
    lacking = lacking_memory(config, workers)
    if not lacking:
        return workers
    order = [*workers, *(device.worker_id for device in config.devices if device.worker_id not in workers)]
    most = min(config.max_workers, len(order))
    enough = next((n for n in range(len(workers) + 1, most + 1) if not lacking_memory(config, order[:n])), None)
    if enough is None:
        return Refusal("impossible", f"{lacking}; no number of workers up to {most} can: raise --memory")
    return Refusal("impossible", f"{lacking}; {_count(enough)} can, or raise --memory")


def _count(workers: int) -> str:
    return f"{workers} worker" + "s" * (workers != 1)


def _bytes(number: int) -> str:
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number} bytes"
