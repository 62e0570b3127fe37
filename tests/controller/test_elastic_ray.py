"""The controller with a Ray of its own and workers without a model: grown, shrunk, killed in the middle of it, and still right."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from flexpert.controller import ray_cluster
from flexpert.controller.controller import Controller
from flexpert.controller.errors import AdminError
from flexpert.controller.runtime_dir import make
from flexpert.controller.spec import ClusterSpec

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

WAIT_S = 60.0


class Cluster:
    def __init__(self, actor: Any, played: Path) -> None:
        self.actor, self.played = actor, played

    async def ask(self, method: str, *arguments: Any) -> Any:
        """Asks again while Ray restarts the controller."""
        async with asyncio.timeout(WAIT_S):
            while True:
                try:
                    return await ray_cluster.call(self.actor, method, *arguments)
                except ray_cluster.ActorGone:
                    await asyncio.sleep(0.1)

    async def until(self, condition: Any, what: str) -> Any:
        last: Any = None
        try:
            async with asyncio.timeout(WAIT_S):
                while True:
                    await self.ask("watch", 0, 0.2)
                    last = await self.ask("status")
                    if condition(last):
                        return last
        except TimeoutError:
            events = (await self.ask("events"))["events"]
            raise AssertionError(
                f"not within {WAIT_S} s: {what}\n{last}\n" + "\n".join(str(e) for e in events)
            ) from None

    async def until_ended(self, transition_id: str) -> dict[str, Any]:
        await self.until(lambda status: status["transition"]["state"] != "running", f"{transition_id} ends")
        return dict(await self.ask("transition", transition_id))


def serving(status: dict[str, Any]) -> list[str]:
    return [worker["worker_id"] for worker in status["workers"] if worker["serving"]]


@pytest.fixture
async def cluster(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Cluster]:
    root = Path(tempfile.mkdtemp(prefix="fx-", dir="/tmp"))
    monkeypatch.setenv("FLEXPERT_RUNTIME_DIR", str(root))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    runtime = make("t")
    (root / "model" / "played").mkdir(parents=True)
    make_model(root / "model")
    spec = ClusterSpec(
        name="t", runtime_path=runtime.path, model_dir=root / "model", model_id="m", device="cpu", dtype=None, memory_bytes=1 << 24,
        memory_exact=True, kv_bytes=None, max_context_tokens=None, max_running=4, max_batch_tokens=64, host="127.0.0.1", port=0,
        api_keys=(), cluster_token="t", log_level="debug", standbys=1, threads=1, drain_timeout_s=1, workers=1, max_workers=4,
        worker_process="tests.controller.played_worker:PlayedWorker",
    )  # fmt: skip
    ray = ray_cluster.RayCluster.start(address=None, num_cpus=2)
    try:
        actor = ray_cluster.create_actor(
            Controller, "t:controller", {"spec": spec, "log_path": str(runtime.logs / "c.log")}, restarts=-1, detached=False
        )  # fmt: skip
        yield Cluster(actor, root / "model" / "played")
        async with asyncio.timeout(WAIT_S):
            await ray_cluster.call(actor, "stop")
            while not (await ray_cluster.call(actor, "watch", 0, 0.2))["stopped"]:
                pass
    finally:
        ray.shutdown("t:")
        from flexpert.hbm import stop_manager

        for name in runtime.manager_names():
            stop_manager(runtime.path, name)
        if not os.environ.get("KEEP"):
            shutil.rmtree(root, ignore_errors=True)


def make_model(path: Path) -> None:
    """As much of a model as the gateway needs."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    (path / "config.json").write_text('{"model_type": "qwen3_moe"}')


async def test_cluster_grows_and_shrinks_and_its_controller_may_die_meanwhile(cluster: Cluster) -> None:
    status = await cluster.until(lambda status: status["ready"] and status["standbys"] == 1, "ready with a standby")
    assert (serving(status), status["epoch"]) == (["worker-0"], 1)
    first = status["workers"][0]

    # Up, and the controller is killed while the members prepare.
    (cluster.played / "slow-prepare").touch()
    begun = await cluster.ask("scale", 3, "up")
    assert begun["state"] == "running"
    await cluster.until(lambda status: status["transition"]["phase"] == "prepare", "prepare begins")
    with pytest.raises(AdminError) as refused:
        await cluster.ask("scale", 2, "meanwhile")
    assert refused.value.code == "conflict"
    os.kill(status["controller"]["pid"], signal.SIGKILL)
    await cluster.until(lambda now: now["controller"]["pid"] != status["controller"]["pid"], "the next controller")
    (cluster.played / "slow-prepare").unlink()
    ended = await cluster.until_ended(begun["transition_id"])
    assert (ended["state"], ended["to_workers"]) == ("done", ["worker-0", "worker-1", "worker-2"])
    status = await cluster.until(lambda status: len(serving(status)) == 3, "three serve")
    assert status["workers"][0]["pid"] == first["pid"], "who served goes on"
    assert (await cluster.ask("scale", 3, "up"))["transition_id"] == begun["transition_id"], (
        "the same request, the same transition"
    )

    # A worker dies: its place is taken by another process.
    os.kill(status["workers"][1]["pid"], signal.SIGKILL)
    pid = status["workers"][1]["pid"]
    status = await cluster.until(
        lambda now: len(serving(now)) == 3 and now["workers"][1]["pid"] not in (pid, None) and now["ready"], "it is replaced"
    )  # fmt: skip
    assert status["workers"][1]["incarnation"] == 2

    # Down, and out of the middle.
    await cluster.until(lambda status: status["transition"]["state"] != "running", "calm")
    begun = await cluster.ask("drain", "worker-1", "out")
    assert (await cluster.until_ended(begun["transition_id"]))["state"] == "done"
    status = await cluster.until(lambda status: serving(status) == ["worker-0", "worker-2"], "two serve")
    with pytest.raises(AdminError) as refused:
        await cluster.ask("scale", 9, "too many")
    assert refused.value.code == "impossible"
    kinds = [event["kind"] for event in (await cluster.ask("events"))["events"]]
    assert {"joined", "committed", "replaced", "ended"} <= set(kinds)
