"""An epoch's NCCL group, and the watcher that frees a rank whose peer left it in the middle of a collective.

A kernel of NCCL that waits for a dead peer never ends by itself, and torch's own watchdog would end the process. So torch's is off,
and a thread of ours sleeps until a peer's socket ends or a collective is overdue, and then aborts the communicator: the rank's wait
for its stream returns, and the exchange is a missed step. Made by `distributed.connect_distributed`.
"""

from __future__ import annotations

import contextlib
import os
import select
import threading
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from flexpert.workers.transport.doorbells import Doorbells

_GRACE_S = 0.1  # a peer that left after its last exchange has sent all of it: our side of that one may end
_NEVER = timedelta(days=365)


class NcclGroup:
    """all_to_all returns when its stream has done it, so the deadline holds for the data and not for the launch."""

    def __init__(
        self, store: Any, rank: int, size: int, device: torch.device, doorbells: Doorbells, *, step_timeout_s: float
    ) -> None:
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")  # 0: no watchdog of torch ends this process
        os.environ.setdefault("TORCH_NCCL_ENABLE_MONITORING", "0")
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = _NEVER
        self._step_timeout_s = step_timeout_s
        self._doorbells = doorbells
        self._device = device
        self._busy_since: float | None = None
        self._aborted = False
        self._lock = threading.Lock()
        self._stop = os.eventfd(0, os.EFD_CLOEXEC)
        with torch.cuda.device(device):
            self._done = torch.cuda.Event(blocking=True)
            self._group: Any = dist.ProcessGroupNCCL(store, rank, size, options)
            self._group.eager_connect_single_device(device)
        self._watcher = threading.Thread(target=self._watch, name="nccl-watcher", daemon=True)
        self._watcher.start()

    def all_to_all(self, output: Tensor, inputs: Tensor, output_sizes: list[int], input_sizes: list[int]) -> None:
        self._busy_since = time.monotonic()
        try:
            self._group.alltoall_base(output, inputs, output_sizes, input_sizes).wait()
            self._done.record(torch.cuda.current_stream(self._device))
            self._done.synchronize()
        finally:
            self._busy_since = None
        if self._aborted:
            raise RuntimeError("the communicator was aborted: a peer is gone or did not come in time")

    def abort(self) -> None:
        with self._lock:
            if self._aborted:
                return
            self._aborted = True
        with contextlib.suppress(RuntimeError):
            self._group.abort()

    def close(self) -> None:
        os.eventfd_write(self._stop, 1)
        self._watcher.join()
        os.close(self._stop)
        self._group = None

    def _watch(self) -> None:
        """Until `close` or an abort. Where a peer is gone, what still runs has only the grace left."""
        poller = select.poll()
        poller.register(self._stop, select.POLLIN)
        for descriptor in self._doorbells.filenos():
            poller.register(descriptor, select.POLLRDHUP)
        allowed_s, look_s = self._step_timeout_s, max(0.05, self._step_timeout_s / 8)
        while True:
            events = [descriptor for descriptor, _ in poller.poll(look_s * 1000)]
            if self._stop in events:
                return
            for descriptor in events:
                poller.unregister(descriptor)
                allowed_s = look_s = _GRACE_S
            began = self._busy_since
            if began is not None and time.monotonic() - began >= allowed_s:
                self.abort()
                return
