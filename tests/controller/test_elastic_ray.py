"""The controller with a Ray of its own and workers without a model: grown, shrunk, killed in the middle of it, and still right."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from flexpert.controller import ray_cluster
from flexpert.controller.controller import Controller
from flexpert.controller.errors import AdminError
from flexpert.controller.runtime_dir import make
from flexpert.controller.spec import ClusterSpec
from flexpert.hbm import stop_manager
from flexpert.hbm.paths import ManagerPaths, lock_holder

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

WAIT_S = 60.0


class Cluster:
    def __init__(self, actor: Any, played: Path, orphans: list[str]) -> None:
        self.actor, self.played, self.orphans = actor, played, orphans

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


@contextlib.asynccontextmanager
async def brought_up(*, ray_address: str | None, standbys: int) -> AsyncIterator[Cluster]:
    """A controller in a Ray of its own, or in the one that runs at ray_address. All managers must end with it but those whose node was
    lost, which `up` ends."""
    orphans: list[str] = []
    root = Path(os.environ["FLEXPERT_RUNTIME_DIR"])
    runtime = make("t")
    (root / "model" / "played").mkdir(parents=True)
    make_model(root / "model")
    spec = ClusterSpec(
        name="t", runtime_path=runtime.path, model_dir=root / "model", model_id="m", device="cpu", dtype=None, memory_bytes=1 << 24,
        memory_exact=True, kv_bytes=None, max_context_tokens=None, max_running=4, max_batch_tokens=64, host="127.0.0.1", port=0,
        api_keys=(), cluster_token="t", log_level="debug", standbys=standbys, threads=1, drain_timeout_s=1, workers=1, max_workers=4,
        worker_process="tests.controller.played_worker:PlayedWorker",
    )  # fmt: skip
    ray = ray_cluster.RayCluster.start(address=ray_address, num_cpus=2)
    try:
        actor = ray_cluster.create_actor(
            Controller, "t:controller", {"spec": spec, "log_path": str(runtime.logs / "c.log")}, restarts=-1, detached=False
        )  # fmt: skip
        yield Cluster(actor, root / "model" / "played", orphans)
        async with asyncio.timeout(WAIT_S):
            await ray_cluster.call(actor, "stop")
            while not (await ray_cluster.call(actor, "watch", 0, 0.2))["stopped"]:
                pass
        assert ray_cluster.find_actor("t:agent") is None
        left = [name for name in runtime.manager_names() if lock_holder(ManagerPaths.of(runtime.path, name).lock)]
        assert left == orphans, "managers that nobody stopped"
    finally:
        ray.shutdown("t:")
        for name in runtime.manager_names():
            stop_manager(runtime.path, name)


@pytest.fixture(autouse=True)
def root(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A runtime directory with a short path: sockets lie in it."""
    path = Path(tempfile.mkdtemp(prefix="fx-", dir="/tmp"))
    monkeypatch.setenv("FLEXPERT_RUNTIME_DIR", str(path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
async def cluster(root: Path) -> AsyncIterator[Cluster]:
    async with brought_up(ray_address=None, standbys=1) as found:
        yield found


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
        lambda now: len(serving(now)) == 3 and now["workers"][1].get("pid") not in (pid, None) and now["ready"], "it is replaced"
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


@pytest.fixture
def three_nodes() -> Iterator[Any]:
    """Three raylets on this machine, each a node of its own for Ray."""
    from ray.cluster_utils import Cluster as RayNodes

    nodes = RayNodes(
        initialize_head=True, connect=False, shutdown_at_exit=False,
        head_node_args={"num_cpus": 1, "object_store_memory": 80 << 20, "include_dashboard": False},
    )  # fmt: skip
    for _ in range(2):
        nodes.add_node(num_cpus=1, object_store_memory=80 << 20)
    yield nodes
    nodes.shutdown()


async def test_devices_are_spread_over_the_nodes_and_a_node_may_be_lost(three_nodes: Any) -> None:
    async with brought_up(ray_address=three_nodes.address, standbys=0) as cluster:
        await cluster.until(lambda status: status["ready"], "ready")
        begun = await cluster.ask("scale", 4, "up")
        assert (await cluster.until_ended(begun["transition_id"]))["state"] == "done"
        status = await cluster.until(lambda status: len(serving(status)) == 4, "four serve")
        nodes = {worker["worker_id"]: worker["node_id"] for worker in status["workers"]}
        assert len(set(nodes.values())) == 3, nodes
        agents = {device["device"]: device["agent_pid"] for device in status["devices"]}
        same_node = {
            (nodes["worker-" + one[-1]] == nodes["worker-" + two[-1]]) == (agents[one] == agents[two])
            for one in agents
            for two in agents
        }
        assert same_node == {True}, "the managers of a node's devices belong to its one agent"

        lost = next(node for node in three_nodes.worker_nodes if node.node_id in nodes.values())
        gone = {worker for worker, node in nodes.items() if node == lost.node_id}
        assert gone
        cluster.orphans += sorted(worker.replace("worker", "device") for worker in gone)
        three_nodes.remove_node(lost, allow_graceful=False)
        status = await cluster.until(
            lambda status: status["ready"] and serving(status) and not gone & set(serving(status)), "the others go on"
        )
        assert len(serving(status)) == 4 - len(gone)
        await cluster.until(lambda status: status["transition"]["state"] != "running", "calm")
        begun = await cluster.ask("scale", 2, "down")
        assert (await cluster.until_ended(begun["transition_id"]))["state"] == "done"
