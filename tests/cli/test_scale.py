"""`flexpert scale`, `drain`, `status` and `events` over the real admin API, with the controller played."""

from __future__ import annotations

import io
import json
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tests.cli.admin_server import ADMIN_KEY, API_KEY, AdminServer, PlayedController
from tests.cli.harness import COMMAND, environment, flexpert

from flexpert.cli import look, machine
from flexpert.cli.api import AdminApi
from flexpert.cli.errors import CommandError
from flexpert.cli.scale import TransitionView, begin_and_follow, describe_transition


@pytest.fixture
def server(runtime: Path) -> Iterator[AdminServer]:
    made = AdminServer(runtime).start()
    yield made
    made.stop()


@pytest.fixture
def controller(server: AdminServer) -> PlayedController:
    return server.controller


def test_scale_follows_the_transition_to_its_end(runtime: Path, controller: PlayedController) -> None:
    done = flexpert(runtime, "scale", "3")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    for line, phase in zip(lines, ("start", "prepare", "commit", "retire"), strict=False):
        assert line.startswith(f"t-1 (scale to 3 workers): {phase}, ")
        assert "of 4 MiB moved, at most 30 s more" in line
    assert (
        lines[-1] == "t-1 (scale to 3 workers) done: worker-0, worker-1, worker-2 serve, epoch 7, 4 MiB moved in 0.50 s"
    )


def test_no_wait_returns_at_once(runtime: Path, controller: PlayedController) -> None:
    controller.hold = True
    done = flexpert(runtime, "scale", "3", "--no-wait")
    assert (done.returncode, done.stdout) == (
        0,
        "t-1 (scale to 3 workers): start, 0 B of 4 MiB moved, at most 30 s more\n",
    )
    assert [call[0] for call in controller.calls] == ["scale"]


def test_json_is_the_transition_and_nothing_else(runtime: Path, controller: PlayedController) -> None:
    assert json.loads(flexpert(runtime, "scale", "3", "--json").stdout)["state"] == "done"
    assert json.loads(flexpert(runtime, "drain", "worker-1", "--json", "--no-wait").stdout)["state"] == "running"


def test_same_request_id_begins_nothing_new(runtime: Path, controller: PlayedController) -> None:
    first = flexpert(runtime, "scale", "3", "--request-id", "monday", "--no-wait", "--json")
    again = flexpert(runtime, "scale", "3", "--request-id", "monday", "--json")
    assert json.loads(first.stdout)["transition_id"] == json.loads(again.stdout)["transition_id"]
    assert len(controller.transitions) == 1


def test_scale_to_what_there_is_says_so(runtime: Path, controller: PlayedController) -> None:
    done = flexpert(runtime, "scale", "2")
    assert (done.returncode, "done: worker-0, worker-1 serve" in done.stdout) == (0, True)


def test_any_worker_is_drained(runtime: Path, controller: PlayedController) -> None:
    done = flexpert(runtime, "drain", "worker-0")
    assert (done.returncode, done.stdout.splitlines()[-1].startswith("t-1 (drain worker-0) done: worker-1 serves")) == (
        0,
        True,
    )


def test_ctrl_c_detaches_and_the_transition_goes_on(runtime: Path, controller: PlayedController) -> None:
    controller.hold = True
    with subprocess.Popen(
        [*COMMAND, "scale", "3"], env=environment(runtime), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # whoever runs the tests may ignore it
    ) as process:  # fmt: skip
        try:
            assert controller.looked.wait(30)
            process.send_signal(signal.SIGINT)
            _, told = process.communicate(timeout=30)
        finally:
            process.kill()
    assert process.returncode == 130
    request_id = controller.calls[0][2]
    assert told == (
        "detached: t-1 goes on without you. Look with `flexpert status` and `flexpert events`, or follow it again with "
        f"`flexpert scale 3 --request-id {request_id}`.\n"
    )
    assert controller.transitions["t-1"]["state"] == "running"
    controller.hold = False
    again = flexpert(runtime, "scale", "3", "--request-id", request_id)
    assert (again.returncode, len(controller.transitions)) == (0, 1)


@pytest.mark.parametrize(
    ("state", "words"), [("aborted", "worker-0, worker-1 serve as before"), ("failed", "see: flexpert events")]
)
def test_transition_that_ends_otherwise_has_its_own_code(
    runtime: Path, controller: PlayedController, state: str, words: str
) -> None:
    controller.ends_as = (state, "worker-2 could not load its share")
    done = flexpert(runtime, "scale", "3")
    assert done.returncode == 18
    assert f"t-1 (scale to 3 workers) {state}: worker-2 could not load its share" in done.stderr
    assert words in done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["scale", "5"], 16, "there are 4 devices; scale to 4 or fewer"),
        (["scale", "0"], 16, "scale to at least 1; 'flexpert down' ends the cluster"),
        (["scale", "many"], 2, "parse string as an integer"),
        (["scale"], 2, "Missing argument"),
        (["drain", "worker-9"], 14, "there is no worker 'worker-9': worker-0, worker-1 serve"),
        (["drain", "../status"], 14, ""),
        (["scale", "3", "--request-id", "a b"], 2, "request_id"),
        (["scale", "3", "--request-id", "boot-x"], 2, "draw another id, found 'boot-x'"),
        (["scale", "3", "--admin-key", "wrong"], 13, "The admin key is not one of this server's"),
        (["scale", "3", "--admin-key", API_KEY], 13, "This is an API key"),
        (["status", "--admin-key", "wrong"], 13, "The admin key is not one of this server's"),
        (["scale", "3", "--url", "localhost:8000"], 2, "expected the gateway's URL"),
        (["scale", "3", "--url", "http://127.0.0.1:1"], 13, "no admin key for http://127.0.0.1:1"),
        (["scale", "3", "--name", "other"], 12, "no cluster named 'other' runs"),
    ],
)
def test_bad_wish_changes_nothing_and_says_what_is_possible(
    runtime: Path, controller: PlayedController, arguments: list[str], code: int, words: str
) -> None:
    done = flexpert(runtime, *arguments)
    assert done.returncode == code, done.stdout + done.stderr
    assert words in " ".join((done.stdout + done.stderr).replace("│", " ").split())
    assert "Traceback" not in done.stderr
    assert controller.transitions == {}


def test_wish_during_another_transition_is_a_conflict(runtime: Path, controller: PlayedController) -> None:
    controller.hold = True
    flexpert(runtime, "scale", "3", "--no-wait", "--request-id", "first")
    done = flexpert(runtime, "drain", "worker-1")
    assert (done.returncode, "t-1 is running: phase prepare; ask again after it" in done.stderr) == (15, True)
    stale = flexpert(runtime, "scale", "2", "--request-id", "first")
    assert (stale.returncode, "was used for ('scale', 3); draw another id" in stale.stderr) == (15, True)
    assert len(controller.transitions) == 1


def test_shrinking_below_what_memory_allows_is_refused(runtime: Path, controller: PlayedController) -> None:
    assert flexpert(runtime, "scale", "3").returncode == 0
    done = flexpert(runtime, "scale", "1")
    assert (done.returncode, "2 workers can, or raise --memory" in done.stderr) == (16, True)


def test_remote_cluster_is_reached_by_url_and_key(runtime: Path, server: AdminServer) -> None:
    (runtime / "default" / "state.json").unlink()
    assert flexpert(runtime, "scale", "3", "--url", f"{server.url}/v1", "--admin-key", ADMIN_KEY).returncode == 0
    variables = {"FLEXPERT_URL": server.url, "FLEXPERT_ADMIN_KEY": ADMIN_KEY}
    status = json.loads(flexpert(runtime, "status", "--json", **variables).stdout)
    assert (status["url"], len(status["workers"])) == (server.url, 3)
    told = flexpert(runtime, "events", "--json", "--after", "1", **variables).stdout.splitlines()
    assert [json.loads(line)["sequence"] for line in told] == [2, 3]


def test_controller_that_is_restarted_is_waited_for(runtime: Path, controller: PlayedController) -> None:
    controller.away = 5
    assert flexpert(runtime, "scale", "3").returncode == 0


def test_status_shows_who_holds_what_and_what_changes(runtime: Path, controller: PlayedController) -> None:
    controller.hold = True
    flexpert(runtime, "scale", "3", "--no-wait")
    shown = flexpert(runtime, "status")
    assert shown.returncode == 0, shown.stderr
    for line in (
        "epoch      6",
        "worker-1   cpu float32, incarnation 1, pid 7; 12 experts; kv 1 MiB",
        "transition t-1 (scale to 3 workers): start, 0 B of 4 MiB moved, at most 30 s more",
        "device-1   1 GiB of 2 GiB held by the HBM manager (pid 8)",
    ):
        assert line in shown.stdout


def test_bar_on_a_terminal_shows_phase_bytes_and_deadline(controller: PlayedController) -> None:
    out = io.StringIO()
    view = TransitionView(Console(file=out, force_terminal=True, width=120))
    transition = controller.scale(3, "r")
    view.show(transition)
    view.show({**transition, "phase": "prepare", "moved_bytes": 1 << 20, "deadline_s": 12.4})
    assert view._bar is not None
    view._bar.refresh()
    view.close()
    for words in ("scale to 3 workers): prepare", "1.0/4.2 MiB", "at most 12 s more"):
        assert words.replace("4.2", "4.0") in out.getvalue()


def test_transition_of_an_older_controller_is_described_all_the_same() -> None:
    assert describe_transition({"transition_id": "t-1", "state": "running"}) == "t-1: start"
    assert describe_transition({"transition_id": "t-1", "state": "aborted"}) == "t-1 aborted: no reason was given"


def test_status_does_without_the_gateway_on_this_machine(
    runtime: Path, server: AdminServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLEXPERT_RUNTIME_DIR", str(runtime))
    monkeypatch.setattr(look, "ask", lambda _runtime, word: {"told by": "up", "asked": word})
    state = runtime / "default" / "state.json"
    state.write_text(state.read_text().replace(server.url, "http://127.0.0.1:1"))
    assert look.read_status("default", url=None, admin_key=None) == {"told by": "up", "asked": "status"}
    with pytest.raises(CommandError) as caught:
        look.read_status("default", url=server.url, admin_key="wrong")
    assert caught.value.kind == "unauthorised"


def test_what_is_no_flexpert_is_told(server: AdminServer) -> None:
    api = AdminApi(f"{server.url}/elsewhere", ADMIN_KEY, patience_s=0)
    with pytest.raises(CommandError) as caught:
        api.status()
    assert caught.value.kind == "not_found"


def test_nobody_there_is_told_after_a_while() -> None:
    tries: list[float] = []
    api = AdminApi("http://127.0.0.1:1", "k", alive=lambda: len(tries) < 3, sleep=tries.append)
    with pytest.raises(CommandError, match="the cluster has ended") as caught:
        api.status()
    assert (caught.value.exit_code, len(tries)) == (12, 3)
    with pytest.raises(CommandError, match="does not answer") as caught:
        AdminApi("http://127.0.0.1:1", "k", patience_s=0).status()
    assert caught.value.exit_code == 17


def follow(api: AdminApi, begin: Callable[[str], dict[str, Any]]) -> CommandError:
    with pytest.raises(CommandError) as caught:
        begin_and_follow(
            begin, api, request_id=None, wait=True, console=Console(quiet=True),
            again=lambda wish: f"flexpert scale 3 --request-id {wish}",
        )  # fmt: skip
    return caught.value


def test_scale_without_an_answer_says_how_to_ask_again() -> None:
    api = AdminApi("http://127.0.0.1:1", "k", patience_s=0)
    asked: list[str] = []

    def begin(request_id: str) -> dict[str, Any]:
        asked.append(request_id)
        return api.scale(3, request_id=request_id)

    error = follow(api, begin)
    assert error.exit_code == 17
    assert f"it may still happen: ask again with `flexpert scale 3 --request-id {asked[0]}`" in str(error)


def test_cluster_that_ends_meanwhile_aborts_the_transition() -> None:
    begun = {"transition_id": "t-1", "asked": "scale 3", "state": "running", "phase": "prepare"}
    api = AdminApi("http://127.0.0.1:1", "k", alive=lambda: False)
    error = follow(api, lambda _: dict(begun))
    assert (error.exit_code, str(error)) == (
        18,
        "t-1 (scale 3) aborted: the cluster has ended; what happened: flexpert events",
    )


@pytest.mark.parametrize(
    ("device", "workers", "asked", "visible", "most"),
    [
        ("cpu", 1, None, "", 4),
        ("cpu", 6, None, "", 6),
        ("cpu", 2, 2, "", 2),
        ("cuda", 1, None, "0,1", 2),
        ("cuda", 2, 2, "3,4", 2),
    ],
)
def test_devices_bound_the_workers(
    monkeypatch: pytest.MonkeyPatch, device: str, workers: int, asked: int | None, visible: str, most: int
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert machine.most_workers(device, workers=workers, asked=asked) == most


def test_workers_share_gpus_only_where_that_was_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert machine.most_workers("cuda", workers=1, asked=3, share_gpus=True) == 3
    with pytest.raises(CommandError, match="found 1 GPUs"):
        machine.most_workers("cuda", workers=1, asked=3)


@pytest.mark.parametrize(
    ("device", "workers", "asked", "kind", "words"),
    [
        ("cpu", 3, 2, "usage", "--workers 3: expected at most the 2 of --max-workers"),
        ("cuda", 3, None, "device", "--workers 3: found 2 GPUs"),
        ("cuda", 1, 3, "device", "--max-workers 3: found 2 GPUs"),
    ],
)
def test_more_workers_than_devices_are_refused_at_the_start(
    monkeypatch: pytest.MonkeyPatch, device: str, workers: int, asked: int | None, kind: str, words: str
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    with pytest.raises(CommandError, match=words) as caught:
        machine.most_workers(device, workers=workers, asked=asked)
    assert caught.value.kind == kind


def test_one_key_for_clients_and_operator_is_refused(runtime: Path) -> None:
    done = flexpert(runtime, "up", "--api-key", "same", "--admin-key", "same", "--device", "cpu", "--port", "0")
    assert (done.returncode, "the API key and the admin key are the same" in done.stderr) == (2, True), done.stderr
