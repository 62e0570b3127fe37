"""Exchange through memory on one host: each rank writes its parts into a buffer of its own, which its peers have mapped read-only.

A buffer is one sealed memfd of three regions that exchanges use in turn. A rank writes exchange n + 3 only after all peers rang for
n + 2, so what n returned stays as it is until the exchange after the next. The descriptors are passed when the ranks connect; in an
exchange only a doorbell (see `doorbells`) travels to each peer, with where in the buffer its part lies. Parts that do not fit
into a region go in rounds through its two halves, and are copied together at the receiver. Made by `connect_mapped` for the CPU's ranks.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from flexpert.workers.epoch import Epoch
from flexpert.workers.transport.doorbell_transport import ALIGNMENT_BYTES, DoorbellTransport, round_up
from flexpert.workers.transport.doorbells import Doorbell, Doorbells, ProtocolError
from flexpert.workers.transport.listener import ExchangeListener
from flexpert.workers.transport.pairs import ConnectError, Pair, connect_pairs

_REGIONS = 3
_F_SEAL_FUTURE_WRITE = 0x10  # linux/fcntl.h, 5.1: no writable mapping beyond those that exist
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | _F_SEAL_FUTURE_WRITE | fcntl.F_SEAL_SEAL


def connect_mapped(
    epoch: Epoch,
    rank: int,
    listener: ExchangeListener,
    *,
    token: str,
    capacity_bytes: int,
    step_timeout_s: float,
    connect_timeout_s: float,
) -> MappedTransport:
    """Blocks until all ranks of the epoch are connected. Raises ConnectError.

    capacity_bytes: what one exchange sends to all peers together without a copy at the receivers; memory is taken as it is used.
    """
    region_bytes = round_up(max(capacity_bytes, 2 * ALIGNMENT_BYTES * epoch.size), mmap.PAGESIZE)
    descriptor, own = _make_buffer(region_bytes * _REGIONS, f"exchange-{epoch.number}-{rank}")
    try:
        pairs = connect_pairs(
            epoch, rank, listener, kind="mapped", token=token, timeout_s=connect_timeout_s, descriptor=descriptor
        )
    finally:
        os.close(descriptor)
    try:
        buffers = {peer: _map_peer(pair, peer) for peer, pair in pairs.items()}
    except BaseException:
        for pair in pairs.values():
            pair.close()
        raise
    socks = {peer: pair.sock for peer, pair in pairs.items()}
    doorbells = Doorbells(epoch.number, socks, step_timeout_s=step_timeout_s)
    return MappedTransport(rank, epoch.size, own, region_bytes, buffers, doorbells)


class MappedTransport(DoorbellTransport):
    """See `base.Transport`. own: this rank's buffer, uint8 [regions * region_bytes]; buffers: those of the peers."""

    def __init__(
        self, rank: int, size: int, own: Tensor, region_bytes: int, buffers: dict[int, Tensor], doorbells: Doorbells
    ) -> None:
        super().__init__(rank, size, doorbells)
        self._own = own
        self._region_bytes = region_bytes
        # In a phase of several rounds each peer has as much of a half region as any other.
        self._chunk_bytes = region_bytes // 2 // max(1, size - 1) // ALIGNMENT_BYTES * ALIGNMENT_BYTES
        self._buffers = buffers
        self._num_exchanges = 0
        self._nothing = torch.empty(0, dtype=torch.uint8)

    def exchange(self, step: int, phase: int, parts: Sequence[Tensor]) -> list[Tensor]:
        if len(parts) != self.size:
            raise ValueError(f"{len(parts)} parts for {self.size} ranks: one for each rank is needed")
        sizes = [part.numel() for part in parts]
        with self._doorbells.busy:
            self._doorbells.check_open((step, phase, 0))
            region = self._num_exchanges % _REGIONS * self._region_bytes
            self._num_exchanges += 1
            rounds = self._rounds(sizes)
            if rounds == 1:
                self._ring_whole(step, phase, region, parts, sizes)
            else:
                self._ring_round(step, phase, 0, rounds, region, parts)
            bells = self._doorbells.collect((step, phase, 0))
            received = [
                self._view(peer, bells[peer]) if peer != self.rank else parts[peer] for peer in range(self.size)
            ]
            most = max([rounds, *(bell.rounds for bell in bells.values())])
            if most > 1:
                self._more_rounds(step, phase, rounds, most, region, parts, received, bells)
            return received

    def close(self) -> None:
        """Memory that returned tensors still show goes with the last of them."""
        self._doorbells.close()
        self._buffers = {}
        self._own = self._nothing

    def _rounds(self, sizes: Sequence[int]) -> int:
        total = sum(round_up(sizes[peer]) for peer in self._peers)
        if total <= self._region_bytes:
            return 1
        return max(-(-sizes[peer] // self._chunk_bytes) for peer in self._peers)

    def _ring_whole(self, step: int, phase: int, offset: int, parts: Sequence[Tensor], sizes: Sequence[int]) -> None:
        for peer in self._peers:
            length = sizes[peer]
            if length:
                self._own[offset : offset + length].copy_(parts[peer])
            self._doorbells.ring(peer, (step, phase, 0), offset=offset, length=length)
            offset += round_up(length)

    def _ring_round(
        self, step: int, phase: int, round_: int, rounds: int, region: int, parts: Sequence[Tensor]
    ) -> None:
        """Round r lies in half r % 2: all have copied what was there when they rang for r - 1."""
        offset = region + round_ % 2 * (self._region_bytes // 2)
        for peer in self._peers:
            chunk = parts[peer][round_ * self._chunk_bytes : (round_ + 1) * self._chunk_bytes]
            length = chunk.numel() if round_ < rounds else 0
            if length:
                self._own[offset : offset + length].copy_(chunk)
            self._doorbells.ring(peer, (step, phase, round_), rounds=rounds, offset=offset, length=length)
            offset += self._chunk_bytes

    def _more_rounds(
        self, step: int, phase: int, rounds: int, most: int, region: int,
        parts: Sequence[Tensor], received: list[Tensor], bells: dict[int, Doorbell],
    ) -> None:  # fmt: skip
        """The rounds after the first, of as many as the neediest rank has: all take part in each, so that halves can be reused."""
        split = [peer for peer in self._peers if bells[peer].rounds > 1]
        chunks = {peer: [received[peer].clone()] for peer in split}
        for round_ in range(1, most):
            self._ring_round(step, phase, round_, rounds, region, parts)
            bells = self._doorbells.collect((step, phase, round_))
            for peer in split:
                chunks[peer].append(self._view(peer, bells[peer]).clone())
        for peer in split:
            received[peer] = torch.cat(chunks[peer])

    def _view(self, peer: int, bell: Doorbell) -> Tensor:
        if bell.length == 0:
            return self._nothing
        end = bell.offset + bell.length
        if bell.offset < 0 or bell.length < 0 or end > self._buffers[peer].numel():
            raise ProtocolError(f"rank {peer} names {bell}, its buffer has {self._buffers[peer].numel()} bytes", [peer])
        return self._buffers[peer][bell.offset : end]


def _make_buffer(nbytes: int, name: str) -> tuple[int, Tensor]:
    """A memfd that peers can only map for reading and never resize, and this rank's writable view of it."""
    descriptor = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(descriptor, nbytes)
        own = mmap.mmap(descriptor, nbytes, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
        return descriptor, _tensor(own, nbytes)
    except BaseException:
        os.close(descriptor)
        raise


def _map_peer(pair: Pair, peer: int) -> Tensor:
    """The peer's buffer, read-only; its seals keep it from being shrunk under us. Takes the pair's descriptor."""
    descriptor, pair.descriptor = pair.descriptor, None
    if descriptor is None:
        raise ConnectError(f"rank {peer} sent no buffer", [peer])
    try:
        if fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & _SEALS != _SEALS:
            raise ConnectError(f"rank {peer} sent a buffer that it could still resize", [peer])
        nbytes = os.fstat(descriptor).st_size
        return _tensor(mmap.mmap(descriptor, nbytes, mmap.MAP_SHARED, mmap.PROT_READ), nbytes)
    finally:
        os.close(descriptor)


def _tensor(mapped: mmap.mmap, nbytes: int) -> Tensor:
    """uint8 [nbytes] over a mapping, which lives as long as the tensor; torch would warn at each read-only buffer it is handed."""
    array = (ctypes.c_uint8 * nbytes).from_address(np.frombuffer(mapped, dtype=np.uint8).ctypes.data)
    array.mapped = mapped  # type: ignore[attr-defined]
    return torch.frombuffer(array, dtype=torch.uint8)
