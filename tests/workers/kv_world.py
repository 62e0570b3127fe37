"""A worker, its arena and its gateway as one simulated world, for property tests of scheduler and books.

The arena keeps real granules with real bytes: byte j of the KV of token t holds (history, j), where history names all tokens
up to and including t. So a wrong mapping, a stale byte, a copy that is too short or a write into shared memory is seen at once.
The model's next token is a function of the history, so the tokens of every request are known before it runs.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import reduce
from itertools import accumulate
from random import Random

from flexpert.hbm.ops import Claim, Map, Unmap
from flexpert.workers.kv_geometry import KvGeometry
from flexpert.workers.kv_trade import TradingKvBooks
from flexpert.workers.messages import SamplingParams, Submit
from flexpert.workers.scheduler import Scheduler, SchedulerConfig
from flexpert.workers.step import CopyTokens, MemoryOp, Row, StepPlan

VOCAB = 3  # small, so that prompts and outputs collide
EMPTY = 7  # the history of no token


def histories(tokens: list[int]) -> list[int]:
    """For each position the name of everything up to and including it."""
    return list(accumulate(tokens, extend, initial=EMPTY))[1:]


def extend(name: int, token: int) -> int:
    return hash((name, token))


def next_token(tokens: list[int], seed: int) -> int:
    return _follows(histories(tokens)[-1], seed)


def _follows(name: int, seed: int) -> int:
    return abs(hash((name, seed))) % VOCAB


def expected_output(frame: Submit) -> tuple[list[int], str]:
    """The tokens and the reason to end of a request on an idle worker."""
    output: list[int] = []
    params = frame.params
    name = reduce(extend, frame.prompt_token_ids, EMPTY)
    while len(output) < params.max_tokens:
        output.append(_follows(name, params.seed))
        name = extend(name, output[-1])
        if output[-1] in params.stop_token_ids and len(output) > params.min_tokens:
            return output, "stop"
    return output, "length"


@dataclass
class Record:
    slot: int
    request_id: str
    granules: list[int]
    committed: int


class Arena:
    """Carries out memory operations as the HBM manager's client does, and objects to every one that must not happen."""

    def __init__(self, geometry: KvGeometry, granules: list[int]) -> None:
        self.geometry = geometry
        self.granted = set(granules)
        self.mapped: list[list[int]] = [[] for _ in range(geometry.slots)]
        self.owner = [""] * geometry.slots
        self.committed = [0] * geometry.slots
        self.bytes: dict[int, list[object]] = {granule: [None] * geometry.granule_bytes for granule in granules}
        slot_bytes = geometry.max_context_tokens * geometry.kv_token_bytes
        self.plain: list[list[object]] = [[None] * slot_bytes for _ in range(geometry.slots)]

    def apply(self, op: MemoryOp) -> None:
        match op:
            case Claim(slot, request_id, committed):
                self.owner[slot], self.committed[slot] = request_id, committed
            case Map(slot, first, granules):
                assert self.geometry.shareable
                assert first == len(self.mapped[slot]), (
                    f"{op}: the slot is backed up to granule {len(self.mapped[slot])}"
                )
                assert granules and self.granted.issuperset(granules), f"{op}: not our granules"
                for place, granule in enumerate(granules, first):
                    for other in self.mapped:
                        assert granule not in other or other.index(granule) == place, f"{op}: shared at another place"
                assert not set(granules) & set(self.mapped[slot]) and len(set(granules)) == len(granules)
                self.mapped[slot] += granules
                assert len(self.mapped[slot]) <= self.geometry.granules_for(self.geometry.max_context_tokens)
            case Unmap(slot, first):
                assert self.geometry.shareable and first < len(self.mapped[slot]), f"{op}: nothing is mapped there"
                assert self.committed[slot] <= self.geometry.tokens_in(first), (
                    f"{op}: committed tokens would lose their KV"
                )
                del self.mapped[slot][first:]
            case CopyTokens(source, slot, first, end, skip):
                width = self.geometry.kv_token_bytes
                assert source != slot and 0 <= first < end and 0 <= skip < width
                for position in range(first * width + skip, end * width):
                    self.write(slot, position, self.read(source, position))

    def _place(self, slot: int, position: int) -> tuple[list[object], int]:
        if not self.geometry.shareable:
            return self.plain[slot], position
        index, offset = divmod(position, self.geometry.granule_bytes)
        assert index < len(self.mapped[slot]), f"slot {slot}: byte {position} is not backed"
        return self.bytes[self.mapped[slot][index]], offset

    def read(self, slot: int, position: int) -> object:
        memory, offset = self._place(slot, position)
        return memory[offset]

    def write(self, slot: int, position: int, value: object) -> None:
        memory, offset = self._place(slot, position)
        if self.geometry.shareable:
            granule = self.mapped[slot][position // self.geometry.granule_bytes]
            holders = sum(granule in other for other in self.mapped)
            assert holders == 1, f"slot {slot}: write into granule {granule}, which {holders} slots hold"
        memory[offset] = value

    def holds(self, slot: int, names: list[int]) -> bool:
        """Whether the slot begins with the KV of these histories."""
        there = [(name, j) for name in names for j in range(self.geometry.kv_token_bytes)]
        return self._from_start(slot, len(there)) == there

    def _from_start(self, slot: int, length: int) -> list[object]:
        if not self.geometry.shareable:
            return self.plain[slot][:length]
        granules = self.mapped[slot][: -(-length // self.geometry.granule_bytes)]
        assert len(granules) * self.geometry.granule_bytes >= length, f"slot {slot}: byte {length - 1} is not backed"
        return [value for granule in granules for value in self.bytes[granule]][:length]

    def compute(self, row: Row, tokens: list[int]) -> None:
        """Attention of a row: reads what stands before it, writes its own."""
        assert list(row.token_ids) == tokens[row.start : row.end], f"{row}: not the request's tokens"
        names = histories(tokens[: row.end])
        assert self.holds(row.slot, names[: row.start]), f"{row}: its prefix is not in its slot"
        width = self.geometry.kv_token_bytes
        for t in range(row.start, row.end):
            for j in range(width):
                self.write(row.slot, t * width + j, (names[t], j))

    def grow(self, granules: list[int]) -> None:
        assert not self.granted & set(granules)
        self.granted |= set(granules)
        self.bytes.update((granule, [None] * self.geometry.granule_bytes) for granule in granules)

    def shrink(self, granules: list[int]) -> None:
        assert self.granted.issuperset(granules) and len(set(granules)) == len(granules)
        assert not any(granule in mapped for mapped in self.mapped for granule in granules), "given back, but mapped"
        self.granted -= set(granules)

    def records(self) -> list[Record]:
        return [
            Record(slot, self.owner[slot], list(self.mapped[slot]), self.committed[slot])
            for slot in range(self.geometry.slots)
        ]


@dataclass
class Client:
    """What the gateway keeps of a live request."""

    frame: Submit
    emitted: list[int] = field(default_factory=list)
    scored: list[bool] = field(default_factory=list)  # prompt positions whose logits came, since the last start

    @property
    def tokens(self) -> list[int]:
        return self.frame.prompt_token_ids + self.emitted


class World:
    """The engine's loop, with a crash possible at each point, and the gateway behind it."""

    def __init__(self, config: SchedulerConfig, geometry: KvGeometry, granules: list[int], ahead: int = 1) -> None:
        self.config, self.geometry, self.granules, self.ahead = config, geometry, granules, ahead
        self.arena = Arena(geometry, granules)
        self.live: dict[str, Client] = {}
        self.finished: dict[str, list[int]] = {}
        self.cancelled: set[str] = set()
        self.everything: dict[str, Submit] = {}
        self.steps_as_oldest = 0
        self.oldest = ""
        self.count = 0
        self.crashes = 0
        self.imported_tokens = 0
        self._start([])

    def _start(self, records: list[Record]) -> None:
        self.books = TradingKvBooks(self.geometry, self.granules, ahead_granules=self.ahead)
        if records:
            self.books.restore(records)
        self.scheduler = Scheduler(self.config, self.books)

    # What a gateway does

    def submit(self, prompt: list[int], **params: object) -> str:
        self.count += 1
        frame = Submit(
            request_id=f"r{self.count}",
            prompt_token_ids=prompt,
            params=SamplingParams(**{"max_tokens": 4, "seed": 0, **params}),
        )
        assert self.scheduler.submit(frame) is None
        self.everything[frame.request_id] = frame
        self.live[frame.request_id] = Client(frame, scored=[False] * len(prompt))
        return frame.request_id

    def cancel(self, request_id: str) -> None:
        assert self.scheduler.cancel(request_id)
        assert not self.scheduler.is_live(request_id)
        assert not self.scheduler.cancel(request_id)
        del self.live[request_id]
        self.cancelled.add(request_id)

    # What the engine does

    def step(self, *, cancel_between: str | None = None, abandon: bool = False) -> bool:
        """One whole step; False when there was nothing to do."""
        plan = self.scheduler.schedule()
        self._check_plan(plan)
        if plan is None:
            return False
        for op in plan.memory:
            self.apply(op)
        if abandon:
            if cancel_between is not None:
                self.cancel(cancel_between)
            self.scheduler.abandon(plan)
        else:
            tokens = self.compute(plan)
            if cancel_between is not None:
                self.cancel(cancel_between)
            self.commit(plan)
            self.deliver(plan, tokens, self.scheduler.complete(plan, tokens))
        self.scheduler.check_integrity()
        self._check_books_and_arena()
        return True

    def crash(self, rng: Random) -> None:
        """Die at some point of a step; a replacement takes over the arena and the gateway submits again."""
        self.crashes += 1
        plan = self.scheduler.schedule()
        if plan is not None:
            point = rng.randrange(4)
            for op in plan.memory[: rng.randint(0, len(plan.memory)) if point == 0 else None]:
                self.apply(op)
            if point == 1:  # in the middle of the rows, some of them half written
                for row in plan.rows[: rng.randint(0, len(plan.rows) - 1)]:
                    self.arena.compute(row, self.live[row.request_id].tokens)
            elif point >= 2:
                tokens = self.compute(plan, scored=False)
                self.commit(plan, upto=rng.randint(0, len(plan.rows)) if point == 2 else None)
                if point == 3 and rng.random() < 0.5:  # the tokens reach the gateway, perhaps without the end
                    for request_id, token in tokens.items():
                        self.live[request_id].emitted.append(token)
        self.check_records()
        self._start(self.arena.records())
        self.books.check_integrity()
        for request_id, client in list(self.live.items()):
            client.scored = [bool(client.emitted)] * len(client.frame.prompt_token_ids)
            frame = Submit(
                request_id=request_id,
                prompt_token_ids=client.frame.prompt_token_ids,
                params=client.frame.params,
                emitted_token_ids=list(client.emitted),
            )
            done = self.scheduler.submit(frame)
            if done is not None:
                self._finish(request_id, done.reason)

    def apply(self, op: MemoryOp) -> None:
        self.arena.apply(op)
        if isinstance(op, Claim) and op.committed_tokens:
            self._check_claim(op)

    def compute(self, plan: StepPlan, scored: bool = True) -> dict[str, int]:
        tokens = {}
        for row in plan.rows:
            client = self.live[row.request_id]
            self.arena.compute(row, client.tokens)
            if row.all_logits and scored:
                assert not any(client.scored[row.start : row.end]), f"{row}: logits handed out twice"
                client.scored[row.start : row.end] = [True] * len(row.token_ids)
            if row.sample:
                assert row.end == len(client.tokens)
                tokens[row.request_id] = next_token(client.tokens, client.frame.params.seed)
        return tokens

    def commit(self, plan: StepPlan, upto: int | None = None) -> None:
        for row in plan.rows[:upto]:
            self.arena.committed[row.slot] = row.end

    def deliver(self, plan: StepPlan, tokens: dict[str, int], finished: list[object]) -> None:
        for request_id, token in tokens.items():
            if request_id in self.live:
                self.live[request_id].emitted.append(token)
        for end in finished:
            self._finish(end.request_id, end.reason)

    def _finish(self, request_id: str, reason: str) -> None:
        client = self.live.pop(request_id)
        assert (client.emitted, reason) == expected_output(client.frame), f"{request_id}: other tokens than undisturbed"
        if client.frame.params.prompt_logprobs is not None:
            assert all(client.scored), f"{request_id}: the logits of some prompt tokens never came"
        self.finished[request_id] = client.emitted

    # What a transition does

    def grow(self, count: int) -> None:
        """The arena gets granules, some of which it may have had before."""
        if self.geometry.shareable:
            fresh = [granule for granule in range(4 * len(self.granules) + count) if granule not in self.arena.granted]
            self.arena.grow(fresh[:count])
            self.granules = sorted(self.arena.granted)
            self.scheduler.add_granules(fresh[:count])
            self.scheduler.check_integrity()

    def shrink(self, count: int) -> None:
        """The arena gives granules back: as many as asked for, unless a request would become impossible."""
        before = self.books.total_granules
        removed, ops = self.scheduler.remove_granules(count, keep_tokens=self.geometry.max_context_tokens)
        for op in ops:
            self.apply(op)
        self.arena.shrink(removed)
        self.granules = sorted(self.arena.granted)
        self.scheduler.check_integrity()
        self._check_books_and_arena()
        kept = self.geometry.granules_for(self.geometry.max_context_tokens)
        assert len(removed) == (max(0, min(count, before - kept)) if self.geometry.shareable else 0)
        assert self.books.total_granules == len(self.granules) * self.geometry.shareable

    def arrive(self, frame: Submit, emitted: int, pieces: list[int], rng: Random) -> None:
        """A request comes from another worker: its KV in pieces that end at these tokens, steps between them, then itself."""
        self.everything[frame.request_id] = frame
        output = expected_output(frame)[0]
        tokens = frame.prompt_token_ids + output[:emitted]
        slot, first = None, 0
        for end in pieces:
            room = self.scheduler.import_kv(frame.request_id, slot, first, tokens[first:end])
            if room is None:
                break
            slot, ops = room
            for op in ops:
                self.apply(op)
            width = self.geometry.kv_token_bytes
            for t, name in enumerate(histories(tokens[:end])[first:], first):
                for j in range(width):
                    self.arena.write(slot, t * width + j, (name, j))
            for op in self.scheduler.imported(slot, tokens[first:end]):
                self.apply(op)
            first = end
            self.imported_tokens = end
            self.scheduler.check_integrity()
            self._check_books_and_arena()
            if rng.random() < 0.5:
                self.step()
        again = Submit(
            request_id=frame.request_id,
            prompt_token_ids=frame.prompt_token_ids,
            params=frame.params,
            emitted_token_ids=output[:emitted],
        )
        assert self.scheduler.submit(again) is None
        self.live[frame.request_id] = Client(frame, list(output[:emitted]), [True] * len(frame.prompt_token_ids))

    # What must hold

    def _check_plan(self, plan: StepPlan | None) -> None:
        stats = self.scheduler.stats()
        assert stats.running + stats.waiting == len(self.live)
        assert stats.running <= self.config.max_running
        assert 0 <= stats.kv_used_tokens <= stats.kv_capacity_tokens
        if not self.live:
            assert plan is None
            return
        assert plan is not None and plan.rows, "requests are left, but nothing is computed"
        assert plan.num_tokens <= self.config.max_batch_tokens
        assert len({row.request_id for row in plan.rows}) == len(plan.rows) == len({row.slot for row in plan.rows})
        # First come, first served: the oldest request is in every step, and those running are the oldest ones.
        oldest = next(iter(self.live))
        assert oldest in {row.request_id for row in plan.rows}, "the oldest request got no row"
        running = list(self.scheduler._running)
        assert running == list(self.live)[: len(running)], "a request overtook another"
        assert list(self.scheduler._waiting) == list(self.live)[len(running) :]
        self.steps_as_oldest = self.steps_as_oldest + 1 if oldest == self.oldest else 1
        self.oldest = oldest

    def check_bounded_wait(self, disturbances: int) -> None:
        """The oldest request advances by a token a step at least (a disturbance may cost it what it had computed)."""
        if self.oldest in self.everything:
            frame = self.everything[self.oldest]
            tokens = len(frame.prompt_token_ids) + frame.params.max_tokens
            assert self.steps_as_oldest <= tokens * (1 + disturbances), "the oldest request does not advance"

    def _check_claim(self, claim: Claim) -> None:
        """A slot holds what the manager is told that it holds, at the moment it is told."""
        frame = self.everything[claim.request_id]
        names = histories(frame.prompt_token_ids + expected_output(frame)[0])
        assert claim.committed_tokens <= len(names)
        assert self.arena.holds(claim.slot, names[: claim.committed_tokens]), f"{claim}: the slot does not hold that"

    def check_records(self) -> None:
        for record in self.arena.records():
            if record.request_id and record.committed:
                self._check_claim(Claim(record.slot, record.request_id, record.committed))

    def _check_books_and_arena(self) -> None:
        for request in self.scheduler._running.values():
            record = self.arena.records()[request.slot]
            assert (record.request_id, record.committed) == (request.request_id, request.computed), "a stale record"
        for slot, ids in enumerate(self.arena.mapped):
            pending = any(getattr(op, "slot", None) == slot for op in self.books._ops)
            assert pending or ids == self.books._slots[slot].granules, "books and arena disagree"
        self.check_records()

    def drain(self, limit: int = 10_000) -> None:
        while self.step():
            limit -= 1
            assert limit > 0, "the world does not come to an end"
        assert not self.live
        assert self.books.available_granules == self.books.total_granules, "memory is held by nobody"
        assert self.books.used_tokens == 0


def random_world(rng: Random) -> World:
    """Small and tight: granules and tokens out of step, a pool that is often too small for all that run."""
    width, granule = rng.randint(1, 5), rng.randint(1, 9)
    context = rng.randint(4, 24)
    shareable = rng.random() < 0.85
    slots = rng.randint(1, 5)
    geometry = KvGeometry(
        slots=slots, max_context_tokens=context, kv_token_bytes=width, granule_bytes=granule, shareable=shareable
    )
    whole = geometry.granules_for(context)
    total = rng.randint(whole, whole * slots if rng.random() < 0.5 else whole + whole // 2)
    granules = rng.sample(range(2 * total), total) if rng.random() < 0.5 else list(range(total))
    running = rng.randint(1, slots)
    config = SchedulerConfig(
        max_running=running,
        max_batch_tokens=rng.randint(running, running + 12),
        max_scored_tokens=rng.randint(1, 8),
        vocab_size=VOCAB,
    )
    return World(config, geometry, granules, ahead=rng.randint(0, 3))


def submit_something(world: World, rng: Random) -> str:
    """A request that often begins as another one did."""
    context = world.geometry.max_context_tokens
    base: list[int] = []
    if world.everything and rng.random() < 0.7:
        frame = world.everything[rng.choice(list(world.everything))]
        whole = frame.prompt_token_ids + (expected_output(frame)[0] if rng.random() < 0.5 else [])
        base = whole[: rng.randint(0, min(len(whole), context - 1))]
    fresh = rng.randint(0 if base else 1, max(1, min(6, context - 1 - len(base))))
    prompt = (base + [rng.randrange(VOCAB) for _ in range(fresh)])[: context - 1]
    room = context - len(prompt)
    scored = rng.random() < 0.2
    max_tokens = room if rng.random() < 0.5 else rng.randint(0 if scored else 1, room)
    return world.submit(
        prompt,
        max_tokens=max_tokens,
        min_tokens=rng.randint(0, max_tokens) if rng.random() < 0.3 else 0,
        seed=rng.randrange(3),
        stop_token_ids=(rng.randrange(VOCAB),) if rng.random() < 0.4 else (),
        prompt_logprobs=0 if scored else None,
    )


def arrive_from_elsewhere(world: World, rng: Random) -> None:
    context = world.geometry.max_context_tokens
    world.count += 1
    prompt = [rng.randrange(VOCAB) for _ in range(rng.randint(1, context - 1))]
    params = SamplingParams(max_tokens=context - len(prompt), seed=rng.randrange(3))
    frame = Submit(request_id=f"r{world.count}", prompt_token_ids=prompt, params=params)
    emitted = rng.randint(0, params.max_tokens - 1)
    computed = rng.randint(0, len(prompt) + emitted - 1)
    pieces = sorted({rng.randint(1, computed) for _ in range(rng.randint(1, 3))} | {computed}) if computed else []
    world.arrive(frame, emitted, pieces, rng)


def run_trace(rng: Random, events: int) -> World:
    """Random events in a random world, then quiet until all is done; every check of the world on the way."""
    world = random_world(rng)
    disturbances = 0
    for _ in range(rng.randint(1, events)):
        kind = rng.random()
        if kind < 0.04:
            arrive_from_elsewhere(world, rng)
        elif kind < 0.3 or not world.live:
            submit_something(world, rng)
        elif kind < 0.74:
            world.step()
        elif kind < 0.77:
            world.grow(rng.randint(1, 6))
        elif kind < 0.8:
            world.shrink(rng.randint(1, 8))
            disturbances += 1
        elif kind < 0.87:
            world.cancel(rng.choice(list(world.live)))
        elif kind < 0.93:
            world.step(cancel_between=rng.choice(list(world.live)))
        elif kind < 0.96:
            world.step(abandon=True)
            disturbances += 1
        else:
            world.crash(rng)
            disturbances += 1
        world.check_bounded_wait(disturbances)
    world.drain()
    world.check_bounded_wait(disturbances)
    assert world.finished.keys() | world.cancelled == world.everything.keys()
    return world
