"""The worker's socket server with an engine that only notes what it is told."""

from __future__ import annotations

import asyncio
import queue

import pytest

from flexpert.workers.framing import open_stream, worker_frames
from flexpert.workers.messages import Cancel, Hello, Refused, SamplingParams, StepOutput, Submit, Welcome
from flexpert.workers.server import WorkerServer

WELCOME = Welcome(worker_id="w", incarnation=1, model_id="m", vocab_size=8, max_context_tokens=16, max_running=4)
SUBMIT = Submit(request_id="a", prompt_token_ids=[1], params=SamplingParams(max_tokens=1, seed=0))


class NotingEngine:
    def __init__(self):
        self.seen = queue.Queue()

    def join(self, owner):
        self.seen.put(("join", owner))

    def leave(self, owner):
        self.seen.put(("leave", owner))

    def submit(self, owner, submit):
        self.seen.put((owner, submit))

    def cancel(self, owner, cancel):
        self.seen.put((owner, cancel))

    def next(self):
        return self.seen.get(timeout=10)


@pytest.fixture(params=["unix", "tcp"])
def served(request, tmp_path):
    address = f"unix:{tmp_path}/w.sock" if request.param == "unix" else "tcp:127.0.0.1:0"
    server = WorkerServer(address=address, cluster_token="secret", welcome=WELCOME)
    engine = NotingEngine()
    server.start(engine)
    yield server, engine
    server.stop()


class Gateway:
    """A client that speaks frames."""

    def __init__(self, reader, writer):
        self.reader, self.writer, self.codec = reader, writer, worker_frames()

    @classmethod
    async def connect(cls, server):
        return cls(*await open_stream(server.address))

    def send(self, frame):
        self.writer.write(self.codec.encode(frame))

    async def read(self):
        return await asyncio.wait_for(self.codec.read(self.reader), 10)


async def greeted(server):
    gateway = await Gateway.connect(server)
    gateway.send(Hello(cluster_token="secret", gateway_id="g"))
    assert await gateway.read() == WELCOME
    return gateway


def test_requests_reach_the_engine_and_outputs_their_gateway(served):
    server, engine = served

    async def talk():
        gateway = await greeted(server)
        _, owner = engine.next()
        gateway.send(SUBMIT)
        gateway.send(Cancel(request_id="a"))
        assert await asyncio.to_thread(engine.next) == (owner, SUBMIT)
        assert await asyncio.to_thread(engine.next) == (owner, Cancel(request_id="a"))
        server.emit(owner, StepOutput(step=5))
        assert await gateway.read() == StepOutput(step=5)
        gateway.writer.close()
        assert await asyncio.to_thread(engine.next) == ("leave", owner)

    asyncio.run(talk())


@pytest.mark.parametrize(
    ("first", "reason"),
    [
        (Hello(cluster_token="wrong", gateway_id="g"), "token"),
        (Hello(cluster_token="secret", gateway_id="g", protocol=99), "protocol 99"),
        (SUBMIT, "expected Hello"),
    ],
)
def test_a_stranger_is_refused_with_the_reason(served, first, reason):
    server, engine = served

    async def talk():
        gateway = await Gateway.connect(server)
        gateway.send(first)
        refused = await gateway.read()
        assert isinstance(refused, Refused)
        assert reason in refused.reason
        assert await gateway.read() is None

    asyncio.run(talk())
    assert engine.seen.empty()


def test_a_broken_frame_closes_its_own_stream_only(served):
    server, engine = served

    async def talk():
        good = await greeted(server)
        bad = await greeted(server)
        owners = [engine.next()[1], engine.next()[1]]
        bad.writer.write((3).to_bytes(4, "big") + b"abc")
        assert await bad.read() is None
        assert await asyncio.to_thread(engine.next) == ("leave", owners[1])
        good.send(SUBMIT)
        assert await asyncio.to_thread(engine.next) == (owners[0], SUBMIT)

    asyncio.run(talk())


def test_a_frame_for_a_gateway_that_left_is_dropped(served):
    server, engine = served

    async def talk():
        gateway = await greeted(server)
        _, owner = engine.next()
        gateway.writer.close()
        await asyncio.to_thread(engine.next)
        server.emit(owner, StepOutput(step=1))
        await greeted(server)

    asyncio.run(talk())
