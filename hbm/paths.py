"""Where a manager's files are, and who holds its lock. Used by the daemon and by those who start, stop or adopt it.

The lock is a POSIX record lock: it belongs to the daemon's process, ends with it, and the kernel tells who holds it.
"""

from __future__ import annotations

import fcntl
import os
import re
import stat
import struct
from dataclasses import dataclass
from pathlib import Path

from flexpert.hbm.errors import HbmError

_FLOCK = struct.Struct("hhqqi4x")  # struct flock on 64-bit Linux
_MAX_SOCKET_PATH_BYTES = 107


@dataclass(frozen=True, slots=True)
class ManagerPaths:
    socket: Path
    lock: Path
    log: Path

    @classmethod
    def of(cls, runtime_dir: Path, name: str) -> ManagerPaths:
        """Raises HbmError for a name that is no file name, or a path too long for a Unix socket."""
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name):
            raise HbmError(f"manager name {name!r}: expected letters, digits, dots, dashes and underscores, at most 64")
        base = Path(os.path.abspath(runtime_dir))
        paths = cls(base / f"{name}.sock", base / f"{name}.lock", base / f"{name}.log")
        length = len(os.fsencode(paths.socket))
        if length > _MAX_SOCKET_PATH_BYTES:
            raise HbmError(
                f"the socket path {paths.socket} has {length} bytes, Linux allows {_MAX_SOCKET_PATH_BYTES}: "
                "choose a shorter runtime directory"
            )
        return paths


def make_runtime_dir(runtime_dir: Path) -> None:
    """Make it for this user alone; refuse one that others can write to."""
    try:
        runtime_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = runtime_dir.stat()
    except OSError as error:
        raise HbmError(f"the runtime directory {runtime_dir} cannot be used: {error}") from error
    if status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) & 0o022:
        raise HbmError(
            f"the runtime directory {runtime_dir} belongs to uid {status.st_uid} with mode {stat.S_IMODE(status.st_mode):o}; "
            f"expected uid {os.geteuid()} and nobody else with write permission. Use a directory of your own"
        )


def take_lock(path: Path) -> int | None:
    """Lock for as long as this process lives and keeps the descriptor; None where another process has it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def lock_holder(path: Path) -> int | None:
    """The pid that holds the lock, as the kernel knows it; None where nobody does."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        question = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        answer = _FLOCK.unpack(fcntl.fcntl(descriptor, fcntl.F_GETLK, question))
    finally:
        os.close(descriptor)
    kind, _whence, _start, _length, pid = answer
    return pid if kind != fcntl.F_UNLCK and pid > 0 else None
