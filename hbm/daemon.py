"""The HBM manager as a process: `python -m flexpert.hbm`. Started, or found running, by `launch.ensure_manager`.

It leaves its parent's session and process group, so that it outlives the actor that started it, takes the lock of its
name, checks the machine's limits, listens on a Unix socket of mode 0600 and serves until SIGTERM or SIGINT. It imports
neither torch nor ray. How the start went is told to the starter as one line of JSON on a pipe: {"pid": ...}, {"busy":
true} or {"error": ..., "kind": ...}.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import socket
import sys
from pathlib import Path

from flexpert.hbm.errors import HbmError
from flexpert.hbm.host import GRANULE_BYTES, HostBackend
from flexpert.hbm.limits import ensure_descriptors, max_mappings, require_memory
from flexpert.hbm.loop import READ, EventLoop
from flexpert.hbm.paths import ManagerPaths, make_runtime_dir, take_lock
from flexpert.hbm.server import Server

log = logging.getLogger("flexpert.hbm")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m flexpert.hbm", description="The HBM manager of one device.")
    parser.add_argument("--runtime-dir", type=Path, required=True, help="directory of its socket, lock and log")
    parser.add_argument("--name", default="device-0", help="one manager for each name in a runtime directory")
    parser.add_argument("--budget-bytes", type=int, required=True, help="memory for weights and KV together")
    parser.add_argument("--ready-fd", type=int, help="write how the start went to this descriptor")
    parser.add_argument("--detach", action="store_true", help="run in a session of its own, the log in a file")
    options = parser.parse_args(arguments)
    paths = ManagerPaths.of(options.runtime_dir, options.name)
    make_runtime_dir(paths.lock.parent)
    if options.detach:
        _detach(paths.log)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    lock = take_lock(paths.lock)
    if lock is None:
        _report(options.ready_fd, {"busy": True})
        log.info("another manager has the lock %s", paths.lock)
        return 3
    try:
        max_descriptors = ensure_descriptors()
        num_granules = check_budget(options.budget_bytes)
        listener = _listen(paths.socket)
    except HbmError as error:
        log.error("%s", error)
        os.close(lock)  # before anyone hears of it, so that nobody finds a manager that is about to end
        _report(options.ready_fd, {"error": str(error), "kind": error.kind})
        return 1
    try:
        _serve(listener, num_granules=num_granules, max_descriptors=max_descriptors, ready_fd=options.ready_fd)
    finally:
        paths.socket.unlink(missing_ok=True)
    return 0


def check_budget(budget_bytes: int) -> int:
    """The budget in granules. LimitError where the machine cannot give as much now."""
    if budget_bytes < GRANULE_BYTES:
        raise HbmError(f"the memory budget is {budget_bytes} bytes; expected at least one granule of {GRANULE_BYTES}")
    require_memory(budget_bytes)
    return budget_bytes // GRANULE_BYTES


def _serve(listener: socket.socket, *, num_granules: int, max_descriptors: int, ready_fd: int | None) -> None:
    loop = EventLoop()
    server = Server(loop, HostBackend(), listener, num_granules=num_granules, max_descriptors=max_descriptors)
    wakeup_read, wakeup_write = socket.socketpair()
    for end in (wakeup_read, wakeup_write):
        end.setblocking(False)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])  # whatever the starter had blocked
    signal.set_wakeup_fd(wakeup_write.fileno())
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)

    def on_signal(_events: int) -> None:
        log.info("signal %s: ending", list(wakeup_read.recv(64)))
        loop.stop()

    loop.watch(wakeup_read.fileno(), READ, on_signal)
    log.info(
        "pid %d serves %d granules of %d bytes; %d descriptors; vm.max_map_count %d",
        os.getpid(),
        num_granules,
        GRANULE_BYTES,
        max_descriptors,
        max_mappings(),
    )
    if max_mappings() < num_granules:
        log.warning("vm.max_map_count is below the number of granules: a scattered KV arena may need more mappings")
    _report(ready_fd, {"pid": os.getpid()})
    try:
        loop.run()
    finally:
        server.close()


def _listen(path: Path) -> socket.socket:
    """We have the lock, so a socket file that lies there is a dead manager's."""
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    old_mask = os.umask(0o177)
    try:
        listener.bind(os.fspath(path))
        listener.listen(64)
    except OSError as error:
        raise HbmError(f"the socket {path} cannot be made: {error}") from error
    finally:
        os.umask(old_mask)
    return listener


def _detach(log_path: Path) -> None:
    """A session of its own, adopted by init, standard streams away from the starter's."""
    sys.stdout.flush()
    if os.fork() != 0:
        os._exit(0)
    os.setsid()
    os.chdir("/")
    null = os.open(os.devnull, os.O_RDONLY)
    log_file = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(null, 0)
    os.dup2(log_file, 1)
    os.dup2(log_file, 2)
    os.close(null)
    os.close(log_file)


def _report(descriptor: int | None, outcome: dict[str, object]) -> None:
    if descriptor is not None:
        try:
            os.write(descriptor, json.dumps(outcome).encode() + b"\n")
        except BrokenPipeError:
            log.warning("the starter has gone")
        os.close(descriptor)
