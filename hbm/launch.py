"""Starts, adopts, stops and examines a manager. Called by the node agent, the command line and tests.

A manager is found by its lock, not by a pid file: the kernel says which process holds it. One that runs already is
adopted as it is, weights and KV included, even where its budget differs from the one asked for (the handle tells).
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import flexpert
from flexpert.hbm.client import HbmClient, ManagerInfo
from flexpert.hbm.errors import HbmError, ManagerGoneError, error_of_kind
from flexpert.hbm.host import GRANULE_BYTES
from flexpert.hbm.paths import ManagerPaths, lock_holder, make_runtime_dir

START_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 15.0
_LOG_TAIL_BYTES = 2000


@dataclass(frozen=True, slots=True)
class ManagerConfig:
    runtime_dir: Path
    name: str = "device-0"
    budget_bytes: int = 0


@dataclass(frozen=True, slots=True)
class ManagerHandle:
    """budget_bytes: of the manager that runs, which an adopted one was started with."""

    socket_path: Path
    pid: int
    adopted: bool
    budget_bytes: int


@dataclass(frozen=True, slots=True)
class ManagerReport:
    """What `check_manager` found. `problems` is empty when all is well; `info` is None when no manager answers."""

    running: bool
    pid: int | None
    problems: list[str] = field(default_factory=list)
    info: ManagerInfo | None = None


def ensure_manager(config: ManagerConfig) -> ManagerHandle:
    """The running manager of that name, or a new one.

    Raises HbmError: LimitError for too few descriptors or too little memory, ManagerGoneError for one that holds the
    lock but does not answer, HbmError for a runtime directory that cannot be used.
    """
    paths = ManagerPaths.of(config.runtime_dir, config.name)
    make_runtime_dir(paths.lock.parent)
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        holder = lock_holder(paths.lock)
        if holder is not None:
            handle = _adopt(paths, holder, deadline)
        else:
            handle = _start(config, paths)
        if handle is not None:
            return handle
        if time.monotonic() > deadline:
            raise ManagerGoneError(
                f"no HBM manager {config.name!r} came up within {START_TIMEOUT_S:.0f} s; see {paths.log}"
            )
        time.sleep(0.01)  # another one is starting, or has just ended


def stop_manager(runtime_dir: Path, name: str = "device-0") -> bool:
    """End the manager: weights and KV are gone then. False where none runs. Raises HbmError where it does not end."""
    paths = ManagerPaths.of(runtime_dir, name)
    pid = lock_holder(paths.lock)
    if pid is None:
        return False
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return False
    try:
        if lock_holder(paths.lock) != pid:  # it ended in between, and the number may be another's
            return False
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(pidfd, signal.SIGTERM)
        if not _readable(pidfd, STOP_TIMEOUT_S):
            raise HbmError(
                f"HBM manager {name!r} (pid {pid}) did not end within {STOP_TIMEOUT_S:.0f} s of SIGTERM; see {paths.log}. "
                f"`kill -9 {pid}` ends it"
            )
    finally:
        os.close(pidfd)
    return True


def check_manager(runtime_dir: Path, name: str = "device-0") -> ManagerReport:
    """Has the manager prove its books, and looks at its process and files. Changes nothing; raises nothing but for a
    bad name.
    """
    paths = ManagerPaths.of(runtime_dir, name)
    pid = lock_holder(paths.lock)
    if pid is None:
        return ManagerReport(False, None, [f"no HBM manager {name!r} runs: nobody holds {paths.lock}"])
    problems = []
    try:
        mode = paths.socket.stat().st_mode & 0o777
        if mode != 0o600:
            problems.append(f"{paths.socket} has mode {mode:o}, expected 600")
        client = HbmClient.connect(paths.socket, client_name="check")
    except (OSError, HbmError) as error:
        return ManagerReport(
            True, pid, [*problems, f"the manager (pid {pid}) does not answer: {error}; see {paths.log}"]
        )
    try:
        problems.extend(client.findings())
        info = client.info()
    except HbmError as error:
        return ManagerReport(
            True, pid, [*problems, f"the manager (pid {pid}) does not answer: {error}; see {paths.log}"]
        )
    finally:
        client.close()
    if info.pid != pid:
        problems.append(f"pid {pid} holds the lock, but pid {info.pid} answers on {paths.socket}")
    return ManagerReport(True, pid, problems, info)


def _adopt(paths: ManagerPaths, holder: int, deadline: float) -> ManagerHandle | None:
    """None: not listening yet, or just gone; try again."""
    try:
        client = HbmClient.connect(paths.socket, client_name="ensure_manager", timeout_s=deadline - time.monotonic())
    except (FileNotFoundError, ConnectionRefusedError):
        return None
    except ManagerGoneError as error:
        if lock_holder(paths.lock) != holder:
            return None
        raise ManagerGoneError(
            f"the HBM manager with pid {holder} holds {paths.lock} and does not answer ({error}). If it is stopped, continue it "
            f"(`kill -CONT {holder}`); `kill -9 {holder}` ends it, with the weights and KV it holds"
        ) from error
    try:
        info = client.info()
    finally:
        client.close()
    return ManagerHandle(paths.socket, info.pid, True, info.budget_bytes)


def _start(config: ManagerConfig, paths: ManagerPaths) -> ManagerHandle | None:
    """None: someone else was faster."""
    ready_read, ready_write = os.pipe()
    arguments = [
        "--runtime-dir",
        str(paths.lock.parent),
        "--name",
        config.name,
        "--budget-bytes",
        str(config.budget_bytes),
    ]
    command = [sys.executable, "-P", "-m", "flexpert.hbm", *arguments, "--detach", "--ready-fd", str(ready_write)]
    try:
        with open(paths.log, "ab") as log_file:
            starter = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log_file,
                stderr=log_file,
                pass_fds=[ready_write],
                env=environment(),
                start_new_session=True,
            )
        os.close(ready_write)
        ready_write = -1
        outcome = _read_line(ready_read, START_TIMEOUT_S)
        starter.wait(timeout=START_TIMEOUT_S)
    finally:
        os.close(ready_read)
        if ready_write >= 0:
            os.close(ready_write)
    if outcome.get("busy"):
        return None
    if "pid" not in outcome:
        text = str(outcome.get("error", f"it said nothing. The end of {paths.log}: {_tail(paths.log)}"))
        raise error_of_kind(str(outcome.get("kind", "")), f"the HBM manager {config.name!r} could not start: {text}")
    return ManagerHandle(
        paths.socket, int(str(outcome["pid"])), False, config.budget_bytes // GRANULE_BYTES * GRANULE_BYTES
    )


def environment() -> dict[str, str]:
    """This process's environment, with the package importable however this process found it."""
    package_root = str(Path(flexpert.__file__).parent.parent)
    others = [part for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part and part != package_root]
    return {**os.environ, "PYTHONPATH": os.pathsep.join([package_root, *others])}


def _read_line(descriptor: int, timeout_s: float) -> dict[str, object]:
    deadline = time.monotonic() + timeout_s
    received = b""
    while b"\n" not in received and _readable(descriptor, deadline - time.monotonic()):
        data = os.read(descriptor, 65536)
        if not data:
            break
        received += data
    with contextlib.suppress(ValueError):
        outcome = json.loads(received)
        if isinstance(outcome, dict):
            return outcome
    return {}


def _readable(descriptor: int, timeout_s: float) -> bool:
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(max(0.0, timeout_s) * 1000))


def _tail(path: Path) -> str:
    try:
        return path.read_bytes()[-_LOG_TAIL_BYTES:].decode(errors="replace").strip() or "(empty)"
    except OSError as error:
        return f"(unreadable: {error})"
