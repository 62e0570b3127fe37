"""Whole workers on a real HBM manager: what they copy, what they leave behind, and how a replacement goes on."""

from __future__ import annotations

import asyncio
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from tests.families import make_model
from tests.workers.serving import GREEDY, PROMPTS, SEEDED, TOKEN, in_process, read_tokens, submits

from flexpert.hbm import HbmClient, HbmError, ManagerConfig, ensure_manager, stop_manager
from flexpert.workers.engine import MAX_FAILED_STEPS
from flexpert.workers.messages import Failed, Finished, SamplingParams, Stats, StepOutput, Submit
from flexpert.workers.process import BROKEN_EXIT_CODE, WorkerStartError

SCARCE_KV_BYTES = 5 << 16


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> Path:
    """About 96 MiB of experts, so that a copy of them could not hide."""
    folder = tmp_path_factory.mktemp("model")
    make_model(
        "qwen3_moe", num_experts=32, hidden_size=512, moe_intermediate_size=256, num_hidden_layers=2
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def small_model_dir(tmp_path_factory) -> Path:
    """The same KV per token with experts that cost little: for what takes thousands of steps."""
    folder = tmp_path_factory.mktemp("small")
    make_model("qwen3_moe").save_pretrained(folder)
    return folder


@pytest.fixture
def manager():
    runtime_dir = Path(tempfile.mkdtemp(prefix="fxw"))
    try:
        yield ensure_manager(ManagerConfig(runtime_dir=runtime_dir, budget_bytes=512 << 20))
    finally:
        stop_manager(runtime_dir)
        shutil.rmtree(runtime_dir)


class Child:
    """A worker process; `status` is what it said when it was up."""

    def __init__(self, manager, model_dir: Path, incarnation: int) -> None:
        folder = Path(manager.socket_path).parent
        fields = {
            "worker_id": "worker-0",
            "model_dir": str(model_dir),
            "model_id": "tiny",
            "cluster_token": TOKEN,
            "address": f"unix:{folder}/w{incarnation}.sock",
            "incarnation": incarnation,
            "manager_socket": str(manager.socket_path),
            "max_running": 8,
            "max_context_tokens": 512,
            "kv_bytes": 64 << 20,
        }
        script = Path(__file__).with_name("worker_child.py")
        self.process = subprocess.Popen(
            [sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.status = self.ask(json.dumps(fields))

    def ask(self, line: str) -> dict:
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer, f"the worker ended with code {self.process.wait()}"
        return json.loads(answer)

    def kill(self) -> None:
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def start_child(manager, model_dir):
    children = []

    def start(incarnation: int) -> Child:
        children.append(Child(manager, model_dir, incarnation))
        return children[-1]

    yield start
    for child in children:
        if child.process.poll() is None:
            child.kill()


def undisturbed(model_dir: Path, params: SamplingParams) -> dict[str, list[int]]:
    worker = in_process(model_dir)
    try:
        return asyncio.run(read_tokens(worker.start(), submits(params)))[0]
    finally:
        worker.stop()


@pytest.mark.parametrize("params", [GREEDY, SEEDED], ids=["greedy", "seeded"])
def test_a_replacement_goes_on_with_exactly_the_tokens_of_an_undisturbed_run(start_child, manager, model_dir, params):
    first = start_child(1)
    assert first.status["weights_loaded"]
    emitted, _ = asyncio.run(read_tokens(first.status["address"], submits(params), stop_after=60))
    first.kill()
    second = start_child(2)
    assert not second.status["weights_loaded"], "the weights are in the manager's memory"
    tokens, others = asyncio.run(read_tokens(second.status["address"], submits(params, emitted)))
    assert tokens == undisturbed(model_dir, params)
    assert [end.reason for end in others if isinstance(end, Finished)] == ["length"] * 3
    stats = [frame for frame in others if isinstance(frame, Stats)][-1]
    computed_before = sum(len(prompt) for prompt in PROMPTS)
    assert stats.prefill_tokens < computed_before / 4, "the KV of before was computed again"


def test_a_worker_copies_no_weights(start_child):
    child = start_child(1)
    asyncio.run(read_tokens(child.status["address"], submits(GREEDY)))
    memory = child.ask("anonymous")
    grown = memory["now"] - memory["before"]
    assert child.status["weights_bytes"] > 90 << 20
    assert grown < child.status["weights_bytes"] / 4, f"{grown} bytes of private memory were added"


def test_a_worker_that_was_replaced_is_fenced_off(start_child, manager, model_dir):
    start_child(2)
    late = in_process(model_dir, manager_socket=Path(manager.socket_path), incarnation=1, kv_bytes=64 << 20)
    with pytest.raises(HbmError, match=r"incarnation|token|fenc"):
        late.start()
    late.stop()


def test_no_memory_for_kv_is_said_in_bytes(manager, model_dir):
    worker = in_process(model_dir, manager_socket=Path(manager.socket_path), kv_bytes=1024)
    with pytest.raises(WorkerStartError, match=r"no memory for KV: found \d+ bytes, at least \d+ are needed"):
        worker.start()
    worker.stop()


def test_no_memory_for_weights_is_said_in_bytes_and_the_manager_goes_on(model_dir):
    runtime_dir = Path(tempfile.mkdtemp(prefix="fxw"))
    try:
        manager = ensure_manager(ManagerConfig(runtime_dir=runtime_dir, budget_bytes=16 << 20))
        worker = in_process(model_dir, manager_socket=Path(manager.socket_path))
        with pytest.raises(HbmError, match=r"\d+ bytes"):
            worker.start()
        worker.stop()
        with HbmClient.connect(manager.socket_path, client_name="after") as client:
            assert client.info().free_bytes == 16 << 20
    finally:
        stop_manager(runtime_dir)
        shutil.rmtree(runtime_dir)


def test_another_model_takes_the_place_of_what_nobody_uses(manager, model_dir, tmp_path):
    other_dir = tmp_path / "other"
    make_model("qwen3_moe", num_hidden_layers=1).save_pretrained(other_dir)
    for folder in (model_dir, other_dir):
        worker = in_process(folder, manager_socket=Path(manager.socket_path), kv_bytes=8 << 20)
        worker.start()
        worker.stop()
    with HbmClient.connect(manager.socket_path, client_name="after") as client:
        info = client.info()
    assert (len(info.weights), len(info.arenas)) == (1, 1)


def test_a_replacement_gets_all_the_kv_memory_its_predecessor_had(manager, model_dir):
    held = []
    for incarnation in (1, 2):
        worker = in_process(model_dir, manager_socket=Path(manager.socket_path), incarnation=incarnation)
        worker.start()
        held.append(worker.status()["kv_bytes"])
        worker.stop()
    assert held[0] == held[1] > 0


def test_a_context_beyond_the_models_own_is_refused(model_dir):
    with pytest.raises(WorkerStartError, match="made for at most"):
        in_process(model_dir, max_context_tokens=1 << 20).start()


def test_a_step_that_fails_ends_its_requests_and_no_others(model_dir, monkeypatch):
    worker = in_process(model_dir)
    address = worker.start()
    try:
        forward = worker.engine._runner.forward

        def broken(rows):
            raise RuntimeError("planted")

        monkeypatch.setattr(worker.engine._runner, "forward", broken)
        _, others = asyncio.run(read_tokens(address, submits(GREEDY)))
        failed = [frame for frame in others if isinstance(frame, Failed)]
        assert {frame.request_id for frame in failed} == {"r0", "r1", "r2"}
        assert all("planted" in frame.message and frame.code == "internal" for frame in failed)
        monkeypatch.setattr(worker.engine._runner, "forward", forward)
        tokens, _ = asyncio.run(read_tokens(address, submits(GREEDY)))
        assert all(len(found) == 48 for found in tokens.values())
    finally:
        worker.stop()


def test_a_request_that_can_never_be_served_is_refused_alone(model_dir):
    worker = in_process(model_dir)
    try:
        too_long = Submit(request_id="long", prompt_token_ids=[5] * 600, params=GREEDY)
        tokens, others = asyncio.run(read_tokens(worker.start(), [too_long, *submits(GREEDY)]))
        (failed,) = [frame for frame in others if isinstance(frame, Failed)]
        assert (failed.request_id, failed.code) == ("long", "invalid_request")
        assert len(tokens["r0"]) == 48
    finally:
        worker.stop()


def test_prompt_logprobs_are_those_of_the_model(model_dir):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    prompt = PROMPTS[2]
    with torch.inference_mode():
        expected = model(torch.tensor([prompt])).logits[0].log_softmax(-1)
    params = SamplingParams(max_tokens=1, seed=0, temperature=0.0, prompt_logprobs=2, logprobs=2)
    worker = in_process(model_dir)
    frames: list = []
    worker.tap("tap", frames.append)
    worker.start()
    try:
        worker.engine.submit("tap", Submit(request_id="p", prompt_token_ids=prompt, params=params))
        asyncio.run(read_tokens(worker.address, submits(GREEDY)))
    finally:
        worker.stop()
    (scores,) = [scores for frame in frames if isinstance(frame, StepOutput) for scores in frame.prompt_logprobs]
    wanted = [expected[i, token].item() for i, token in enumerate(prompt[1:])]
    assert scores.logprobs == pytest.approx(wanted, abs=1e-3)
    assert [top[0][0] for top in scores.top] == expected[:-1].argmax(-1).tolist()


def test_a_worker_whose_books_cannot_be_trusted_ends_for_a_replacement(model_dir, tmp_path):
    script = f"""
import threading
from pathlib import Path
from flexpert.workers.messages import SamplingParams, Submit
from flexpert.workers.process import WorkerConfig, WorkerProcess

worker = WorkerProcess(WorkerConfig(worker_id="w", model_dir=Path({str(model_dir)!r}), model_id="m", cluster_token="t",
                                    address="unix:{tmp_path}/w.sock", max_running=4, max_context_tokens=512))
worker.start()
def broken(ops):
    raise OSError("planted")
worker.engine._memory.apply = broken
worker.engine.submit("o", Submit(request_id="r", prompt_token_ids=[5], params=SamplingParams(max_tokens=1, seed=0)))
threading.Event().wait(60)
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert ended.returncode == BROKEN_EXIT_CODE
    assert "this worker ends for a replacement" in ended.stderr


def test_an_idle_worker_tells_its_numbers_at_once_and_after_its_last_step(model_dir):
    worker = in_process(model_dir)
    frames: queue.SimpleQueue = queue.SimpleQueue()
    worker.tap("tap", frames.put)
    worker.start()
    try:
        worker.engine.join("tap")
        first = frames.get(timeout=60)
        worker.engine.submit("tap", submits(GREEDY)[0])
        asyncio.run(read_tokens(worker.address, submits(GREEDY)[1:]))
    finally:
        worker.stop()
    assert isinstance(first, Stats) and first.kv_capacity_tokens > 0
    rest = [frames.get() for _ in range(frames.qsize())]
    last = [frame for frame in rest if isinstance(frame, Stats)][-1]
    assert (last.running, last.waiting, last.kv_used_tokens) == (0, 0, 0)


def test_a_request_that_no_token_can_be_drawn_for_ends_alone(model_dir):
    worker = in_process(model_dir)
    vocab_size = 96
    masked = SamplingParams(max_tokens=4, min_tokens=2, seed=0, stop_token_ids=tuple(range(vocab_size)))
    try:
        address = worker.start()
        poison = Submit(request_id="poison", prompt_token_ids=[5], params=masked)
        tokens, others = asyncio.run(read_tokens(address, [poison, *submits(SEEDED)]))
    finally:
        worker.stop()
    (failed,) = [frame for frame in others if isinstance(frame, Failed)]
    assert (failed.request_id, failed.code) == ("poison", "invalid_request")
    assert [len(tokens[f"r{i}"]) for i in range(3)] == [48, 48, 48]


def test_a_gateway_that_comes_back_early_takes_its_requests_over(model_dir):
    worker = in_process(model_dir)
    frames: list = []
    worker.tap("old", lambda frame: None)
    worker.tap("new", frames.append)
    worker.start()
    try:
        long = SamplingParams(max_tokens=400, seed=0, temperature=0.0)
        worker.engine.submit("old", Submit(request_id="r0", prompt_token_ids=PROMPTS[0], params=long))
        worker.engine.submit("new", submits(GREEDY)[0])
        worker.engine.leave("old")
        asyncio.run(read_tokens(worker.address, submits(GREEDY)[1:]))
    finally:
        worker.stop()
    steps = [frame for frame in frames if isinstance(frame, StepOutput)]
    assert sum(len(frame.tokens) for frame in steps) == 48
    assert [end.request_id for frame in steps for end in frame.finished] == ["r0"]


def test_a_worker_announces_no_more_context_than_its_memory_holds(model_dir):
    worker = in_process(model_dir)
    worker.start()
    capacity = worker.engine._scheduler.stats().kv_capacity_tokens
    assert worker._server._welcome.max_context_tokens == min(512, capacity)
    worker.stop()


def test_steps_that_all_fail_end_the_worker(model_dir, monkeypatch):
    worker = in_process(model_dir)
    worker.start()
    engine = worker.engine
    engine.stop()
    worker._thread.join()
    monkeypatch.setattr(engine._runner, "forward", lambda rows: (_ for _ in ()).throw(RuntimeError("planted")))
    for i in range(MAX_FAILED_STEPS - 1):
        engine.submit("o", Submit(request_id=f"{i}", prompt_token_ids=[5], params=GREEDY))
        engine.step()
    engine.submit("o", Submit(request_id="last", prompt_token_ids=[5], params=GREEDY))
    with pytest.raises(RuntimeError, match="planted"):
        engine.step()
    worker.stop()


def test_preempted_requests_lose_no_token(small_model_dir):
    """Memory for a part of what runs at once; every request grows over several granules."""
    growing = SamplingParams(max_tokens=400, seed=99, temperature=0.9)
    long = [Submit(request_id=f"r{i}", prompt_token_ids=[i + 1] * 40, params=growing) for i in range(6)]

    def served(**changes) -> tuple[dict, int]:
        worker = in_process(small_model_dir, **changes)
        try:
            tokens, _ = asyncio.run(read_tokens(worker.start(), long))
            return tokens, worker.engine.stats().preemptions
        finally:
            worker.stop()

    runtime_dir = Path(tempfile.mkdtemp(prefix="fxw"))
    try:
        manager = ensure_manager(ManagerConfig(runtime_dir=runtime_dir, budget_bytes=512 << 20))
        scarce, preemptions = served(manager_socket=Path(manager.socket_path), kv_bytes=SCARCE_KV_BYTES)
        plenty, none = served(manager_socket=Path(manager.socket_path), incarnation=2, kv_bytes=64 << 20)
    finally:
        stop_manager(runtime_dir)
        shutil.rmtree(runtime_dir)
    assert preemptions > 0 == none
    assert scarce == plenty
