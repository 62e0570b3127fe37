"""The messages between HBM clients, the manager and its loader helper, and nothing else; `hbm.wire` puts them on a
socket.

Structs are arrays on the wire, tagged by their first element; msgspec checks types and bounds when it decodes, so a
malformed message is an error before any code sees it. `request` numbers a question of one client; its answer carries
the same number. `Apply` has none: it is sent without waiting, and answered, by an `ErrorReply` with request 0, only
when it is refused.

    client                                            manager
    Hello                                   ────>     Welcome | ErrorReply, then the socket closes
    Info, Check, WeightsState, ...          ────>     the answer named in the docstring, or ErrorReply
    LoadSegments                            ────>     Progress*, then Done | ErrorReply
    Apply                                   ────>     nothing | ErrorReply(request=0, lease)

    loader helper                                     manager
    Progress*, Done | ErrorReply            ────>     nothing; the helper's exit ends the load
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated

import msgspec
from msgspec import Meta

PROTOCOL_VERSION = 2
MAX_SLOTS = 1 << 16

Index = Annotated[int, Meta(ge=0, le=1 << 53)]
Name = Annotated[str, Meta(min_length=1, max_length=512)]
Extents = Sequence[tuple[Index, Index]]


class _Message(msgspec.Struct, frozen=True, array_like=True):
    pass


# Client to manager


class Hello(_Message, tag="hello"):
    request: Index
    protocol: int
    client_name: Name
    fencing_token: Index


class GetInfo(_Message, tag="info"):
    """Answer: Info."""

    request: Index


class GetCheck(_Message, tag="check"):
    """Answer: Findings."""

    request: Index


class GetWeightsState(_Message, tag="weights_state"):
    """Answer: WeightsStateReply."""

    request: Index
    key: Name


class GetSegments(_Message, tag="segments"):
    """Answer: SegmentsReply."""

    request: Index
    key: Name


class LoadSegments(_Message, tag="load"):
    """Add to a key the segments that it does not have. Answer: Progress*, then Done when it has all of them. `copies`
    is passed on to the loader helper unread, which carries out those for the segments that are new.
    """

    request: Index
    key: Name
    segments: dict[Name, Index]
    manifest: bytes
    copies: msgspec.Raw


class PinSegments(_Message, tag="pin"):
    """These segments are going to be read: mapped, or exported to another process. names None: all of the key. Answer:
    PinnedReply with a read-only descriptor of the pool.
    """

    request: Index
    key: Name
    names: list[Name] | None = None


class ReleasePin(_Message, tag="unpin"):
    """The client has unmapped them. Answer: Done."""

    request: Index
    pin_id: Index


class DropSegments(_Message, tag="drop"):
    """names None: all of the key. Answer: Done."""

    request: Index
    key: Name
    names: list[Name] | None = None


class OpenArena(_Message, tag="open_arena"):
    """granules 0: as many as the arena has. Answer: ArenaReply with two descriptors: the pool's and the committed
    table's.
    """

    request: Index
    name: Name
    slots: Annotated[int, Meta(ge=0, le=MAX_SLOTS)]
    slot_granules: Index
    granules: Index


class GrowArena(_Message, tag="grow"):
    """Answer: GrownReply."""

    request: Index
    lease_id: Index
    granules: Index


class ShrinkArena(_Message, tag="shrink"):
    """Everything that was sent before it counts: no slot may map these granules. Answer: Done."""

    request: Index
    lease_id: Index
    extents: list[tuple[Index, Index]]


class ReleaseArena(_Message, tag="release_arena"):
    """The client has unmapped the arena. Answer: Done."""

    request: Index
    lease_id: Index


class DropArena(_Message, tag="drop_arena"):
    """Answer: Done."""

    request: Index
    name: Name


class ClaimOp(_Message, tag="c"):
    slot: Index
    request_id: Annotated[str, Meta(max_length=512)]


class MapOp(_Message, tag="m"):
    slot: Index
    first_granule: Index
    granules: list[int]


class UnmapOp(_Message, tag="u"):
    slot: Index
    first_granule: Index


class Apply(_Message, tag="apply"):
    lease_id: Index
    ops: list[ClaimOp | MapOp | UnmapOp]


class Flush(_Message, tag="flush"):
    """Answer: Done, after everything that was sent before it; ErrorReply where some of that was refused."""

    request: Index
    lease_id: Index


# Manager to client


class Welcome(_Message, tag="welcome"):
    request: Index
    pid: int
    granule_bytes: int
    budget_bytes: int


class Done(_Message, tag="done"):
    request: Index


class ErrorReply(_Message, tag="error"):
    """request 0: not the answer to a question; lease_id then says which lease is over, 0: the connection is."""

    request: Index
    kind: str
    text: str
    lease_id: Index = 0


class Progress(_Message, tag="progress"):
    request: Index
    done_bytes: Index
    total_bytes: Index


class WeightsStateReply(_Message, tag="weights_state_reply"):
    """state: "absent", "loading", "ready" or "failed"."""

    request: Index
    state: str
    done_bytes: Index = 0
    total_bytes: Index = 0
    reason: str = ""


class SegmentsReply(_Message, tag="segments_reply"):
    """Ready segments and their bytes."""

    request: Index
    segments: dict[str, int]


class PinnedReply(_Message, tag="pinned"):
    """Segments in the order asked for: bytes, and where they lie."""

    request: Index
    pin_id: Index
    segments: Mapping[str, tuple[int, Extents]]
    manifest: bytes


class ArenaReply(_Message, tag="arena"):
    """table: (request id, granule ids) of every slot, as the last holder left them."""

    request: Index
    lease_id: Index
    extents: Extents
    table: list[tuple[str, list[int]]]


class GrownReply(_Message, tag="grown"):
    request: Index
    lease_id: Index
    extents: Extents


class WeightsInfo(_Message):
    """state as in WeightsStateReply ("loading": some of it), or "dropped": no longer under the key, still read, or
    written, by someone. segments: names and bytes, those that are being loaded too. readers: pids.
    """

    key: str
    state: str
    nbytes: int
    readers: list[int]
    segments: dict[str, int] = {}


class ArenaInfo(_Message):
    """holder_pid 0: nobody. fencing_token: the newest that has been seen for this name."""

    name: str
    slots: int
    slot_granules: int
    granules: int
    fencing_token: int
    holder_pid: int
    ending: bool


class Info(_Message, tag="info_reply"):
    request: Index
    pid: int
    granule_bytes: int
    budget_bytes: int
    free_bytes: int
    clients: list[tuple[str, int]]
    weights: list[WeightsInfo]
    arenas: list[ArenaInfo]
    fencing_tokens: dict[str, int]


class Findings(_Message, tag="findings"):
    request: Index
    findings: list[str]


ClientMessage = (
    Hello
    | GetInfo
    | GetCheck
    | GetWeightsState
    | GetSegments
    | LoadSegments
    | PinSegments
    | ReleasePin
    | DropSegments
    | OpenArena
    | GrowArena
    | ShrinkArena
    | ReleaseArena
    | DropArena
    | Apply
    | Flush
)
ManagerMessage = (
    Welcome
    | Done
    | ErrorReply
    | Progress
    | WeightsStateReply
    | SegmentsReply
    | PinnedReply
    | ArenaReply
    | GrownReply
    | Info
    | Findings
)
LoaderMessage = Progress | Done | ErrorReply


# Manager to loader helper, through a memfd


class ScaleRecord(_Message):
    """`loading.BlockScale`, field by field."""

    file: str
    file_offset: Index
    dtype: str
    columns: Index
    block_rows: Index
    block_columns: Index


class CopyRecord(_Message):
    """`loading.Copy`, field by field."""

    file: str
    file_offset: Index
    num_elements: Index
    source_dtype: str
    segment: str
    segment_offset: Index
    dtype: str
    scale: ScaleRecord | None = None


class LoaderTask(_Message):
    """Copies for other segments than these are left out."""

    segments: Mapping[str, tuple[int, Extents]]
    copies: list[CopyRecord]
