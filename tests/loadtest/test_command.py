"""`flexpert loadtest` as a user types it: files, exit codes, and errors that come at once and name what is wrong."""

from __future__ import annotations

import csv
import json
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.loadtest.stub_thread import always, running
from typer.testing import CliRunner, Result

from flexpert.cli.app import app
from flexpert.cli.errors import CommandError
from flexpert.loadtest.stub import Reply, StubServer

SHORT = ["--rate", "100", "--duration", "200ms", "--shape", "constant", "--output-tokens", "4", "-q"]


@pytest.fixture
def stub() -> Iterator[StubServer]:
    with running(StubServer()) as found:
        yield found


def loadtest(*arguments: str) -> Result:
    return CliRunner().invoke(
        app, ["loadtest", *arguments], env={"FLEXPERT_URL": "", "FLEXPERT_API_KEY": "", "FLEXPERT_ADMIN_KEY": ""}
    )


def refused(*arguments: str) -> CommandError:
    found = loadtest(*arguments).exception
    assert isinstance(found, CommandError), found
    return found


def test_run_tells_what_it_measured_and_ends_well(stub: StubServer, tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("out.json", "out.csv")]
    found = loadtest(
        "--url", stub.url, *SHORT, "--slo", "ttft_p99<9s", "--slo", "attainment>0.99", "--json", str(files[0]), "--csv", str(files[1])
    )  # fmt: skip
    result, rows = json.loads(files[0].read_text()), list(csv.DictReader(files[1].open()))

    assert found.exit_code == 0, found.output
    assert "20 sent: 20 ok" in found.output and "ok   attainment>0.99: 100.0000%, met" in found.output
    assert (result["whole"]["attainment"], result["passed"], len(result["requests"])) == (1.0, True, 20)
    assert result["settings"]["rate"] == "100" and "api_key" not in result["settings"]
    assert len(rows) == 20 and all(float(row["ttft_s"]) > 0 and row["end"] == "ok" for row in rows)


def test_missed_objective_is_exit_code_1() -> None:
    with running(StubServer(behaviour=always(Reply(ttft_s=0.05)))) as stub:
        found = loadtest("--url", stub.url, *SHORT, "--slo", "ttft_p99<1ms")

    assert found.exit_code == 1
    assert "FAIL ttft_p99<1ms" in found.output and "MISSED" in found.output


def test_load_of_which_nothing_is_answered_is_exit_code_1_and_lists_the_errors() -> None:
    with running(StubServer(behaviour=always(Reply(fault="error"), after=2))) as stub:
        found = loadtest("--url", stub.url, *SHORT)

    assert found.exit_code == 1
    assert "20 failed" in found.output and "HTTP 500: made to fail" in found.output


def test_schedule_is_printed_without_a_server_and_replayed(stub: StubServer, tmp_path: Path) -> None:
    shape = ["--shape", "gamma", "--cv", "2", "--rate", "50", "--duration", "500ms", "--seed", "3"]
    first, again = loadtest(*shape, "--print-schedule"), loadtest(*shape, "--print-schedule")
    file = tmp_path / "schedule.jsonl"
    file.write_text(first.output)
    replayed = loadtest("--url", stub.url, "--schedule", str(file), "-q")

    assert first.exit_code == 0 and first.output == again.output
    assert all(json.loads(line)["prompt_tokens"] == 128 for line in first.output.splitlines())
    assert f"{len(first.output.splitlines())} sent" in replayed.output


def test_shape_may_be_a_file(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text("sequence: [{shape: constant}, {shape: constant, rate: 20}]")
    found = loadtest("--shape", str(tmp_path / "s.yaml"), "--rate", "10", "--duration", "1s", "--print-schedule")

    assert len(found.output.splitlines()) == 30


def test_report_is_written(stub: StubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = types.SimpleNamespace(write_report=lambda result, path: path.write_text(result.model))
    monkeypatch.setitem(sys.modules, "flexpert.loadtest.report", written)
    found = loadtest("--url", stub.url, *SHORT, "--report", str(tmp_path / "out.html"))

    assert found.exit_code == 0, found.output
    assert (tmp_path / "out.html").read_text() == "stub"


def test_report_shows_the_changes_of_size_that_the_server_tells(tmp_path: Path) -> None:
    stub = StubServer(admin_key="a")

    def grows(number: int, fields: dict[str, Any]) -> Reply:
        if number == 10:
            for kind in ("begun", "committed", "ended"):
                told = {"transition_id": "t-1", "from_workers": ["worker-0"], "to_workers": ["worker-0", "worker-1"]}
                stub.events.append(
                    {
                        "sequence": len(stub.events) + 1,
                        "time_s": time.time(),
                        "kind": kind,
                        "text": f"scale 2 {kind}",
                        **told,
                    }
                )
        return Reply()

    stub.behaviour = grows
    with running(stub):
        found = loadtest("--url", stub.url, *SHORT, "--admin-key", "a", "--report", str(tmp_path / "out.html"))
    html = (tmp_path / "out.html").read_text()

    assert found.exit_code == 0, found.output
    assert "events of the server: 3, the last: scale 2 ended" in found.output
    assert ">1→2<" in html and "scale 2 begun" in html


def test_report_without_its_packages_is_refused_before_the_load(
    stub: StubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    found = refused("--url", stub.url, *SHORT, "--report", str(tmp_path / "out.html"))

    assert "pip install flexpert[report]" in str(found)
    assert stub.requests == 0


def test_users_put_load_on_it_too(stub: StubServer) -> None:
    found = loadtest(
        "--url",
        stub.url,
        "--users",
        "2",
        "--turns",
        "2",
        "--requests",
        "8",
        "--duration",
        "5s",
        "--endpoint",
        "chat",
        "-q",
    )

    assert found.exit_code == 0, found.output
    assert "2 users in conversations of 2 turns" in found.output and "8 sent: 8 ok" in found.output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--rate", "5", "--duration", "1s"], "no server was named: give --url"),
        (["--url", "ftp://x", "--rate", "5", "--duration", "1s"], "expected a URL like http://host:8000"),
        (["--url", "http://x:99999", "--rate", "5", "--duration", "1s"], "expected a URL like"),
        (["--url", "http://x", "--duration", "1s"], "poisson: rate is missing"),
        (["--url", "http://x", "--rate", "5"], "poisson: duration is missing"),
        (["--url", "http://x", "--shape", "spkie", "--rate", "5"], "did you mean spike?"),
        (["--url", "http://x", "--rate", "5", "--duration", "1s", "--slo", "tftt_p99<1s"], "did you mean ttft_p99?"),
        (["--url", "http://x", "--rate", "5", "--duration", "1s", "--prompt-tokens", "0"], "--prompt-tokens '0'"),
        (
            ["--url", "http://x", "--rate", "5", "--duration", "1s", "--timeout", "0"],
            "--timeout 0: expected more than 0",
        ),
        (["--url", "http://x", "--rate", "5", "--duration", "1s", "--warmup", "1s"], "leave nothing of the 1 s"),
        (
            ["--url", "http://x", "--rate", "5", "--duration", "1s", "--endpoint", "embed"],
            "expected one of completions, chat",
        ),
        (
            ["--url", "http://x", "--rate", "5", "--duration", "1s", "--endpoint", "chat", "--prompts", "ids"],
            "only completions take token ids",
        ),
        (["--url", "http://x", "--rate", "5", "--duration", "1s", "--extra-body", "{"], "no JSON"),
        (
            ["--url", "http://x", "--rate", "5", "--duration", "1s", "--extra-body", '{"stream": false}'],
            "stream is set by the load test",
        ),
        (["--url", "http://x", "--rate", "5", "--duration", "1s", "--turns", "2"], "give --users too"),
        (["--url", "http://x", "--rate", "5", "--users", "2"], "leave --shape, --rate and --schedule out"),
        (
            ["--url", "http://x", "--rate", "5", "--duration", "1s", "--json", "/nowhere/x.json"],
            "there is no directory /nowhere",
        ),
        (["--url", "http://x", "--schedule", "/nowhere.jsonl"], "--schedule /nowhere.jsonl"),
        (["--url", "http://x", "--shape", "/nowhere.yaml"], "/nowhere.yaml: No such file"),
        (["--users", "2", "--print-schedule"], "the closed loop has none"),
    ],
)
def test_wrong_option_is_told_at_once_and_by_name(arguments: list[str], said: str) -> None:
    found = refused(*arguments)

    assert said in str(found)
    assert found.exit_code == 2


def test_server_that_is_not_there_and_a_wrong_key_have_exit_codes_of_their_own() -> None:
    with running(StubServer(key="right")) as stub:
        keyless, wrong = refused("--url", stub.url, *SHORT), refused("--url", stub.url, "--api-key", "left", *SHORT)
        right = loadtest("--url", f"{stub.url}/v1/", "--api-key", "right", *SHORT)
    gone = refused("--url", stub.url, *SHORT)

    assert (keyless.exit_code, wrong.exit_code, gone.exit_code, right.exit_code) == (13, 13, 17, 0)
    assert "connection refused; nothing listens there" in str(gone)
