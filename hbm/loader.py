"""The loader helper: reads checkpoint files into the granules of new weights, reports progress, and exits.

`python -m flexpert.hbm.loader CHANNEL_FD`, started by `helpers.Helper` in the manager; pool and task come over the
channel when there is a load. Threads read: straight into the mapped granules where the dtype is the same (preadv),
through a chunk buffer and `convert` where it is not. Each byte is read once. It dies with the manager, and on any error
says which file, what was found and what was expected.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
import threading
import traceback
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace

import msgspec

from flexpert.hbm import wire
from flexpert.hbm.backend import map_back_to_back
from flexpert.hbm.errors import HbmError, LoadError
from flexpert.hbm.granules import Extent
from flexpert.hbm.host import HostBackend, memory_at
from flexpert.hbm.loading import ITEM_BYTES, BlockScale, Copy, LoadPlan, check_plan
from flexpert.hbm.messages import CopyRecord, Done, ErrorReply, LoaderTask, Progress

CHUNK_BYTES = 8 << 20
REPORT_INTERVAL_S = 0.05
EXPORTED = "/proc/"  # paths of `HbmClient.export_segments` in another process
_PEER_GONE = (
    "the process that exported it, or its HBM manager, has ended or let go of it. Load these segments from elsewhere"
)
_PR_SET_PDEATHSIG = 1


def main(arguments: Sequence[str]) -> int:
    manager_pid = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != manager_pid:
        return 1
    (channel_fd,) = map(int, arguments)
    channel = socket.socket(fileno=channel_fd)
    given: deque[int] = deque()
    if not wire.receive(channel, given):
        return 0  # no load came, and the manager has ended
    pool_fd, task_fd = given
    try:
        with os.fdopen(task_fd, "rb") as task_file:
            task = msgspec.msgpack.decode(task_file.read(), type=LoaderTask)
        _load(task, pool_fd, channel)
    except (HbmError, OSError, msgspec.MsgspecError) as error:
        channel.sendall(wire.encode(ErrorReply(0, LoadError.kind, str(error))))
        return 1
    except Exception:
        traceback.print_exc()
        return 1
    channel.sendall(wire.encode(Done(0)))
    return 0


def _load(task: LoaderTask, pool_fd: int, channel: socket.socket) -> None:
    wanted = task.segments
    copies = [_copy_of(record) for record in task.copies if record.segment in wanted]
    plan = LoadPlan({name: nbytes for name, (nbytes, _extents) in task.segments.items()}, copies)
    check_plan(plan)
    total_bytes = plan.total_bytes()
    channel.sendall(wire.encode(Progress(0, 0, total_bytes)))
    files = open_files(copies)
    reading = Reading(files, _map_segments(task, pool_fd), copies)
    for done_bytes in reading.run():
        channel.sendall(wire.encode(Progress(0, done_bytes, total_bytes)))
    for file, descriptor in files.items():
        if file.startswith(EXPORTED):
            require_still_exported(file, descriptor)


def _copy_of(record: CopyRecord) -> Copy:
    fields = msgspec.structs.asdict(record)
    scale = None if record.scale is None else BlockScale(**msgspec.structs.asdict(record.scale))
    return Copy(**{**fields, "scale": scale})


def open_files(copies: Sequence[Copy]) -> dict[str, int]:
    """A descriptor for each file, after its size was checked against the copies. LoadError names the first that is
    missing or short.
    """
    needed: dict[str, int] = {}
    for copy in copies:
        needed[copy.file] = max(needed.get(copy.file, 0), copy.file_offset + copy.source_bytes)
        if copy.scale is not None:
            end = copy.scale.file_offset + copy.scale.num_bytes(copy.num_elements)
            needed[copy.scale.file] = max(needed.get(copy.scale.file, 0), end)
    files = {}
    for file, expected_bytes in needed.items():
        try:
            files[file] = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
            found_bytes = os.fstat(files[file]).st_size
        except OSError as error:
            if file.startswith(EXPORTED):
                raise LoadError(f"{file} cannot be read ({error.strerror}): {_PEER_GONE}") from error
            raise LoadError(
                f"checkpoint file {file}: {error.strerror}; expected a file of at least {expected_bytes} bytes"
            ) from error
        if found_bytes < expected_bytes:
            raise too_short(file, found_bytes, expected_bytes)
    return files


def require_still_exported(file: str, descriptor: int) -> None:
    """A peer's bytes are held in place for as long as its export is open. LoadError where it no longer is: what was
    read may have been something else by then.
    """
    try:
        held = os.path.samestat(os.stat(file), os.fstat(descriptor))
    except OSError:
        held = False
    if not held:
        raise LoadError(f"{file} was withdrawn while it was read: {_PEER_GONE}")


def too_short(file: str, found_bytes: int, expected_bytes: int) -> LoadError:
    return LoadError(
        f"checkpoint file {file} is truncated: found {found_bytes} bytes, expected at least {expected_bytes}. Download it again"
    )


class Reading:
    """Carries copies out with several threads."""

    def __init__(self, files: dict[str, int], segments: dict[str, memoryview], copies: Sequence[Copy]) -> None:
        self._files, self._segments = files, segments
        self._chunks = iter(sorted(_in_chunks(copies), key=lambda chunk: (chunk.file, chunk.file_offset)))
        self._num_threads = min(8, 2 * len(os.sched_getaffinity(0)) + 2)
        self._lock = threading.Lock()
        self._done_bytes = 0
        self._error: BaseException | None = None

    def run(self) -> Iterator[int]:
        """Yields the bytes done from time to time and at the end. Raises what a thread raised, first come."""
        threads = [threading.Thread(target=self._work, daemon=True) for _ in range(self._num_threads)]
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive():
                thread.join(REPORT_INTERVAL_S)
                yield self._done_bytes
        if self._error is not None:
            raise self._error
        yield self._done_bytes

    def _work(self) -> None:
        buffer = memoryview(bytearray(0))
        try:
            while (chunk := self._next()) is not None:
                target = self._segments[chunk.segment][
                    chunk.segment_offset : chunk.segment_offset + chunk.segment_bytes
                ]
                if chunk.source_dtype == chunk.dtype:
                    self._read(chunk.file, chunk.file_offset, target)
                else:
                    if len(buffer) < chunk.source_bytes:
                        buffer = memoryview(bytearray(chunk.source_bytes))
                    source = buffer[: chunk.source_bytes]
                    self._read(chunk.file, chunk.file_offset, source)
                    self._convert(chunk, source, target)
                with self._lock:
                    self._done_bytes += chunk.source_bytes
        except BaseException as error:
            with self._lock:
                self._error = self._error or error

    def _next(self) -> Copy | None:
        with self._lock:
            return None if self._error is not None else next(self._chunks, None)

    def _read(self, file: str, offset: int, target: memoryview) -> None:
        done = 0
        while done < len(target):
            count = os.preadv(self._files[file], [target[done:]], offset + done)
            if count == 0:
                raise too_short(file, offset + done, offset + len(target))
            done += count

    def _convert(self, chunk: Copy, source: memoryview, target: memoryview) -> None:
        from flexpert.hbm import convert  # numpy takes 0.1 s to import: only where something is converted

        if chunk.scale is None:
            convert.convert(source, chunk.source_dtype, target, chunk.dtype)
            return
        factors = memoryview(bytearray(chunk.scale.num_bytes(chunk.num_elements)))
        self._read(chunk.scale.file, chunk.scale.file_offset, factors)
        convert.scale_blocks(source, chunk.source_dtype, factors, chunk.scale, target, chunk.dtype)


def _in_chunks(copies: Sequence[Copy]) -> Iterator[Copy]:
    """The same copies in pieces of at most CHUNK_BYTES of source, so that threads share the large ones."""
    for copy in copies:
        source_item, item = ITEM_BYTES[copy.source_dtype], ITEM_BYTES[copy.dtype]
        step, scale = CHUNK_BYTES // source_item, copy.scale
        if scale is not None:  # whole rows of blocks
            unit = scale.columns * scale.block_rows
            step = max(1, step // unit) * unit
        if copy.num_elements <= step:
            yield copy
            continue
        for first in range(0, copy.num_elements, step):
            yield replace(
                copy,
                file_offset=copy.file_offset + first * source_item,
                segment_offset=copy.segment_offset + first * item,
                num_elements=min(step, copy.num_elements - first),
                scale=scale and replace(scale, file_offset=scale.file_offset + scale.num_bytes(first)),
            )


def _map_segments(task: LoaderTask, pool_fd: int) -> dict[str, memoryview]:
    backend = HostBackend()
    pool = backend.import_(pool_fd, writable=True)
    all_extents = [Extent(start, count) for _nbytes, extents in task.segments.values() for start, count in extents]
    address = map_back_to_back(backend, pool, all_extents).address
    segments = {}
    for name, (nbytes, extents) in task.segments.items():
        segments[name] = memory_at(address, nbytes, writable=True)
        address += sum(count for _start, count in extents) * backend.granule_bytes
    return segments


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
