"""Commands without a cluster: what is typed wrong is told at once, with its own exit code and nothing left behind."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest
from tests.cli.harness import flexpert

from flexpert.cli.errors import CommandError
from flexpert.cli.machine import available_memory_bytes, check_memory, cores
from flexpert.cli.options import parse_bytes, show_bytes
from flexpert.controller.runtime_dir import hold_lock, is_locked, make, write_json


@pytest.mark.parametrize(
    ("text", "size"),
    [("4GiB", 4 << 30), ("512 MB", 512 * 10**6), ("1.5g", 3 << 29), ("4096", 4096), ("64k", 65536), ("1TiB", 1 << 40)],
)
def test_sizes_are_read_with_their_units(text: str, size: int) -> None:
    assert parse_bytes(text, option="--memory") == size


@pytest.mark.parametrize("text", ["", "x", "-1", "0", "4 apples", "1e9", "GiB"])
def test_wrong_sizes_name_the_option(text: str) -> None:
    with pytest.raises(CommandError, match=r"--memory .*expected a size"):
        parse_bytes(text, option="--memory")


def test_sizes_are_shown_with_units() -> None:
    assert [show_bytes(size) for size in (5, 2048, 3 << 20, 5 << 40)] == ["5 B", "2 KiB", "3 MiB", "5 TiB"]


def test_more_memory_than_there_is_is_refused() -> None:
    with pytest.raises(CommandError, match=r"--memory: found .* of free memory") as caught:
        check_memory(available_memory_bytes() * 2)
    assert caught.value.exit_code == 7
    assert 1 <= cores() <= (os.cpu_count() or 1)


def test_help_and_version(runtime: Path) -> None:
    version = flexpert(runtime, "--version")
    assert (version.returncode, version.stdout.split()[0]) == (0, "flexpert")
    for command in ("up", "down", "status", "logs", "events", "hbm"):
        shown = flexpert(runtime, command, "--help")
        assert shown.returncode == 0
        assert "Usage" in shown.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["up", "no-such-directory"], 5, "found no such directory"),
        (["up", "some-org/some-model"], 5, "the hub cannot be reached"),
        (["up", "--model", "a", "b"], 2, "two models"),
        (["up", "--memory", "lots"], 2, "--memory 'lots': expected a size"),
        (["up", "--kv-memory", "0"], 2, "--kv-memory '0': expected a size"),
        (["up", "--memory", "900TiB"], 7, "900 TiB were asked for"),
        (["up", "--memory", "64MiB", "--kv-memory", "64MiB"], 7, "expected less than the 64 MiB of --memory"),
        (["up", "--device", "tpu"], 2, "expected one of auto, cpu, cuda"),
        (["up", "--dtype", "int4"], 2, "expected one of float32"),
        (["up", "--log-level", "loud"], 2, "expected one of debug"),
        (["up", "--port", "70000"], 2, "--port"),
        (["up", "--max-running", "0"], 2, "--max-running"),
        (["up", "--host", "203.0.113.7"], 4, "203.0.113.7"),
        (["up", "--host", "no.such.host.invalid"], 4, "--host no.such.host.invalid"),
        (["up", "--name", "../x"], 11, "cluster name '../x'"),
        (["up", "--no-auth", "--api-key", "k"], 2, "--no-auth and an API key"),
        (["status"], 12, "no cluster named 'default' runs"),
        (["hbm", "check"], 12, "no HBM manager"),
        (["logs"], 12, "no logs"),
    ],
)
def test_mistake_gets_a_clear_line_and_its_own_code(runtime: Path, arguments: list[str], code: int, words: str) -> None:
    done = flexpert(runtime, *arguments)
    assert done.returncode == code, done.stdout + done.stderr
    assert words in " ".join((done.stdout + done.stderr).split())
    assert "Traceback" not in done.stdout + done.stderr


def test_cuda_without_a_gpu_is_refused(runtime: Path) -> None:
    if Path("/dev/nvidiactl").exists():
        pytest.skip("this machine has a GPU")
    done = flexpert(runtime, "up", "--device", "cuda")
    assert (done.returncode, "use --device cpu" in done.stderr) == (9, True), done.stderr


def test_port_in_use_is_told_before_anything_starts(runtime: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = flexpert(runtime, "up", "--device", "cpu", "--port", str(port))
    assert done.returncode == 4
    assert f"127.0.0.1:{port} cannot be listened on" in done.stderr


@pytest.mark.parametrize(
    ("files", "code", "words"),
    [
        ({}, 5, "found no config.json"),
        ({"config.json": "{not json"}, 5, "config.json cannot be read"),
        ({"config.json": "[]"}, 5, "config.json holds no JSON object"),
        ({"config.json": "{}"}, 6, "found no *.safetensors file"),
        ({"config.json": "{}", "model.safetensors": "12345678"}, 6, "model.safetensors is truncated or damaged"),
        (
            {
                "config.json": "{}",
                "a.safetensors": "",
                "model.safetensors.index.json": json.dumps({"weight_map": {"w": "b.safetensors"}}),
            },
            6,
            "b.safetensors named in model.safetensors.index.json is missing",
        ),
    ],
)
def test_broken_checkpoint_is_told_at_once(
    runtime: Path, tmp_path: Path, files: dict[str, str], code: int, words: str
) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    done = flexpert(runtime, "up", str(tmp_path), "--device", "cpu")
    assert done.returncode == code
    assert words in done.stderr


def test_truncated_weights_are_told_at_once(runtime: Path, tmp_path: Path, tiny_model: Path) -> None:
    (tmp_path / "config.json").write_text((tiny_model / "config.json").read_text())
    whole = (tiny_model / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-1000])
    done = flexpert(runtime, "up", str(tmp_path), "--device", "cpu")
    assert done.returncode == 6
    assert "model.safetensors is truncated or damaged" in done.stderr


def test_down_of_nothing_is_no_error(runtime: Path) -> None:
    done = flexpert(runtime, "down")
    assert (done.returncode, done.stdout) == (0, "no cluster named 'default' runs\n")


@pytest.mark.parametrize(
    ("address", "words"),
    [("127.0.0.1:9", "cannot be reached"), ("ray://127.0.0.1:10001", "expected host:port")],
)
def test_ray_cluster_that_cannot_be_joined_is_told_at_once(
    runtime: Path, tiny_model: Path, address: str, words: str
) -> None:
    done = flexpert(runtime, "up", str(tiny_model), "--device", "cpu", "--port", "0", RAY_ADDRESS=address)
    assert done.returncode == 10
    assert words in done.stderr


def test_leftovers_in_a_ray_cluster_that_is_gone_keep_nobody_waiting(
    runtime: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLEXPERT_RUNTIME_DIR", str(runtime))
    gone = {"pid": 2**22 + 1, "start_ticks": 1, "name": "up"}
    write_json(make("default").state, {"up": gone, "ray_address": "127.0.0.1:9"})
    sockets = [make("default").path / f"worker-0.1{ending}" for ending in (".sock", ".ep.sock", ".ep.sock.kv")]
    for path in sockets:
        path.touch()
    done = flexpert(runtime, "down")
    assert done.returncode == 0
    assert "could not look for actors" in done.stdout
    assert not any(path.exists() for path in sockets)
    assert flexpert(runtime, "down").stdout == "no cluster named 'default' runs\n"


def test_second_up_of_the_same_name_is_refused(runtime: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEXPERT_RUNTIME_DIR", str(runtime))
    made = make("default")
    lock = hold_lock(made)
    try:
        assert is_locked(made)
        done = flexpert(runtime, "up", "--device", "cpu")
    finally:
        os.close(lock)
    assert done.returncode == 3
    assert "runs already" in done.stderr


def test_runtime_directory_that_others_can_write_to_is_refused(runtime: Path) -> None:
    (runtime / "default").mkdir()
    (runtime / "default").chmod(0o777)
    done = flexpert(runtime, "up")
    (runtime / "default").chmod(0o700)
    assert (done.returncode, "only you can write to" in done.stderr) == (11, True), done.stderr


def test_runtime_directory_with_a_long_path_is_refused(runtime: Path) -> None:
    done = flexpert(runtime / ("x" * 90), "up")
    assert done.returncode == 11
    assert "set FLEXPERT_RUNTIME_DIR to a shorter directory" in done.stderr
