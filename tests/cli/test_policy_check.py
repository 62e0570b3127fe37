"""`flexpert policy check`: words and exit code 0, or every error with file, line and key, and exit code 2."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.cli.harness import flexpert
from typer.testing import CliRunner

from flexpert.cli.app import app

GOOD = """\
apiVersion: flexpert.dev/v1alpha1
kind: ScalingPolicy
spec:
  workers: {max: 4}
  signals: [{type: kv_utilization}]
"""
BAD = """\
apiVersion: flexpert.dev/v1alpha1
kind: ScalingPolicy
spec:
  workers: {min: 9, max: 8, minn: 1}
  slo: {ttft: 500}
  signals: [{type: slo}]
"""


def check(*arguments: str | Path, text: bytes | None = None) -> tuple[int, list[str], list[str]]:
    done = CliRunner().invoke(app, ["policy", "check", *map(str, arguments)], input=text)
    return done.exit_code, done.stdout.splitlines(), done.stderr.splitlines()


def test_valid_policy_is_told_in_words(tmp_path: Path) -> None:
    file = tmp_path / "policy.yaml"
    file.write_text(GOOD)
    code, words, errors = check(file)

    assert (code, errors) == (0, [])
    assert words[:2] == [
        "Policy default decides every 5s and acts.",
        "From 1 to 4 workers serve; 1 warm process waits beside.",
    ]


def test_every_error_of_every_file_is_told(tmp_path: Path) -> None:
    good, bad, missing = tmp_path / "good.yaml", tmp_path / "bad.yaml", tmp_path / "missing.yaml"
    good.write_text(GOOD)
    bad.write_text(BAD)
    code, words, errors = check(good, bad, missing)

    assert code == 2
    assert errors == [
        f"{bad}:4: spec.workers.minn: unknown key; did you mean min? expected one of min, max, standby",
        f"{bad}:4: spec.workers.min: 9 is above max, which is 8; lower min or raise max",
        f"{bad}:5: spec.slo.ttft: found 500, which has no unit; write a time with one, such as 500ms, 30s, 5m, 2h or 7d",
        f"{missing}: cannot be read: No such file or directory; give a policy file; `flexpert policy default` prints one",
    ]
    assert words[:2] == [f"{good}:", "  Policy default decides every 5s and acts."]


def test_standard_input_and_what_is_no_text() -> None:
    assert check("-", text=GOOD.encode())[0] == 0
    assert check("-", text=BAD.encode())[2][0].startswith("standard input:4: spec.workers.minn: unknown key")
    assert check("-", text=b"spec: \xff")[::2] == (
        2,
        ["standard input: byte 6 is not UTF-8; save the file as UTF-8 text"],
    )


def test_forecast_without_its_library_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "policy.yaml"
    file.write_text(GOOD.replace("}]", "}, {type: forecast}]"))
    assert not any("pip install" in line for line in check(file)[1])

    monkeypatch.setattr("flexpert.cli.policy_check.FORECASTER", "no_such_forecaster")
    assert check(file)[1][-1] == (
        "note: no_such_forecaster is not installed here, which the forecast needs: pip install 'flexpert[forecast]'"
    )


def test_command_as_it_is_typed(runtime: Path, tmp_path: Path) -> None:
    file = tmp_path / "policy.yaml"
    file.write_text(BAD)
    done = flexpert(runtime, "policy", "check", str(file))

    assert done.returncode == 2
    assert done.stdout == ""
    assert f"{file}:4: spec.workers.min: 9 is above max" in done.stderr


def test_default_policy_is_printed_as_the_examples_have_it_and_can_be_used(repository: Path) -> None:
    printed = CliRunner().invoke(app, ["policy", "default"])

    assert printed.exit_code == 0
    assert printed.stdout == (repository / "examples/policies/default.yaml").read_text()
    assert check("-", text=printed.stdout_bytes)[0] == 0
