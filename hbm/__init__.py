"""The HBM manager: a long-lived process that owns all memory for weights and KV of a device, and its clients.

Start or adopt it with `ensure_manager`, connect with `HbmClient.connect`. Imports neither torch, ray nor numpy.
"""

from flexpert.hbm.arena import KvArena, SlotRecord
from flexpert.hbm.client import HbmClient, ManagerInfo, WeightsState
from flexpert.hbm.errors import (
    BudgetError,
    BusyError,
    FencedError,
    HbmError,
    LimitError,
    LoadError,
    ManagerGoneError,
    NotFoundError,
    ProtocolError,
)
from flexpert.hbm.host import GRANULE_BYTES
from flexpert.hbm.launch import (
    ManagerConfig,
    ManagerHandle,
    ManagerReport,
    check_manager,
    ensure_manager,
    stop_manager,
)
from flexpert.hbm.loading import Copy, LoadPlan, peer_plan
from flexpert.hbm.mapped_weights import ExportedSegments, MappedSegment, MappedWeights
from flexpert.hbm.ops import ArenaOp, Claim, Map, Unmap

__all__ = [
    "GRANULE_BYTES",
    "ArenaOp",
    "BudgetError",
    "BusyError",
    "Claim",
    "Copy",
    "ExportedSegments",
    "FencedError",
    "HbmClient",
    "HbmError",
    "KvArena",
    "LimitError",
    "LoadError",
    "LoadPlan",
    "ManagerConfig",
    "ManagerGoneError",
    "ManagerHandle",
    "ManagerInfo",
    "ManagerReport",
    "Map",
    "MappedSegment",
    "MappedWeights",
    "NotFoundError",
    "ProtocolError",
    "SlotRecord",
    "Unmap",
    "WeightsState",
    "check_manager",
    "ensure_manager",
    "peer_plan",
    "stop_manager",
]
