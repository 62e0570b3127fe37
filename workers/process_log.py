"""Where a process of the cluster writes its log: one rotating file (mode 0600), which also takes what is printed.

Called once by each actor, first thing. File descriptors 1 and 2 are pointed at the file, so that a crash inside a library and a
fatal signal leave their last words there too, not only what goes through `logging`.
"""

from __future__ import annotations

import faulthandler
import logging
import logging.handlers
import os
import sys
from io import TextIOWrapper
from pathlib import Path

MAX_LOG_BYTES = 8 << 20
KEPT_LOGS = 2
FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class _ProcessLog(logging.handlers.RotatingFileHandler):
    """A rotating log file that stdout and stderr follow."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, maxBytes=MAX_LOG_BYTES, backupCount=KEPT_LOGS)
        self.setFormatter(logging.Formatter(FORMAT))
        self._follow()

    def doRollover(self) -> None:
        super().doRollover()
        self._follow()

    def _open(self) -> TextIOWrapper:
        return open(self.baseFilename, "a", opener=lambda path, flags: os.open(path, flags, 0o600))

    def _follow(self) -> None:
        assert self.stream is not None
        os.dup2(self.stream.fileno(), 1)
        os.dup2(self.stream.fileno(), 2)


def open_process_log(path: Path, level: str) -> None:
    """Send everything this process says to `path`, from `level` ("debug", "info", "warning", "error") on."""
    handler = _ProcessLog(path)
    sys.stdout = sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115 (open as long as the process)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    faulthandler.enable()
