"""The scaling policy on a running cluster, with everything real: load makes it grow, calm makes it shrink, people and mishaps hold it.

The signal is KV in use: how much of it streams hold does not depend on how fast this machine is. `Load` keeps them open as long as a test
needs, every wait is for a decision or an event, and the policy's windows are seconds.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.cli.harness import Cluster, wait_until
from typer.testing import CliRunner

from flexpert.cli.api import AdminApi, find_api
from flexpert.cli.app import app
from flexpert.cli.errors import CommandError

POLICY = """\
apiVersion: flexpert.dev/v1alpha1
kind: ScalingPolicy
metadata: {name: quick}
spec:
  interval: 300ms
  workers: {min: 1, max: 2, standby: 1}
  signals: [{type: kv_utilization, target: 0.25}]
  behavior:
    scaleDown: {stabilizationWindow: 1s, policies: [{type: percent, value: 100, period: 1s}]}
  panic: {threshold: 0}
"""
PROMPT = "x" * 1500  # a token each: four of them are three quarters of the KV of one worker
STREAMS = 4
SLOWEST_S = 120.0  # a wait on a machine with much else to do; what is waited for takes a second or two


class Load:
    """Streams that hold KV from the `with` on to its end, each begun anew when it is over."""

    def __init__(self, cluster: Cluster) -> None:
        self._url, self._headers = cluster.url, {"authorization": f"Bearer {cluster.key}"}
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._hold, args=(number,)) for number in range(STREAMS)]
        self.errors: list[str] = []

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.end()

    def end(self) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(60)
        assert self.errors == [], "a change of size costs no request"

    def _hold(self, number: int) -> None:
        body = {
            "model": "tiny-qwen3-moe", "prompt": f"{number}{PROMPT}", "max_tokens": 400, "stream": True, "temperature": 0,
            "ignore_eos": True,
        }  # fmt: skip
        with httpx.Client(base_url=self._url, headers=self._headers, timeout=60) as client:
            while not self._over.is_set():
                try:
                    with client.stream("POST", "/v1/completions", json=body) as answer:
                        answer.raise_for_status()
                        for line in answer.iter_lines():
                            if self._over.is_set():
                                break
                            if '"error"' in line:
                                self.errors.append(line)
                except httpx.HTTPError as error:
                    self.errors.append(repr(error))
                    return


@dataclass
class Scaled:
    """A cluster under a policy, and how a test looks at it."""

    cluster: Cluster
    file: Path
    api: AdminApi
    seen: int = 0  # events of earlier tests
    _decided: str = field(default="", init=False)

    def begin(self) -> None:
        """What comes from here on is this test's."""
        self.seen = max((event["sequence"] for event in self.api.events(after=0)), default=0)
        self._decided = (self.api.policy("GET").get("last") or {}).get("decision_id", "")

    def decisions(self) -> list[dict[str, Any]]:
        """Those since `begin`, oldest first."""
        found: list[dict[str, Any]] = self.api.decisions(limit=1000, changes=False)["decisions"]
        names = [decision["decision_id"] for decision in found]
        return found[: names.index(self._decided) if self._decided in names else None][::-1]

    def decision(self, condition: Callable[[dict[str, Any]], Any], *, what: str) -> dict[str, Any]:
        """The first such decision since `begin`."""
        try:
            return dict(
                wait_until(lambda: next(filter(condition, self.decisions()), None), what=what, timeout_s=SLOWEST_S)
            )
        except AssertionError as error:
            last = [f"{one['reason']}: {one['text']}" for one in self.decisions()[-5:]]
            raise AssertionError(f"{error}; the last decisions: {last}") from error

    def event(self, text: str) -> dict[str, Any]:
        def find() -> dict[str, Any] | None:
            return next((event for event in self.api.events(after=self.seen) if text in event["text"]), None)

        return dict(wait_until(find, what=f"an event that says {text!r}", timeout_s=SLOWEST_S))

    def size(self, workers: int) -> None:
        """Once that many serve and no transition runs."""

        def reached() -> bool:
            status = self.api.status()
            running = (status["transition"] or {}).get("state") == "running"
            return not running and len(status["workers"]) == workers

        wait_until(reached, what=f"{workers} workers", timeout_s=SLOWEST_S)

    def ordered(self, reason: str) -> dict[str, Any]:
        """The first decision that began a transition for that reason."""
        return self.decision(
            lambda one: one["reason"] == reason and one["transition_id"], what=f"an order for {reason}"
        )

    def write(self, text: str) -> None:
        """As editors do: another file takes its place."""
        fresh = self.file.with_suffix(".new")
        fresh.write_text(text)
        fresh.replace(self.file)


@pytest.fixture(scope="module")
def running(tiny_model: Path) -> Iterator[Scaled]:
    runtime = Path(tempfile.mkdtemp(prefix="fx-", dir="/tmp"))
    file = runtime / "policy.yaml"
    file.write_text(POLICY)
    cluster = Cluster.up(runtime, tiny_model, "--policy", str(file), "--kv-memory", "4MiB")
    try:
        cluster.wait_ready()
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("FLEXPERT_RUNTIME_DIR", str(runtime))
            yield Scaled(cluster, file, find_api("default", url=None, admin_key=None))
    finally:
        code = cluster.end()
    assert code == 0, cluster.text
    shutil.rmtree(runtime, ignore_errors=True)


@pytest.fixture
def scaled(running: Scaled) -> Scaled:
    """At its smallest, in calm, under the policy alone."""
    running.write(POLICY)
    running.api.policy("POST", "/resume", {})
    running.api.policy("PUT", "", {})
    running.size(1)
    running.begin()
    return running


def run(*arguments: str) -> str:
    done = CliRunner().invoke(app, list(arguments))
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.stdout


def test_load_grows_the_cluster_calm_shrinks_it_and_explain_says_why(scaled: Scaled) -> None:
    with Load(scaled.cluster):
        grown = scaled.ordered("scale_up")
        scaled.size(2)
    shrunk = scaled.ordered("scale_down")
    scaled.size(1)
    told = run("policy", "explain", grown["decision_id"])
    assert "kv_utilization asks for" in told and f"grow 1 -> 2 (transition {grown['transition_id']})" in told
    told = run("policy", "explain", shrunk["decision_id"])
    assert f"shrink 2 -> 1 (transition {shrunk['transition_id']})" in told
    begun = scaled.event(f"policy quick: 1 -> 2 workers: {grown['text']}")
    assert begun["decision_id"] == grown["decision_id"]
    assert scaled.api.transition(grown["transition_id"])["request_id"] == f"policy-{grown['decision_id']}"


def test_advisory_and_pause_hold_it_and_resume_lets_it_go(scaled: Scaled) -> None:
    run("policy", "mode", "advisory")
    with Load(scaled.cluster):
        for mode, said in (("Advisory", ()), ("Paused", ("policy", "pause", "--for", "1h"))):
            if said:
                run(*said)
            seen = scaled.decision(
                lambda one, mode=mode: one["mode"] == mode and one["would"], what=f"a wish in mode {mode}"
            )
            assert (seen["would"]["target"], seen["action"]) == (2, None)
        assert len(scaled.api.status()["workers"]) == 1
        assert not [one for one in scaled.decisions() if one["transition_id"]]
        run("policy", "resume")
        scaled.ordered("scale_up")
        scaled.size(2)


def test_a_bad_reload_keeps_the_policy_and_says_so(scaled: Scaled, tmp_path: Path) -> None:
    scaled.write(POLICY.replace("min: 1", "minn: 1"))
    told = scaled.event("minn")["text"]
    assert "line 6" in told or ":6:" in told
    assert "quick" in told and "stays in use" in told
    shown = run("policy", "show")
    assert "quick of" in shown and "minn" in shown
    (tmp_path / "bad.yaml").write_text(POLICY.replace("max: 2", "max: 0"))
    with pytest.raises(CommandError, match="max"):
        run("policy", "reload", str(tmp_path / "bad.yaml"))
    scaled.write(POLICY.replace("name: quick", "name: mended"))
    scaled.event("policy mended")
    assert scaled.api.policy("GET")["problem"] is None


def test_a_size_by_hand_holds_until_it_ends_and_one_beyond_the_bounds_is_refused(scaled: Scaled) -> None:
    with pytest.raises(CommandError, match=r"keeps 1 to 2 workers.*flexpert policy pause"):
        run("scale", "3")
    run("scale", "2", "--for", "1h")
    held = scaled.decision(lambda one: one["now"] == 2 and one["reason"] == "override", what="a size that is held")
    assert held["action"] is None
    override = scaled.api.policy("GET")["override"]
    assert override["workers"] == 2 and "@" in override["owner"] and override["left_s"] > 3000
    assert override["owner"] in held["text"]
    scaled.api.scale(2, request_id="brief", hold={"owner": "ada", "for_s": 0.5})
    scaled.event("the size of 2 by ada is over")
    scaled.ordered("scale_down")


def test_a_controller_that_was_killed_does_not_shrink_for_want_of_history(scaled: Scaled) -> None:
    scaled.write(POLICY.replace("stabilizationWindow: 1s", "stabilizationWindow: 60s"))
    scaled.api.policy("PUT", "", {})
    with Load(scaled.cluster) as load:
        scaled.ordered("scale_up")
        scaled.size(2)
        controller, killed_s = scaled.api.status()["controller"]["pid"], time.time()
        os.kill(controller, signal.SIGKILL)
        load.end()
        scaled.event("controller replaced")
    scaled.begin()
    calm = scaled.decision(lambda one: one["reason"] == "scale_down_refused_history", what="a shrink that has to wait")
    watched_s = float(re.search(r"watched for (\d+) s, 60 s are needed", calm["text"])[1])  # type: ignore[index]
    assert calm["at_s"] - watched_s > killed_s - 1, "what the killed one saw has a gap"
    assert calm["now"] == 2
    assert len(scaled.api.status()["workers"]) == 2
