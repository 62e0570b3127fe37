"""The terminal is for what `flexpert up` prints; what libraries print goes to its log."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from flexpert.controller.runtime_dir import RuntimeDir
from flexpert.workers.process_log import open_process_log


@contextlib.contextmanager
def own_output(runtime: RuntimeDir, log_level: str) -> Iterator[TextIO]:
    """The terminal, for what we print; descriptors 1 and 2 go to the log of this process until the end of the block."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = (os.dup(1), os.dup(2))
    streams = (sys.stdout, sys.stderr)
    open_process_log(Path(runtime.logs / "up.log"), log_level)
    try:
        with os.fdopen(os.dup(kept[0]), "w", buffering=1) as out:
            yield out
    finally:
        sys.stdout, sys.stderr = streams
        for number, descriptor in zip((1, 2), kept, strict=True):
            os.dup2(descriptor, number)
            os.close(descriptor)
