"""A whole load test: look at the server, send, wait for the last answer, read the server's events, make the result.

Called by the command line and by the benchmarks. The first stop lets answers finish for a while, the second ends at once.
"""

from __future__ import annotations

import asyncio
import gc
import json
import math
import resource
import time
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flexpert.loadtest.client import Client
from flexpert.loadtest.lengths import Mix
from flexpert.loadtest.measure import Outcome, RunResult, ServerEvent
from flexpert.loadtest.preflight import Ready, Unusable, prepare
from flexpert.loadtest.prompts import PromptKind
from flexpert.loadtest.run import ClosedLoop, OpenLoop, Recorder, Users
from flexpert.loadtest.schedule import Arrival
from flexpert.loadtest.slo import Objective, per_request, verdict
from flexpert.loadtest.summary import lag_of, summarise, timeline
from flexpert.loadtest.target import Target

__all__ = ["LoadTest", "conduct"]

PREFLIGHT_TIMEOUT_S = 10.0
TICK_S = 0.25
ADMIN_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class LoadTest:
    """schedule: for the open loop; it gives the same arrivals each time. users: for the closed loop, which takes lengths from mix."""

    target: Target
    words: str
    duration_s: float
    schedule: Callable[[], Iterator[Arrival]] | None = None
    users: Users | None = None
    mix: Mix | None = None
    most: int | None = None  # requests
    model: str | None = None
    chat: bool = False
    prompts: PromptKind | None = None
    tokenizer: Path | None = None
    ignore_eos: bool = True
    extra: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    timeout_s: float = 120.0
    drain_s: float = 10.0  # after a stop
    head_start_s: float = 0.25  # to make the first requests
    warmup_s: float = 0.0
    cooldown_s: float = 0.0
    lag_limit_s: float = 0.010
    objectives: tuple[Objective, ...] = ()
    admin_key: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    tool: str = ""


Tick = Callable[[Recorder, float, int], None]  # (so far, seconds since the start, in flight)


async def conduct(
    test: LoadTest,
    *,
    tick: Tick | None = None,
    stop: asyncio.Event | None = None,
    stop_now: asyncio.Event | None = None,
) -> RunResult:
    """Raises Unusable where the endpoint is of no use; failures under load are part of the result. A stop before the load ends in
    KeyboardInterrupt."""
    stop, stop_now = stop or asyncio.Event(), stop_now or asyncio.Event()
    shortage = _raise_file_limit()
    client = Client(test.target, timeout_s=PREFLIGHT_TIMEOUT_S)
    collecting = gc.isenabled()
    try:
        ready, first_event = await _unless(stop, _look(test, client))
        client.timeout_s = test.timeout_s
        limits = per_request(test.objectives)
        window = (test.warmup_s, test.duration_s - test.cooldown_s) if test.warmup_s or test.cooldown_s else None
        recorder = Recorder(limits=limits, window=window)
        gc.collect()
        gc.disable()  # a full collection would stand between the clock and the socket; _ticks collects the young
        client.start_s = time.perf_counter() + test.head_start_s
        started_unix_s = time.time() + test.head_start_s
        notes = await _send(test, client, ready, recorder, tick, stop, stop_now)
        ended_s = client.now_s()
        await _settle(client, recorder)
        client.timeout_s = ADMIN_TIMEOUT_S
        events = await _events(client, test.admin_key, first_event, started_unix_s, notes)
    finally:
        if collecting:
            gc.enable()
        await client.close()
    return _result(test, client, ready, recorder, started_unix_s, ended_s, events, notes, shortage)


async def _look(test: LoadTest, client: Client) -> tuple[Ready, int]:
    """What the server is, and the number of its last event."""
    ready = await prepare(
        client, model=test.model, chat=test.chat, kind=test.prompts or ("words" if _converses(test) else None),
        tokenizer=test.tokenizer, ignore_eos=test.ignore_eos, extra=test.extra, seed=test.seed,
    )  # fmt: skip
    return ready, await _last_event(client, test.admin_key)


async def _unless(stop: asyncio.Event, looking: Coroutine[Any, Any, tuple[Ready, int]]) -> tuple[Ready, int]:
    look, stopped = asyncio.create_task(looking), asyncio.create_task(stop.wait())
    try:
        await asyncio.wait([look, stopped], return_when=asyncio.FIRST_COMPLETED)
        if not look.done():
            raise KeyboardInterrupt
        return await look
    finally:
        look.cancel()
        stopped.cancel()


def _converses(test: LoadTest) -> bool:
    return test.users is not None and test.users.turns > 1


async def _send(
    test: LoadTest,
    client: Client,
    ready: Ready,
    recorder: Recorder,
    tick: Tick | None,
    stop: asyncio.Event,
    stop_now: asyncio.Event,
) -> list[str]:
    """Returns what a reader must know."""
    ticking = asyncio.create_task(_ticks(tick, client, recorder))
    open_loop: OpenLoop | None = None
    try:
        if test.schedule is not None:
            open_loop = OpenLoop(client, ready.template, recorder)
            await open_loop.run(test.schedule(), stop)
        else:
            assert test.users is not None
            assert test.mix is not None
            closed = ClosedLoop(client, ready.template, recorder, mix=test.mix, seed=test.seed)
            loop = asyncio.create_task(closed.run(test.users, stop, duration_s=test.duration_s, most=test.most))
            await _until(loop, stop, stop_now, test.drain_s, client)
        stopped_s = client.now_s()
        while (
            client.live and not stop_now.is_set() and not (stop.is_set() and client.now_s() > stopped_s + test.drain_s)
        ):
            await asyncio.sleep(0.02)
    finally:
        ticking.cancel()
    notes = [f"stopped after {stopped_s:.1f} s; the rest of the load was not sent"] if stop.is_set() else []
    if open_loop is not None and open_loop.held:
        notes.append(f"{open_loop.held} turns waited for the turn before; they count from its end")
    return notes


async def _until(
    loop: asyncio.Task[None], stop: asyncio.Event, stop_now: asyncio.Event, drain_s: float, client: Client
) -> None:
    """Users wait for their answers, so a stop has to end these too."""
    stopped_s = math.inf
    while not loop.done():
        await asyncio.wait([loop], timeout=0.05)
        if stop.is_set():
            stopped_s = min(stopped_s, client.now_s())
        if stop_now.is_set() or client.now_s() > stopped_s + drain_s:
            await client.give_up()
    await loop


async def _settle(client: Client, recorder: Recorder) -> None:
    await client.give_up()
    recorder.gaps.fold()
    recorder.window_gaps.fold()


async def _ticks(tick: Tick | None, client: Client, recorder: Recorder) -> None:
    while True:
        await asyncio.sleep(TICK_S)
        gc.collect(0)  # only what is new since the last tick: a millisecond at thousands of requests a second
        if tick is not None:
            tick(recorder, client.now_s(), len(client.live))


async def _last_event(client: Client, key: str | None) -> int:
    """Raises Unusable where an admin key was given and does not open the admin API: it would be found out only after the run."""
    if key is None:
        return 0
    after = 0
    while True:
        outcome, body = await client.fetch("GET", f"/admin/v1/events?after={after}", key=key)
        if outcome.end != "ok":
            kind = "unauthorised" if outcome.http_status in (401, 403) else "unreachable"
            raise Unusable(kind, f"--admin-key: GET /admin/v1/events: {outcome.error}")  # type: ignore[arg-type]
        page = json.loads(body)["events"]
        if not page:
            return after
        after = int(page[-1]["sequence"])


async def _events(
    client: Client, key: str | None, after: int, started_unix_s: float, notes: list[str]
) -> list[ServerEvent]:
    found: list[ServerEvent] = []
    while key is not None:
        outcome, body = await client.fetch("GET", f"/admin/v1/events?after={after}", key=key)
        if outcome.end != "ok":
            notes.append(f"the server's events could not be read after the run: {outcome.error}")
            break
        page = json.loads(body)["events"]
        if not page:
            break
        after = int(page[-1]["sequence"])
        found += [
            ServerEvent(float(event["time_s"]) - started_unix_s, str(event["kind"]), str(event["text"]), event)
            for event in page
        ]
    return found


def _result(
    test: LoadTest, client: Client, ready: Ready, recorder: Recorder, started_unix_s: float, ended_s: float, events: list[ServerEvent],
    notes: list[str], shortage: str,
) -> RunResult:  # fmt: skip
    limits, outcomes = (
        recorder.limits,
        sorted(recorder.outcomes, key=lambda outcome: (outcome.intended_s, outcome.index)),
    )
    sent_until_s = max([0.0, *(outcome.intended_s for outcome in outcomes)])
    whole_s = test.duration_s if not notes or not notes[0].startswith("stopped") else max(sent_until_s, 1e-3)
    whole = summarise(outcomes, from_s=0.0, to_s=whole_s, limits=limits, gaps=recorder.gaps)
    inside, window, gaps = outcomes, whole, recorder.window_gaps
    if recorder.window is not None:
        low, high = recorder.window
        inside = [outcome for outcome in outcomes if low <= outcome.intended_s < high]
        window = summarise(inside, from_s=low, to_s=high, limits=limits, gaps=gaps)
    verdicts = [verdict(each, inside, window, gaps.statistic) for each in test.objectives if not each.bare]
    return RunResult(
        url=test.target.url, model=ready.model, endpoint="chat" if test.chat else "completions",
        mode="closed" if test.schedule is None else "open", shape=test.words, seed=test.seed, started_unix_s=started_unix_s,
        duration_s=test.duration_s, ended_s=ended_s, objectives=limits, whole=whole, window=window,
        lag=lag_of(outcomes, limit_s=test.lag_limit_s, shortage=_shortage(outcomes) or ""),
        timeline=timeline(outcomes, length_s=whole_s, limits=limits), verdicts=verdicts, outcomes=outcomes, events=events,
        notes=[*ready.notes, *notes, *_remarks(whole, shortage)], settings=test.settings, tool=test.tool,
    )  # fmt: skip


def _remarks(whole: Any, shortage: str) -> list[str]:
    found = [shortage] if shortage else []
    if whole.without_usage:
        found.append(f"{whole.without_usage} answers came without usage: their tokens are counted by chunks")
    if whole.prompt_mismatch:
        found.append(
            f"{whole.prompt_mismatch} prompts were counted by the server with another number of tokens than was asked for"
        )
    if whole.output_mismatch:
        found.append(f"{whole.output_mismatch} answers had another number of tokens than was asked for")
    if whole.one_token:
        found.append(f"{whole.one_token} answers of one token have no time per output token")
    return found


def _shortage(outcomes: list[Outcome]) -> str | None:
    """What this machine lacked: such failures are the generator's own."""
    own = [o for o in outcomes if "Too many open files" in o.error or "Cannot assign requested address" in o.error]
    return f"{len(own)} requests found no free file descriptor or port here ({own[0].error})" if own else None


def _raise_file_limit() -> str:
    """Each request in flight is an open file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = hard if hard != resource.RLIM_INFINITY else 1 << 20
    if soft < wanted:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            soft = wanted
        except (OSError, ValueError):
            pass
    return (
        f"only {soft} open files are allowed here: raise `ulimit -n` for more requests at once" if soft < 4096 else ""
    )
