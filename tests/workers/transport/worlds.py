"""Groups of ranks to test with: threads over the local transport, processes over those that connect processes.

A world is made once for a module; its ranks are called by `call`, which returns at once, and `everyone`, which waits for all.
Processes come from a fork server that has loaded torch once.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import threading
import traceback
from concurrent.futures import Future
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path

from flexpert.workers import epoch as epochs
from flexpert.workers.epoch import Epoch, Member
from flexpert.workers.transport import LocalGroup

from .play import TOKEN, Player

TIMEOUT_S = 60
_numbers = itertools.count(1)
_context = multiprocessing.get_context("forkserver")


def stop_fork_server() -> None:
    """It would outlive the tests by a moment; the methods are those that Python's own tests stop it with."""
    forkserver._forkserver._stop()
    resource_tracker._resource_tracker._stop()


def preload() -> None:
    _context.set_forkserver_preload([__name__])


class ThreadRank:
    def __init__(self) -> None:
        self.player = Player()

    def call(self, operation: str, *arguments, **options) -> Future:
        future: Future = Future()

        def run() -> None:
            try:
                future.set_result(getattr(self.player, operation)(*arguments, **options))
            except BaseException as error:
                future.set_exception(error)

        threading.Thread(target=run, daemon=True).start()
        return future

    def end(self) -> None:
        self.player.close_all()


class ProcessRank:
    """A process that runs the calls it is sent, each in a thread of its own."""

    def __init__(self) -> None:
        self._connection, theirs = _context.Pipe()
        self.process = _context.Process(target=serve, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()
        self._futures: dict[int, Future] = {}
        self._numbers = itertools.count()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def call(self, operation: str, *arguments, **options) -> Future:
        number, future = next(self._numbers), Future()
        self._futures[number] = future
        self._connection.send((number, operation, arguments, options))
        return future

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.process.pid, number)

    def kill(self) -> None:
        self.process.kill()
        self.process.join(TIMEOUT_S)

    def end(self) -> None:
        self.kill()
        self._reader.join(TIMEOUT_S)
        self._connection.close()
        self.process.close()

    def _read(self) -> None:
        while True:
            try:
                number, result, error = self._connection.recv()
            except (EOFError, OSError):
                break
            if error:
                self._futures.pop(number).set_exception(AssertionError(error))
            else:
                self._futures.pop(number).set_result(result)
        for future in self._futures.values():
            future.set_exception(EOFError("the rank's process has ended"))


def serve(connection: Connection) -> None:
    """Runs in the rank's process until its parent is gone."""
    player, lock = Player(), threading.Lock()
    threads: list[threading.Thread] = []

    def run(number: int, operation: str, arguments: tuple, options: dict) -> None:
        try:
            answer = (number, getattr(player, operation)(*arguments, **options), None)
        except BaseException:
            answer = (number, None, traceback.format_exc())
        with lock:
            connection.send(answer)

    while True:
        try:
            number, operation, arguments, options = connection.recv()
        except EOFError:
            return
        if operation == "resources":  # of this process when it does nothing else
            for thread in threads:
                thread.join()
            run(number, operation, arguments, options)
            continue
        threads = [thread for thread in threads if thread.is_alive()]
        threads.append(threading.Thread(target=run, args=(number, operation, arguments, options), daemon=True))
        threads[-1].start()


class World:
    """Ranks of one kind of transport ("local", "mapped", "gloo", "nccl"), in no epoch until `connect`."""

    def __init__(self, kind: str, size: int, folder: Path) -> None:
        self.kind = kind
        self.size = size
        self.ranks = [ThreadRank() if kind == "local" else ProcessRank() for _ in range(size)]
        if kind != "local":
            self.addresses = self.everyone("listen", lambda rank: (self._address(folder, rank),))

    def _address(self, folder: Path, rank: int) -> str:
        return f"unix:{folder}/{next(_numbers)}.{rank}" if self.kind in ("mapped", "nccl") else "tcp:127.0.0.1:0"

    def epoch(self, number: int | None = None) -> Epoch:
        members = tuple(
            Member(worker_id=f"worker-{rank}", incarnation=1, exchange_address=address, manager_socket="")
            for rank, address in enumerate(self.addresses)
        )
        return Epoch(number=next(_numbers) if number is None else number, members=members, holders=())

    def connect(self, name: str = "t", **options) -> None:
        """A new epoch of all ranks, under `name` at each."""
        if self.kind == "local":
            group = LocalGroup(self.size, step_timeout_s=options.get("step_timeout_s", 20.0))
            for rank, each in enumerate(self.ranks):
                each.player.transports[name] = group.transport(rank)
            return
        epoch = epochs.encode(self.epoch())
        answers = self.everyone("connect", lambda rank: (name, self.kind, epoch, rank), **options)
        assert answers == [None] * self.size

    def call(self, rank: int, operation: str, *arguments, **options) -> Future:
        return self.ranks[rank].call(operation, *arguments, **options)

    def everyone(self, operation: str, arguments=lambda rank: (), ranks: list[int] | None = None, **options) -> list:
        """The answers of all ranks, or of `ranks`, that run `operation` at the same time."""
        wanted = range(self.size) if ranks is None else ranks
        futures = [self.call(rank, operation, *arguments(rank), **options) for rank in wanted]
        return [future.result(TIMEOUT_S) for future in futures]

    def end(self) -> None:
        for rank in self.ranks:
            rank.end()


__all__ = ["TIMEOUT_S", "TOKEN", "ProcessRank", "World", "preload", "stop_fork_server"]
