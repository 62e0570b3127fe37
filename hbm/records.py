"""What the manager's books hold: clients, weight sets, KV arenas, their slots and leases, as plain records. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field

from flexpert.hbm.granules import Extent


@dataclass(slots=True)
class Client:
    client_id: int
    pid: int
    name: str
    fencing_token: int
    connected: bool = True


@dataclass(frozen=True, slots=True)
class Segment:
    nbytes: int
    extents: tuple[Extent, ...]


@dataclass(slots=True)
class WeightSet:
    """Weights under a key. `dropped`: no longer under its key, kept until its last reader lets go."""

    owner_id: int
    key: str
    segments: dict[str, Segment]
    manifest: bytes
    ready: bool = False
    dropped: bool = False
    readers: dict[int, int] = field(default_factory=dict)  # client id -> how many times it has mapped the set

    @property
    def num_granules(self) -> int:
        return sum(extent.length for segment in self.segments.values() for extent in segment.extents)


@dataclass(frozen=True, slots=True)
class Geometry:
    slots: int
    slot_granules: int
    granules: int


@dataclass(slots=True)
class Slot:
    request_id: str = ""
    granules: list[int] = field(default_factory=list)


@dataclass(slots=True)
class Lease:
    """`faulted`: an operation of this lease was refused, so the books may no longer say what its client has mapped; it
    can only end.
    """

    lease_id: int
    client_id: int
    fencing_token: int
    ending: bool = False
    faulted: bool = False


@dataclass(frozen=True, slots=True)
class Waiter:
    """A newer writer that waits until the arena's holder has exited. `request` is the daemon's own handle on the
    question.
    """

    client_id: int
    geometry: Geometry
    request: int


@dataclass(slots=True)
class Arena:
    owner_id: int
    name: str
    geometry: Geometry
    extents: tuple[Extent, ...]
    table: list[Slot]
    lease: Lease | None = None
    waiter: Waiter | None = None
