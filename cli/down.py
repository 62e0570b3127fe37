"""`flexpert down`: tells the running `up` to end, waits for it, and cleans up where there is none any more."""

from __future__ import annotations

import signal

from flexpert.cli.errors import CommandError
from flexpert.cli.leftovers import clean_up
from flexpert.controller.processes import ProcessId
from flexpert.controller.runtime_dir import AlreadyRunning, RuntimeDirError, find, hold_lock


def run_down(name: str, *, timeout_s: float) -> list[str]:
    """End the cluster `name`, drained; returns what was done. Ending what does not run is no error. Raises CommandError."""
    try:
        runtime = find(name)
    except RuntimeDirError as error:
        raise CommandError("directory", str(error)) from error
    if not runtime.path.is_dir():
        return [f"no cluster named {name!r} runs"]
    said: list[str] = []
    state = runtime.read_state()
    if state is not None:
        up = ProcessId.from_json(state["up"])
        if up.signal(signal.SIGTERM):
            if not up.wait(timeout_s):
                raise CommandError(
                    "running",
                    f"cluster {name!r} was told to end and has not after {timeout_s:g} s (pid {up.pid}); wait, or run down again",
                )
            said.append(f"cluster {name!r} ended")
    try:
        lock = hold_lock(runtime)
    except AlreadyRunning:
        raise CommandError("running", f"cluster {name!r} is just being started; run down again") from None
    import os

    try:
        said += clean_up(runtime, stop_manager=True)
    finally:
        os.close(lock)
    return said or [f"no cluster named {name!r} runs"]
