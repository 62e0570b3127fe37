"""One worker of the modelled cluster: its batch, its queue, its KV, and how long its part of a step takes.

A Lane stands for `workers` equal workers (one, unless one simulated request stands for several), each of which serves 1/workers of the
lane's requests. It counts in steps of the group: a decoding request gains one token a step, so KV and tokens at any step follow from two
sums and nothing is touched between the events that change them. `simulator.cluster` moves the steps and calls everything here.
"""

from __future__ import annotations

from collections import deque
from math import ceil

from flexpert.simulator.profile import Profile, interpolate

__all__ = ["TOKENS_PER_RUNNING_REQUEST", "Lane", "Request", "StepTimes"]

# As controller.routing has them: what a running request weighs against prompt tokens, and how many batches a worker takes from the gateway.
TOKENS_PER_RUNNING_REQUEST = 32
NEVER = 1 << 62


class Request:
    """One simulated request; it stands for `weight` of the load.

    todo: tokens whose KV is still to be computed before the next token comes. output: tokens still to come after those of an earlier
    life (before a preemption) are taken off by `cluster`. start: the step after which `generated` began to count; finish: its last step.
    """

    __slots__ = (
        "answer_s", "arrived_s", "finish", "first_s", "generated", "lane", "output", "prompt", "start", "started_s", "todo", "weight",
    )  # fmt: skip

    def __init__(self, arrived_s: float, prompt: int, output: int, weight: float) -> None:
        self.arrived_s = arrived_s
        self.prompt = prompt
        self.output = output
        self.weight = weight
        self.todo: float = prompt
        self.generated = 0
        self.start = 0
        self.finish = NEVER
        self.started_s = -1.0
        self.first_s = -1.0
        self.answer_s = 0.0  # from its first token to its client
        self.lane: Lane | None = None

    def tokens(self, step: int) -> int:
        """Prompt and output so far, at the begin of `step`."""
        return self.prompt + self.generated + (step - self.start if self.finish != NEVER else 0)


class StepTimes:
    """What a profile says of one size of the cluster, as tables. overlap: as in profile.Served."""

    def __init__(self, profile: Profile, workers: int = 1) -> None:
        served = profile.serves(workers)
        decode, prefill = (profile.decode, profile.prefill) if served is None else (served.decode, served.prefill)
        running = 4 * profile.max_running + 2
        self.decode = [interpolate(decode, n) for n in range(running + 1)]
        self.prefill = [interpolate(prefill, n) for n in range(profile.max_batch_tokens + 2)]
        self.prefill[0] = 0.0
        self.context_s = profile.context_s
        self.prefill_context_s = profile.prefill_context_s
        self.overlap = 0.0 if served is None else served.overlap
        self._answer = ((0.0, profile.answer_s),) if served is None else served.answer

    def answer_s(self, running: float) -> float:
        """From a step's end to the client, while so many requests run in the cluster."""
        points = self._answer
        return points[0][1] if len(points) == 1 else interpolate(points, min(running, points[-1][0]))

    def decode_s(self, running: float) -> float:
        low = min(int(running), len(self.decode) - 2)
        at_low = self.decode[low]
        return at_low + (running - low) * (self.decode[low + 1] - at_low)

    def prefill_s(self, tokens: float) -> float:
        return self.prefill[min(ceil(tokens), len(self.prefill) - 1)]


class Lane:
    """`workers` workers that serve alike. Sums are over the lane's requests times their weight; a worker has its share."""

    __slots__ = (
        "context_base", "decode_tokens_base", "decoding", "in_flight", "kv_base", "kv_capacity", "number", "prefill_tokens",
        "prefilling", "running", "step_s", "times", "todo", "unstarted", "waiting", "weight", "workers",
    )  # fmt: skip

    def __init__(self, times: StepTimes, *, workers: int, kv_capacity: float) -> None:
        self.times = times
        self.workers = workers
        self.kv_capacity = kv_capacity  # of one worker
        self.number = 0  # its place among the cluster's lanes
        self.waiting: deque[Request] = deque()
        self.prefilling: deque[Request] = deque()
        self.running: dict[Request, None] = {}  # admitted, in that order
        self.weight = 0.0  # of running
        self.decoding = 0.0  # weight of those that decode
        self.in_flight = 0.0  # weight of waiting and running
        self.unstarted = 0.0  # prompt tokens without an answer, waiting ones included
        self.todo = 0.0  # tokens to compute, of prefilling
        self.context_base = 0.0  # context of the decoding at step v: context_base + decoding * v
        self.kv_base = 0.0  # the same with what prefilling requests hold
        self.prefill_tokens = 0.0  # computed so far
        self.decode_tokens_base = 0.0  # decoded up to step v: decode_tokens_base + decoding * v
        self.step_s = times.decode_s(0)

    def kv_used(self, step: int) -> float:
        """Tokens of one worker's KV."""
        return (self.kv_base + self.decoding * step) / self.workers

    def decoded_tokens(self, step: int) -> float:
        return self.decode_tokens_base + self.decoding * step

    def work(self) -> float:
        """What controller.routing weighs: work of one worker before a new request's first token."""
        return (self.unstarted + TOKENS_PER_RUNNING_REQUEST * self.in_flight) / self.workers

    def refresh(self, step: int) -> None:
        """How long the decode part of a step takes now."""
        times, share = self.times, 1 / self.workers
        self.step_s = times.decode_s(self.decoding * share)
        if times.context_s:
            self.step_s += times.context_s * (self.context_base + self.decoding * step) * share

    def overflows_at(self, step: int) -> int:
        """The first step from which on there is no room for a token each of the decoding; `step` where that is now."""
        free = self.kv_capacity * self.workers - self.kv_base
        if self.decoding <= 1e-9:
            return NEVER
        return max(step, int(free / self.decoding))

    # Requests come and go

    def enqueue(self, request: Request, *, first: bool = False) -> None:
        request.lane = self
        self.in_flight += request.weight
        if request.first_s < 0:
            self.unstarted += request.weight * request.prompt
        if first:
            self.waiting.appendleft(request)
        else:
            self.waiting.append(request)

    def dequeue(self, request: Request) -> None:
        """Take it out of the queue, wherever it stands."""
        self.waiting.remove(request)
        self._forget(request)

    def admit(self, request: Request, now_s: float) -> None:
        """The head of the queue begins."""
        self.waiting.popleft()
        if request.started_s < 0:
            request.started_s = now_s
        self._begin(request)

    def _begin(self, request: Request) -> None:
        weight = request.weight
        self.running[request] = None
        self.weight += weight
        self.prefilling.append(request)
        self.todo += weight * request.todo
        self.kv_base += weight * (request.prompt + request.generated)

    def start_decoding(self, request: Request, step: int) -> None:
        """Its tokens are computed, its next one is out with the step that ended; from `step` on one more with each."""
        weight = request.weight
        request.start = step
        self.decoding += weight
        tokens = weight * (request.prompt + request.generated - step)
        self.context_base += tokens
        self.kv_base -= weight * step
        self.decode_tokens_base -= weight * step

    def leave(self, request: Request, step: int) -> None:
        """A running request goes: it ended, is preempted or moves. Its `generated` and `todo` tell where it stands."""
        weight = request.weight
        del self.running[request]
        self.weight -= weight
        if request.finish == NEVER:
            self.prefilling.remove(request)
            self.todo -= weight * request.todo
            self.kv_base -= weight * (request.prompt + request.generated)
        else:
            grown = step - request.start
            self.decoding -= weight
            self.context_base -= weight * (request.prompt + request.generated - request.start)
            self.kv_base -= weight * (request.prompt + request.generated - request.start)
            self.decode_tokens_base += weight * step
            request.generated += grown
        self._forget(request)
        if not self.running:  # what rounding left
            self.weight = self.decoding = self.todo = self.context_base = self.kv_base = 0.0

    def _forget(self, request: Request) -> None:
        self.in_flight -= request.weight
        if request.first_s < 0:
            self.unstarted -= request.weight * request.prompt
        if not self.waiting and not self.running:
            self.in_flight = self.unstarted = 0.0

    def arrive(self, request: Request, step: int) -> None:
        """A running request comes from another lane with its KV."""
        weight = request.weight
        request.lane = self
        self.in_flight += weight
        if request.first_s < 0:
            self.unstarted += weight * request.prompt
        if request.finish == NEVER:
            self._begin(request)
            return
        self.running[request] = None
        self.weight += weight
        self.kv_base += weight * (request.prompt + request.generated)
        self.start_decoding(request, step)

    def check(self, step: int) -> None:
        """Raise AssertionError where the sums are not those of the requests."""
        running = list(self.running)
        decoding = [request for request in running if request.finish != NEVER]
        assert _close(self.weight, sum(r.weight for r in running))
        assert _close(self.decoding, sum(r.weight for r in decoding))
        assert _close(self.in_flight, self.weight + sum(r.weight for r in self.waiting))
        assert _close(self.kv_used(step) * self.workers, sum(r.weight * r.tokens(step) for r in running))
        assert _close(self.todo, sum(r.weight * r.todo for r in self.prefilling))
        assert set(self.prefilling) == {r for r in running if r.finish == NEVER}
        assert all(r.lane is self for r in (*running, *self.waiting))


def _close(found: float, expected: float) -> bool:
    return abs(found - expected) <= 1e-5 * max(1.0, abs(expected))
