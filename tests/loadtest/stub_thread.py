"""The stub server in a thread of its own, for tests of whole commands; and a load test against it in one loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from flexpert.loadtest.conduct import LoadTest, conduct
from flexpert.loadtest.lengths import Mix, parse_lengths
from flexpert.loadtest.measure import RunResult
from flexpert.loadtest.schedule import Arrival
from flexpert.loadtest.slo import parse_slos
from flexpert.loadtest.stub import Reply, StubServer
from flexpert.loadtest.target import parse_url


@contextmanager
def running(stub: StubServer) -> Iterator[StubServer]:
    loop = asyncio.new_event_loop()
    ready = threading.Event()

    async def serve() -> None:
        await stub.start()
        ready.set()

    def work() -> None:
        asyncio.set_event_loop(loop)
        task = loop.create_task(serve())
        loop.run_forever()
        del task
        loop.run_until_complete(stub.stop())
        loop.close()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        assert ready.wait(10)
        yield stub
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)


def always(reply: Reply, *, after: int = 0) -> Callable[[int, dict[str, Any]], Reply]:
    """after: so many requests are answered well before; the generator's own look at the server is among them."""
    return lambda number, fields: Reply() if number < after else reply


def mix(prompt: str = "32", output: str = "8", **more: Any) -> Mix:
    return Mix(parse_lengths(prompt, option="--prompt-tokens"), parse_lengths(output, option="--output-tokens"), **more)


def every(gap_s: float, count: int, *, prompt: int = 32, output: int = 8, **more: Any) -> list[Arrival]:
    return [Arrival(i * gap_s, prompt, output, **more) for i in range(count)]


async def load(
    stub: StubServer, arrivals: list[Arrival] | None = None, *, slo: tuple[str, ...] = (), **more: Any
) -> RunResult:
    """Open loop over these arrivals, or what `more` says."""
    url = await stub.start()
    target = parse_url(url, key=more.pop("key", None))
    fields: dict[str, Any] = {
        "words": "a test",
        "duration_s": 0.5,
        "timeout_s": 10.0,
        "head_start_s": 0.02,
        "objectives": tuple(parse_slos(slo)),
        **more,
    }
    if arrivals is not None:
        fields |= {"schedule": lambda: iter(arrivals), "duration_s": max(0.01, arrivals[-1].at_s)}
    try:
        return await conduct(LoadTest(target=target, **fields))
    finally:
        await stub.stop()
