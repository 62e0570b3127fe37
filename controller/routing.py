"""Which worker takes a request: a pure decision over what the gateway knows of its workers.

`choose_worker` is called by the gateway's pool for each request that waits, `PrefixIndex` tells it which workers have seen the
beginning of the prompt. Neither knows sockets, clocks or HTTP. A worker that drains, or that already has a full second batch waiting,
takes nothing; None means that the request stays in the gateway's queue, where a worker that joins later can still have it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

# One running request slows a new one about as much as this many prompt tokens do.
TOKENS_PER_RUNNING_REQUEST = 32
# A worker holds its batch and as many again, so that it never starves between two frames.
BATCHES_HELD = 2
PREFIX_BLOCK_TOKENS = 64
PREFIX_BLOCKS_MAX = 64


@dataclass(frozen=True, slots=True)
class WorkerLoad:
    """One connected worker as the gateway sees it: its own books for what it sent, the worker's last report for its KV.

    unstarted_prompt_tokens: prompt tokens sent there whose request has not answered yet. prefix_tokens: how many tokens of the
    beginning of this prompt the worker has seen lately. kv_free_tokens None: no report yet.
    """

    worker_id: str
    in_flight: int
    max_running: int
    unstarted_prompt_tokens: int = 0
    kv_free_tokens: int | None = None
    prefix_tokens: int = 0
    draining: bool = False


def choose_worker(*, prompt_tokens: int, workers: Sequence[WorkerLoad]) -> str | None:
    """The worker that should start this prompt soonest; None if each drains or is full.

    Workers with a free place in their batch and enough free KV come first; among equals the least work before the first token counts:
    prompt tokens not cached there, prompt tokens already queued there, and the batch that shares its steps. Ties go by name.
    """
    open_workers = [load for load in workers if _takes_requests(load)]
    if not open_workers:
        return None
    return min(
        open_workers, key=lambda load: (_must_wait(load, prompt_tokens), _work(load, prompt_tokens), load.worker_id)
    ).worker_id


def _takes_requests(load: WorkerLoad) -> bool:
    return not load.draining and load.in_flight < BATCHES_HELD * load.max_running


def _must_wait(load: WorkerLoad, prompt_tokens: int) -> bool:
    if load.in_flight >= load.max_running:
        return True
    return load.kv_free_tokens is not None and load.kv_free_tokens + load.prefix_tokens <= prompt_tokens


def _work(load: WorkerLoad, prompt_tokens: int) -> int:
    uncached = max(0, prompt_tokens - load.prefix_tokens)
    return uncached + load.unstarted_prompt_tokens + TOKENS_PER_RUNNING_REQUEST * load.in_flight


class PrefixIndex:
    """Who has seen which beginnings of prompts, in blocks of PREFIX_BLOCK_TOKENS; the oldest are forgotten beyond `max_blocks`.

    A hint only: a worker may have reused that memory since. Only the first PREFIX_BLOCKS_MAX blocks of a prompt count.
    """

    def __init__(self, *, max_blocks: int = 65536) -> None:
        self._max_blocks = max_blocks
        self._workers_of: OrderedDict[int, set[str]] = OrderedDict()

    def record(self, worker_id: str, token_ids: Sequence[int]) -> None:
        for key in _block_keys(token_ids):
            self._workers_of.setdefault(key, set()).add(worker_id)
            self._workers_of.move_to_end(key)
        while len(self._workers_of) > self._max_blocks:
            self._workers_of.popitem(last=False)

    def seen_tokens(self, token_ids: Sequence[int]) -> dict[str, int]:
        """For each worker that knows the prompt's beginning: how many of its tokens, in whole blocks."""
        seen: dict[str, int] = {}
        for number, key in enumerate(_block_keys(token_ids)):
            holders = self._workers_of.get(key)
            if not holders:
                break
            for worker_id in holders:
                if seen.get(worker_id, 0) == number * PREFIX_BLOCK_TOKENS:
                    seen[worker_id] = (number + 1) * PREFIX_BLOCK_TOKENS
        return seen

    def forget(self, worker_id: str) -> None:
        """The worker is gone for good, and its cached prefixes with it."""
        for holders in self._workers_of.values():
            holders.discard(worker_id)


def _block_keys(token_ids: Sequence[int]) -> Iterable[int]:
    key = 0
    for number in range(min(len(token_ids) // PREFIX_BLOCK_TOKENS, PREFIX_BLOCKS_MAX)):
        block = token_ids[number * PREFIX_BLOCK_TOKENS : (number + 1) * PREFIX_BLOCK_TOKENS]
        key = hash((key, *block))
        yield key
