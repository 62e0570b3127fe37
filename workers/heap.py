"""What the C library keeps of freed memory, given back to the machine.

Each thread frees into a heap of its own, and such a heap keeps its pages for the thread that comes next. A transition builds and drops much
on threads that end with it, so without this a worker's memory would grow with each, to no use. Called when a transition is over.
"""

from __future__ import annotations

import ctypes
import gc

_libc = ctypes.CDLL(None)


def give_back_free_memory(*, collect: bool = False) -> None:
    """Milliseconds; another thread that allocates waits meanwhile. collect: garbage that refers to itself first. Nothing without glibc."""
    if collect:
        gc.collect()
    trim = getattr(_libc, "malloc_trim", None)
    if trim is not None:
        trim(0)
