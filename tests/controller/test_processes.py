"""Processes by pid and start time: the right one is signalled and waited for, a stranger never."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace

import pytest

from flexpert.controller.processes import ProcessId, children, end_all

DEAF = (
    "import signal, sys; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
    "print('deaf', flush=True); signal.sigwait({signal.SIGUSR1})"
)


@pytest.fixture
def child() -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, text=True)
    yield process
    process.kill()
    process.wait(10)


def test_own_process_is_alive_and_survives_json() -> None:
    own = ProcessId.own("me")
    assert own.alive
    assert ProcessId.from_json(own.to_json()) == own


def test_signal_ends_it_and_wait_tells(child: subprocess.Popen[str]) -> None:
    found = ProcessId.of(child.pid)
    assert found is not None
    assert not found.wait(0)
    assert found.signal(signal.SIGTERM)
    assert found.wait(10)
    assert not found.alive
    assert not found.signal(signal.SIGTERM)


def test_stranger_with_a_recorded_pid_is_left_alone(child: subprocess.Popen[str]) -> None:
    found = ProcessId.of(child.pid)
    assert found is not None
    earlier = replace(found, start_ticks=found.start_ticks - 1)
    assert not earlier.alive
    assert not earlier.signal(signal.SIGKILL)
    assert earlier.wait(0), "the recorded one has ended"
    assert end_all([earlier], grace_s=1) == []
    assert child.poll() is None


def test_process_that_ignores_sigterm_is_killed() -> None:
    process = subprocess.Popen([sys.executable, "-c", DEAF], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "deaf\n"
    found = ProcessId.of(process.pid)
    assert found is not None
    try:
        assert end_all([found], grace_s=0.1) == [found]
        assert process.wait(10) == -signal.SIGKILL
    finally:
        process.kill()
        process.stdout.close()


def test_children_are_found_with_their_names(child: subprocess.Popen[str]) -> None:
    names = {process.pid: process.name for process in children(ProcessId.own())}
    assert names[child.pid].startswith("python")


def test_pid_without_a_process_is_nobody(child: subprocess.Popen[str]) -> None:
    child.kill()
    child.wait(10)
    assert ProcessId.of(child.pid) is None


def test_thread_that_computes_is_active_and_one_that_waits_is_not() -> None:
    code = (
        "import threading; threading.Thread(target=input).start()\n"
        "print(threading.enumerate()[1].native_id, flush=True)\n"
        "while True: pass"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as busy:
        try:
            assert busy.stdout is not None
            waiting = int(busy.stdout.readline())
            found = ProcessId.of(busy.pid)
            assert found is not None
            began_s = found.active_s()
            while (now_s := found.active_s())[busy.pid] < began_s[busy.pid] + 0.05:
                pass
            assert now_s[waiting] < began_s[waiting] + 0.05
        finally:
            busy.kill()


def test_stopped_process_is_told_from_one_that_runs(child: subprocess.Popen[str]) -> None:
    found = ProcessId.of(child.pid)
    assert found is not None
    assert not found.stopped
    found.signal(signal.SIGSTOP)
    os.waitid(os.P_PID, child.pid, os.WSTOPPED)
    assert found.stopped
    assert found.alive
    assert not replace(found, start_ticks=found.start_ticks + 1).stopped
