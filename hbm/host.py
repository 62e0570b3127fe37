"""Host memory as device memory: a pool is one sealed memfd, granule i its bytes [i * GRANULE_BYTES, (i + 1) *
GRANULE_BYTES).

The memfd is sparse (pages are taken when touched) and sealed against any change of size, so a mapping can never turn
into a bus error by a shrinking file. A range is reserved as private anonymous read-only memory: unbacked parts read as
zeros and writing there faults. mmap is called through ctypes since Python's own mmap knows no MAP_FIXED. The calls that
take microseconds keep the GIL (PyDLL): giving it up would let another thread of the worker hold it for milliseconds.
Used by the manager, its clients and the loader helper.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import weakref

from flexpert.hbm.backend import Pool, Range
from flexpert.hbm.errors import HbmError
from flexpert.hbm.granules import Extent

GRANULE_BYTES = 64 * 1024

PROT_READ, PROT_WRITE = 0x1, 0x2
MAP_SHARED, MAP_PRIVATE, MAP_FIXED, MAP_ANONYMOUS, MAP_NORESERVE = 0x01, 0x02, 0x10, 0x20, 0x4000
MAP_POPULATE = 0x8000
_MAP_FAILED = ctypes.c_void_p(-1).value
_FALLOC_PUNCH_HOLE = 0x02 | 0x01  # with FALLOC_FL_KEEP_SIZE
_POPULATED = MAP_SHARED | MAP_FIXED | MAP_POPULATE
_ZEROS = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE

_MMAP_ARGUMENTS = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
_fast = ctypes.PyDLL(None, use_errno=True)
_slow = ctypes.CDLL(None, use_errno=True)
_fast.mmap.argtypes = _slow.mmap.argtypes = _MMAP_ARGUMENTS
_fast.mmap.restype = _slow.mmap.restype = ctypes.c_void_p
_slow.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_slow.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long)


def sealed_memfd(name: str, nbytes: int) -> int:
    """A new memfd of nbytes zeros whose size nobody can change any more; the caller closes it."""
    descriptor = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(descriptor, nbytes)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


class HostPool:
    """One memfd. Writable or read-only as it was opened."""

    def __init__(self, descriptor: int, *, writable: bool) -> None:
        self.descriptor = descriptor
        self.protection = PROT_READ | PROT_WRITE if writable else PROT_READ
        self._closer = weakref.finalize(self, _close_quietly, descriptor)

    def export(self, *, writable: bool) -> int:
        if writable:
            return os.dup(self.descriptor)
        return os.open(f"/proc/self/fd/{self.descriptor}", os.O_RDONLY | os.O_CLOEXEC)

    def discard(self, extent: Extent) -> None:
        offset, nbytes = extent.start * GRANULE_BYTES, extent.length * GRANULE_BYTES
        if _slow.fallocate(self.descriptor, _FALLOC_PUNCH_HOLE, offset, nbytes) != 0:
            raise _failed(f"fallocate(punch hole) of {nbytes} bytes at {offset}")

    def close(self) -> None:
        self._closer()


class HostBackend:
    """Implements `backend.Backend`."""

    granule_bytes = GRANULE_BYTES

    def create(self, num_granules: int) -> HostPool:
        return HostPool(sealed_memfd("flexpert-hbm", num_granules * GRANULE_BYTES), writable=True)

    def import_(self, descriptor: int, *, writable: bool) -> HostPool:
        return HostPool(descriptor, writable=writable)

    def reserve(self, nbytes: int) -> Range:
        address = _slow.mmap(None, nbytes, PROT_READ, _ZEROS, -1, 0)
        if address is None or address == _MAP_FAILED:
            raise _failed(f"reserving {nbytes} bytes of address space")
        return Range(address, nbytes)

    def map(self, target: Range, offset_bytes: int, pool: Pool, extent: Extent, *, populate: bool = False) -> None:
        assert isinstance(pool, HostPool)
        nbytes, offset = extent.length * GRANULE_BYTES, extent.start * GRANULE_BYTES
        self._require_inside(target, offset_bytes, nbytes)
        address = target.address + offset_bytes
        if not populate:
            map_fixed(address, nbytes, pool.protection, pool.descriptor, offset)
        elif _slow.mmap(address, nbytes, pool.protection, _POPULATED, pool.descriptor, offset) != address:
            raise _failed(f"mapping {nbytes} bytes")

    def unmap(self, target: Range, offset_bytes: int, nbytes: int) -> None:
        self._require_inside(target, offset_bytes, nbytes)
        map_zeros(target.address + offset_bytes, nbytes)

    def release(self, target: Range) -> None:
        if _slow.munmap(target.address, target.nbytes) != 0:
            raise _failed(f"munmap of {target.nbytes} bytes")

    @staticmethod
    def _require_inside(target: Range, offset_bytes: int, nbytes: int) -> None:
        if offset_bytes < 0 or nbytes <= 0 or offset_bytes + nbytes > target.nbytes:
            raise HbmError(f"[{offset_bytes}, {offset_bytes + nbytes}) is not inside a range of {target.nbytes} bytes")


def map_fixed(address: int, nbytes: int, protection: int, descriptor: int, offset: int) -> None:
    """mmap(MAP_FIXED | MAP_SHARED). The caller has checked that the target lies in a range of its own."""
    if _fast.mmap(address, nbytes, protection, MAP_SHARED | MAP_FIXED, descriptor, offset) != address:
        raise _failed(f"mapping {nbytes} bytes")


def map_zeros(address: int, nbytes: int) -> None:
    """Back to unbacked: reads as zeros, writing faults. The caller has checked the target."""
    if _fast.mmap(address, nbytes, PROT_READ, _ZEROS | MAP_FIXED, -1, 0) != address:
        raise _failed(f"unmapping {nbytes} bytes")


def memory_at(address: int, nbytes: int, *, writable: bool) -> memoryview:
    """The bytes at an address as a memoryview ('B'). It owns nothing: using it after the range was released crashes the
    process.
    """
    view = memoryview((ctypes.c_ubyte * nbytes).from_address(address)).cast("B")
    return view if writable else view.toreadonly()


def _close_quietly(descriptor: int) -> None:
    with contextlib.suppress(OSError):
        os.close(descriptor)


def _failed(what: str) -> HbmError:
    number = ctypes.get_errno()
    hint = " (vm.max_map_count or an address-space limit may be reached)" if number == 12 else ""
    return HbmError(f"{what} failed: {os.strerror(number)}{hint}")
