"""What one worker is made of, and the order in which it is built: checkpoint, memory, scheduler, runner, engine, membership.

Called by `workers.process`, which gives the parts their threads. A worker that serves alone has all experts; one that joins an epoch has
fetched its share of the draft, and computes nothing before it was committed.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from flexpert.hbm import HbmClient
from flexpert.workers.engine import Engine, Owner
from flexpert.workers.ep import capacity_bytes
from flexpert.workers.epoch import Epoch, decode
from flexpert.workers.fetch import Fetched, ManagedWeights, PrivateWeights, Progress, Weights
from flexpert.workers.kv_move import KvReceiver, KvSender, door_of
from flexpert.workers.kv_space import KvSpace
from flexpert.workers.membership import Connect, Membership
from flexpert.workers.messages import WorkerFrame
from flexpert.workers.model import (
    DENSE,
    ServableModel,
    WeightLayout,
    all_experts,
    bind,
    check_servable,
    expert_segments,
    kv_token_bytes,
)
from flexpert.workers.model.layout import is_experts
from flexpert.workers.runner import ModelRunner
from flexpert.workers.sampling import Sampler
from flexpert.workers.scheduler import Scheduler, SchedulerConfig
from flexpert.workers.transport import ExchangeListener, Transport, connect_distributed, connect_mapped
from flexpert.workers.weights import drop_leftovers, weights_key
from flexpert.workers.worker_config import WorkerConfig, WorkerStartError

TRANSPORTS = ("auto", "mapped", "distributed")


@dataclass
class StartTimes:
    """Seconds of each phase of a start, for events and metrics."""

    phases: dict[str, float] = field(default_factory=dict)
    _began_s: float = field(default_factory=time.perf_counter)

    def mark(self, phase: str) -> None:
        now_s = time.perf_counter()
        self.phases[phase] = round(now_s - self._began_s, 4)
        self._began_s = now_s


@dataclass
class Parts:
    engine: Engine
    runner: ModelRunner
    membership: Membership
    weights: Weights
    kv: KvSpace
    listener: ExchangeListener
    receiver: KvReceiver | None
    client: HbmClient | None
    vocab_size: int
    dense_bytes: int
    fetched_bytes: int  # of experts, from peers and disk, for this start

    def close(self) -> None:
        """After the engine's thread has ended. Weights, KV and records stay with the manager."""
        self.listener.close()
        if self.receiver is not None:
            self.receiver.close()
        self.membership.close()
        if self.client is not None:
            self.client.close()


def assemble(
    config: WorkerConfig,
    *,
    emit: Callable[[Owner, WorkerFrame], None],
    times: StartTimes,
    on_progress: Progress | None = None,
) -> Parts:
    """Raises as `WorkerProcess.start`."""
    torch.set_num_threads(config.threads or os.cpu_count() or 1)
    torch.set_grad_enabled(False)
    servable = check_servable(config.model_dir)
    times.mark("check_model")
    client = _connect_manager(config)
    try:
        return _assemble(config, servable, client, emit=emit, times=times, on_progress=on_progress)
    except BaseException:
        if client is not None:
            client.close()
        raise


def _assemble(
    config: WorkerConfig,
    servable: ServableModel,
    client: HbmClient | None,
    *,
    emit: Callable[[Owner, WorkerFrame], None],
    times: StartTimes,
    on_progress: Progress | None,
) -> Parts:
    draft = None if config.epoch is None else decode(config.epoch)
    weights: Weights
    if client is None or config.manager_socket is None:
        weights = PrivateWeights(servable, config.dtype_name, device=config.device)
    else:
        key, socket = _key(config), config.manager_socket
        weights = ManagedWeights(client, key, servable, config.dtype_name, device=config.device, own_socket=socket)
    layout = weights.layout(config.sources)
    held = all_experts(layout) if draft is None else _share(draft, config.worker_id)
    names = expert_segments(layout, held)
    kv = KvSpace(
        config,
        token_bytes=kv_token_bytes(servable, config.dtype_name),
        max_context_tokens=_max_context(config, servable),
    )
    if client is None or config.device != "cpu":
        fetched = weights.fetch([DENSE, *names], config.sources, on_progress)
        times.mark("weights")
        # Between prepare and retire the experts of two epochs are on the device, each time at most all.
        group_bytes = layout.group_bytes
        to_come_bytes = 0 if draft is None else (2 * layout.groups - len(names)) * group_bytes
        kv.open_private(to_come_bytes=to_come_bytes)
        scheduler = _scheduler(config, servable, kv)
    else:
        scheduler, fetched = _fill_device(config, servable, client, weights, layout, names, kv, on_progress)
    times.mark("memory")
    manifest, dense = weights.dense()
    bound = bind(servable, manifest, {DENSE: dense}, device=config.device)
    runner = ModelRunner(bound, kv.memory.tensor)
    engine = Engine(
        scheduler=scheduler,
        runner=runner,
        sampler=Sampler(),
        memory=kv.memory,
        emit=emit,
        waiting=draft is not None,
    )
    listener = ExchangeListener(config.listen_for_peers, token=config.cluster_token)
    token_bytes = kv_token_bytes(servable, config.dtype_name)
    moving: dict[str, Any] = {
        "cluster_token": config.cluster_token,
        "layout": f"{_key(config)}:{token_bytes}",
        "token_bytes": token_bytes,
        "engine": engine,
        "scheduler": scheduler,
        "memory": kv.memory,
    }
    membership = Membership(
        worker_id=config.worker_id,
        weights=weights,
        bound=bound,
        kv=kv,
        engine=engine,
        scheduler=scheduler,
        connect=_connector(config, servable, listener),
        cancel_connect=listener.cancel,
        context_tokens=kv.context_tokens,
        make_sender=lambda: KvSender(**moving),
    )
    door = door_of(listener.address)
    receiver = None if door is None else KvReceiver(door, **moving)
    times.mark("bind")
    if draft is None:
        runner.use(membership.begin_alone(names, held), None)
        runner.warm_up()
        times.mark("warm_up")
    return Parts(
        engine=engine,
        runner=runner,
        membership=membership,
        weights=weights,
        kv=kv,
        listener=listener,
        receiver=receiver,
        client=client,
        vocab_size=servable.vocab_size,
        dense_bytes=layout.dense_bytes,
        fetched_bytes=layout.group_bytes * sum(is_experts(name) for name in fetched.names),
    )


def discard(config: WorkerConfig, parts: Parts) -> int:
    """Free what a worker that was closed left at its manager; how many bytes."""
    client = _connect_manager(config)
    if client is None:
        return 0
    with client:
        free_bytes = client.info().free_bytes
        if client.segments(_key(config)):
            client.drop_weights(_key(config))
        if any(arena.name == _arena(config) for arena in client.info().arenas):
            client.drop_kv_arena(_arena(config))
        return client.info().free_bytes - free_bytes


def _key(config: WorkerConfig) -> str:
    return weights_key(config.model_dir, config.dtype_name)


def _arena(config: WorkerConfig) -> str:
    return f"kv:{_key(config)}"


def _share(draft: Epoch, worker_id: str) -> tuple[tuple[int, ...], ...]:
    rank = draft.rank_of(worker_id)
    if rank is None:
        members = ", ".join(member.worker_id for member in draft.members)
        raise WorkerStartError(f"worker {worker_id} is to join epoch {draft.number}, whose members are {members}")
    return draft.held_by(rank)


def _max_context(config: WorkerConfig, servable: ServableModel) -> int:
    wanted = config.max_context_tokens
    if wanted is not None and wanted > servable.max_context_tokens:
        raise WorkerStartError(
            f"max context: found {wanted} tokens, the model was made for at most {servable.max_context_tokens}; "
            "give a smaller --max-context"
        )
    return wanted or servable.max_context_tokens


def _connect_manager(config: WorkerConfig) -> HbmClient | None:
    if config.manager_socket is None:
        return None
    client = HbmClient.connect(config.manager_socket, client_name=config.worker_id, fencing_token=config.incarnation)
    drop_leftovers(client, keep_weights=_key(config), keep_arena=_arena(config))
    return client


def _fill_device(
    config: WorkerConfig,
    servable: ServableModel,
    client: HbmClient,
    weights: Weights,
    layout: WeightLayout,
    names: Sequence[str],
    kv: KvSpace,
    on_progress: Progress | None,
) -> tuple[Scheduler, Fetched]:
    """Weights and KV on the manager's device. KV that an earlier incarnation left gives way before more experts come."""
    there = weights.segments()
    sizes = layout.segment_bytes()
    experts = {name for name in there if is_experts(name)} | set(names)
    held_bytes = sum(sizes[name] for name in experts)

    def open_kv(missing: Sequence[str]) -> Scheduler:
        kv.open(
            client,
            _arena(config),
            experts_bytes=layout.groups * layout.group_bytes,
            held_bytes=held_bytes,
            missing_bytes=sum(sizes[name] for name in missing),
        )
        return _scheduler(config, servable, kv)

    wanted = [DENSE, *names]
    left = kv.exists(client, _arena(config))
    if left:
        scheduler = open_kv([name for name in wanted if name not in there])
        kv.make_room(held_bytes, scheduler, lambda function: function(), keep_tokens=1)
    fetched = weights.fetch(wanted, config.sources, on_progress)
    if not left:
        return open_kv(()), fetched
    kv.fill(held_bytes, scheduler, lambda function: function())
    return scheduler, fetched


def _scheduler(config: WorkerConfig, servable: ServableModel, kv: KvSpace) -> Scheduler:
    kv.books.restore(kv.memory.records())
    limits = SchedulerConfig(
        max_running=config.max_running, max_batch_tokens=config.batch_tokens, vocab_size=servable.vocab_size
    )
    return Scheduler(limits, kv.books)


def _connector(config: WorkerConfig, servable: ServableModel, listener: ExchangeListener) -> Connect:
    """Mapped memory where all ranks are on this host's CPU, torch.distributed elsewhere, unless the config says which."""
    if config.transport not in TRANSPORTS or (config.transport == "mapped" and config.device != "cpu"):
        raise WorkerStartError(
            f"transport {config.transport} on device {config.device}: expected one of {', '.join(TRANSPORTS)}, and mapped only on the CPU"
        )
    most_bytes = capacity_bytes(servable, config.dtype_name, max_batch_tokens=config.batch_tokens)
    device = torch.device(config.device)

    def connect(epoch: Epoch, rank: int, timeout_s: float) -> Transport:
        on_this_host = all(member.exchange_address.startswith("unix:") for member in epoch.members)
        if (
            config.transport == "distributed"
            or device.type != "cpu"
            or not (on_this_host or config.transport == "mapped")
        ):
            return connect_distributed(
                epoch,
                rank,
                listener,
                device,
                token=config.cluster_token,
                step_timeout_s=config.step_timeout_s,
                connect_timeout_s=timeout_s,
            )
        return connect_mapped(
            epoch,
            rank,
            listener,
            token=config.cluster_token,
            capacity_bytes=most_bytes * (epoch.size - 1),
            step_timeout_s=config.step_timeout_s,
            connect_timeout_s=timeout_s,
        )

    return connect
