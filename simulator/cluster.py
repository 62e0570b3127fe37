"""The modelled cluster: workers that step together, requests that come, are routed, computed and end.

Time goes from step to step. All workers are ranks of one expert-parallel group, so a step takes as long as that of the slowest; while
nobody computes a prompt and nobody ends, many steps are one jump. Prompts are computed in chunks beside the decoding requests, the oldest
first; requests wait in order at their worker, and in the gateway where every worker has two batches. A worker whose KV is full preempts its
latest request, which computes all its tokens again. This is what workers.scheduler and controller.routing do, told in sums.

Called by `simulator.runner`: `advance`, `submit`, and at the commits of transitions `grow`, `shrink` and `pause`.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator
from heapq import heappop, heappush

from flexpert.simulator.profile import Profile, interpolate
from flexpert.simulator.service import NEVER, Lane, Request, StepTimes

__all__ = ["Cluster"]

BATCHES_HELD = 2  # of controller.routing
RESERVE_TOKENS = 16  # of KV for each running request, before another one is admitted
REFRESH_STEPS = 64  # the context that decoding requests gain is counted again at least this often
EPSILON = 1e-9


class Cluster:
    """`on_first(request, now_s)` and `on_end(request, now_s)` are told of first tokens and ends, `on_route` of who goes to a worker.

    stands_for: how many of the load's requests one simulated request stands for, and how many workers one lane.
    """

    def __init__(
        self,
        profile: Profile,
        *,
        workers: int,
        stands_for: int = 1,
        on_first: Callable[[Request, float], None],
        on_end: Callable[[Request, float], None],
        on_route: Callable[[Request, float], None] = lambda _request, _now_s: None,
    ) -> None:
        self.profile = profile
        self.now_s = 0.0
        self.step = 0
        self.busy_s = 0.0  # in steps, so far
        self.lanes: list[Lane] = []
        self.queue: deque[Request] = deque()  # in the gateway
        self.preemptions = 0.0
        self.live = 0.0
        self.unanswered = self._decoded_gone = 0.0  # gone: by lanes that left
        self.slow = 1.0  # times as long as the profile says, while other processes start
        self._times = StepTimes(profile)
        self._times_of = {None if (served := profile.serves(1)) is None else served.workers: self._times}
        self._stands_for = stands_for
        self._on_first = on_first
        self._on_end = on_end
        self._on_route = on_route
        self._work: list[float] = []  # of each lane, for routing
        self._steps_s: list[float] = []  # of each lane, without prompts
        self._active: dict[Lane, None] = {}  # lanes with something to compute or to admit
        self._ends: list[tuple[int, int, Request]] = []
        self._order = 0
        self._overflow = NEVER
        self._refresh = 0
        self._running = 0
        self._exchange_s = 0.0
        self.grow(workers)

    @property
    def workers(self) -> int:
        return sum(lane.workers for lane in self.lanes)

    @property
    def decoded_tokens(self) -> float:
        """So far, without first ones."""
        return self._decoded_gone + sum(lane.decoded_tokens(self.step) for lane in self.lanes)

    @property
    def running(self) -> float:
        return sum(lane.weight for lane in self.lanes)

    def unanswered_requests(self) -> Iterator[Request]:
        """Those without a first token."""
        for requests in (self.queue, *(lane.waiting for lane in self.lanes), *(lane.prefilling for lane in self.lanes)):
            for request in requests:
                if request.first_s < 0:
                    yield request

    # Requests

    def submit(self, request: Request) -> None:
        """It arrives now, at the gateway. Requests that could never fit a worker's KV must not come here."""
        self.live += request.weight
        self.unanswered += request.weight
        if self.queue:
            self.queue.append(request)
        else:
            self._route(request, request.arrived_s)

    def _route(self, request: Request, now_s: float) -> bool:
        """To the lane with the least work; where its workers are fewer than the request stands for, only a part of it."""
        while True:
            lane = self._choose(request)
            if lane is None:
                self.queue.appendleft(request)
                return False
            rest = request.weight - lane.workers
            if rest > EPSILON:
                part = Request(request.arrived_s, request.prompt, request.output, float(lane.workers))
                request.weight = rest
                self._enqueue(lane, part, now_s)
                continue
            self._enqueue(lane, request, now_s)
            return True

    def _choose(self, request: Request) -> Lane | None:
        lane = self.lanes[self._work.index(min(self._work))]
        most = self.profile.max_running * lane.workers
        if lane.in_flight < most and lane.kv_capacity - lane.kv_used(self.step) > request.prompt:
            return lane
        best, best_key = None, (True, math.inf)
        for lane, work in zip(self.lanes, self._work, strict=True):
            most = self.profile.max_running * lane.workers
            if lane.in_flight >= BATCHES_HELD * most:
                continue
            waits = lane.in_flight >= most or lane.kv_capacity - lane.kv_used(self.step) <= request.prompt
            if best is None or (waits, work) < best_key:
                best, best_key = lane, (waits, work)
        return best

    def _enqueue(self, lane: Lane, request: Request, now_s: float) -> None:
        self._on_route(request, now_s)
        lane.enqueue(request)
        self._active[lane] = None
        self._weigh(lane)

    def _weigh(self, lane: Lane) -> None:
        self._work[lane.number] = lane.work()

    def _changed(self, lane: Lane) -> None:
        """Its batch is another one: its steps take another time, and it has other work before it."""
        lane.refresh(self.step)
        self._steps_s[lane.number] = lane.step_s
        self._work[lane.number] = lane.work()

    # Time

    def advance(self, until_s: float) -> None:
        """Take every step that begins before until_s. The last one may end after it; an idle cluster waits until then."""
        while self.now_s < until_s:
            if not self._active and not self._running:
                self.now_s = until_s
                return
            self._take_step(until_s)

    def pause(self, seconds: float) -> None:
        """Nobody computes for so long (a commit)."""
        self.now_s += seconds

    def _take_step(self, until_s: float) -> None:
        if self.step >= self._overflow:
            self._preempt()
        if self.step >= self._refresh:
            self._refresh = self.step + REFRESH_STEPS
            for lane in self.lanes:
                self._changed(lane)
        steps = min(self._refresh, self._overflow) - self.step
        slowest_s = max(self._steps_s)
        chunks: list[tuple[Lane, float]] = []
        prompts_s = longest_s = 0.0
        for lane in list(self._active):
            chunk, alike = self._plan(lane)
            if not chunk:
                continue
            chunks.append((lane, chunk))
            steps = min(steps, alike)
            prompt_s = self._times.prefill_s(chunk)
            if self._times.prefill_context_s:
                head = lane.prefilling[0]
                prompt_s += self._times.prefill_context_s * chunk * (head.prompt + head.generated - head.todo)
            prompts_s += prompt_s
            longest_s = max(longest_s, prompt_s)
            slowest_s = max(slowest_s, lane.step_s + prompt_s)
        slowest_s = (slowest_s + self._times.overlap * (prompts_s - longest_s) + self._exchange_s) * self.slow
        ends = self._ends
        while ends and ends[0][2].finish != ends[0][0]:
            heappop(ends)  # it was preempted
        if ends:
            steps = min(steps, ends[0][0] - self.step)
        if steps > 1:
            steps = max(1, min(steps, math.ceil((until_s - self.now_s) / slowest_s)))
        self.step += steps
        self.now_s += steps * slowest_s
        self.busy_s += steps * slowest_s
        for lane, chunk in chunks:
            self._compute(lane, chunk * steps)
        if ends and ends[0][0] <= self.step:
            self._end()
        if self.queue:
            self._drain_queue()

    def _plan(self, lane: Lane) -> tuple[float, int]:
        """Prompt tokens that each of the lane's workers computes in the next step, and for how many steps that stays so."""
        profile, workers = self.profile, lane.workers
        budget = profile.max_batch_tokens - lane.decoding / workers
        waiting = lane.waiting
        if waiting:
            room = profile.max_running * workers - lane.weight
            free = (lane.kv_capacity - lane.kv_used(self.step)) * workers - RESERVE_TOKENS * lane.weight
            while waiting and lane.todo < budget * workers:
                head = waiting[0]
                held = head.weight * (head.prompt + head.generated)
                if (head.weight > room + EPSILON or held > free) and lane.running:
                    break
                lane.admit(head, self.now_s)
                self._running += 1
                room -= head.weight
                free -= held + RESERVE_TOKENS * head.weight
        if not lane.prefilling:
            if not waiting:
                del self._active[lane]
            return 0.0, NEVER
        chunk = min(budget, lane.todo / workers)
        head = lane.prefilling[0]
        share = head.weight / workers
        return chunk, max(1, math.ceil(head.todo * share / budget - EPSILON) - 1)

    def _compute(self, lane: Lane, tokens: float) -> None:
        """So many prompt tokens of each worker are done, the oldest first; requests without any left have their next token."""
        left = tokens * lane.workers
        lane.prefill_tokens += left
        prefilling = lane.prefilling
        while prefilling:
            head = prefilling[0]
            needed = head.todo * head.weight
            if needed > left + 1e-6:
                head.todo -= left / head.weight
                lane.todo -= left
                break
            left -= needed
            lane.todo -= needed
            prefilling.popleft()
            self._answer(lane, head)
        if not prefilling:
            lane.todo = 0.0
            if not lane.waiting:
                del self._active[lane]
        self._changed(lane)

    def _answer(self, lane: Lane, request: Request) -> None:
        if request.first_s < 0:
            lane.unstarted -= request.weight * request.prompt
            self.unanswered -= request.weight
            request.first_s = self.now_s
            request.answer_s = self._times.answer_s(self._running * self._stands_for)
            self._on_first(request, self.now_s)
        request.todo = 0.0
        request.generated += 1
        lane.kv_base += request.weight
        request.finish = self.step + request.output - request.generated
        lane.start_decoding(request, self.step)
        self._order += 1
        heappush(self._ends, (request.finish, self._order, request))
        self._overflow = min(self._overflow, lane.overflows_at(self.step))

    def _end(self) -> None:
        """All whose last token is out."""
        ends, step, now_s = self._ends, self.step, self.now_s
        touched: dict[Lane, None] = {}
        while ends and ends[0][0] <= step:
            finish, _, request = heappop(ends)
            if request.finish != finish:
                continue
            lane = request.lane
            assert lane is not None
            lane.leave(request, step)
            request.finish = -1
            request.lane = None
            self._running -= 1
            self.live -= request.weight
            touched[lane] = None
            self._on_end(request, now_s)
        for lane in touched:
            self._changed(lane)

    def _drain_queue(self) -> None:
        while self.queue:
            if not self._route(self.queue.popleft(), self.now_s):
                return

    def _preempt(self) -> None:
        """Where the decoding requests have no room for a token each, the latest ones go back to the head of the queue."""
        for lane in self.lanes:
            while len(lane.running) > 1 and lane.overflows_at(self.step) <= self.step:
                latest = next(reversed(lane.running))
                lane.leave(latest, self.step)
                latest.finish = NEVER
                latest.todo = latest.prompt + latest.generated
                lane.enqueue(latest, first=True)
                self._running -= 1
                self.preemptions += latest.weight
                self._active[lane] = None
            self._changed(lane)
        self._overflow = min((max(self.step + 1, lane.overflows_at(self.step)) for lane in self.lanes), default=NEVER)

    # Workers

    def grow(self, count: int) -> None:
        """So many empty workers serve from now on."""
        for lane in self.lanes:
            if count and lane.workers < self._stands_for:
                added = min(count, self._stands_for - lane.workers)
                lane.workers += added
                count -= added
        while count:
            added = min(count, self._stands_for)
            self.lanes.append(Lane(self._times, workers=added, kv_capacity=0.0))
            count -= added
        self._resized()
        self._drain_queue()

    def shrink(self, count: int) -> None:
        """So many workers leave, the last lanes first; their requests go on at the others, with their KV."""
        if not 0 <= count < self.workers:
            raise ValueError(f"{count} of {self.workers} workers cannot leave: one must stay")
        homeless: list[Request] = []
        while count:
            lane = min(reversed(self.lanes), key=lambda lane: lane.workers)
            leavers = min(count, lane.workers)
            whole = leavers == lane.workers
            left = lane.in_flight * leavers / lane.workers
            for request in [*reversed(lane.running), *reversed(lane.waiting)]:
                if not whole and left < request.weight / 2:
                    break
                left -= request.weight
                self._take_out(lane, request)
                homeless.append(request)
            lane.workers -= leavers
            count -= leavers
            if not lane.workers:
                self._decoded_gone += lane.decoded_tokens(self.step)
                self.lanes.remove(lane)
                self._active.pop(lane, None)
        self._resized()
        for request in homeless:
            self._resettle(request)

    def _take_out(self, lane: Lane, request: Request) -> None:
        if request in lane.running:
            lane.leave(request, self.step)
            self._running -= 1
        else:
            lane.dequeue(request)

    def _resettle(self, request: Request) -> None:
        """A leaver's request at the worker with the least work, its KV with it if there is room."""
        lane = self.lanes[self._work.index(min(self._work))]
        room = self.profile.max_running * lane.workers - lane.weight >= request.weight
        free = (lane.kv_capacity - lane.kv_used(self.step)) * lane.workers - lane.weight
        began = request.finish != NEVER or request.todo < request.prompt + request.generated
        if began and room and free >= request.weight * (request.prompt + request.generated):
            lane.arrive(request, self.step)
            self._running += 1
        else:
            if began:
                self.preemptions += request.weight
            request.finish = NEVER
            request.todo = request.prompt + request.generated
            lane.enqueue(request, first=began)
        self._active[lane] = None
        self._changed(lane)

    def _resized(self) -> None:
        workers = self.workers
        served = self.profile.serves(workers)
        key = None if served is None else served.workers
        if key not in self._times_of:
            self._times_of[key] = StepTimes(self.profile, workers)
        self._times = self._times_of[key]
        self._exchange_s = interpolate(self.profile.exchange, workers) if served is None else 0.0
        for number, lane in enumerate(self.lanes):
            lane.number = number
            lane.times = self._times
            lane.kv_capacity = self.profile.kv_capacity(workers)
            lane.refresh(self.step)
        self._work = [lane.work() for lane in self.lanes]
        self._steps_s = [lane.step_s for lane in self.lanes]
        self._overflow = self.step

    def check(self) -> None:
        """Raise AssertionError where the books contradict each other."""
        for lane in self.lanes:
            lane.check(self.step)
        live = [r for lane in self.lanes for r in (*lane.running, *lane.waiting)] + list(self.queue)
        assert len(set(live)) == len(live)
        assert abs(sum(r.weight for r in live) - self.live) <= 1e-6 * max(1.0, self.live)
        assert self._running == sum(len(lane.running) for lane in self.lanes)
