"""How a worker's weights come into its device's memory and leave it: segment by segment, from a peer's manager or from disk.

Two forms behind one small interface. ManagedWeights lie with the HBM manager and outlive the worker; what a peer's manager has is read
from there, byte for byte, the rest from the checkpoint. PrivateWeights are plain torch memory of this process. Called by
`workers.process` and `workers.membership`, never on the engine's thread.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from flexpert.hbm import BudgetError, ExportedSegments, HbmClient, HbmError, LoadPlan, MappedWeights
from flexpert.hbm.loading import peer_plan
from flexpert.workers.devices import copy_to
from flexpert.workers.memory import bytes_at
from flexpert.workers.model import (
    DENSE,
    ServableModel,
    WeightLayout,
    compact,
    load_into,
    make_buffers,
    plan_weights,
    select,
)
from flexpert.workers.model.layout import segment_of

log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
Source = (
    str | tuple[str, Sequence[int]]
)  # a manager's socket; with the slab groups to read there, or for whatever it has


@dataclass(slots=True)
class Fetched:
    """names: the segments that were not there before. moved_bytes came from peers' managers, loaded_bytes from disk."""

    names: tuple[str, ...] = ()
    moved_bytes: int = 0
    loaded_bytes: int = 0


@dataclass
class HeldExperts:
    """Segments back to back on the model's device, until `close`: no view of them may be used afterwards."""

    memory: Tensor
    mapping: MappedWeights | None = None

    def close(self) -> None:
        del self.memory
        if self.mapping is not None:
            self.mapping.close()


class Weights(Protocol):
    loaded_from_disk: bool

    def fetch(
        self, names: Sequence[str], sources: Sequence[Source] = (), on_progress: Progress | None = None
    ) -> Fetched:
        """Have these segments. Raises BudgetError, LoadError, CheckpointError; then none of a source is half there."""

    def layout(self, sources: Sequence[Source] = ()) -> WeightLayout:
        """As the dense segment here tells it, or else that of a source, or else the checkpoint."""

    def dense(self) -> tuple[bytes, Tensor]:
        """The manifest, and the dense segment on the model's device."""

    def experts(self, names: Sequence[str]) -> HeldExperts: ...

    def segments(self) -> dict[str, int]:
        """Those that are here, and their bytes."""

    def interrupt(self, names: Sequence[str]) -> None:
        """A fetch of these that runs in another thread fails. From any thread."""

    def drop(self, names: Sequence[str]) -> int:
        """Forget these of what is here; how many bytes that were."""


class ManagedWeights:
    def __init__(
        self, client: HbmClient, key: str, servable: ServableModel, dtype: str, *, device: str, own_socket: Path
    ) -> None:
        self._client, self._key = client, key
        self._servable, self._dtype, self._device = servable, dtype, torch.device(device)
        self._own_socket = str(own_socket)
        self.loaded_from_disk = False

    @cached_property
    def _plan(self) -> LoadPlan:
        return plan_weights(self._servable, self._dtype)

    def fetch(
        self, names: Sequence[str], sources: Sequence[Source] = (), on_progress: Progress | None = None
    ) -> Fetched:
        missing = self._missing(names)
        fetched = Fetched(names=tuple(missing))
        peers = [source for source in sources if _socket_of(source) != self._own_socket]
        # All at once; where one of several cannot be read, each alone.
        for attempt in [peers, *([peer] for peer in peers if len(peers) > 1)]:
            if missing and attempt:
                fetched.moved_bytes += self._pull(attempt, missing, on_progress)
                missing = self._missing(missing)
        if missing:
            plan = select(self._plan, missing)
            self._client.load_segments(self._key, plan, on_progress=on_progress)
            fetched.loaded_bytes = sum(plan.segments.values())
            self.loaded_from_disk = True
        return fetched

    def layout(self, sources: Sequence[Source] = ()) -> WeightLayout:
        if DENSE in self._client.segments(self._key):
            mapped = self._client.map_weights(self._key, [DENSE])
            try:
                return WeightLayout.from_manifest(mapped.manifest)
            finally:
                mapped.close()
        with contextlib.ExitStack() as open_peers:
            for source in sources:
                if (exported := self._export(source, [DENSE], open_peers)) is not None:
                    return WeightLayout.from_manifest(exported.manifest)
        return WeightLayout.from_manifest(self._plan.manifest)

    def _missing(self, names: Sequence[str]) -> list[str]:
        there = self._client.segments(self._key)
        return [name for name in dict.fromkeys(names) if name not in there]

    def _pull(self, sources: Sequence[Source], missing: Sequence[str], on_progress: Progress | None) -> int:
        """What these sources are meant to give of what is missing, in one load; how many bytes. Nothing where that fails: the next
        source or the disk has it too."""
        parts: list[LoadPlan] = []
        left = list(missing)
        with contextlib.ExitStack() as open_peers:
            for source in sources:
                if (exported := self._export(source, left, open_peers)) is not None:
                    parts.append(peer_plan(exported.path, exported.extents, exported.manifest))
                    left = [name for name in left if name not in exported.extents]
            if not parts:
                return 0
            segments = {name: nbytes for part in parts for name, nbytes in part.segments.items()}
            plan = LoadPlan(segments, [copy for part in parts for copy in part.copies], parts[0].manifest)
            try:
                self._client.load_segments(self._key, plan, on_progress=on_progress)
            except BudgetError:
                raise
            except (HbmError, OSError) as error:
                log.warning("reading weights of other managers failed, going on without: %s", error)
                return 0
            return sum(segments.values())

    def _export(
        self, source: Source, names: Sequence[str], open_peers: contextlib.ExitStack
    ) -> ExportedSegments | None:
        """Held in place until `open_peers` is closed; None where this source has none of them to give, or does not answer."""
        wanted = list(names)
        if not isinstance(source, str | Path):
            meant = {segment_of(group) for group in source[1]} | {DENSE}
            wanted = [name for name in names if name in meant]
        try:
            peer = HbmClient.connect(_socket_of(source), client_name=f"reader of {self._own_socket}")
            open_peers.enter_context(peer)
            there = peer.segments(self._key)
            found = [name for name in wanted if name in there]
            if not found:
                return None
            exported = peer.export_segments(self._key, found)
            open_peers.callback(exported.close)
            return exported
        except (HbmError, OSError) as error:
            log.warning("the manager %s cannot be read, going on without it: %s", _socket_of(source), error)
            return None

    def dense(self) -> tuple[bytes, Tensor]:
        mapped = self._client.map_weights(self._key, [DENSE])
        segment = mapped.segments[DENSE]
        return mapped.manifest, bytes_at(segment.address, segment.nbytes).to(self._device)

    def experts(self, names: Sequence[str]) -> HeldExperts:
        if not names:
            return HeldExperts(torch.empty(0, dtype=torch.uint8, device=self._device))
        on_host = self._device.type == "cpu"  # else it is read once, and filling page tables holds up other threads
        mapped = self._client.map_weights(self._key, names, populate=on_host)
        memory = bytes_at(mapped.address, mapped.nbytes)
        if on_host:
            return HeldExperts(memory, mapped)
        copied = copy_to(memory, self._device)
        del memory
        mapped.close()
        return HeldExperts(copied)

    def segments(self) -> dict[str, int]:
        return self._client.segments(self._key)

    def interrupt(self, names: Sequence[str]) -> None:
        for name in names:
            with contextlib.suppress(HbmError):
                self._client.drop_segments(self._key, [name])

    def drop(self, names: Sequence[str]) -> int:
        there = self.segments()
        gone = [name for name in names if name in there]
        if gone:
            with contextlib.suppress(HbmError):
                self._client.drop_segments(self._key, gone)
        return sum(there[name] for name in gone)


class PrivateWeights:
    def __init__(self, servable: ServableModel, dtype: str, *, device: str) -> None:
        self._plan = plan_weights(servable, dtype)
        self._device = torch.device(device)
        self._buffers: dict[str, Tensor] = {}
        self.loaded_from_disk = False

    def fetch(
        self, names: Sequence[str], sources: Sequence[Source] = (), on_progress: Progress | None = None
    ) -> Fetched:
        missing = [name for name in dict.fromkeys(names) if name not in self._buffers]
        if not missing:
            return Fetched()
        plan = select(self._plan, missing)
        buffers = make_buffers(plan, device=self._device)
        load_into(plan, buffers, on_progress)
        self._buffers.update(buffers)
        self.loaded_from_disk = True
        return Fetched(tuple(missing), loaded_bytes=sum(plan.segments.values()))

    def layout(self, sources: Sequence[Source] = ()) -> WeightLayout:
        return WeightLayout.from_manifest(self._plan.manifest)

    def dense(self) -> tuple[bytes, Tensor]:
        return self._plan.manifest, self._buffers[DENSE]

    def experts(self, names: Sequence[str]) -> HeldExperts:
        return HeldExperts(compact([self._buffers[name] for name in names], device=self._device))

    def segments(self) -> dict[str, int]:
        return {name: buffer.numel() for name, buffer in self._buffers.items()}

    def interrupt(self, names: Sequence[str]) -> None:
        pass

    def drop(self, names: Sequence[str]) -> int:
        return sum(self._buffers.pop(name).numel() for name in names if name in self._buffers)


def _socket_of(source: Source) -> str:
    return str(source) if isinstance(source, (str, Path)) else str(source[0])
