"""A cluster as a user has it: `flexpert up` in a process of its own, HTTP clients, and processes that are killed while it serves."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
from tests.cli.harness import GREEDY, TOKENS, Cluster, flexpert, stream_tokens, wait_until

from flexpert.controller.journal import read_events
from flexpert.controller.processes import ProcessId
from flexpert.controller.runtime_dir import RuntimeDir

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

SEEDED = {"temperature": 1.0, "seed": 20, "top_p": 0.95}
SAMPLING = {"greedy": GREEDY, "seeded": SEEDED}


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster) -> dict[str, list[str]]:
    """Way of sampling -> the tokens of a stream during which nothing dies."""
    return {name: stream_tokens(cluster.client(), **sampling) for name, sampling in SAMPLING.items()}


def events(cluster: Cluster, kind: str) -> list[dict[str, Any]]:
    done = flexpert(cluster.runtime, "events", "--json")
    return [event for line in done.stdout.splitlines() if (event := json.loads(line))["kind"] == kind]


def test_printed_curl_line_works_as_pasted(cluster: Cluster) -> None:
    [line] = re.findall(r"^ +(curl .*)$", cluster.text, re.MULTILINE)
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=120, check=True)
    answer = json.loads(done.stdout)
    assert answer["object"] == "chat.completion"
    assert answer["usage"]["completion_tokens"] >= 1


def test_openai_client_is_served_and_a_wrong_key_is_not(cluster: Cluster) -> None:
    import openai

    client = cluster.client()
    assert [model.id for model in client.models.list()] == ["tiny-qwen3-moe"]
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()


def test_status_tells_model_worker_and_memory(cluster: Cluster) -> None:
    status = cluster.status()
    assert status["ready"]
    assert status["model"] == "tiny-qwen3-moe"
    assert status["workers"][0]["device"] == "cpu"
    assert status["manager"]["budget_bytes"] == 1 << 30
    assert status["up"]["pid"] == cluster.process.pid
    shown = flexpert(cluster.runtime, "status", "--json")
    assert json.loads(shown.stdout)["workers"][0]["pid"] == status["workers"][0]["pid"]
    assert "worker-0   cpu float32" in flexpert(cluster.runtime, "status").stdout
    checked = flexpert(cluster.runtime, "hbm", "check")
    assert (checked.returncode, "all is well" in checked.stdout) == (0, True), checked.stderr


def test_everything_written_is_for_the_user_alone(cluster: Cluster) -> None:
    files = [path for path in cluster.runtime.rglob("*") if not path.is_dir()]
    assert {"state.json", "controller.json", "events.jsonl", "admin.sock", "up.log"} <= {path.name for path in files}
    others = [path for path in files if path.lstat().st_mode & 0o077 and not path.name.startswith("device-")]
    assert others == []


def test_second_up_of_that_name_is_refused_and_harms_nothing(cluster: Cluster, tiny_model: Path) -> None:
    done = flexpert(cluster.runtime, "up", str(tiny_model), "--port", "0")
    assert (done.returncode, "runs already" in done.stderr) == (3, True), done.stderr
    assert cluster.client().models.list().data


@pytest.mark.parametrize("name", SAMPLING)
def test_stream_goes_on_exactly_when_its_worker_is_killed(
    cluster: Cluster, undisturbed: dict[str, list[str]], name: str
) -> None:
    before, worker = cluster.status(), cluster.worker()
    tokens = stream_tokens(
        cluster.client(), after=20, then=lambda: os.kill(worker["pid"], signal.SIGKILL), **SAMPLING[name]
    )
    assert len(tokens) == TOKENS
    assert tokens == undisturbed[name]
    after, replacement = cluster.status(), cluster.worker()
    assert replacement["pid"] != worker["pid"]
    assert replacement["incarnation"] > worker["incarnation"]
    assert after["manager"]["pid"] == before["manager"]["pid"]
    assert not replacement["weights_loaded"], "the weights of the dead worker are mapped, not loaded again"
    assert events(cluster, "replaced")


def test_two_deaths_in_a_row_lose_nothing(cluster: Cluster, undisturbed: dict[str, list[str]]) -> None:
    """The second death comes as soon as the replacement serves, mostly before a new standby is warm."""
    first = cluster.worker()["pid"]

    def kill_twice() -> None:
        os.kill(first, signal.SIGKILL)
        second = wait_until(
            lambda: (w := cluster.worker_if_any()) and w["pid"] != first and w["pid"], what="replacement", timeout_s=90
        )
        os.kill(second, signal.SIGKILL)

    assert stream_tokens(cluster.client(), after=20, then=kill_twice, **GREEDY) == undisturbed["greedy"]


def test_stopped_worker_is_noticed_and_its_stream_goes_on(cluster: Cluster, undisturbed: dict[str, list[str]]) -> None:
    """It is alive and holds its connections, but does nothing any more."""
    worker = cluster.worker()
    tokens = stream_tokens(cluster.client(), after=20, then=lambda: os.kill(worker["pid"], signal.SIGSTOP), **SEEDED)
    assert tokens == undisturbed["seeded"]
    assert ProcessId.of(worker["pid"]) is None
    assert any("no answer for" in event["text"] for event in read_events(RuntimeDir(cluster.runtime / "default")))


def test_dead_gateway_is_replaced_on_the_same_port(cluster: Cluster) -> None:
    import openai

    worker, gateway = cluster.worker(), cluster.status()["gateway"]
    os.kill(gateway["pid"], signal.SIGKILL)

    def served() -> Any:
        try:
            return cluster.client().completions.create(model="tiny-qwen3-moe", prompt="Hello", max_tokens=4)
        except openai.APIConnectionError:
            return None

    assert wait_until(served, what="served by the next gateway", timeout_s=60).usage.completion_tokens >= 1
    assert cluster.worker()["pid"] == worker["pid"], "the worker is none the wiser"


def test_dead_controller_is_restarted_and_requests_do_not_notice(
    cluster: Cluster, undisturbed: dict[str, list[str]]
) -> None:
    status = cluster.status()
    tokens = stream_tokens(
        cluster.client(), after=20, then=lambda: os.kill(status["controller"]["pid"], signal.SIGKILL), **GREEDY
    )
    assert tokens == undisturbed["greedy"]
    again = cluster.status()
    assert again["controller"]["pid"] != status["controller"]["pid"]
    assert again["workers"][0]["pid"] == status["workers"][0]["pid"]
    assert again["gateway"]["pid"] == status["gateway"]["pid"]
    os.kill(again["workers"][0]["pid"], signal.SIGKILL)
    wait_until(
        lambda: (found := cluster.worker_if_any()) and found["pid"] != status["workers"][0]["pid"],
        what="the new controller replaces a dead worker", timeout_s=90,
    )  # fmt: skip


def test_dead_node_agent_is_replaced_and_adopts_the_manager(cluster: Cluster) -> None:
    before = cluster.status()["manager"]
    os.kill(before["agent_pid"], signal.SIGKILL)

    def adopted() -> dict[str, Any] | None:
        found = cluster.status()["manager"]
        return found if found.get("agent_pid", before["agent_pid"]) != before["agent_pid"] else None

    assert wait_until(adopted, what="a new node agent", timeout_s=60)["pid"] == before["pid"]
    assert stream_tokens(cluster.client(), **GREEDY)


def test_dead_manager_is_replaced_and_the_weights_are_loaded_again(
    cluster: Cluster, undisturbed: dict[str, list[str]]
) -> None:
    pid = cluster.status()["manager"]["pid"]
    os.kill(pid, signal.SIGKILL)
    wait_until(
        lambda: (status := cluster.status())["ready"] and status["manager"].get("pid", pid) != pid and status["workers"],
        what="a new manager and worker", timeout_s=90,
    )  # fmt: skip
    assert stream_tokens(cluster.client(), **GREEDY) == undisturbed["greedy"]
