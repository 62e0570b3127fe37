"""The private directory of one cluster: its lock, its state, its sockets and its logs.

`<root>/<name>/`, where root is $FLEXPERT_RUNTIME_DIR, $XDG_RUNTIME_DIR/flexpert or /tmp/flexpert-UID. `flexpert up` makes it and holds
the lock while it runs; the other commands and the controller find the cluster by it. Everything in it belongs to the user alone.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAX_SOCKET_PATH_BYTES = 107  # sun_path holds 108, the last one is zero
LONGEST_SOCKET_NAME = "worker-99.1000000.ep.sock"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,31}")


class RuntimeDirError(Exception):
    """The runtime directory cannot be used; says why and what to do."""


class AlreadyRunning(Exception):
    """Another `flexpert up` holds the lock of this cluster."""


@dataclass(frozen=True)
class RuntimeDir:
    """Paths below one cluster's directory. Names of files are here and nowhere else."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def lock(self) -> Path:
        return self.path / "up.lock"

    @property
    def state(self) -> Path:
        """Written by `up`: who runs, where it answers."""
        return self.path / "state.json"

    @property
    def journal(self) -> Path:
        """Written by the controller: what a restarted controller must know."""
        return self.path / "controller.json"

    @property
    def controller_pid(self) -> Path:
        """Written by the controller as it begins: which process it is."""
        return self.path / "controller.pid.json"

    @property
    def events(self) -> Path:
        """Written by the controller, one JSON object a line."""
        return self.path / "events.jsonl"

    @property
    def old_events(self) -> Path:
        """Events before those in `events`."""
        return self.path / "events.old.jsonl"

    @property
    def autoscaler(self) -> Path:
        """Written by the controller: what the scaling policy decided, and what it must know after a restart."""
        return self.path / "autoscaler"

    @property
    def admin_socket(self) -> Path:
        return self.path / "admin.sock"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    def worker_socket(self, worker_id: str, incarnation: int) -> Path:
        return self.path / f"{worker_id}.{incarnation}.sock"

    def exchange_socket(self, worker_id: str, incarnation: int) -> Path:
        """Where a worker's peers of an epoch connect."""
        return self.path / f"{worker_id}.{incarnation}.ep.sock"

    def manager_socket(self, device: str) -> Path:
        """Where the HBM manager of a device listens."""
        return self.path / f"{device}.sock"

    def manager_names(self) -> list[str]:
        """The devices that a manager was ever started for here."""
        return sorted(path.stem for path in self.path.glob("device-*.lock"))

    def read_state(self) -> dict[str, Any] | None:
        """What the last `up` wrote; None where there is nothing (or nothing readable)."""
        return read_json(self.state)


def runtime_root() -> Path:
    """Where all clusters of this user have their directories."""
    if root := os.environ.get("FLEXPERT_RUNTIME_DIR"):
        return Path(root).absolute()
    if root := os.environ.get("XDG_RUNTIME_DIR"):
        return Path(root).absolute() / "flexpert"
    return Path("/tmp") / f"flexpert-{os.getuid()}"


def find(name: str) -> RuntimeDir:
    """The directory of the cluster `name`, which need not exist."""
    if not _NAME.fullmatch(name):
        raise RuntimeDirError(
            f"cluster name {name!r}: expected letters, digits, '.', '_' and '-', at most 32, not beginning with a sign"
        )
    return RuntimeDir(runtime_root() / name)


def make(name: str) -> RuntimeDir:
    """Create the directory of the cluster `name`, or check that the one there is ours alone."""
    runtime = find(name)
    longest = len(os.fsencode(runtime.path / LONGEST_SOCKET_NAME))
    if longest > MAX_SOCKET_PATH_BYTES:
        raise RuntimeDirError(
            f"the runtime directory {runtime.path} is too long: a socket in it has a path of {longest} bytes, Unix allows "
            f"{MAX_SOCKET_PATH_BYTES}; set FLEXPERT_RUNTIME_DIR to a shorter directory"
        )
    for path in (runtime.path.parent, runtime.path, runtime.logs):
        _make_private(path)
    return runtime


def _make_private(path: Path) -> None:
    """mkdir with mode 0700; what exists must be a directory of this user that nobody else can write to."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = path.lstat()
    except OSError as error:
        raise RuntimeDirError(
            f"cannot make the runtime directory {path}: {error.strerror}; set FLEXPERT_RUNTIME_DIR to a directory you can write to"
        ) from error
    if not stat.S_ISDIR(found.st_mode):
        raise RuntimeDirError(f"{path} is not a directory; remove it or set FLEXPERT_RUNTIME_DIR")
    if found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise RuntimeDirError(
            f"{path} belongs to user {found.st_uid} with mode {stat.S_IMODE(found.st_mode):o}; expected one of your own that only you can "
            "write to: set FLEXPERT_RUNTIME_DIR"
        )


def hold_lock(runtime: RuntimeDir) -> int:
    """Take the cluster's lock for as long as the returned descriptor is open. Raises AlreadyRunning."""
    descriptor = os.open(runtime.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise AlreadyRunning(runtime.name) from None
    return descriptor


def is_locked(runtime: RuntimeDir) -> bool:
    """Whether an `up` runs."""
    with contextlib.suppress(FileNotFoundError, AlreadyRunning):
        descriptor = os.open(runtime.lock, os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(descriptor)
    return False


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Replace the file in one step, readable for the user alone."""
    write_bytes(path, json.dumps(value, indent=1).encode() + b"\n")


def write_bytes(path: Path, data: bytes) -> None:
    """Replace the file in one step, readable for the user alone."""
    new = f"{path}.new"  # no Path: its name would be interned anew at each write, which makes the interpreter's table of names grow
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
    os.replace(new, path)


def read_json(path: Path) -> dict[str, Any] | None:
    """What write_json wrote; None where there is no such file or no JSON object in it."""
    try:
        value = json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return value if isinstance(value, dict) else None
