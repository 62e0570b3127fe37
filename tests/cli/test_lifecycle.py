"""How a cluster begins and ends: each test has one of its own."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
from tests.cli.harness import GREEDY, TOKENS, Cluster, flexpert, stream_tokens, wait_until

from flexpert.controller.processes import ProcessId

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


def test_up_killed_leaves_nothing_running_and_the_next_adopts_the_memory(runtime: Path, tiny_model: Path) -> None:
    cluster = Cluster.up(runtime, tiny_model).wait_ready()
    status = cluster.status()
    others = [
        ProcessId.of(pid)
        for pid in (status["controller"]["pid"], status["gateway"]["pid"], status["workers"][0]["pid"])
    ]
    cluster.process.kill()
    cluster.process.wait(30)
    manager = ProcessId.of(status["manager"]["pid"])
    assert manager is not None
    again = Cluster.up(runtime, tiny_model).wait_ready()
    try:
        assert all(process is None or process.wait(10) for process in others)
        now = again.status()
        assert now["manager"]["pid"] == manager.pid
        assert not now["workers"][0]["weights_loaded"]
        assert now["workers"][0]["incarnation"] > status["workers"][0]["incarnation"]
        expected = drained_stream(again)
        assert len(expected) == TOKENS
        assert again.process.wait(60) == 0
        assert manager.wait(10), "down ends the manager too"
        assert not (runtime / "default" / "state.json").exists()
        assert again._closed.wait(10), "nothing holds the output of up any more"
    finally:
        again.end()


def drained_stream(cluster: Cluster) -> list[str]:
    """Tokens of a stream during which `flexpert down` is run."""
    down: list[threading.Thread] = []

    def run_down() -> None:
        down.append(threading.Thread(target=lambda: codes.append(flexpert(cluster.runtime, "down").returncode)))
        down[0].start()
        wait_until(lambda: "draining" in cluster.text, what="draining")

    codes: list[int] = []
    tokens = stream_tokens(cluster.client(), after=20, then=run_down, **GREEDY)
    down[0].join(60)
    assert codes == [0]
    return tokens


def test_down_after_up_was_killed_ends_the_manager_too(runtime: Path, tiny_model: Path) -> None:
    cluster = Cluster.up(runtime, tiny_model, "--standby", "0").wait_ready()
    manager = ProcessId.of(cluster.status()["manager"]["pid"])
    assert manager is not None
    cluster.process.kill()
    cluster.process.wait(30)
    assert manager.alive
    done = flexpert(runtime, "down")
    assert (done.returncode, "HBM manager" in done.stdout) == (0, True), done.stdout + done.stderr
    assert not manager.alive
    assert flexpert(runtime, "down").stdout == "no cluster named 'default' runs\n"


def test_model_that_cannot_be_served_ends_up_with_the_reason(runtime: Path, tiny_model: Path, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((tiny_model / name).read_bytes())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}))
    done = flexpert(runtime, "up", str(tmp_path), "--port", "0", "--device", "cpu", "--memory", "256MiB")
    assert done.returncode == 5, done.stdout + done.stderr
    assert "error: " in done.stderr
    assert "cannot be served" in done.stderr


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--memory", "256KiB"], "cannot hold the model"),
        (["--memory", "64MiB", "--kv-memory", "1KiB"], "no memory for KV"),
    ],
    ids=["weights", "kv"],
)
def test_memory_that_is_too_little_ends_up_with_the_reason(
    runtime: Path, tiny_model: Path, options: list[str], words: str
) -> None:
    done = flexpert(runtime, "up", str(tiny_model), "--port", "0", "--device", "cpu", *options)
    assert done.returncode == 7, done.stdout + done.stderr
    assert done.stderr.startswith("error: ")
    assert words in done.stderr
    assert not (runtime / "default" / "state.json").exists()
