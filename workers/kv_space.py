"""A worker's KV memory: how much of the device it takes, and how it trades granules with the expert weights.

A device has room for experts and KV together; what a worker holds less of the one it has more of the other. So the size of the arena
follows from the bytes of experts held (`target_granules`) and from nothing that happened before. Shrinking goes by the scheduler, which
evicts what nobody computes on and then preempts the latest requests; what an accepted request may need always stays.
Called by `workers.process` as the worker comes up and by `workers.membership`, never on the engine's thread.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Protocol, TypeVar

import torch

from flexpert.hbm import BudgetError, HbmClient
from flexpert.workers.kv_geometry import KvGeometry
from flexpert.workers.kv_trade import TradingKvBooks
from flexpert.workers.memory import ArenaMemory, KvMemory, TorchMemory
from flexpert.workers.scheduler import Scheduler
from flexpert.workers.worker_config import MAX_DEFAULT_KV_BYTES, WorkerConfig, WorkerStartError

log = logging.getLogger(__name__)

DONOR_SLOTS_PER_RUNNING = 1
# What the engine gives up between two steps at a time: each run of granules is a system call.
GRANULES_AT_A_TIME = 256

T = TypeVar("T")


class Between(Protocol):
    """Runs a function between two steps and returns what it returned."""

    def __call__(self, function: Callable[[], T], /) -> T: ...


class KvSpace:
    """memory and books of one worker. Without a manager, or on a GPU, its size is fixed."""

    memory: KvMemory
    books: TradingKvBooks

    def __init__(self, config: WorkerConfig, *, token_bytes: int, max_context_tokens: int) -> None:
        self._config = config
        self._token_bytes = token_bytes
        self._max_context_tokens = max_context_tokens
        self._slots = config.max_running * (1 + DONOR_SLOTS_PER_RUNNING)
        self._client: HbmClient | None = None
        self._arena: ArenaMemory | None = None
        self._room_bytes = self._granule_bytes = 0

    @property
    def kv_bytes(self) -> int:
        return self.books.capacity_tokens * self._token_bytes

    @property
    def context_tokens(self) -> int:
        """The longest request that this memory can hold: the model's context, or all of the memory where that is less."""
        return min(self._max_context_tokens, self.books.capacity_tokens)

    def exists(self, client: HbmClient, name: str) -> bool:
        """Whether an earlier incarnation left an arena."""
        return any(arena.name == name for arena in client.info().arenas)

    def open(
        self, client: HbmClient, name: str, *, experts_bytes: int, held_bytes: int, missing_bytes: int = 0
    ) -> None:
        """experts_bytes: of all experts of the model; held_bytes: of those that are here or will be at once; missing_bytes: of all
        weights that are yet to be loaded. Raises WorkerStartError, HbmError."""
        info = client.info()
        self._client, self._granule_bytes = client, info.granule_bytes
        slot_granules = -(-self._max_context_tokens * self._token_bytes // info.granule_bytes)
        left = sum(arena.granules for arena in info.arenas if arena.name == name)
        free_bytes = info.free_bytes + left * info.granule_bytes - missing_bytes
        wanted_bytes = MAX_DEFAULT_KV_BYTES if self._config.kv_bytes is None else self._config.kv_bytes
        self._room_bytes = min(free_bytes + held_bytes, experts_bytes + wanted_bytes)
        self._most_granules = self._slots * slot_granules
        target = self.target_granules(held_bytes)
        self._require(target * info.granule_bytes, self._token_bytes)
        arena = client.open_kv_arena(
            name, slots=self._slots, slot_bytes=slot_granules * info.granule_bytes, granules=None if left else target
        )
        geometry = KvGeometry(
            slots=self._slots,
            max_context_tokens=self._max_context_tokens,
            kv_token_bytes=self._token_bytes,
            granule_bytes=info.granule_bytes,
            shareable=True,
        )
        self._arena = ArenaMemory(arena, slots=self._slots, slot_bytes=arena.slot_bytes, token_bytes=self._token_bytes)
        self.memory, self.books = self._arena, TradingKvBooks(geometry, arena.granules)

    def open_private(self, *, to_come_bytes: int = 0) -> None:
        """to_come_bytes: what the epochs to come may need on the device at once beside what is there, where there is room for it."""
        slot_bytes = self._max_context_tokens * self._token_bytes
        device, slots = torch.device(self._config.device), self._slots
        if self._config.kv_bytes is not None:
            slots = min(slots, self._config.kv_bytes // slot_bytes)
        elif device.type == "cuda":
            free_bytes = torch.cuda.mem_get_info(device)[0]
            slots = min(slots, int((free_bytes - min(to_come_bytes, free_bytes // 2)) * 0.8) // slot_bytes)
        self._require(slots * slot_bytes, slot_bytes)
        geometry = KvGeometry(
            slots=slots,
            max_context_tokens=self._max_context_tokens,
            kv_token_bytes=self._token_bytes,
            granule_bytes=slot_bytes,
            shareable=False,
        )
        self.memory = TorchMemory(slots=slots, slot_bytes=slot_bytes, token_bytes=self._token_bytes, device=device)
        self.books = TradingKvBooks(geometry)

    def target_granules(self, held_bytes: int) -> int:
        """How many granules KV has beside so many bytes of experts."""
        return max(0, min((self._room_bytes - held_bytes) // self._granule_bytes, self._most_granules))

    def make_room(self, held_bytes: int, scheduler: Scheduler, between: Between, *, keep_tokens: int) -> int:
        """Shrink the arena to its size beside so many bytes of experts; how many bytes went back to the manager.

        Raises BudgetError, with the arena as large as it was, where the requests that are here leave too little.
        """
        if self._arena is None:
            return 0
        surplus = self.books.total_granules - self.target_granules(held_bytes)
        given = 0
        while given < surplus:
            count = min(surplus - given, GRANULES_AT_A_TIME)
            removed = between(partial(self._remove, scheduler, count, keep_tokens))
            if not removed:
                error = BudgetError(
                    f"no memory for more experts: {held_bytes} bytes of them would leave {self.target_granules(held_bytes)} granules "
                    f"for KV, and {self.books.total_granules} are needed for a request of {keep_tokens} tokens or for one that is here; "
                    "raise --memory, lower --max-context, or keep more workers"
                )
                self.fill(held_bytes, scheduler, between, granules=given)
                raise error
            self._arena.shrink(removed)
            given += len(removed)
        return given * self._granule_bytes

    def _remove(self, scheduler: Scheduler, count: int, keep_tokens: int) -> list[int]:
        removed, ops = scheduler.remove_granules(count, keep_tokens=keep_tokens)
        self.memory.apply(ops)
        return removed

    def fill(self, held_bytes: int, scheduler: Scheduler, between: Between, *, granules: int | None = None) -> int:
        """Grow the arena to its size beside so many bytes of experts, as far as memory is free (or by `granules`); by how many bytes."""
        if self._arena is None or self._client is None:
            return 0
        short = self.target_granules(held_bytes) - self.books.total_granules if granules is None else granules
        count = min(short, self._client.info().free_bytes // self._granule_bytes)
        if count <= 0:
            return 0
        try:
            added = self._arena.grow(count)
        except BudgetError as error:  # somebody else was faster
            log.warning("the KV arena stays as it is: %s", error)
            return 0
        between(lambda: scheduler.add_granules(added))
        return len(added) * self._granule_bytes

    def _require(self, found_bytes: int, needed_bytes: int) -> None:
        if found_bytes < needed_bytes:
            raise WorkerStartError(
                f"no memory for KV: found {found_bytes} bytes, at least {needed_bytes} are needed; "
                "raise --memory or --kv-memory, or lower --max-context"
            )
