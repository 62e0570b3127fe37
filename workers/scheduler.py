"""What the next step of a worker computes: the whole scheduling policy, as a state machine over values.

    submit ──> waiting ──schedule──> running ──complete──> finished
                  ^                     │
                  └──── preempted ──────┘            cancel: from anywhere to nowhere

Requests are served in the order of arrival: those running are always the earliest, none overtakes. A step takes one
token of every request that decodes, then fills max_batch_tokens with prompts, oldest first, in chunks. Where memory is
short the latest arrival is preempted: its tokens are kept, its slot becomes a donor from which it resumes, and it is
first in the queue. The oldest request can thus always have all memory, gets a row in every step, and so nobody starves.

Pure: no torch, no clock, no I/O. The engine calls, from one thread:
    plan = schedule(); carry out plan.memory; compute plan.rows; sample
    committed[row.slot] = row.end for every row; finished = complete(plan, tokens)
or, where a step came to nothing, abandon(plan). submit and cancel may come at any time. Memory belongs to
`workers.kv_books`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from flexpert.workers.kv_trade import TradingKvBooks
from flexpert.workers.messages import Finished, Submit
from flexpert.workers.request import Request, RequestRejected, check_request
from flexpert.workers.step import MemoryOp, Row, StepPlan

__all__ = ["RequestRejected", "Scheduler", "SchedulerConfig", "SchedulerStats"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """max_batch_tokens: what one step computes at most. max_scored_tokens: a row of prompt_logprobs, whose logits are all
    kept, is no longer than this. vocab_size: token ids are checked against it at submit.
    """

    max_running: int
    max_batch_tokens: int
    max_scored_tokens: int = 256
    vocab_size: int | None = None

    def __post_init__(self) -> None:
        if self.max_running < 1 or self.max_scored_tokens < 1:
            raise ValueError("max_running and max_scored_tokens must be at least 1")
        if self.max_batch_tokens < self.max_running:
            raise ValueError(
                f"max_batch_tokens is {self.max_batch_tokens}, below max_running ({self.max_running}): a step must have "
                "room for one token of every running request; raise the one or lower the other"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerStats:
    """The scheduler's share of messages.Stats."""

    waiting: int
    running: int
    kv_used_tokens: int
    kv_capacity_tokens: int
    steps: int
    prefill_tokens: int
    decode_tokens: int
    cached_prompt_tokens: int
    preemptions: int


class Scheduler:
    def __init__(self, config: SchedulerConfig, books: TradingKvBooks) -> None:
        self._config = config
        self._books = books
        self._waiting: OrderedDict[str, Request] = OrderedDict()
        self._running: dict[str, Request] = {}  # in order of arrival; all of them arrived before all that wait
        self._rows: dict[str, Row] = {}  # of the step being planned
        self._left = 0  # tokens for which that step still has room
        self._plan: StepPlan | None = None  # handed out, not completed
        self._cancelled: dict[str, None] = {}  # while a plan was out
        self._preempted_now = False
        self._step = 0
        self._prefill_tokens = self._decode_tokens = self._cached_prompt_tokens = self._preemptions = 0

    # From outside

    def submit(self, frame: Submit) -> Finished | None:
        """Queue a request. Raises RequestRejected where it can never be served.

        A replayed request whose last token was emitted before the worker's death, but not its end, is returned as
        finished.
        """
        context = self._books.geometry.max_context_tokens
        if frame.request_id in self._running or frame.request_id in self._waiting:
            raise RequestRejected(f"request {frame.request_id!r} is being served already: request ids must be unique")
        check_request(frame, max_context_tokens=context, vocab_size=self._config.vocab_size)
        request = Request(frame)
        if not self._books.fits_alone(request.most_tokens):
            raise RequestRejected(
                f"the prompt has {request.prompt_tokens} tokens and max_tokens is {frame.params.max_tokens}: "
                f"{request.limit_tokens} together, but this worker's whole KV memory holds {self._books.capacity_tokens} "
                "tokens; ask for fewer output tokens, shorten the prompt, or give the worker more memory"
            )
        reason = request.finish_reason(context) if frame.emitted_token_ids else None
        if reason is not None:
            return Finished(request_id=request.request_id, reason=reason)
        self._waiting[request.request_id] = request
        return None

    def cancel(self, request_id: str) -> bool:
        """Forget a request, at any moment. False where it is not (or no longer) known."""
        if self._waiting.pop(request_id, None) is not None:
            return True
        if request_id not in self._running or request_id in self._cancelled:
            return False
        if self._plan is not None:  # its slot is being written: free at the end of this step
            self._cancelled[request_id] = None
        else:
            self._leave(self._running.pop(request_id))
        return True

    @property
    def has_work(self) -> bool:
        """Whether schedule() would return a plan."""
        return bool(self._waiting or self._running)

    def is_live(self, request_id: str) -> bool:
        """Whether the request is waiting or running (and not cancelled)."""
        return request_id in self._waiting or (request_id in self._running and request_id not in self._cancelled)

    def add_granules(self, granules: Sequence[int]) -> None:
        """The KV arena has grown by these."""
        self._books.add_granules(granules)

    def remove_granules(self, count: int, *, keep_tokens: int) -> tuple[list[int], tuple[MemoryOp, ...]]:
        """Up to `count` granules for the arena to give back, and the operations to carry out before that. Between two steps only.

        Donors give way first, then the latest requests are preempted. What a request of `keep_tokens` tokens needs stays, and what the
        largest live request may need, so nothing that was accepted becomes impossible.
        """
        if self._plan is not None:
            raise RuntimeError(f"step {self._plan.step} is still out: granules can be removed between two steps only")
        live = (*self._running.values(), *self._waiting.values())
        longest = max((request.most_tokens for request in live), default=0)
        kept = self._books.geometry.granules_for(max(longest, keep_tokens))
        count = max(0, min(count, self._books.total_granules - kept))
        while self._books.available_granules < count:
            self._preempt(next(reversed(self._running.values())))
        return self._books.remove_granules(count), self._books.take_ops()

    def computed(self, request_id: str) -> tuple[int, list[int]] | None:
        """The slot of a running request, and the tokens whose KV is committed there. None for one that does not run."""
        request = self._running.get(request_id)
        if request is None or request.slot is None:
            return None
        return request.slot, request.tokens[: request.computed]

    def running(self) -> list[tuple[str, int]]:
        """Request ids in order of arrival, and of how many tokens KV is committed."""
        return [(request.request_id, request.computed) for request in self._running.values()]

    def import_kv(
        self, request_id: str, slot: int | None, first: int, tokens: Sequence[int]
    ) -> tuple[int, tuple[MemoryOp, ...]] | None:
        """Room for KV that another worker computed, as a donor from which the request will go on here (TradingKvBooks.import_tokens).
        Between two steps only: carry out the operations, write the KV, then `imported`."""
        taken = self._books.import_tokens(request_id, slot, first, tokens)
        return None if taken is None else (taken, self._books.take_ops())

    def imported(self, slot: int, tokens: Sequence[int]) -> tuple[MemoryOp, ...]:
        self._books.imported(slot, tokens)
        return self._books.take_ops()

    def schedule(self) -> StepPlan | None:
        """The next step; None where there is no request. Each plan comes back by complete or abandon before the next."""
        if self._plan is not None:
            raise RuntimeError(f"step {self._plan.step} is still out: call complete() or abandon() before schedule()")
        self._rows = {}
        self._left = self._config.max_batch_tokens
        self._preempted_now = False
        self._plan_running(decoding=True)
        self._plan_running(decoding=False)
        self._admit()
        if not self._rows:
            assert not self._running, "requests run, but none can be computed"
            assert not self._waiting, "requests wait, but none can be started"
            return None
        self._step += 1
        self._plan = StepPlan(self._step, self._books.take_ops(), tuple(self._rows.values()))
        return self._plan

    def complete(self, plan: StepPlan, tokens: Mapping[str, int]) -> list[Finished]:
        """Take the step's result: the token drawn for every row with sample=True. Returns the requests that it ends."""
        self._check_out(plan)
        missing = [row.request_id for row in plan.rows if row.sample and row.request_id not in tokens]
        missing = [request_id for request_id in missing if request_id not in self._cancelled]
        if missing:
            raise ValueError(f"step {plan.step}: no token for {missing}; every row with sample=True needs one")
        finished = []
        context = self._books.geometry.max_context_tokens
        for row in plan.rows:
            request = self._running[row.request_id]
            request.computed = row.end
            self._books.commit(row.slot, row.token_ids)
            self._count(row, request)
            if row.all_logits:
                request.scored = row.end
            if row.request_id in self._cancelled:
                continue
            if row.sample:
                request.tokens.append(tokens[row.request_id])
            elif request.params.max_tokens > 0 or request.computed < len(request.tokens):
                continue
            reason = request.finish_reason(context)
            if reason is not None:
                finished.append(
                    Finished(request_id=request.request_id, reason=reason, cached_tokens=request.cached_tokens or 0)
                )
                self._leave(self._running.pop(request.request_id))
        self._end_step()
        return finished

    def abandon(self, plan: StepPlan) -> None:
        """The step came to nothing after its memory operations (a rank missed its deadline): plan its rows again."""
        self._check_out(plan)
        self._end_step()

    def stats(self) -> SchedulerStats:
        return SchedulerStats(
            waiting=len(self._waiting),
            running=len(self._running),
            kv_used_tokens=self._books.used_tokens,
            kv_capacity_tokens=self._books.capacity_tokens,
            steps=self._step,
            prefill_tokens=self._prefill_tokens,
            decode_tokens=self._decode_tokens,
            cached_prompt_tokens=self._cached_prompt_tokens,
            preemptions=self._preemptions,
        )

    # Planning

    def _plan_running(self, *, decoding: bool) -> None:
        """Rows for the running requests that decode (or for those that do not), oldest first."""
        for request in list(self._running.values()):
            if self._left == 0:
                return
            # One that was preempted on behalf of an older request of this loop has no slot any more.
            if (len(request.tokens) - request.computed == 1) == decoding and request.slot is not None:
                self._plan_row(request)

    def _admit(self) -> None:
        """Start waiting requests, strictly in order, while there is a slot and memory for all their tokens so far."""
        if not self._waiting or self._preempted_now or len(self._running) >= self._config.max_running:
            return
        reserve = sum(self._reserve(request) for request in self._running.values())
        while self._waiting and self._left > 0 and len(self._running) < self._config.max_running:
            request = next(iter(self._waiting.values()))
            grant = self._books.acquire(
                request.request_id, request.tokens, reuse_limit=request.reuse_limit, reserve_granules=reserve
            )
            if grant is None:
                return
            del self._waiting[request.request_id]
            self._running[request.request_id] = request
            request.slot, request.computed = grant.slot, grant.reused_tokens
            if request.cached_tokens is None:
                request.cached_tokens = min(grant.reused_tokens, request.prompt_tokens)
                self._cached_prompt_tokens += request.cached_tokens
            self._plan_row(request)
            reserve += self._reserve(request)

    def _reserve(self, request: Request) -> int:
        assert request.slot is not None
        return self._books.reserve_granules(request.slot, len(request.tokens))

    def _plan_row(self, request: Request) -> None:
        """A row of as many of the request's tokens as fit into the step and into memory; perhaps none."""
        slot, start = request.slot, request.computed
        assert slot is not None
        end = min(len(request.tokens), start + self._left)
        all_logits = request.scored <= start < request.prompt_tokens
        if all_logits:
            end = min(end, start + self._config.max_scored_tokens)
        elif request.scored < request.prompt_tokens:
            end = min(end, request.scored)  # computed before a preemption: these logits were handed out already
        end = self._make_room(request, slot, end)
        if end == start:
            return
        sample = end == len(request.tokens) and request.params.max_tokens > 0
        self._rows[request.request_id] = Row(
            request.request_id, slot, start, tuple(request.tokens[start:end]), sample, all_logits
        )
        self._left -= end - start

    def _make_room(self, request: Request, slot: int, end: int) -> int:
        """Back the slot up to `end` or as far as can be; later arrivals give way before the request gets nothing."""
        while not self._books.grow(slot, end, limit_tokens=request.limit_tokens):
            reachable = self._books.reachable_tokens(slot)
            if reachable > request.computed:
                end = min(end, reachable)
                continue
            latest = next(reversed(self._running.values()))
            if latest is request:  # those before it need what there is; it keeps what it has and waits
                return request.computed
            self._preempt(latest)
        return end

    def _preempt(self, request: Request) -> None:
        del self._running[request.request_id]
        row = self._rows.pop(request.request_id, None)
        if row is not None:
            self._left += len(row.token_ids)
        self._leave(request)
        self._waiting[request.request_id] = request
        self._waiting.move_to_end(request.request_id, last=False)
        self._preempted_now = True
        self._preemptions += 1

    def _leave(self, request: Request) -> None:
        assert request.slot is not None
        self._books.release(request.slot)
        request.slot = None
        request.computed = 0

    # The end of a step

    def _check_out(self, plan: StepPlan) -> None:
        if self._plan is not plan:
            out = "none is" if self._plan is None else f"step {self._plan.step} is"
            raise RuntimeError(f"step {plan.step} was returned, but {out} out: each plan comes back exactly once")

    def _end_step(self) -> None:
        self._plan = None
        for request_id in self._cancelled:
            self._leave(self._running.pop(request_id))
        self._cancelled = {}

    def _count(self, row: Row, request: Request) -> None:
        if row.start >= request.prompt_tokens and row.sample:
            self._decode_tokens += len(row.token_ids)
        else:
            self._prefill_tokens += len(row.token_ids)

    def check_integrity(self) -> None:
        """Raise AssertionError where the queue, the slots and the books contradict each other."""
        assert not self._running.keys() & self._waiting.keys(), "a request runs and waits"
        slots = [request.slot for request in self._running.values()]
        assert None not in slots, "a running request has no slot"
        assert len(set(slots)) == len(slots), "two requests are in one slot"
        assert all(request.slot is None and request.computed == 0 for request in self._waiting.values())
        assert all(request.computed < len(request.tokens) for request in self._running.values())
        assert self._cancelled.keys() <= self._running.keys()
        self._books.check_integrity()
