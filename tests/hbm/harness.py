"""What the suite's tests and fixtures share: another process to play the client, a load in the background, waits that
end, the end of a manager.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

from flexpert.hbm import HbmClient, HbmError, LoadPlan, ManagerHandle, stop_manager
from flexpert.hbm.launch import environment
from flexpert.hbm.paths import ManagerPaths, lock_holder

WAIT_S = 20.0


class Child:
    """Another process that runs code it is sent. Each run's answer is the value of `result`; an exception comes back by
    name.
    """

    def __init__(self) -> None:
        code = Path(__file__).with_name("child_process.py")
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(code)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment(),
            text=True,
        )

    @property
    def pid(self) -> int:
        return self.process.pid

    def run(self, code: str) -> Any:
        self.start(code)
        return self.answer()

    def start(self, code: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(code) + "\n")
        self.process.stdin.flush()

    def answer(self) -> Any:
        assert self.process.stdout is not None
        assert readable(self.process.stdout.fileno()), "the child does not answer"
        line = self.process.stdout.readline()
        assert line, f"the child ended with code {self.process.wait(WAIT_S)}"
        answer = json.loads(line)
        if "error" in answer:
            raise ChildError(answer["error"], answer["text"])
        return answer["result"]

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(WAIT_S)

    def stop(self) -> None:
        """SIGSTOP, and wait until it is stopped."""
        os.kill(self.pid, signal.SIGSTOP)
        _pid, status = os.waitpid(self.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)


class BackgroundLoad:
    """`load_weights` in a thread; `progressed` is readable once the helper has reported."""

    def __init__(self, client: HbmClient, plan: LoadPlan, key: str = "w") -> None:
        self.error: Exception | None = None
        self.progressed, self._report = os.pipe()
        self._client, self._plan, self._key = client, plan, key
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        try:
            self._client.load_weights(self._key, self._plan, on_progress=lambda *_: os.write(self._report, b"."))
        except HbmError as error:
            self.error = error

    def join(self) -> Exception | None:
        self.thread.join(WAIT_S)
        assert not self.thread.is_alive()
        os.close(self.progressed)
        os.close(self._report)
        return self.error


def wait_for_helper(manager: ManagerHandle, *, but: Collection[int]) -> int:
    """The pid of the helper that waits for a load, once the manager has started another one than those."""
    deadline_s = time.monotonic() + WAIT_S
    while time.monotonic() < deadline_s:
        children = Path(f"/proc/{manager.pid}/task/{manager.pid}/children").read_text().split()
        if found := [int(child) for child in children if int(child) not in but]:
            return found[0]
        select.select([], [], [], 0.02)
    raise AssertionError("no helper was started in advance")


def helper_pid(manager: ManagerHandle) -> int:
    children = Path(f"/proc/{manager.pid}/task/{manager.pid}/children").read_text().split()
    assert len(children) == 1
    return int(children[0])


class ChildError(Exception):
    def __init__(self, name: str, text: str) -> None:
        super().__init__(f"{name}: {text}")
        self.name = name
        self.text = text


def readable(descriptor: int, timeout_s: float = WAIT_S) -> bool:
    return bool(select.select([descriptor], [], [], timeout_s)[0])


def wait_for_exit(pid: int) -> None:
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        assert readable(pidfd), f"process {pid} does not exit"
    finally:
        os.close(pidfd)


def end_manager(runtime_dir: Path, name: str) -> None:
    """As a user would; by SIGKILL where that fails, and then it is an error."""
    pid = lock_holder(ManagerPaths.of(runtime_dir, name).lock)
    if pid is not None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
    try:
        stop_manager(runtime_dir, name)
    except BaseException:
        if pid is not None:
            os.kill(pid, signal.SIGKILL)
            wait_for_exit(pid)
        raise
