"""What the next epoch looks like: its placement, its members, who reads what from where; and what the gateways are to know. Pure.

Called by `controller.transition_course`.
"""

from __future__ import annotations

from collections.abc import Sequence

from flexpert.controller.planner import groups_held, keep, plan
from flexpert.controller.transition_requests import capacity_slabs
from flexpert.controller.transition_state import State, Transition
from flexpert.controller.transition_types import Publish, Serving, Source, TransitionConfig
from flexpert.workers.epoch import Epoch, Member


def plan_next(
    config: TransitionConfig, state: State, running: Transition, load: Sequence[Sequence[float]] | None
) -> None:
    """Write placement, sources and bytes into `running`. A repair by the same members keeps the placement. Raises planner.DoesNotFit."""
    model, current = config.model, state.current
    held: dict[str, list[int]] = {}
    sockets: dict[str, str] = {}
    if current is not None:
        held = groups_held(current.holders, state.members, slabs_per_group=model.slabs_per_group)
        sockets = {member.worker_id: member.manager_socket for member in current.members}
    held = {worker: groups for worker, groups in held.items() if worker not in state.lost}
    if current is not None and running.mends and running.to_workers == state.members:
        found = keep(
            holders=current.holders,
            members=running.to_workers,
            held=held,
            slabs_per_group=model.slabs_per_group,
            slab_bytes=model.slab_bytes,
        )
    else:
        found = plan(
            layers=model.layers,
            experts=model.experts,
            members=[(worker, capacity_slabs(config, worker)) for worker in running.to_workers],
            held=held,
            load=load,
            slabs_per_group=model.slabs_per_group,
            slab_bytes=model.slab_bytes,
            replicas=config.replicas,
        )
    running.holders, running.total_bytes = found.holders, found.moved_bytes
    for worker, part in running.parts.items():
        fetches = found.fetches.get(worker, {})
        part.sources = [Source(source, sockets[source], tuple(groups)) for source, groups in fetches.items() if source]


def next_epoch(state: State, running: Transition) -> Epoch:
    """With "" for the addresses of those that have not started yet."""
    members = []
    for worker in running.to_workers:
        live = running.parts[worker].live
        members.append(
            Member(
                worker_id=worker,
                incarnation=live.incarnation if live else state.incarnations.get(worker, 0) + 1,
                exchange_address=live.exchange_address if live else "",
                manager_socket=live.manager_socket if live else "",
            )
        )
    return Epoch(number=running.number, members=tuple(members), holders=running.holders)


def to_publish(state: State) -> Publish:
    """Who serves now: the living members of the current epoch, and leavers until they have left."""
    draining: set[str] = set()
    if state.running and state.running.phase in ("prepare", "commit"):
        draining = {worker for worker, part in state.running.parts.items() if part.role == "leaves"} & state.live.keys()
    serving = [
        Serving(worker, live.incarnation, live.serve_address)
        for worker, live in state.live.items()
        if worker in state.members or worker in draining
    ]
    return Publish(tuple(sorted(serving)), tuple(sorted(draining)))
