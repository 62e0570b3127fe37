"""Freed memory that the C library keeps."""

from __future__ import annotations

import ctypes
import threading
from pathlib import Path

from flexpert.workers.heap import give_back_free_memory

CHUNK_BYTES, CHUNKS = 32 << 10, 1000


def own_bytes() -> int:
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("Anonymous:"))


def test_what_an_ended_thread_freed_goes_back_to_the_machine() -> None:
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = (
        ctypes.c_void_p,
        [ctypes.c_size_t],
        [ctypes.c_void_p],
    )
    last = []

    def build_and_drop() -> None:
        chunks = [libc.malloc(CHUNK_BYTES) for _ in range(CHUNKS)]
        for chunk in chunks:
            ctypes.memset(chunk, 1, CHUNK_BYTES)
        last.append(chunks.pop())  # while it is there, nothing below it goes back by itself
        for chunk in chunks:
            libc.free(chunk)

    thread = threading.Thread(target=build_and_drop)
    thread.start()
    thread.join()
    before_bytes = own_bytes()
    give_back_free_memory(collect=True)
    assert before_bytes - own_bytes() > CHUNK_BYTES * CHUNKS // 2
    libc.free(last[0])
