"""A model spread over ranks that are threads of this process, and the single worker whose bits they must have."""

from __future__ import annotations

import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from flexpert.hbm.loading import LoadPlan
from flexpert.workers.ep import EpochExperts, ExpertExchange
from flexpert.workers.epoch import Epoch, Member
from flexpert.workers.model import (
    DENSE,
    all_experts,
    bind,
    check_servable,
    compact,
    expert_segments,
    kv_token_bytes,
    load_into,
    make_buffers,
    plan_weights,
)
from flexpert.workers.model.layout import ALIGNMENT_BYTES, WeightLayout
from flexpert.workers.runner import ModelRunner
from flexpert.workers.step import Row
from flexpert.workers.transport.local import LocalGroup

SLOTS, MAX_CONTEXT_TOKENS = 6, 256
Holders = tuple[tuple[tuple[int, ...], ...], ...]


class World:
    """The weights of one model. Granules are so small that a slab group is a single expert, which real models have with real granules."""

    def __init__(
        self, model_dir: Path, *, dtype: str = "float32", device: str = "cpu", granule_bytes: int = ALIGNMENT_BYTES
    ) -> None:
        self.servable = check_servable(model_dir)
        self.dtype, self.device = dtype, device
        self.plan: LoadPlan = plan_weights(self.servable, dtype, granule_bytes=granule_bytes)
        self.segments = make_buffers(self.plan)
        load_into(self.plan, self.segments)
        self.layout = WeightLayout.from_manifest(self.plan.manifest)
        self._idle: list[ModelRunner] = []
        self.single = self._runner()
        self.single.use(self.experts(self.single, all_experts(self.layout)), None)

    def _runner(self) -> ModelRunner:
        dense = self.segments[DENSE].to(self.device)
        bound = bind(self.servable, self.plan.manifest, {DENSE: dense}, device=self.device)
        slot_bytes = MAX_CONTEXT_TOKENS * kv_token_bytes(self.servable, self.dtype)
        return ModelRunner(bound, torch.zeros(SLOTS, slot_bytes, dtype=torch.uint8, device=self.device))

    def experts(self, runner: ModelRunner, held: Sequence[Sequence[int]]) -> EpochExperts:
        """As a worker has them: only the held segments, back to back."""
        names = expert_segments(self.layout, held)
        memory = compact([self.segments[name].clone() for name in names], device=self.device)
        return EpochExperts(runner.bound, held, memory)

    def group(self, holders: Holders, *, size: int, number: int = 1) -> Group:
        while len(self._idle) < size:
            self._idle.append(self._runner())
        return Group(self, self._idle[:size], make_epoch(holders, size=size, number=number))


class Group:
    """Ranks of one epoch, stepping in lockstep."""

    def __init__(self, world: World, runners: list[ModelRunner], epoch: Epoch) -> None:
        self.runners, self.epoch = runners, epoch
        self.transports = LocalGroup(epoch.size)
        self.exchanges: list[ExpertExchange] = []
        self.step = 0
        for rank, runner in enumerate(runners):
            experts = world.experts(runner, epoch.held_by(rank))
            self.exchanges.append(ExpertExchange(self.transports.transport(rank), epoch, rank, experts))
            runner.use(experts, self.exchanges[rank])

    def forward(self, rows: Sequence[Sequence[Row]]) -> list[torch.Tensor]:
        """rows[rank] of one step; a rank without rows serves."""

        def one(rank: int) -> torch.Tensor:
            try:
                header = torch.zeros(8, dtype=torch.uint8)
                self.transports.transport(rank).exchange(self.step, 0, [header] * len(rows))
                self.exchanges[rank].begin(self.step)
                if rows[rank]:
                    return self.runners[rank].forward(rows[rank])
                self.runners[rank].serve()
                return torch.empty(0)
            except BaseException:
                self.transports.fail(rank)  # the others need not wait for this one
                raise

        with ThreadPoolExecutor(max_workers=len(rows)) as threads:
            results = [threads.submit(one, rank) for rank in range(len(rows))]
        self.step += 1
        return [result.result() for result in results]


def make_epoch(holders: Holders, *, size: int, number: int = 1) -> Epoch:
    members = [
        Member(worker_id=f"worker-{i}", incarnation=1, exchange_address="", manager_socket="") for i in range(size)
    ]
    return Epoch(number=number, members=tuple(members), holders=holders)


def random_holders(layout: WeightLayout, size: int, seed: int, *, replicas: float = 0.3) -> Holders:
    """Every expert somewhere, some on several ranks; a rank may be left without any."""
    chance = random.Random(seed)

    def ranks() -> tuple[int, ...]:
        first = chance.randrange(size)
        return tuple(rank for rank in range(size) if rank == first or chance.random() < replicas)

    return tuple(tuple(ranks() for _ in range(layer.num_experts)) for layer in layout.experts)


def sole_holders(layout: WeightLayout, size: int, rank: int = 0) -> Holders:
    """Every expert on one rank only."""
    assert rank < size
    return tuple(((rank,),) * layer.num_experts for layer in layout.experts)
