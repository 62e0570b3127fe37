"""How a controller begins: anew, after an earlier `up` on the same directory, or in place of one that died. Pure but for what it is given.

A run is one `up`. Within a run the transitions go on where the journal left them; a new run keeps only what must keep growing.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Mapping

from flexpert.controller.conductor import Conductor
from flexpert.controller.journal import Facts
from flexpert.controller.spec import ClusterSpec, device_of
from flexpert.controller.supervision import Supervision
from flexpert.controller.supervision_types import SupervisionConfig
from flexpert.controller.transition import Transitions
from flexpert.controller.transition_state import State, from_journal
from flexpert.controller.transition_types import Device, ModelShape, TransitionConfig

log = logging.getLogger(__name__)

MIN_KV_TOKENS = 256  # of use to somebody


def run_of(spec: ClusterSpec) -> str:
    """Names the run: each `up` draws a token of its own."""
    return hashlib.sha256(spec.cluster_token.encode()).hexdigest()[:12]


def forget_other_run(spec: ClusterSpec, facts: Facts) -> None:
    """What only the run knew that wrote it: when it began, the model, where the devices are and who held them."""
    if facts.run != run_of(spec):
        facts.run, facts.model, facts.managers = run_of(spec), {}, {}
        facts.began_s, facts.transition_began_s, facts.nodes = time.time(), {}, []


def make_conductor(spec: ClusterSpec, facts: Facts, agents: Mapping[str, str]) -> Conductor:
    """With the transitions of this run, where there were any. agents: worker -> agent of its node."""
    supervision = Supervision(
        SupervisionConfig(standbys=spec.standbys, agents=agents),
        first_process=facts.next_process,
        first_generation=facts.generation,
    )
    boot_workers = spec.worker_ids[: spec.workers]
    if facts.model and facts.transitions:
        try:
            transitions = Transitions.restore(transition_config(spec, facts.model), facts.transitions)
            return Conductor(supervision, boot_workers=boot_workers, transitions=transitions)
        except ValueError:
            log.exception("the journal cannot be read; starting anew")
    return Conductor(supervision, boot_workers=boot_workers)


def first_state(facts: Facts) -> State:
    """No epoch yet, but numbers that go on where an earlier run ended: incarnations and epochs never come twice."""
    try:
        old = from_journal(facts.transitions) if facts.transitions else State()
    except ValueError:
        log.exception("the journal of an earlier run cannot be read")
        old = State()
    return State(
        incarnations=dict(old.incarnations), last_epoch=old.last_epoch, last_transition=old.last_transition,
        last_deadline=old.last_deadline,
    )  # fmt: skip


def transition_config(spec: ClusterSpec, shape: dict[str, int]) -> TransitionConfig:
    kv_tokens = min(MIN_KV_TOKENS, spec.max_context_tokens or MIN_KV_TOKENS)
    model = ModelShape(
        layers=shape["layers"], experts=shape["experts"], slab_bytes=shape["slab_bytes"], slabs_per_group=shape["slabs_per_group"],
        dense_bytes=shape["dense_bytes"], kv_min_bytes=kv_tokens * shape["kv_token_bytes"],
    )  # fmt: skip
    devices = tuple(Device(worker_id=worker, memory_bytes=spec.memory_bytes) for worker in spec.worker_ids)
    return TransitionConfig(devices=devices, model=model, max_workers=spec.max_workers)


def needed_devices(spec: ClusterSpec, conductor: Conductor) -> set[str]:
    """Those of members, joiners and processes on their way, and the next ones that standbys would serve."""
    transitions = conductor.transitions
    workers = {worker for _, worker in conductor.supervision.processes().values() if worker}
    if transitions is None or transitions.current is None:
        workers |= set(spec.worker_ids[: spec.workers])
    else:
        workers |= {*transitions.state.members, *transitions.state.missing}
    idle = [worker for worker in spec.worker_ids if worker not in workers]
    return {device_of(worker) for worker in workers | set(idle[: spec.standbys])}
