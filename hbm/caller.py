"""Questions and answers over one socket to the HBM manager.

A reader thread takes what the manager sends and hands each answer to the caller that waits for it, so calls may come
from any thread, and sending a batch of arena operations waits for nothing: a refusal, or the manager's end, is noticed
by the thread and raised by the next call. `client.HbmClient` is built on it.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import queue
import socket
import threading
from collections import deque
from collections.abc import Callable, Iterable
from typing import TypeVar

from flexpert.hbm import messages as m
from flexpert.hbm import wire
from flexpert.hbm.errors import HbmError, ManagerGoneError, error_of_kind

LAST_WORDS_TIMEOUT_S = 1.0

Answer = TypeVar("Answer")


class Caller:
    """One connection. `_on_gone` is called by the reader thread when it has ended."""

    def __init__(self, sock: socket.socket, *, timeout_s: float) -> None:
        self._sock = sock
        self._timeout_s = timeout_s
        self._pid = os.getpid()
        self._requests = itertools.count(1)
        self._send_lock = threading.Lock()
        self._waiting: dict[int, queue.SimpleQueue[Answered | None]] = {}
        self._descriptors: deque[int] = deque()
        self._lease_faults: dict[int, str] = {}
        self._gone: str | None = None
        self._reader = threading.Thread(target=self._read, name="hbm-client", daemon=True)

    def require_open(self) -> None:
        """Raises ManagerGoneError once the connection has ended, HbmError in a forked child."""
        if os.getpid() != self._pid:
            raise HbmError(f"this HbmClient belongs to process {self._pid}; a forked child must connect for itself")
        if self._gone is not None:
            raise ManagerGoneError(self._gone)

    def _ask(self, answer_type: type[Answer], question: Callable[[int], object]) -> Answer:
        return self._ask_for_descriptors(answer_type, question, num_descriptors=0)[0]

    def _ask_for_descriptors(
        self,
        answer_type: type[Answer],
        question: Callable[[int], object],
        *,
        num_descriptors: int,
        timeout_s: float | None = None,
    ) -> tuple[Answer, list[int]]:
        request, answers = self._begin()
        try:
            self._send(question(request))
            answer, descriptors = self._next_answer(answers, timeout_s=timeout_s or self._timeout_s)
        finally:
            self._waiting.pop(request, None)
        if not isinstance(answer, answer_type) or len(descriptors) != num_descriptors:
            close_all(descriptors)
            raise HbmError(f"the HBM manager answered {type(answer).__name__}, expected {answer_type.__name__}")
        return answer, descriptors

    def _begin(self) -> tuple[int, queue.SimpleQueue[Answered | None]]:
        self.require_open()
        request = next(self._requests)
        answers: queue.SimpleQueue[Answered | None] = queue.SimpleQueue()
        self._waiting[request] = answers
        return request, answers

    def _next_answer(self, answers: queue.SimpleQueue[Answered | None], *, timeout_s: float | None) -> Answered:
        self.require_open()
        try:
            answered = answers.get(timeout=timeout_s)
        except queue.Empty:
            raise ManagerGoneError(f"the HBM manager has not answered for {timeout_s:.0f} s") from None
        if answered is None:
            self.require_open()
            raise ManagerGoneError("the connection to the HBM manager has ended")
        message = answered[0]
        if isinstance(message, m.ErrorReply):
            close_all(answered[1])
            raise error_of_kind(message.kind, message.text)
        return answered

    def _send(self, message: object) -> None:
        frame = wire.encode(message)
        with self._send_lock:
            try:
                self._sock.sendall(frame)
            except OSError as error:
                # A part of the frame may have gone out: nothing can follow it. Why it ended may still be there to be read.
                with contextlib.suppress(OSError):
                    self._sock.shutdown(socket.SHUT_WR)
                if threading.current_thread() is not self._reader:
                    self._reader.join(LAST_WORDS_TIMEOUT_S)
                with contextlib.suppress(OSError):
                    self._sock.shutdown(socket.SHUT_RDWR)
                self.require_open()
                raise ManagerGoneError(f"the HBM manager takes no messages: {error}") from error

    def _on_gone(self) -> None:
        raise NotImplementedError

    # The reader thread

    def _read(self) -> None:
        told = ""  # why the manager closes the connection, in its own words
        reason = "the HBM manager has ended, or closed the connection"
        frames = wire.manager_messages()
        try:
            while data := wire.receive(self._sock, self._descriptors):
                frames.add(data)
                for message, num_descriptors in frames.messages():
                    descriptors = [self._descriptors.popleft() for _ in range(num_descriptors)]
                    if isinstance(message, m.ErrorReply) and message.request == 0 and message.lease_id == 0:
                        told = message.text
                    self._deliver(message, descriptors)
        except (OSError, HbmError, IndexError) as error:
            reason = f"the connection to the HBM manager broke: {error}"
        self._gone = told or reason
        close_all(self._descriptors)
        self._on_gone()
        for answers in list(self._waiting.values()):
            answers.put(None)

    def _deliver(self, message: m.ManagerMessage, descriptors: list[int]) -> None:
        if isinstance(message, m.ErrorReply) and message.request == 0:
            if message.lease_id:
                self._lease_faults[message.lease_id] = message.text
            return
        answers = self._waiting.get(message.request)
        if answers is None:  # the caller gave up waiting
            close_all(descriptors)
            if isinstance(message, m.ArenaReply):
                self._send(m.ReleaseArena(next(self._requests), message.lease_id))
            elif isinstance(message, m.GrownReply):
                self._send(m.ShrinkArena(next(self._requests), message.lease_id, list(message.extents)))
            elif isinstance(message, m.PinnedReply):
                self._send(m.ReleasePin(next(self._requests), message.pin_id))
        else:
            answers.put((message, descriptors))


Answered = tuple[m.ManagerMessage, list[int]]


def close_all(descriptors: Iterable[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
