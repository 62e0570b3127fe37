"""Engines as threads of one process, with a played model: its logits are a function of the tokens that lie in the slot's KV.

A wrong, missing or stale token of KV therefore changes what comes out, and what must come out is known from an engine that runs alone.
The played exchange goes through the transport as the real one does, layer by layer, and objects to ranks that are not in the same step.
"""

from __future__ import annotations

import threading
from random import Random

import torch
from tests.workers.elastic import Gateway

from flexpert.workers.engine import Engine
from flexpert.workers.epoch import Epoch, Member
from flexpert.workers.group import Group, NextEpoch
from flexpert.workers.kv_geometry import KvGeometry
from flexpert.workers.kv_trade import TradingKvBooks
from flexpert.workers.messages import SamplingParams, Submit
from flexpert.workers.sampling import Sampler
from flexpert.workers.scheduler import Scheduler, SchedulerConfig
from flexpert.workers.step import CopyTokens
from flexpert.workers.transport import LocalGroup, StepMissed

VOCAB, LAYERS, SLOTS, CONTEXT = 48, 2, 4, 64
STEP_TIMEOUT_S = 5.0


class PlayedMemory:
    """kv[slot]: the tokens that were computed there."""

    def __init__(self) -> None:
        self.kv: list[list[int]] = [[] for _ in range(SLOTS)]

    def apply(self, ops) -> None:
        for op in ops:
            if isinstance(op, CopyTokens):
                self.kv[op.slot][op.first_token : op.end_token] = self.kv[op.source_slot][op.first_token : op.end_token]

    def commit(self, ends) -> None:
        for slot, tokens in ends:
            assert len(self.kv[slot]) >= tokens


class PlayedExchange:
    """Two exchanges a layer; each rank's message names rank, step and phase."""

    def __init__(self, transport, rank: int, size: int) -> None:
        self.transport, self.rank, self.size = transport, rank, size
        self.step = -1

    def begin(self, step: int) -> None:
        self.step = step

    def all_layers(self) -> None:
        for phase in range(1, 1 + 2 * LAYERS):
            message = torch.tensor([self.rank, self.step % 251, phase], dtype=torch.uint8)
            received = self.transport.exchange(self.step, phase, [message] * self.size)
            assert [part.tolist() for part in received] == [[r, self.step % 251, phase] for r in range(self.size)]


class PlayedRunner:
    last_build_s = 0.0

    def __init__(self, memory: PlayedMemory) -> None:
        self.memory = memory
        self.exchange: PlayedExchange | None = None
        self.served = 0
        self.broken = False

    def use(self, experts, exchange) -> None:
        self.exchange = exchange

    def serve(self) -> None:
        self.exchange.all_layers()
        self.served += 1

    def forward(self, rows) -> torch.Tensor:
        if self.broken:
            self.broken = False
            raise RuntimeError("planted")
        logits = []
        for row in rows:
            tokens = self.memory.kv[row.slot]
            assert len(tokens) >= row.start
            tokens[row.start :] = row.token_ids
            if row.sample:
                seed = hash(tuple(tokens)) & 0x7FFFFFFF
                logits.append(torch.rand(VOCAB, generator=torch.Generator().manual_seed(seed)) * 4)
        if self.exchange is not None:
            self.exchange.all_layers()
        return torch.stack(logits) if logits else torch.empty(0, VOCAB)


class FlakyTransport:
    """Misses the exchange that `miss_after` counts down to, once, as if a peer had not come in time."""

    def __init__(self, inner) -> None:
        self._inner = inner
        self.miss_after: int | None = None
        self.rank, self.size = inner.rank, inner.size

    def exchange(self, step, phase, parts):
        if self.miss_after is not None:
            self.miss_after -= 1
            if self.miss_after < 0:
                raise StepMissed("planted", [(self.rank + 1) % self.size])
        return self._inner.exchange(step, phase, parts)

    def __getattr__(self, name):
        return getattr(self._inner, name)


class PlayedWorker:
    def __init__(self, name: str, gateway: Gateway, *, waiting: bool = True, max_batch_tokens: int = 8) -> None:
        self.name, self.gateway = name, gateway
        memory = PlayedMemory()
        geometry = KvGeometry(
            slots=SLOTS, max_context_tokens=CONTEXT, kv_token_bytes=1, granule_bytes=CONTEXT, shareable=False
        )
        self.scheduler = Scheduler(
            SchedulerConfig(max_running=3, max_batch_tokens=max_batch_tokens), TradingKvBooks(geometry)
        )
        self.runner = PlayedRunner(memory)
        self.troubles: list = []
        self.engine = Engine(
            scheduler=self.scheduler,
            runner=self.runner,
            sampler=Sampler(),
            memory=memory,
            emit=lambda owner, frame: gateway.take(name, frame),
            waiting=waiting,
        )
        self.engine.on_trouble = self.troubles.append
        self.thread = threading.Thread(target=self._run, name=name, daemon=True)
        self.transport: FlakyTransport | None = None
        self.error: BaseException | None = None
        self.thread.start()

    def _run(self) -> None:
        try:
            self.engine.run()
        except BaseException as error:
            self.error = error
            with self.gateway.changed:
                self.gateway.errors.append(f"{self.name}: {error!r}")
                self.gateway.changed.notify_all()

    def stop(self) -> None:
        self.engine.stop()
        self.thread.join(20)
        assert not self.thread.is_alive()

    def die(self) -> None:
        self.transport.close()
        self.stop()
        self.gateway.lose(self.name)


class World:
    """A controller's hand, without a controller: it makes epochs and has all enter them."""

    def __init__(self) -> None:
        self.gateway = Gateway()
        self.workers: dict[str, PlayedWorker] = {}
        self.epoch: Epoch | None = None
        self.number = 0
        self.flips: list[dict] = []

    def close(self) -> None:
        for worker in self.workers.values():
            worker.stop()

    def make(self, names: list[str]) -> dict[str, NextEpoch]:
        """What each worker, leavers too, is to enter."""
        self.number += 1
        for name in names:
            if name not in self.workers:
                self.workers[name] = PlayedWorker(name, self.gateway)
        members = tuple(Member(worker_id=n, incarnation=1, exchange_address="", manager_socket="") for n in names)
        epoch = Epoch(number=self.number, members=members, holders=())
        self.next = epoch
        following = {n: NextEpoch(number=epoch.number, leaves=True) for n in self.workers if n not in names}
        if len(names) == 1:
            return following | {names[0]: NextEpoch(number=epoch.number, experts=object())}
        local = LocalGroup(len(names), step_timeout_s=STEP_TIMEOUT_S)
        for rank, name in enumerate(names):
            transport = FlakyTransport(local.transport(rank))
            exchange = PlayedExchange(transport, rank, len(names))
            group = Group(epoch=epoch, rank=rank, transport=transport, exchange=exchange)
            following[name] = NextEpoch(number=epoch.number, group=group, experts=object(), exchange=exchange)
        return following

    def enter(self, following: dict[str, NextEpoch], order: list[str] | None = None) -> None:
        """Commit, in this order; all have flipped when it returns, leavers are gone, their requests live on."""
        for name in order or list(following):
            self.workers[name].engine.enter(following[name])
        self.flips.append({name: step.done.result(30) for name, step in following.items()})
        self.epoch = self.next
        for name, step in following.items():
            if step.leaves:
                self.workers.pop(name).stop()
            else:
                self.workers[name].transport = step.group._transport if step.group else None
        self.rehome(Random(self.number))

    def rehome(self, rng: Random) -> None:
        while self.gateway.homeless:
            name = rng.choice(self.members())
            for submit in self.gateway.take_homeless(name):
                self.workers[name].engine.submit("gateway", submit)

    def members(self) -> list[str]:
        return [member.worker_id for member in self.epoch.members]

    def submit(self, submit: Submit, name: str) -> None:
        self.gateway.add(submit, name)
        self.workers[name].engine.submit("gateway", submit)


def random_submit(rng: Random, number: int) -> Submit:
    prompt = [rng.randrange(VOCAB) for _ in range(rng.randint(1, 20))]
    params = SamplingParams(
        max_tokens=rng.randint(1, 40), seed=rng.randrange(1 << 32), temperature=rng.choice([0.0, 0.9]), top_p=0.95
    )
    return Submit(request_id=f"r{number}", prompt_token_ids=prompt, params=params)


def tokens_alone(submits: list[Submit]) -> dict[str, list[int]]:
    """What an engine that nobody disturbs gives."""
    gateway = Gateway()
    worker = PlayedWorker("alone", gateway, waiting=False)
    try:
        for submit in submits:
            gateway.add(submit, "alone")
            worker.engine.submit("gateway", submit)
        return gateway.wait_all()
    finally:
        worker.stop()
