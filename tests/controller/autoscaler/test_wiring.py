"""The autoscaler inside the controller: real machines, real transitions, a real loop at ten ticks a second; components are played."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from tests.controller.test_controller import PlayedComponents, make_controller, play_components, watch_until

from flexpert.controller.controller import Controller
from flexpert.controller.errors import AdminError
from flexpert.controller.runtime_dir import RuntimeDir
from flexpert.controller.supervision_types import GATEWAY

POLICY = """
apiVersion: flexpert.dev/v1alpha1
kind: ScalingPolicy
metadata: {name: chat}
spec:
  interval: 100ms
  workers: {min: 1, max: 3}
  slo: {ttft: 500ms}
  signals: [{type: kv_utilization, target: 0.5}]
  growTimeout: 500ms
"""


class Gateway:
    """What the gateway tells: used_tokens of KV, shared by the workers that the controller published."""

    def __init__(self) -> None:
        self.used_tokens, self.asked = 0, 0

    async def ask(self, component: str, method: str, window_s: float, slo: Any, long_s: float | None) -> Any:
        assert (component, method, slo) == (GATEWAY, "load", (0.5, None))
        self.asked += 1
        names = (
            [worker.worker_id for worker in PlayedComponents.last.told[-1].serving]
            if PlayedComponents.last.told
            else []
        )
        traffic = {
            "since_s": window_s, "requests_per_s": 1.0, "prompt_tokens_per_s": 1.0, "output_tokens_per_s": 1.0, "queue_s": None,
            "ttft_s": None, "tpot_s": None, "met": 0, "missed": 0, "live": 1, "waiting": 0,
        }  # fmt: skip
        workers = [
            {
                "worker_id": name, "incarnation": 1, "age_s": 0.0, "running": 1, "waiting": 0, "max_running": 8, "waiting_tokens": 0,
                "kv_used_tokens": self.used_tokens // len(names), "kv_capacity_tokens": 1000, "prefill_tokens": 1, "decode_tokens": 1,
                "longest_context_tokens": 5,
            } for name in names
        ]  # fmt: skip
        return {"traffic": traffic, "workers": workers, "long": None}


@pytest.fixture
def gateway(monkeypatch: pytest.MonkeyPatch) -> Gateway:
    made = Gateway()

    async def ask(self: PlayedComponents, *arguments: Any) -> Any:
        return await made.ask(*arguments)

    monkeypatch.setattr(PlayedComponents, "ask", ask)
    return made


@pytest.fixture
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RuntimeDir:
    return play_components(tmp_path, monkeypatch)


@pytest.fixture
async def controller(runtime: RuntimeDir, tmp_path: Path, gateway: Gateway) -> AsyncIterator[Controller]:
    file = tmp_path / "policy.yaml"
    file.write_text(POLICY)
    made = make_controller(runtime, policy_path=file)
    await watch_until(made, "ready")
    yield made
    await made._policy.stop()


async def until(controller: Controller, condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await controller.watch(0, 0.05)


def texts(controller: Controller, kind: str) -> list[str]:
    return [event["text"] for event in controller._journal.events if event["kind"] == kind]


def serving() -> int:
    return len(PlayedComponents.last.serving)


async def test_load_becomes_a_transition_with_the_id_of_its_decision(controller: Controller, gateway: Gateway) -> None:
    gateway.used_tokens = 1400
    log = controller._policy._autoscaler.log
    await until(
        controller, lambda: any(entry.transition_id for entry in log.entries) and texts(controller, "ended")[1:]
    )
    assert serving() == 3
    transition = await controller.transition()
    assert transition is not None and (transition["kind"], transition["state"]) == ("scale", "done")
    decision_id = transition["request_id"].removeprefix("policy-")
    explained = await controller.policy("decision", {"decision_id": decision_id})
    assert explained["transition_id"] == transition["transition_id"]
    assert any("policy chat: 1 -> 3 workers" in text for text in texts(controller, "scaling"))
    status = (await controller.status())["policy"]
    assert (status["name"], status["mode"], status["desired"]) == ("chat", "Active", 3)
    assert sum(status["decisions"].values()) >= status["ticks"] > 0


async def test_growth_that_hangs_is_aborted_at_its_deadline(controller: Controller, gateway: Gateway) -> None:
    PlayedComponents.last.members.holds = {"Prepare"}
    gateway.used_tokens = 1400
    await until(controller, lambda: texts(controller, "ended")[1:])
    transition = await controller.transition()
    assert transition is not None and transition["state"] == "aborted"
    assert any("gives up" in text for text in texts(controller, "scaling"))
    assert serving() == 1


async def test_a_size_by_hand_stands_and_one_beyond_the_policy_is_refused(
    controller: Controller, gateway: Gateway
) -> None:
    with pytest.raises(AdminError, match="keeps 1 to 3 workers"):
        await controller.scale(4, "too-many", "ada", 60.0)
    assert (await controller.scale(2, "two", "ada", 60.0))["state"] in ("running", "done")
    await until(controller, lambda: serving() == 2)
    seen = gateway.asked
    await until(controller, lambda: gateway.asked > seen + 5)
    assert serving() == 2
    override = (await controller.policy("show", {}))["override"]
    assert (override["workers"], override["owner"]) == (2, "ada")
    await controller.scale(2, "two", "bob", 3600.0)
    assert (await controller.policy("show", {}))["override"]["owner"] == "ada", "the same request again"
    await controller.drain("worker-0", "out", "bob", 60.0)
    await until(controller, lambda: serving() == 1)
    override = (await controller.policy("show", {}))["override"]
    assert (override["workers"], override["owner"]) == (1, "bob")


async def test_the_end_of_the_cluster_ends_the_loop_and_gives_the_lease_back(
    controller: Controller, gateway: Gateway, runtime: RuntimeDir
) -> None:
    await until(controller, lambda: (runtime.autoscaler / "lease.json").exists())
    await controller.stop()
    await watch_until(controller, "stopped")
    assert not (runtime.autoscaler / "lease.json").exists()
    assert controller._policy._autoscaler._task is None


async def test_without_a_policy_nothing_runs_until_one_is_put(runtime: RuntimeDir, gateway: Gateway) -> None:
    controller = make_controller(runtime)
    await watch_until(controller, "ready")
    assert (await controller.status())["policy"] is None
    assert (await controller.policy("show", {}))["active"] is False
    await controller.scale(2, "by-hand")
    await until(controller, lambda: serving() == 2)
    assert gateway.asked == 0
    assert not runtime.autoscaler.exists()
    await controller.policy("put", {"text": POLICY, "owner": "ada"})
    await until(controller, lambda: gateway.asked > 1)
    await controller._policy.stop()


def test_a_controller_without_a_policy_starts_without_what_reads_policies() -> None:
    """Pydantic's models alone take a third of a second, and a cluster waits for its controller."""
    script = "import sys, flexpert.controller.controller; print(*{'pydantic', 'statsmodels'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == ""
