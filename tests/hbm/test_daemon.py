"""The daemon as a process: start, adopt, stop, its own session, limits, what it imports."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.hbm.harness import Child, wait_for_exit

from flexpert.hbm import (
    GRANULE_BYTES,
    HbmClient,
    HbmError,
    LimitError,
    ManagerConfig,
    ManagerGoneError,
    ManagerHandle,
    check_manager,
    ensure_manager,
    launch,
    stop_manager,
)
from flexpert.hbm.launch import environment

BUDGET_BYTES = 64 * GRANULE_BYTES


def test_a_manager_is_started_once_and_then_adopted(runtime_dir: Path) -> None:
    config = ManagerConfig(runtime_dir, budget_bytes=BUDGET_BYTES)
    started = ensure_manager(config)
    adopted = ensure_manager(ManagerConfig(runtime_dir, budget_bytes=2 * BUDGET_BYTES))
    assert (started.adopted, adopted.adopted) == (False, True)
    assert (adopted.pid, adopted.budget_bytes) == (started.pid, BUDGET_BYTES)
    assert stop_manager(runtime_dir)
    assert not stop_manager(runtime_dir)


def test_many_that_start_at_once_end_with_one_manager(runtime_dir: Path) -> None:
    handles: list[ManagerHandle] = []

    def start() -> None:
        handles.append(ensure_manager(ManagerConfig(runtime_dir, budget_bytes=BUDGET_BYTES)))

    threads = [threading.Thread(target=start) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({handle.pid for handle in handles}) == 1
    assert sorted(handle.adopted for handle in handles) == [False, True, True, True]


def test_it_has_a_session_of_its_own_and_outlives_its_starters_process_group(
    runtime_dir: Path, spawn: Callable[[], Child]
) -> None:
    code = f"import os; os.setpgid(0, 0); result = ensure_manager(ManagerConfig(Path({str(runtime_dir)!r}), budget_bytes=1 << 20)).pid"
    starter = spawn()
    pid = starter.run("from pathlib import Path; " + code)
    assert os.getsid(pid) != os.getsid(starter.pid)
    os.killpg(starter.pid, signal.SIGKILL)
    starter.process.wait()
    assert check_manager(runtime_dir).problems == []


def test_its_files_are_the_users_alone(manager: ManagerHandle, runtime_dir: Path) -> None:
    assert manager.socket_path.stat().st_mode & 0o777 == 0o600
    assert (runtime_dir / "device-0.log").stat().st_mode & 0o077 == 0 or runtime_dir.stat().st_mode & 0o077 == 0


def test_sigterm_ends_it_cleanly(manager: ManagerHandle, runtime_dir: Path) -> None:
    os.kill(manager.pid, signal.SIGTERM)
    wait_for_exit(manager.pid)
    assert not manager.socket_path.exists()
    report = check_manager(runtime_dir)
    assert not report.running
    assert "nobody holds" in report.problems[0]


def test_after_a_kill_the_next_one_starts_over_the_dead_ones_files(manager: ManagerHandle, runtime_dir: Path) -> None:
    client = HbmClient.connect(manager.socket_path, client_name="test")
    os.kill(manager.pid, signal.SIGKILL)
    wait_for_exit(manager.pid)
    assert manager.socket_path.exists()
    with pytest.raises(ManagerGoneError):
        client.info()
    client.close()
    successor = ensure_manager(ManagerConfig(runtime_dir, budget_bytes=BUDGET_BYTES))
    assert (successor.adopted, successor.pid != manager.pid) == (False, True)


def test_one_that_does_not_answer_is_named_with_what_to_do(
    manager: ManagerHandle, runtime_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.kill(manager.pid, signal.SIGSTOP)
    monkeypatch.setattr(launch, "START_TIMEOUT_S", 0.3)
    with pytest.raises(ManagerGoneError, match=rf"pid {manager.pid} .*does not answer.*kill -CONT {manager.pid}"):
        ensure_manager(ManagerConfig(runtime_dir, budget_bytes=BUDGET_BYTES))


def test_managers_of_two_names_live_side_by_side(runtime_dir: Path) -> None:
    first = ensure_manager(ManagerConfig(runtime_dir, "device-0", BUDGET_BYTES))
    second = ensure_manager(ManagerConfig(runtime_dir, "device-1", BUDGET_BYTES))
    assert first.pid != second.pid
    assert stop_manager(runtime_dir, "device-1")
    assert check_manager(runtime_dir, "device-0").problems == []


def test_a_budget_beyond_the_machines_memory_is_refused_with_both_numbers(runtime_dir: Path) -> None:
    with pytest.raises(LimitError, match=r"memory budget is 1125899906842624 bytes .*only \d+ bytes .*available"):
        ensure_manager(ManagerConfig(runtime_dir, budget_bytes=1 << 50))
    assert not check_manager(runtime_dir).running


def test_a_budget_below_one_granule_is_refused(runtime_dir: Path) -> None:
    with pytest.raises(HbmError, match="expected at least one granule"):
        ensure_manager(ManagerConfig(runtime_dir, budget_bytes=GRANULE_BYTES - 1))


def test_too_few_descriptors_are_refused_with_what_to_do(runtime_dir: Path, spawn: Callable[[], Child]) -> None:
    child = spawn()
    child.run("import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))")
    text = child.run(
        f"""
from pathlib import Path
try:
    ensure_manager(ManagerConfig(Path({str(runtime_dir)!r}), budget_bytes=1 << 20))
except LimitError as error:
    result = str(error)
"""
    )
    assert "RLIMIT_NOFILE" in text
    assert "is 64" in text
    assert "ulimit -Hn 256" in text
    assert not check_manager(runtime_dir).running


def test_the_soft_descriptor_limit_is_raised_to_the_hard_one(runtime_dir: Path, spawn: Callable[[], Child]) -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    child = spawn()
    child.run(f"import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (100, {hard}))")
    pid = child.run(
        f"from pathlib import Path; result = ensure_manager(ManagerConfig(Path({str(runtime_dir)!r}), budget_bytes=1 << 20)).pid"
    )
    [line] = [
        line for line in Path(f"/proc/{pid}/limits").read_text().splitlines() if line.startswith("Max open files")
    ]
    assert line.split()[3] == str(hard)


def test_a_runtime_directory_that_others_can_write_is_refused(runtime_dir: Path) -> None:
    runtime_dir.chmod(0o777)
    with pytest.raises(HbmError, match="nobody else with write permission"):
        ensure_manager(ManagerConfig(runtime_dir, budget_bytes=BUDGET_BYTES))


def test_a_runtime_directory_too_deep_for_a_socket_is_refused() -> None:
    with pytest.raises(HbmError, match="shorter runtime directory"):
        ensure_manager(ManagerConfig(Path("/tmp") / ("d" * 100), budget_bytes=BUDGET_BYTES))


def test_a_name_that_is_no_file_name_is_refused(runtime_dir: Path) -> None:
    with pytest.raises(HbmError, match="manager name"):
        ensure_manager(ManagerConfig(runtime_dir, "../other", BUDGET_BYTES))


def test_neither_torch_nor_ray_nor_numpy_is_imported() -> None:
    code = "import sys, flexpert.hbm, flexpert.hbm.daemon, flexpert.hbm.loader; print({'torch', 'ray', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
