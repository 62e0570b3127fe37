"""Exchange through torch.distributed: gloo for tensors of the host, NCCL for those of CUDA devices, on one host or across hosts. Ranks that
share a GPU, or have no NCCL, exchange their device's tensors by gloo, through the host's memory.

The process group belongs to its epoch alone: it is made directly from a store that the epoch's rank 0 hosts, torch's default group is
never touched, so the groups of two epochs live side by side. Doorbells (see `doorbells`) on a socket beside the group carry the sizes
and say that all ranks have come before any of them enters the collective: so an idle rank sits in no collective, and who is missing or
gone is known by name. What can still go wrong inside of a collective ends by its deadline (gloo) or by a watcher (NCCL, `nccl`).
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from flexpert.workers.epoch import Epoch
from flexpert.workers.transport.base import StepMissed
from flexpert.workers.transport.doorbell_transport import DoorbellTransport, round_up
from flexpert.workers.transport.doorbells import Doorbells
from flexpert.workers.transport.handshake import parse_address
from flexpert.workers.transport.listener import ExchangeListener
from flexpert.workers.transport.nccl import NcclGroup
from flexpert.workers.transport.pairs import ConnectError, connect_pairs

log = logging.getLogger(__name__)


class Group(Protocol):
    """One epoch's process group."""

    def all_to_all(self, output: Tensor, inputs: Tensor, output_sizes: list[int], input_sizes: list[int]) -> None:
        """Blocks until output is filled. Raises RuntimeError where it cannot be any more."""

    def abort(self) -> None:
        """End a collective that runs. From any thread."""

    def close(self) -> None: ...


def connect_distributed(
    epoch: Epoch,
    rank: int,
    listener: ExchangeListener,
    device: torch.device,
    *,
    token: str,
    step_timeout_s: float,
    connect_timeout_s: float,
) -> DistributedTransport:
    """Blocks until all ranks of the epoch are connected: NCCL where each has a CUDA device of its own, else gloo. Raises ConnectError."""
    deadline = time.monotonic() + connect_timeout_s
    kind = f"torch.distributed on {device.type}"
    host = _host(epoch, rank)
    try:
        store = _host_store(host, connect_timeout_s) if rank == 0 and epoch.size > 1 else None
    except (OSError, RuntimeError) as error:
        raise ConnectError(f"epoch {epoch.number}: rank 0 cannot host a store at {host}: {error}", [0]) from error
    data = "" if store is None else f"{host} {store.port}"
    pairs = connect_pairs(epoch, rank, listener, kind=kind, token=token, timeout_s=connect_timeout_s, data=data)
    doorbells = Doorbells(
        epoch.number, {peer: pair.sock for peer, pair in pairs.items()}, step_timeout_s=step_timeout_s
    )
    group: Group | None = None
    try:
        if epoch.size > 1:
            remaining = timedelta(seconds=max(0.1, deadline - time.monotonic()))
            if store is None:
                store_host, _, port = pairs[0].data.rpartition(" ")
                store = dist.TCPStore(store_host, int(port), is_master=False, timeout=remaining, wait_for_workers=False)
            kind = "nccl" if device.type == "cuda" and _all_have_gpus(store, rank, epoch.size, device) else "gloo"
            if kind == "nccl":
                group = NcclGroup(store, rank, epoch.size, device, doorbells, step_timeout_s=step_timeout_s)
            else:
                group = GlooGroup(store, rank, epoch.size, host, remaining, step_timeout_s=step_timeout_s)
    except (RuntimeError, ValueError) as error:
        doorbells.close()
        raise ConnectError(
            f"epoch {epoch.number}: {kind} could not connect the ranks: {error}", sorted(pairs)
        ) from error
    except BaseException:
        doorbells.close()
        raise
    log.info("epoch %d: rank %d of %d exchanges by %s", epoch.number, rank, epoch.size, kind)
    wire = torch.device("cpu") if kind == "gloo" else device
    return DistributedTransport(rank, epoch.size, device, group, doorbells, wire=wire)


class DistributedTransport(DoorbellTransport):
    """See `base.Transport`. group: None where this rank is alone. wire: the device whose tensors it takes; others are copied there and
    back."""

    def __init__(
        self,
        rank: int,
        size: int,
        device: torch.device,
        group: Group | None,
        doorbells: Doorbells,
        *,
        wire: torch.device | None = None,
    ) -> None:
        super().__init__(rank, size, doorbells)
        self._device = device
        self._wire = wire or device
        self._group = group

    def exchange(self, step: int, phase: int, parts: Sequence[Tensor]) -> list[Tensor]:
        if len(parts) != self.size:
            raise ValueError(f"{len(parts)} parts for {self.size} ranks: one for each rank is needed")
        with self._doorbells.busy:
            key = (step, phase, 0)
            self._doorbells.check_open(key)
            for peer in self._peers:
                self._doorbells.ring(peer, key, length=parts[peer].numel())
            bells = self._doorbells.collect(key)
            sizes = [bells[peer].length if peer in bells else 0 for peer in range(self.size)]
            received = self._all_to_all(step, phase, parts, sizes) if self._peers else [parts[0]]
            received[self.rank] = parts[self.rank]
            return received

    def close(self) -> None:
        """Ends a collective that runs, too."""
        self._doorbells.hang_up()
        if (group := self._group) is not None:
            group.abort()
        with self._doorbells.busy:
            if self._group is not None:
                self._group.close()
                self._group = None
        self._doorbells.close()

    def _all_to_all(self, step: int, phase: int, parts: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
        """Parts lie at multiples of the alignment, there and here, so that they can be viewed as any dtype."""
        assert self._group is not None
        input_sizes = [0 if peer == self.rank else round_up(parts[peer].numel()) for peer in range(self.size)]
        output_sizes = [round_up(size) for size in sizes]
        inputs = torch.empty(sum(input_sizes), dtype=torch.uint8, device=self._wire)
        output = torch.empty(sum(output_sizes), dtype=torch.uint8, device=self._wire)
        offset = 0
        for peer in self._peers:
            inputs[offset : offset + parts[peer].numel()].copy_(parts[peer])
            offset += input_sizes[peer]
        try:
            with self._doorbells.collective((step, phase, 0)):
                self._group.all_to_all(output, inputs, output_sizes, input_sizes)
        except RuntimeError as error:
            self._doorbells.check_open((step, phase, 0))
            suspects = self._doorbells.suspects((step, phase, 0))
            raise StepMissed(f"step {step} phase {phase}: the exchange broke: {error}", suspects) from error
        found = output.to(self._device).split(output_sizes)
        return [piece[:size] for piece, size in zip(found, sizes, strict=True)]


class GlooGroup:
    """A gloo group over the interface of `host`."""

    def __init__(
        self, store: Any, rank: int, size: int, host: str, connect_timeout: timedelta, *, step_timeout_s: float
    ) -> None:
        options = dist.ProcessGroupGloo._Options()
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=host)]
        options._timeout = connect_timeout
        options._threads = 1
        self._options = dist.AllToAllOptions()
        self._options.timeout = timedelta(seconds=step_timeout_s)
        self._ended = threading.Event()  # the collective, or this group
        self._aborted = False
        self._left_running = False
        self._group: Any = dist.ProcessGroupGloo(store, rank, size, options)

    def all_to_all(self, output: Tensor, inputs: Tensor, output_sizes: list[int], input_sizes: list[int]) -> None:
        self._ended.clear()
        work = self._group.alltoall_base(output, inputs, output_sizes, input_sizes, self._options)
        work.get_future().add_done_callback(lambda _: self._ended.set())
        if not self._aborted:
            self._ended.wait()
        if self._aborted:
            self._left_running = True
            raise RuntimeError("the group was closed")
        work.wait()

    def abort(self) -> None:
        """gloo ends a collective by its deadline only, so this ends the wait for it."""
        self._aborted = True
        self._ended.set()

    def close(self) -> None:
        last = [self._group]
        self._group = None
        if (
            self._left_running
        ):  # its destructor waits for the collective's deadline: in a thread where nobody waits for that
            threading.Thread(target=last.clear, name="gloo-closing", daemon=True).start()


def _all_have_gpus(store: Any, rank: int, size: int, device: torch.device) -> bool:
    """Whether NCCL can connect these ranks: each has it, and a GPU that no other has. NCCL_HOSTID is what NCCL takes for a host, if set."""
    own = ""
    if dist.is_nccl_available():
        own = f"{torch.cuda.get_device_properties(device).uuid} {os.environ.get('NCCL_HOSTID', '')}"
    store.set(f"gpu/{rank}", own)
    found = {store.get(f"gpu/{peer}").decode() for peer in range(size)}
    return len(found) == size and "" not in found


def _host(epoch: Epoch, rank: int) -> str:
    """Where this rank's group and store listen: the host at which its peers find it."""
    family, where = parse_address(epoch.members[rank].exchange_address)
    return "127.0.0.1" if family == socket.AF_UNIX else where[0]


def _host_store(host: str, timeout_s: float) -> Any:
    """A store that listens at `host` only, at any port; torch alone would listen at every interface."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as sock:
        sock.bind((host, 0))
        sock.listen(1024)
        port = sock.getsockname()[1]
        descriptor = os.dup(sock.fileno())
    return dist.TCPStore(
        host, port, is_master=True, timeout=timedelta(seconds=timeout_s), wait_for_workers=False,
        master_listen_fd=descriptor,
    )  # fmt: skip
