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


@dataclass(slots=True, eq=False)
class Segment:
    """Bytes of a key under a name. load_id: the load that fills it, 0 once it is ready. num_pins: how many pins hold
    it. `dropped`: no longer under its name, kept until the last pin, or the loader helper, lets go.
    """

    owner_id: int
    key: str
    name: str
    nbytes: int
    extents: tuple[Extent, ...]
    load_id: int = 0
    num_pins: int = 0
    dropped: bool = False


@dataclass(slots=True)
class WeightSet:
    """All segments under a key, ready or being loaded, and the manifest of the load that made the key."""

    key: str
    manifest: bytes
    segments: dict[str, Segment] = field(default_factory=dict)


@dataclass(slots=True)
class LoadRecord:
    """Segments that one loader helper fills. `abandoned`: dropped before it was done."""

    load_id: int
    key: str
    segments: dict[str, Segment]
    abandoned: bool = False


@dataclass(frozen=True, slots=True)
class Pin:
    """A reader's hold on segments: from its mapping of them until it has unmapped them or exited."""

    pin_id: int
    client_id: int
    segments: tuple[Segment, ...]


@dataclass(frozen=True, slots=True)
class Geometry:
    """granules: of an arena, how many it has; of a question for one, 0 means as many as it has."""

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
    """extents: sorted, no two of them touch; they change as the arena grows and shrinks."""

    owner_id: int
    name: str
    geometry: Geometry
    extents: tuple[Extent, ...]
    table: list[Slot]
    lease: Lease | None = None
    waiter: Waiter | None = None
