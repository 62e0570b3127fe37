"""`flexpert policy show`, `explain`, `pause`, ... over the real admin API with the controller played; what `up --policy` begins with."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.cli.admin_server import AdminServer
from typer.testing import CliRunner

from flexpert.cli import policy_view, show
from flexpert.cli.app import app
from flexpert.cli.errors import CommandError
from flexpert.cli.options import parse_time
from flexpert.cli.policy_files import dry_run_recorded, most_workers, start_with
from flexpert.cli.up import UpOptions
from flexpert.controller.errors import AdminError
from flexpert.controller.policy import record
from flexpert.controller.policy.decide import decide
from flexpert.controller.policy.parse import parse_policy
from flexpert.controller.policy.types import Observation, State, TrafficReading, WorkerReading

POLICY = """
apiVersion: flexpert.dev/v1alpha1
kind: ScalingPolicy
metadata: {name: chat}
spec:
  workers: {min: 2, max: 6, standby: 3}
  signals: [{type: kv_utilization, target: 0.8}]
"""
DECISION: dict[str, Any] = {
    "decision_id": "d-7", "at_s": 1.7e9, "now": 2, "wanted": 4, "reason": "scale_up", "text": "kv asks for 3.6 workers", "policy": "chat",
    "mode": "Active", "panic": False, "transition_id": "t-3", "outcome": None,
    "proposals": [{"signal": "kv_utilization", "wanted": 4, "why": "90% of the KV is used", "load": 3.6}],
    "rejected": [{"rule": "scaleUp", "from_workers": 5, "to_workers": 4, "why": "at most 2 in 15 s"}],
    "action": {"kind": "grow", "from_workers": 2, "target": 4}, "would": {"kind": "grow", "from_workers": 2, "target": 4},
}  # fmt: skip
STATE: dict[str, Any] = {
    "active": True, "name": "chat", "origin": "/policies/chat.yaml", "mode": "Paused", "leads": True, "lease": None, "problem": None,
    "workers": {"min": 2, "max": 6}, "desired": 4, "mode_by_hand": None, "pause": {"owner": "ada@lab", "left_s": 7200.0},
    "override": {"workers": 3, "owner": "bob@lab", "left_s": 60.0}, "last": DECISION, "policy": {"kind": "ScalingPolicy"},
}  # fmt: skip


@pytest.fixture
def server(runtime: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[AdminServer]:
    monkeypatch.setenv("FLEXPERT_RUNTIME_DIR", str(runtime))
    made = AdminServer(runtime).start()
    made.asked = []  # type: ignore[attr-defined]

    def policy(word: str, arguments: dict[str, Any]) -> dict[str, Any]:
        made.asked.append((word, arguments))  # type: ignore[attr-defined]
        if word == "decision":
            if arguments["decision_id"] != "d-7":
                raise AdminError("not_found", "there is no such decision")
            return DECISION
        return {"decisions": [DECISION]} if word == "decisions" else STATE

    made.controller.policy = policy  # type: ignore[attr-defined]
    yield made
    made.stop()


def run(*arguments: str) -> str:
    done = CliRunner().invoke(app, ["policy", *arguments])
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.stdout


def test_commands_ask_what_they_say(server: Any, tmp_path: Path) -> None:
    text = run("pause", "--for", "2h")
    assert "by ada@lab, for 2h more" in text and "3 workers by bob@lab, for 1m more" in text
    run("resume")
    run("mode", "advisory")
    run("reload")
    (tmp_path / "other.yaml").write_text(POLICY)
    run("reload", str(tmp_path / "other.yaml"))
    asked = [(word, {name: value for name, value in found.items() if name != "owner"}) for word, found in server.asked]
    assert asked == [
        ("pause", {"for_s": 7200.0}), ("resume", {}), ("mode", {"mode": "advisory"}), ("put", {}), ("put", {"text": POLICY}),
    ]  # fmt: skip
    assert all("@" in found["owner"] for _, found in server.asked)


def test_show_and_explain(server: Any) -> None:
    shown = run("show")
    assert "chat of /policies/chat.yaml: 2 to 6 workers, mode Paused" in shown and "kind: ScalingPolicy" in shown
    assert json.loads(run("show", "--json")) == STATE
    for text in (run("explain"), run("explain", "d-7")):
        assert "kv_utilization asks for 4 workers: 90% of the KV is used" in text
        assert "scaleUp: 5 -> 4 workers, at most 2 in 15 s" in text
        assert "grow 2 -> 4 (transition t-3)" in text and "not measured yet" in text
    refused = policy_view.explain({**DECISION, "transition_id": None, "refused": "no room for 4"})
    assert "grow 2 -> 4 (refused: no room for 4)" in refused
    assert run("explain", "--last", "5").startswith("d-7 at ")
    with pytest.raises(CommandError, match="no such decision"):
        run("explain", "d-9")


def test_without_a_policy_show_says_how_to_have_one() -> None:
    text = policy_view.describe_policy({"active": False, "problem": "gone.yaml cannot be read"})
    assert "flexpert up --policy FILE" in text and "gone.yaml" in text


@pytest.mark.parametrize("text", ["", "2", "soon", "0s", "-5m"])
def test_a_time_without_sense_is_told(text: str) -> None:
    with pytest.raises(CommandError, match="--for"):
        parse_time(text, option="--for")


def test_status_tells_of_the_policy_where_there_is_one() -> None:
    policy = {
        "name": "chat",
        "min": 1,
        "max": 6,
        "mode": "Active",
        "reason": "no_change",
        "text": "that is right",
        "problem": "line 6",
    }
    assert show.describe_policy(policy) == (
        "chat, 1 to 6 workers, mode Active; no_change: that is right; its file has errors: flexpert policy show"
    )


# up --policy


def test_up_takes_from_the_policy_what_no_option_says(tmp_path: Path) -> None:
    file = tmp_path / "policy.yaml"
    file.write_text(POLICY)
    start = start_with(str(file), workers=None, standbys=None, max_workers=None)
    assert (start.path, start.workers, start.standbys, start.most) == (file, 2, 3, 6)
    start = start_with(str(file), workers=4, standbys=0, max_workers=5)
    assert (start.workers, start.standbys) == (4, 0)
    bare = start_with(None, workers=None, standbys=None, max_workers=None)
    assert (bare.path, bare.workers, bare.standbys, bare.most) == (None, 1, 1, None)


def test_up_refuses_a_policy_with_errors_before_anything_starts(tmp_path: Path) -> None:
    file = tmp_path / "policy.yaml"
    file.write_text(POLICY.replace("min: 2", "minn: 2"))
    with pytest.raises(CommandError, match=r"line 6.*minn"):
        start_with(str(file), workers=None, standbys=None, max_workers=None)
    with pytest.raises(CommandError, match="cannot be read"):
        start_with(str(tmp_path / "none.yaml"), workers=None, standbys=None, max_workers=None)
    file.write_text(POLICY)
    with pytest.raises(CommandError, match="at least 2 workers"):
        start_with(str(file), workers=None, standbys=None, max_workers=1)


def test_the_cpu_has_as_many_devices_as_the_policy_may_want() -> None:
    told: list[str] = []
    assert most_workers(UpOptions(policy_most=6), "cpu", tell=told.append) == 6
    assert most_workers(UpOptions(), "cpu", tell=told.append) == 4
    assert told == []
    assert most_workers(UpOptions(policy_most=6, max_workers=3), "cpu", tell=told.append) == 3
    assert "allows 6 workers, there are 3 devices" in told[0]


# dry-run


def recorded(ticks: int) -> list[bytes]:
    """Two workers whose KV fills up: 90% from the first tick on."""
    config = parse_policy(POLICY).to_config()
    state, lines = State(), [record.begin_line(State(), config)]
    for number in range(ticks):
        worker = {"age_s": 0.1, "running": 4, "kv_used_tokens": 900, "kv_capacity_tokens": 1000, "max_running": 64}
        observation = Observation(
            now_s=1000.0 + 5 * number,
            workers=tuple(WorkerReading(worker_id=f"worker-{index}", **worker) for index in range(2)),  # type: ignore[arg-type]
            traffic=TrafficReading(age_s=0.0, live=8, met=9, missed=1, since_s=990.0 + 5 * number),
        )
        decision, state = decide(observation, state, config)
        lines.append(record.tick_line(observation, decision))
    return lines


def test_dry_run_of_a_record_tells_what_another_policy_would_have_done(tmp_path: Path) -> None:
    (tmp_path / "decisions.jsonl").write_bytes(b"\n".join(recorded(60)))
    (tmp_path / "same.yaml").write_text(POLICY)
    (tmp_path / "never.yaml").write_text(POLICY.replace("max: 6", "max: 2"))
    grown = dry_run_recorded(str(tmp_path / "same.yaml"), str(tmp_path / "decisions.jsonl"))
    assert grown["changes"][0]["from_workers"] == 2 and grown["workers"] > 2
    assert grown["device_hours"] > grown["recorded_device_hours"]
    assert grown["attainment_where_as_many_workers"] == pytest.approx(0.9) and grown["attainment_unknown_share"] == 0
    still = dry_run_recorded(str(tmp_path / "never.yaml"), str(tmp_path / "decisions.jsonl"))
    assert (still["changes"], still["device_hours"]) == ([], still["recorded_device_hours"])
    text = run("dry-run", "--policy", str(tmp_path / "same.yaml"), "--recorded", str(tmp_path / "decisions.jsonl"))
    assert "device-hours" in text and "2 -> " in text


def test_dry_run_of_what_is_no_record_is_told(tmp_path: Path) -> None:
    (tmp_path / "policy.yaml").write_text(POLICY)
    for content, said in (("", "no decision is recorded"), ("{}\n", "line 1 of the record")):
        (tmp_path / "r.jsonl").write_text(content)
        with pytest.raises(CommandError, match=said):
            dry_run_recorded(str(tmp_path / "policy.yaml"), str(tmp_path / "r.jsonl"))
