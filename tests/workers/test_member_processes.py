"""Two workers in processes of their own, on two HBM managers, joined by mapped memory; one is killed while both serve."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tests.families import make_model
from tests.workers.elastic import spread
from tests.workers.serving import SEEDED, TOKEN, in_process, read_tokens, submits

from flexpert.hbm import ManagerConfig, ensure_manager, stop_manager
from flexpert.workers.epoch import Epoch, Member, encode

LAYERS, EXPERTS = 2, 8


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_model(
        "qwen3_moe", num_experts=EXPERTS, hidden_size=128, moe_intermediate_size=128, num_hidden_layers=LAYERS
    ).save_pretrained(folder)
    return folder


@pytest.fixture
def folder():
    made = Path(tempfile.mkdtemp(prefix="fxm"))
    yield made
    for name in ("device-0", "device-1"):
        stop_manager(made, name)
    shutil.rmtree(made)


class Child:
    def __init__(self, worker: int, incarnation: int, folder: Path, model_dir: Path, draft: Epoch) -> None:
        manager = ensure_manager(ManagerConfig(runtime_dir=folder, name=f"device-{worker}", budget_bytes=64 << 20))
        self.member = Member(
            worker_id=f"worker-{worker}",
            incarnation=incarnation,
            exchange_address=f"unix:{folder}/x{worker}.{incarnation}",
            manager_socket=str(manager.socket_path),
        )
        fields = {
            "worker_id": self.member.worker_id,
            "model_dir": str(model_dir),
            "model_id": "tiny",
            "cluster_token": TOKEN,
            "address": f"unix:{folder}/w{worker}.{incarnation}",
            "exchange_address": self.member.exchange_address,
            "incarnation": incarnation,
            "manager_socket": self.member.manager_socket,
            "max_running": 8,
            "max_context_tokens": 512,
            "kv_bytes": 4 << 20,
            "threads": 1,
            "epoch": base64.b64encode(encode(draft)).decode(),
        }
        script = Path(__file__).with_name("member_child.py")
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self._write(fields)

    def started(self) -> dict:
        self.status = self._read()
        return self.status

    def ask(self, method: str, *arguments: object) -> dict:
        self._write({"method": method, "arguments": arguments})
        return self._read()

    def _write(self, value: object) -> None:
        self.process.stdin.write(json.dumps(value) + "\n")
        self.process.stdin.flush()

    def _read(self) -> dict:
        line = self.process.stdout.readline()
        assert line, f"the worker ended with code {self.process.wait()}"
        return json.loads(line)

    def kill(self) -> None:
        if self.process.poll() is None:
            os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


def epoch_of(number: int, members: list[Member]) -> Epoch:
    return Epoch(number=number, members=tuple(members), holders=spread(LAYERS, EXPERTS, len(members)))


def enter(epoch: Epoch, children: list[Child]) -> None:
    """Prepare and commit at all of them at once."""
    data = base64.b64encode(encode(epoch)).decode()
    with ThreadPoolExecutor(len(children)) as threads:
        list(threads.map(lambda child: child.ask("prepare", data, [], 60.0), children))
        list(threads.map(lambda child: child.ask("commit", epoch.number, 30.0), children))
        list(threads.map(lambda child: child.ask("retire", epoch.number), children))


def test_a_worker_killed_with_its_group_running_costs_no_token(folder, model_dir):
    alone = in_process(model_dir, threads=1)
    expected, _ = asyncio.run(read_tokens(alone.start(), submits(SEEDED)))
    alone.stop()
    unknown = [Member(worker_id=f"worker-{i}", incarnation=1, exchange_address="", manager_socket="") for i in (0, 1)]
    children = [Child(i, 1, folder, model_dir, epoch_of(1, unknown)) for i in (0, 1)]
    try:
        first, second = children
        for child in children:
            child.started()
        enter(epoch_of(1, [first.member, second.member]), [first, second])
        asyncio.run(go_on_after_a_kill(folder, model_dir, children, expected))
    finally:
        for child in children:
            child.kill()


async def go_on_after_a_kill(folder: Path, model_dir: Path, children: list[Child], expected: dict) -> None:
    first, second = children
    kept = asyncio.create_task(read_tokens(first.status["address"], submits(SEEDED)))
    emitted, _ = await read_tokens(second.status["address"], submits(SEEDED), stop_after=40)
    second.kill()
    trouble = await asyncio.to_thread(first.ask, "wait_trouble")
    assert trouble["suspects"] == ["worker-1"]
    again = Child(1, 2, folder, model_dir, epoch_of(2, [first.member, second.member]))
    children.append(again)
    await asyncio.to_thread(again.started)
    assert not again.status["weights_loaded"], "the share of the dead one is in the manager's memory"
    await asyncio.to_thread(enter, epoch_of(2, [first.member, again.member]), [first, again])
    tokens, _ = await read_tokens(again.status["address"], submits(SEEDED, emitted))
    assert tokens == expected
    assert (await kept)[0] == expected
    assert first.ask("status")["paused"] == ""
