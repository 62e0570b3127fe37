"""What the C library keeps of freed memory, and Python of names, given back to the machine.

Each thread frees into a heap of its own, and such a heap keeps its pages for the thread that comes next. A transition builds and drops much
on threads that end with it, so without this memory would grow with each, to no use. Called by workers and by the controller when a
transition is over.
"""

from __future__ import annotations

import ctypes
import gc
import sys

_libc = ctypes.CDLL(None)


def give_back_free_memory(*, collect: bool = False) -> None:
    """Milliseconds; another thread that allocates waits meanwhile. collect: garbage that refers to itself first. Of the C library's
    nothing without glibc."""
    if collect:
        gc.collect()
    if sys.version_info < (3, 12):  # whose cache of attributes keeps a name of its own for each match of a class
        sys._clear_type_cache()
    trim = getattr(_libc, "malloc_trim", None)
    if trim is not None:
        trim(0)
