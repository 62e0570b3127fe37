"""`flexpert simulate`: a table, files, and a clear line for each mistake."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flexpert.cli.app import app
from flexpert.cli.errors import CommandError
from flexpert.simulator.profile import load_profile
from flexpert.simulator.results import from_json

POLICY = """
apiVersion: flexpert.dev/v1alpha1
kind: ScalingPolicy
metadata: {name: mine}
spec:
  workers: {min: 1, max: 4}
  slo: {ttft: 5s, tpot: 500ms}
  signals: [{type: slo}, {type: kv_utilization, target: 0.8}]
"""


@pytest.fixture
def files(tmp_path: Path) -> Path:
    (tmp_path / "policy.yaml").write_text(POLICY)
    rows = ["TIMESTAMP,ContextTokens,GeneratedTokens"]
    rows += [f"2023-11-16 18:{i // 60:02d}:{i % 60:02d}.0000000,40,8" for i in range(120)]
    (tmp_path / "trace.csv").write_text("\n".join(rows))
    return tmp_path


def simulate(files: Path, *options: str) -> tuple[int, str]:
    done = CliRunner().invoke(
        app, ["simulate", "--trace", str(files / "trace.csv"), "--profile", "example-gpu", *options]
    )
    if isinstance(done.exception, CommandError):
        return done.exception.exit_code, str(done.exception)
    return done.exit_code, done.output


def test_policies_and_baselines_become_a_table_and_a_file(files: Path) -> None:
    out = files / "out.json"
    options = (
        "--policy",
        str(files / "policy.yaml"),
        "--baselines",
        "fixed-2,hpa",
        "--devices",
        "4",
        "--json",
        str(out),
    )
    code, text = simulate(files, *options)

    assert code == 0
    assert all(name in text for name in ("mine", "fixed-2", "hpa-0.7", "device-h"))
    found = from_json(out.read_bytes())
    assert [result.name for result in found.results] == ["mine", "fixed-2", "hpa-0.7"]
    assert found.slo.ttft_s == 5.0
    again = files / "again.json"
    simulate(files, *options[:-1], str(again))
    assert again.read_bytes() == out.read_bytes()
    assert json.loads(out.read_text())["results"][1]["requests"] == 120


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        ((), 2, "nothing to simulate"),
        (("--baselines", "cleverest"), 2, "expected all, or some of static-peak"),
        (("--baselines", "fixed-0"), 2, "fixed-N"),
        (("--baselines", "hpa"), 2, "no SLO to judge by"),
        (("--baselines", "hpa", "--ttft", "soon"), 2, "--ttft 'soon'"),
        (("--baselines", "hpa", "--ttft", "1s", "--split", "third"), 2, "expected half"),
        (("--baselines", "hpa", "--ttft", "1s", "--profile", "none"), 2, "builtin-cpu"),
        (("--baselines", "hpa", "--ttft", "1s", "--json", "/no/such/folder/x"), 11, "there is no folder"),
        (("--policy", "nowhere.yaml"), 2, "cannot be read"),
    ],
)
def test_a_mistake_is_told_in_one_line(files: Path, options: tuple[str, ...], code: int, words: str) -> None:
    found = simulate(files, *options)

    assert (found[0], words in found[1]) == (code, True), found


def test_a_wrong_policy_and_a_wrong_trace_name_their_lines(files: Path) -> None:
    (files / "wrong.yaml").write_text(POLICY.replace("max: 4", "maxx: 4"))
    assert "did you mean max" in simulate(files, "--policy", str(files / "wrong.yaml"))[1]
    (files / "trace.csv").write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:00:00.0,-3,8\n")
    code, text = simulate(files, "--policy", str(files / "policy.yaml"))
    assert (code, "line 2" in text) == (2, True), text


def test_the_default_profile_is_shipped() -> None:
    assert load_profile("builtin-cpu").model


def test_policies_of_the_same_name_are_told_apart_by_their_files(files: Path) -> None:
    (files / "other.yaml").write_text(POLICY)
    code, text = simulate(files, "--policy", f"{files / 'policy.yaml'},{files / 'other.yaml'}", "--devices", "4")

    assert code == 0
    assert [line.split()[0] for line in text.splitlines() if "%" in line] == ["policy", "other"]
