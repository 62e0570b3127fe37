"""A gateway on a loopback port, scripted workers behind it, and a tiny tokenizer: everything real but the model.

`Harness` runs one asyncio loop on a thread; the gateway and its fake workers live there, the tests talk to them over HTTP and wait
on conditions, never on time.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from flexpert.controller.gateway import Gateway, GatewayConfig, WorkerAddress
from flexpert.controller.gateway.errors import ApiError
from flexpert.workers.framing import gateway_frames
from flexpert.workers.messages import (
    Cancel,
    Failed,
    Finished,
    Hello,
    PromptLogprobs,
    Refused,
    Released,
    StepOutput,
    Submit,
    TokenOutput,
    Welcome,
)

WAIT_S = 20.0
MODEL_ID = "tiny-moe"
TOKEN = "cluster-secret"
CORPUS = [
    "The quick brown fox jumps over the lazy dog. Hello, world! How are you today?",
    "Größe, naïve café, Ελληνικά, 世界 こんにちは 안녕하세요, emoji 🎉🚀👩‍💻 and maths ∑∞≠.",
    "one two three four five six seven eight nine ten STOP END done",
]
CHAT_TEMPLATE = (
    "{%- for m in messages %}{%- if m.content == 'refuse me' %}{{ raise_exception('roles must alternate') }}{%- endif %}"
    "<|{{ m.role }}|>{{ m.content }}<|end|>{%- endfor %}{%- if shout is defined %}{{ shout }}{%- endif %}"
    "{%- if add_generation_prompt %}<|assistant|>{%- endif %}"
)


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Byte-level BPE of 400 tokens: many characters take several tokens."""
    directory = tmp_path_factory.mktemp("model")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|end|>", "<|system|>", "<|user|>", "<|assistant|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 4, trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    (directory / "config.json").write_text(json.dumps({"eos_token_id": 0}))
    return directory


@pytest.fixture(scope="session")
def vocabulary(model_dir: Path) -> Tokenizer:
    return Tokenizer.from_file(str(model_dir / "tokenizer.json"))


class _Running:
    """A request at the fake worker: `next` is the next output index to send."""

    def __init__(self, submit: Submit, tokens: list[int], start: int, owner: asyncio.StreamWriter) -> None:
        self.submit, self.tokens, self.next, self.owner = submit, tokens, start, owner
        self.sent_prompt = False


class FakeWorker:
    """Speaks the frames. Each step gives every request one token of `reply(submit)`; it dies, waits and refuses when told to."""

    def __init__(self, path: Path, *, name: str = "worker-0", max_running: int = 8, max_context: int = 512) -> None:
        self.address = WorkerAddress(name, f"unix:{path}")
        self.reset()
        self.incarnation = 0
        self.step_number = 0
        self.model_id = MODEL_ID
        self.max_running, self.max_context = max_running, max_context
        self.connections = self.hellos = 0
        self.changed = threading.Condition()
        self._path = path
        self._codec = gateway_frames()
        self._running: dict[str, _Running] = {}
        self._writers: list[asyncio.StreamWriter] = []
        self._server: asyncio.Server | None = None
        self._engine: asyncio.Task[None] | None = None
        self._may_greet = asyncio.Event()
        self._may_greet.set()
        self._may_step = asyncio.Event()
        self._steps_left: int | None = None  # None: as fast as it can

    def reset(self) -> None:
        """Back to a worker that answers everything with tokens 10, 11, 12."""
        self.reply: Callable[[Submit], list[int]] = lambda submit: [10, 11, 12]
        self.submits: list[Submit] = []
        self.cancels: list[str] = []
        self.cached_tokens = 0
        self.repeat_tokens = 0  # after a replay: send so many tokens again
        self.die_after_steps: int | None = None
        self.lives: Iterator[int] = iter(())  # steps of the incarnations after that
        self.fail_with: tuple[str, str] | None = None  # code and message
        self.refuse_with: str | None = None
        self.hold_finished = False
        self.top_shift = 0  # 0: the token itself is its first alternative

    async def hold_greetings(self) -> None:
        self._may_greet.clear()

    async def greet(self) -> None:
        self._may_greet.set()

    # For the test's thread

    def wait_until(self, condition: Callable[[], Any]) -> None:
        with self.changed:
            assert self.changed.wait_for(condition, WAIT_S), f"submits {self.submits}, cancels {self.cancels}"

    def _notify(self) -> None:
        with self.changed:
            self.changed.notify_all()

    # On the loop

    async def start(self) -> None:
        self.incarnation += 1
        self._path.unlink(missing_ok=True)
        self._server = await asyncio.start_unix_server(self._serve, str(self._path))
        self._engine = asyncio.create_task(self._run())

    async def die(self) -> None:
        """As after kill -9: the streams end, nothing is remembered."""
        if self._server is not None:
            self._server.close()
            self._server = None
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()
        self._running.clear()
        engine, self._engine = self._engine, None
        if engine is not None and engine is not asyncio.current_task():
            engine.cancel()
        self._notify()

    async def hold(self) -> None:
        """No step until `step` or `release`."""
        self._steps_left = 0
        self._may_step.clear()

    async def step(self, count: int) -> None:
        self._steps_left = count
        self._may_step.set()

    async def release(self) -> None:
        self._steps_left = None
        self._may_step.set()

    async def fail(self, request_id: str, code: str, message: str) -> None:
        self._running.pop(request_id, None)
        self.send(Failed(request_id=request_id, code=code, message=message))

    async def hand_over(self, target: str = "", *, request_ids: list[str] | None = None) -> list[str]:
        """Give requests away, as a worker does that leaves; without ids all. Returns their ids."""
        given = [name for name in self._running if request_ids is None or name in request_ids]
        for request_id in given:
            del self._running[request_id]
        self.send(Released(request_ids=given, target_worker_id=target))
        return given

    def send(self, frame: object) -> None:
        for writer in self._writers:
            writer.write(self._codec.encode(frame))

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        hello = await self._codec.read(reader)
        assert isinstance(hello, Hello)
        self.hellos += 1
        self._notify()
        await self._may_greet.wait()
        reason = self.refuse_with or (None if hello.cluster_token == TOKEN else "the cluster token does not match")
        if reason is not None:
            writer.write(self._codec.encode(Refused(reason=reason)))
            writer.close()
            return
        welcome = Welcome(
            worker_id=self.address.worker_id,
            incarnation=self.incarnation,
            model_id=self.model_id,
            vocab_size=400,
            max_context_tokens=self.max_context,
            max_running=self.max_running,
        )
        writer.write(self._codec.encode(welcome))
        self._writers.append(writer)
        self.connections += 1
        self._notify()
        while (frame := await self._codec.read(reader)) is not None:
            self._take(frame, writer)
        for request_id, running in list(self._running.items()):
            if running.owner is writer:
                del self._running[request_id]
        if writer in self._writers:
            self._writers.remove(writer)
        writer.close()

    def _take(self, frame: object, owner: asyncio.StreamWriter) -> None:
        if isinstance(frame, Submit):
            self.submits.append(frame)
            if self.fail_with is not None:
                code, message = self.fail_with
                self.send(Failed(request_id=frame.request_id, code=code, message=message))
            else:
                start = max(0, len(frame.emitted_token_ids) - self.repeat_tokens)
                self._running[frame.request_id] = _Running(frame, self.reply(frame), start, owner)
        elif isinstance(frame, Cancel):
            self.cancels.append(frame.request_id)
            self._running.pop(frame.request_id, None)
        if self._steps_left is None or self._steps_left > 0:
            self._may_step.set()
        self._notify()

    async def _run(self) -> None:
        self._may_step.set()
        while True:
            await self._may_step.wait()
            if not self._running or self._steps_left == 0:
                self._may_step.clear()
                continue
            self._step()
            if self._steps_left is not None:
                self._steps_left -= 1
            if self.die_after_steps is not None:
                self.die_after_steps -= 1
                if self.die_after_steps == 0:
                    self.die_after_steps = next(self.lives, None)
                    await asyncio.sleep(0)
                    await self.die()
                    await self.start()
                    return
            await asyncio.sleep(0)

    def _step(self) -> None:
        self.step_number += 1
        for owner in {running.owner for running in self._running.values()}:
            owner.write(self._codec.encode(self._step_of(owner)))

    def _step_of(self, owner: asyncio.StreamWriter) -> StepOutput:
        """One token for each request of that stream."""
        tokens, prompts, finished = [], [], []
        for request_id, running in [(name, found) for name, found in self._running.items() if found.owner is owner]:
            params = running.submit.params
            if params.prompt_logprobs is not None and not running.sent_prompt:
                running.sent_prompt = True
                scored = running.submit.prompt_token_ids[1:]
                top = [tuple((token + k, -1.0 - k) for k in range(params.prompt_logprobs)) for token in scored]
                prompts.append(PromptLogprobs(request_id=request_id, logprobs=[-1.0] * len(scored), top=top))
            end = min(len(running.tokens), params.max_tokens)
            reason = "length"
            if running.next < end:
                token_id = running.tokens[running.next]
                score = None if params.logprobs is None else -0.5 * (running.next + 1)
                alternatives = range(self.top_shift, self.top_shift + (params.logprobs or 0))
                top = tuple((token_id + k, (score or 0.0) - k) for k in alternatives)
                tokens.append(
                    TokenOutput(
                        request_id=request_id, output_index=running.next, token_id=token_id, logprob=score, top=top
                    )
                )
                running.next += 1
                reason = "stop" if token_id in params.stop_token_ids else "length"
            if (running.next >= end or reason == "stop") and not self.hold_finished:
                finished.append(Finished(request_id=request_id, reason=reason, cached_tokens=self.cached_tokens))
                del self._running[request_id]
        return StepOutput(step=self.step_number, tokens=tokens, prompt_logprobs=prompts, finished=finished)


class Harness:
    """One loop on a thread, the gateway and its workers on it. All methods may be called from the test."""

    def __init__(self, model_dir: Path, directory: Path) -> None:
        self.loop = asyncio.new_event_loop()
        self.model_dir, self.directory = model_dir, directory
        self.workers: list[FakeWorker] = []
        self.gateways: list[Gateway] = []
        self._thread = threading.Thread(target=self.loop.run_forever, name="harness", daemon=True)
        self._thread.start()

    def run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(WAIT_S)

    def worker(self, *, started: bool = True, **settings: Any) -> FakeWorker:
        name = f"worker-{len(self.workers)}"

        async def make() -> FakeWorker:
            worker = FakeWorker(self.directory / f"{name}.sock", name=name, **settings)
            if started:
                await worker.start()
            return worker

        self.workers.append(self.run(make()))
        return self.workers[-1]

    def gateway(self, *, wait: bool = True, call_controller: Any = None, **settings: Any) -> Gateway:
        config = GatewayConfig(
            **{
                "model_id": MODEL_ID,
                "model_dir": self.model_dir,
                "cluster_token": TOKEN,
                "port": 0,
                "worker_addresses": tuple(worker.address for worker in self.workers),
                "drain_timeout_s": 5.0,
                **settings,
            }
        )

        async def make() -> Gateway:
            gateway = Gateway(config, call_controller=call_controller)
            await gateway.start()
            return gateway

        self.gateways.append(self.run(make()))
        if wait:
            for worker in self.workers:
                worker.wait_until(lambda worker=worker: worker.connections)
            self.ask_until(lambda: self.gateways[-1]._pool.ready)
        return self.gateways[-1]

    def ask_until(self, condition: Callable[[], Any]) -> None:
        """Wait on the loop, turn by turn, until a condition of the gateway holds."""

        async def poll() -> None:
            async with asyncio.timeout(WAIT_S):
                while not condition():
                    await asyncio.sleep(0)

        self.run(poll())

    def close(self) -> None:
        async def stop() -> None:
            for worker in self.workers:
                await worker.die()
            for gateway in self.gateways:
                gateway._pool.fail_all(ApiError(500, "the test is over"))
                await gateway.drain_and_stop()

        self.run(stop())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(WAIT_S)
        self.loop.close()


@pytest.fixture
def harness(model_dir: Path, tmp_path: Path) -> Iterator[Harness]:
    """For tests that stop, kill or configure something: everything of their own."""
    made = Harness(model_dir, tmp_path)
    yield made
    made.close()


@pytest.fixture(scope="module")
def shared(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Harness]:
    """One gateway and one worker for a module's tests."""
    made = Harness(model_dir, tmp_path_factory.mktemp("shared"))
    made.worker()
    made.gateway()
    yield made
    made.close()


@pytest.fixture
def worker(shared: Harness) -> Iterator[FakeWorker]:
    """The shared worker; as new afterwards."""
    yield shared.workers[0]
    shared.run(shared.workers[0].release())
    shared.workers[0].reset()


@pytest.fixture(scope="module")
def shared_client(shared: Harness, make_client: Callable[..., openai.OpenAI]) -> openai.OpenAI:
    return make_client(shared.gateways[0])


@pytest.fixture
def client(shared_client: openai.OpenAI, worker: FakeWorker) -> openai.OpenAI:
    """The real client on the shared gateway."""
    return shared_client


@pytest.fixture(scope="module")
def make_client() -> Iterator[Callable[..., openai.OpenAI]]:
    """The real client on a gateway, without retries."""
    made: list[openai.OpenAI] = []

    def make(gateway: Gateway, **settings: Any) -> openai.OpenAI:
        settings = {"api_key": "unused", "max_retries": 0, "timeout": WAIT_S, **settings}
        made.append(openai.OpenAI(base_url=f"{gateway.url}/v1", **settings))
        return made[-1]

    yield make
    for one in made:
        one.close()
