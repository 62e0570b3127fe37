"""The processes of loader helpers: one always waits, its imports done, for the next load.

Starting Python takes longer than reading a gigabyte from a peer's memory, and a join waits for it. A helper serves one load and exits; the
next is started when no load runs, so that it takes no time from one. Until it is given a load it has neither the pool nor anything else.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence

from flexpert.hbm import wire


class Helper:
    """A process that has been started. channel: our end, on which it reports. pidfd: readable once it has exited."""

    def __init__(self) -> None:
        """Raises OSError where no process can be started."""
        self.channel, theirs = socket.socketpair()
        try:
            command = [sys.executable, "-P", "-m", "flexpert.hbm.loader", str(theirs.fileno())]
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=2, pass_fds=(theirs.fileno(),))
            self.pidfd = os.pidfd_open(self.process.pid)
        except OSError:
            self.channel.close()
            raise
        finally:
            theirs.close()

    def give(self, descriptors: Sequence[int]) -> None:
        """The pool and the task. Raises OSError where it has ended."""
        wire.send_some(self.channel, b"\0", descriptors)
        self.channel.setblocking(False)

    def kill(self) -> None:
        """It is gone, and its exit waited for, when this returns."""
        signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
        self.process.wait()
        os.close(self.pidfd)
        self.channel.close()


class Helpers:
    def __init__(self) -> None:
        self._spare: Helper | None = None

    def prepare(self) -> None:
        """Have one that waits. Raises OSError where no process can be started."""
        if self._spare is not None and self._spare.process.poll() is not None:
            self.close()
        if self._spare is None:
            self._spare = Helper()

    def start(self, descriptors: Sequence[int]) -> Helper:
        """One that has been given these: the one that waits, or a new one. Raises OSError."""
        spare, self._spare = self._spare, None
        if spare is not None:
            try:
                spare.give(descriptors)
                return spare
            except OSError:  # it was killed while it waited
                spare.kill()
        helper = Helper()
        try:
            helper.give(descriptors)
        except OSError:
            helper.kill()
            raise
        return helper

    def close(self) -> None:
        if self._spare is not None:
            self._spare.kill()
            self._spare = None
