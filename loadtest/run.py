"""Drives the load: the open loop sends when the schedule says so, the closed loop when a user's last answer has come.

The open loop never waits for the server. Requests are made ahead while there is time and sent in order of the schedule;
what is late is sent at once, its lag recorded. Only a turn of a conversation waits for the turn before it; it is then
intended when that one ended.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from flexpert.loadtest.client import Client, Exchange
from flexpert.loadtest.lengths import Mix
from flexpert.loadtest.measure import Outcome
from flexpert.loadtest.prompts import Template, Turn
from flexpert.loadtest.schedule import Arrival
from flexpert.loadtest.slo import met
from flexpert.loadtest.summary import Gaps

__all__ = ["ClosedLoop", "OpenLoop", "Recorder", "Users"]

AHEAD = 512  # requests made before they are due, at most
AT_ONCE = 32  # requests sent or made before answers get their turn
MOST_SLEEP_S = 0.1
LEAST_SLEEP_S = 0.001  # the loop's own resolution


class Recorder:
    """Keeps what ended, and running figures for the live view. window: [from, to) of intended times, None: the whole run."""

    def __init__(self, *, limits: dict[str, float], window: tuple[float, float] | None = None) -> None:
        self.limits, self.window = limits, window
        self.outcomes: list[Outcome] = []
        self.gaps = Gaps()
        self.window_gaps = self.gaps if window is None else Gaps()
        self.ttft, self.tpot = Gaps(), Gaps()  # as histograms of single values
        self.ended = self.ok = self.met = 0
        self.tokens = 0
        self.last_error = ""

    def new(self, arrival: Arrival, index: int, *, at_s: float, turn: int = 0) -> Outcome:
        """turn > 0: the prompt's length is not known before, it holds what was answered."""
        outcome = Outcome(
            index, at_s, 0 if turn else arrival.prompt_tokens, arrival.output_tokens, session=arrival.session, turn=turn
        )
        self.outcomes.append(outcome)
        return outcome

    def end(self, exchange: Exchange) -> None:
        outcome = exchange.outcome
        self.ended += 1
        self.tokens += outcome.tokens
        if outcome.end == "ok":
            self.ok += 1
            self.met += met(outcome, self.limits)
        elif outcome.error:
            self.last_error = outcome.error
        for histogram, value in ((self.ttft, outcome.ttft_s), (self.tpot, outcome.tpot_s)):
            if value is not None:
                histogram.add_one(value)
        self.gaps.add(exchange.gaps_s, tokens=outcome.tokens)
        if self.window is not None and self.window[0] <= outcome.intended_s < self.window[1]:
            self.window_gaps.add(exchange.gaps_s, tokens=outcome.tokens)
        exchange.gaps_s = []


class OpenLoop:
    """Sends a schedule."""

    def __init__(self, client: Client, template: Template, recorder: Recorder) -> None:
        self._client, self._template, self._recorder = client, template, recorder
        self._later: dict[str, deque[tuple[int, Arrival]]] = {}  # sessions in flight -> their next turns
        self.held = 0  # turns that waited for the one before
        self._made = 0

    async def run(self, schedule: Iterable[Arrival], stop: asyncio.Event) -> None:
        """Until the schedule's end or stop; answers may still be on their way then."""
        coming = enumerate(schedule)
        ahead: deque[tuple[int, Arrival, bytes]] = deque()
        now_s = self._client.now_s
        while not stop.is_set():
            sent = 0
            while ahead and sent < AT_ONCE and ahead[0][1].at_s <= now_s():
                self._send(*ahead.popleft())
                sent += 1
            if sent:
                await asyncio.sleep(0)
                continue
            left_s = ahead[0][1].at_s - now_s() if ahead else 0.0
            if not ahead or (left_s > 2 * LEAST_SLEEP_S and len(ahead) < AHEAD):
                made = self._make(coming)
                if made is not None:
                    ahead.append(made)
                    if self._made % AT_ONCE == 0:
                        await asyncio.sleep(0)
                    continue
                if not ahead:
                    break
            await asyncio.sleep(min(max(left_s, LEAST_SLEEP_S), MOST_SLEEP_S))
        while self._later and not stop.is_set():
            await asyncio.sleep(MOST_SLEEP_S)

    def _make(self, coming: Iterator[tuple[int, Arrival]]) -> tuple[int, Arrival, bytes] | None:
        index, arrival = next(coming, (0, None))
        if arrival is None:
            return None
        self._made += 1
        content = self._client.request(self._template.path, self._template.body(arrival, index))
        return index, arrival, content

    def _send(self, index: int, arrival: Arrival, content: bytes) -> None:
        session = arrival.session
        if session:
            waiting = self._later.get(session)
            if waiting is not None:
                self.held += 1
                waiting.append((index, arrival))
                return
            self._later[session] = deque()
        self._begin(index, arrival, content, at_s=arrival.at_s)

    def _begin(self, index: int, arrival: Arrival, content: bytes, *, at_s: float) -> None:
        outcome = self._recorder.new(arrival, index, at_s=at_s)
        on_end = partial(self._ended, arrival.session) if arrival.session else self._recorder.end
        self._client.send(Exchange(content, outcome, on_end))

    def _ended(self, session: str, exchange: Exchange) -> None:
        self._recorder.end(exchange)
        waiting = self._later[session]
        if exchange.outcome.end == "unfinished" or not waiting:
            del self._later[session]
            return
        index, arrival = waiting.popleft()
        content = self._client.request(self._template.path, self._template.body(arrival, index))
        self._begin(index, arrival, content, at_s=max(arrival.at_s, exchange.outcome.end_s or 0.0))


@dataclass(frozen=True)
class Users:
    """count people at once; each asks `turns` times in a conversation, thinking think_s between answer and next question."""

    count: int
    turns: int = 1
    think_s: float = 0.0


class ClosedLoop:
    """Users who wait for their answers. The server sets the pace, so a slow one is asked less: for capacity, not for latency under load."""

    def __init__(self, client: Client, template: Template, recorder: Recorder, *, mix: Mix, seed: int) -> None:
        self._client, self._template, self._recorder = client, template, recorder
        self._mix, self._seed = mix, seed
        self._index = 0

    async def run(self, users: Users, stop: asyncio.Event, *, duration_s: float, most: int | None = None) -> None:
        """No request begins after duration_s, nor more than `most`."""
        await asyncio.gather(*(self._user(number, users, stop, duration_s, most) for number in range(users.count)))

    async def _user(self, number: int, users: Users, stop: asyncio.Event, duration_s: float, most: int | None) -> None:
        rng = np.random.default_rng([self._seed, number])
        lengths = self._lengths(rng)
        conversation, ready_s = 0, 0.0
        while True:
            said = Turn()
            for turn in range(users.turns):
                if ready_s >= duration_s or not await self._until(ready_s, stop):
                    return
                if most is not None and self._index >= most:
                    return
                name = f"{number}.{conversation}" if users.turns > 1 else ""
                arrival = replace(next(lengths), session=name)
                exchange = await self._ask(arrival, said, turn, ready_s)
                if exchange.outcome.end == "unfinished":
                    return
                ready_s = (exchange.outcome.end_s or 0.0) + users.think_s
                if exchange.outcome.end != "ok":
                    # A server that refuses at once must not be asked in a tight loop.
                    ready_s += max(exchange.outcome.retry_after_s or 0.0, 0.1)
                    break
                if users.turns > 1:
                    said = said.then(self._own(arrival, turn), "".join(exchange.text))
            conversation += 1

    def _lengths(self, rng: np.random.Generator) -> Iterator[Arrival]:
        while True:
            yield from self._mix.draw(np.zeros(64), rng)

    async def _until(self, at_s: float, stop: asyncio.Event) -> bool:
        """False where it was stopped before."""
        while not stop.is_set():
            left_s = at_s - self._client.now_s()
            if left_s <= 0:
                return True
            await asyncio.sleep(min(left_s, MOST_SLEEP_S))
        return False

    async def _ask(self, arrival: Arrival, said: Turn, turn: int, at_s: float) -> Exchange:
        index, self._index = self._index, self._index + 1
        if arrival.session:
            body = self._template.body_of_turn(said, self._own(arrival, turn), arrival.output_tokens)
        else:
            body = self._template.body(arrival, index)
        ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def on_end(exchange: Exchange) -> None:
            self._recorder.end(exchange)
            if not ended.done():
                ended.set_result(None)

        outcome = self._recorder.new(arrival, index, at_s=at_s, turn=turn)
        content = self._client.request(self._template.path, body)
        exchange = Exchange(content, outcome, on_end, keep_text=bool(arrival.session))
        self._client.send(exchange)
        await ended
        return exchange

    def _own(self, arrival: Arrival, turn: int) -> str:
        """What a user says in this turn: words of its own in each."""
        said = self._template.prompts.text(replace(arrival, session=f"{arrival.session}/{turn}"), 0)
        return said if not self._template.chat else said.rstrip()
