"""Runs one load: gives it to a helper, relays its progress, and says how it ended when the helper's process has exited.

The helper maps the new granules writable; they count as loaded only after its exit, so nobody else has a writable
mapping then. A helper that is killed or crashes is a failed load with a reason, never a failed manager. Called by
`weight_desk.WeightDesk`.
"""

from __future__ import annotations

import os
import signal
from collections import deque
from collections.abc import Callable

import msgspec

from flexpert.hbm import wire
from flexpert.hbm.backend import Pool
from flexpert.hbm.errors import ProtocolError
from flexpert.hbm.helpers import Helpers
from flexpert.hbm.loop import READ, EventLoop
from flexpert.hbm.messages import Done, ErrorReply, LoaderMessage, LoadSegments, Progress
from flexpert.hbm.records import LoadRecord

_READS_A_TURN = 16


class Load:
    """A running load. `on_progress` is called with it at new numbers, `on_end` once, with it and None or the reason of the
    failure. Whoever knows it may forget it then, and nothing of it stays: it is part of no cycle of references.
    """

    def __init__(
        self,
        loop: EventLoop,
        pool: Pool,
        record: LoadRecord,
        copies: bytes,
        helpers: Helpers,
        *,
        on_progress: Callable[[Load], None],
        on_end: Callable[[Load, str | None], None],
    ) -> None:
        """Gives the load to a helper; raises OSError where no process can be started."""
        self.load_id = record.load_id
        self.done_bytes = self.total_bytes = 0
        self.waiters: list[tuple[int, LoadSegments]] = []  # (client id, its question)
        self._loop, self._on_progress, self._on_end = loop, on_progress, on_end
        self._reader = wire.loader_messages()
        self._finished = False
        self._reason: str | None = None
        given = pool.export(writable=True), _memfd_with(_task(record, copies))
        try:
            helper = helpers.start(given)
        finally:
            for descriptor in given:
                os.close(descriptor)
        self.process, self._pidfd, self._channel = helper.process, helper.pidfd, helper.channel
        loop.watch(self._channel.fileno(), READ, self._on_channel)
        loop.watch(self._pidfd, READ, self._on_exit)

    def kill(self, reason: str) -> None:
        """End it as failed, for this reason."""
        self._finished, self._reason = False, reason
        signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def _on_channel(self, _events: int) -> None:
        if not self._read(_READS_A_TURN):
            self._loop.unwatch(self._channel.fileno())
            self._channel.close()

    def _on_exit(self, _events: int) -> None:
        if self._channel.fileno() >= 0:
            self._read(1 << 20)
            if self._channel.fileno() >= 0:
                self._loop.unwatch(self._channel.fileno())
                self._channel.close()
        self._loop.unwatch(self._pidfd)
        os.close(self._pidfd)
        code = self.process.wait()
        if self._finished and code == 0:
            self._on_end(self, None)
        else:
            self._on_end(self, self._reason or self._how_it_died(code))

    def _read(self, times: int) -> bool:
        """False at the end of the stream, or of trust in it."""
        for _ in range(times):
            try:
                data = wire.receive(self._channel, deque())
            except BlockingIOError:
                return True
            except OSError:
                return False
            if not data:
                return False
            self._reader.add(data)
            try:
                for message, _num_descriptors in self._reader.messages():
                    self._take(message)
            except ProtocolError as error:
                self.kill(f"the loader helper sent nonsense: {error}")
                return False
        return True

    def _take(self, message: LoaderMessage) -> None:
        match message:
            case Progress():
                self.done_bytes, self.total_bytes = message.done_bytes, message.total_bytes
                self._on_progress(self)
            case Done():
                self._finished = True
            case ErrorReply():
                self._reason = self._reason or message.text

    def _how_it_died(self, code: int) -> str:
        if code >= 0:
            how = f"exited with code {code} (its error stands in the manager's log)"
        else:
            how = f"was killed by signal {-code} ({signal.Signals(-code).name})"
            if code in (-signal.SIGKILL, -signal.SIGBUS):
                how += "; the machine or the control group may be out of memory"
        return f"the loader helper {how} after {self.done_bytes} of {self.total_bytes} bytes; the load can be repeated"


def _task(record: LoadRecord, copies: bytes) -> bytes:
    """`messages.LoaderTask`, with the copies as they came."""
    segments = {name: (segment.nbytes, segment.extents) for name, segment in record.segments.items()}
    return msgspec.msgpack.encode((segments, msgspec.Raw(copies)))


def _memfd_with(content: bytes) -> int:
    descriptor = os.memfd_create("flexpert-hbm-task", os.MFD_CLOEXEC)
    rest = memoryview(content)
    while rest:
        rest = rest[os.write(descriptor, rest) :]
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor
