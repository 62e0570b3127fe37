"""What every suite shares: offline settings, the gpu marker, and the proof that no test leaves a process behind.

The settings go into the environment before any test module is imported, so that the processes tests start have them too.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

# Every process a test starts inherits this variable, however it detaches itself: daemons, Ray workers, helpers.
_MARK = "FLEXPERT_TEST_RUN"
_GRACE_S = float(os.environ.get("FLEXPERT_TEST_GRACE_S", "20"))
_EXEC_S = 0.5  # the longest that a process is given to show its environment after it was started

os.environ[_MARK] = uuid.uuid4().hex
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

# Machines that run the tests are shared: how long an example takes says nothing about the code.
hypothesis.settings.register_profile("flexpert", deadline=None, print_blob=True)
hypothesis.settings.load_profile("flexpert")


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and not _has_cuda():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def source_files(repository: Path) -> list[Path]:
    """Every file that git tracks or would track, relative to the root; symlinked folders are one entry, the link."""
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=repository, check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    names = sorted(set(filter(None, listing.split("\0"))))
    return [Path(name) for name in names if os.path.lexists(repository / name)]


@pytest.fixture(scope="session", autouse=True)
def no_process_outlives_the_tests() -> Iterator[None]:
    """Fails the suite, and ends what it finds by process id, where a process started here still runs at the end."""
    yield
    deadline = time.monotonic() + _GRACE_S
    while (left := _processes_of_this_run()) and time.monotonic() < deadline:
        _wait_for_exit(next(iter(left)), timeout_s=max(0.0, deadline - time.monotonic()))
    for pid in left:
        _kill(pid)
        _wait_for_exit(pid, timeout_s=_GRACE_S)
    assert not left, f"these processes outlived the tests that started them: {left}"


def _processes_of_this_run() -> dict[int, str]:
    """Process id -> command line of every process but this one that carries this run's mark; zombies are gone already."""
    mark = f"{_MARK}={os.environ[_MARK]}".encode()
    deadline = time.monotonic() + _EXEC_S
    found = {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit() or int(folder.name) == os.getpid():
            continue
        try:
            if mark in _environment(folder, deadline).split(b"\0"):
                found[int(folder.name)] = (
                    (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                )
        except OSError:  # it ended meanwhile, or is another user's
            continue
    return found


def _environment(process: Path, deadline: float) -> bytes:
    """The environment of a process, by its folder in /proc.

    It reads as empty for a moment in the middle of execve(2), which Popen does not wait for; a process that really has
    none, or is a zombie, reads so for ever.
    """
    while not (environment := (process / "environ").read_bytes()) and time.monotonic() < deadline:
        os.readlink(process / "exe")  # a kernel thread and a zombie have no program: OSError
        os.sched_yield()
    return environment


def _wait_for_exit(pid: int, *, timeout_s: float) -> None:
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        select.select([pidfd], [], [], timeout_s)
    finally:
        os.close(pidfd)


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
