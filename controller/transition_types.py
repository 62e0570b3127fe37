"""The words between the controller and its transitions: events (what happened), instructions (what to do), and what is configured.

Values without behaviour; `controller.transition` takes the one and gives the other, the controller's components carry them out and write
the machine's snapshot to the journal between the two. An answer names the process and, where there is one, the epoch that it speaks
of: what comes late from a process or an epoch that is over is known by that and changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from flexpert.controller.transition_progress import MemberProgress as MemberProgress
from flexpert.controller.transition_progress import Progress as Progress
from flexpert.workers.epoch import Epoch

# What is configured


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """Expert slabs lie in slots, layer after layer: slot = layer * experts + expert. Group g holds the slabs_per_group slots from
    g * slabs_per_group on and is the unit that is moved and loaded. layers: those that have experts."""

    layers: int
    experts: int
    slab_bytes: int
    slabs_per_group: int = 1
    dense_bytes: int = 0  # on each device, beside its experts
    kv_min_bytes: int = 0  # what a worker must keep for KV to be of use

    @property
    def slabs(self) -> int:
        return self.layers * self.experts


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """The device of one worker, and the memory that its HBM manager may use."""

    worker_id: str
    memory_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Deadlines:
    """How long each phase may take. process_s: how long a repair waits for a process before it goes on without that worker."""

    process_s: float = 2.0
    start_s: float = 600.0
    prepare_s: float = 300.0
    commit_s: float = 10.0
    retire_s: float = 20.0
    abort_s: float = 5.0
    pause_s: float = 0.5  # before a repair that failed is tried again; doubled each time, up to pause_max_s
    pause_max_s: float = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TransitionConfig:
    """devices: those there are, in the order in which workers are added. max_workers: the operator's bound.

    max_attempts: processes that a boot or a repair tries for one worker before it fails or goes on without it.
    """

    devices: tuple[Device, ...]
    model: ModelShape
    max_workers: int
    deadlines: Deadlines = field(default_factory=Deadlines)
    replicas: bool = False
    max_attempts: int = 5
    max_history: int = 100


# Events


@dataclass(frozen=True, slots=True)
class Request:
    """kind: "boot" or "scale" with `workers` as the number wanted, "drain" with worker_id. Answered with Answer(request_id) at once."""

    kind: str
    request_id: str
    workers: int = 0
    worker_id: str = ""


@dataclass(frozen=True, slots=True)
class LoadMeasured:
    """Tokens routed to [layer][expert] of late, over all workers; the next plan uses it."""

    load: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class ProcessReady:
    """A warm process is set aside for the worker, and the HBM manager of its device answers."""

    worker_id: str
    process: str


@dataclass(frozen=True, slots=True)
class WorkerStarted:
    worker_id: str
    process: str
    exchange_address: str
    serve_address: str
    manager_socket: str
    seconds: float = 0.0
    moved_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Moved:
    """How far a StartWorker (the dense weights counted too) or the Prepare of epoch `number` is; for people only."""

    worker_id: str
    process: str
    step: str
    moved_bytes: int
    number: int = 0


@dataclass(frozen=True, slots=True)
class Prepared:
    worker_id: str
    process: str
    number: int
    moved_bytes: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Committed:
    worker_id: str
    process: str
    number: int
    pause_s: float = 0.0
    kv_moved_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Retired:
    worker_id: str
    process: str
    number: int
    freed_bytes: int = 0
    pause_s: float = 0.0  # how long its requests stood still at the flip


@dataclass(frozen=True, slots=True)
class Aborted:
    worker_id: str
    process: str
    number: int


@dataclass(frozen=True, slots=True)
class Released:
    """The process let go of everything and is a standby again."""

    worker_id: str
    process: str


@dataclass(frozen=True, slots=True)
class Failed:
    """An instruction to this worker failed; the process lives. step: "process" (none can be had; process is ""), "start", "prepare",
    "commit", "retire", "abort" or "release". permanent: no second try can change it (model, settings, limits)."""

    worker_id: str
    process: str
    step: str
    reason: str
    number: int = 0
    permanent: bool = False


@dataclass(frozen=True, slots=True)
class MemberDied:
    """A worker's process ended, at whatever step."""

    worker_id: str
    process: str
    reason: str


@dataclass(frozen=True, slots=True)
class Trouble:
    """This worker's group missed a step of epoch `number` and pauses. suspects: worker ids it waited for, maybe none."""

    worker_id: str
    process: str
    number: int
    suspects: tuple[str, ...]
    reason: str


@dataclass(frozen=True, slots=True)
class ManagerDied:
    """The HBM manager of this worker's device died: weights and KV are gone. Starting another is not decided here."""

    worker_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class Expired:
    """The time of Deadline(deadline_id) is up."""

    deadline_id: str


@dataclass(frozen=True, slots=True)
class Resumed:
    """The controller was restarted and has restored the machine; live: (worker_id, process) of the processes that were
    found with a worker's name; idle standbys are not among them. Those that the machine does not know are killed."""

    live: tuple[tuple[str, str], ...]


Event = (
    Request | LoadMeasured | ProcessReady | WorkerStarted | Moved | Prepared | Committed | Retired | Aborted | Released | Failed
    | MemberDied | Trouble | ManagerDied | Expired | Resumed
)  # fmt: skip


# Instructions. Each may be given again, above all after a restart of the controller: then it answers as it did, or goes on.


@dataclass(frozen=True, slots=True)
class Answer:
    """To whoever sent Request(request_id). code: "" where transition_id was begun or is known; else "invalid", "conflict", "impossible" or
    "not_found", and message says what is possible instead."""

    request_id: str
    transition_id: str = ""
    code: str = ""
    message: str = ""


@dataclass(frozen=True, slots=True)
class GiveProcess:
    """Set a warm process aside for this worker (spawn one where none is left) and see that its device's manager runs; then ProcessReady.
    attempt: how many processes failed at it in this transition; a pause before the next is the receiver's to make."""

    worker_id: str
    attempt: int = 0


@dataclass(frozen=True, slots=True)
class Withdraw:
    """GiveProcess is no longer wanted; a process that was set aside is a standby again."""

    worker_id: str


@dataclass(frozen=True, slots=True)
class Source:
    """A manager to read slab groups from; groups: those that the plan means to read there. What no source has comes from disk."""

    worker_id: str
    manager_socket: str
    groups: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class StartWorker:
    """draft: the epoch to be, with "" for addresses that are not known yet; the worker may load its share already and sizes its KV by it.
    It serves nobody before Commit. Answer: WorkerStarted or Failed."""

    worker_id: str
    process: str
    incarnation: int
    draft: Epoch
    sources: tuple[Source, ...]


@dataclass(frozen=True, slots=True)
class Prepare:
    """Make `epoch` ready beside the current one. A worker that is no member of it leaves: it moves the KV of its requests meanwhile."""

    worker_id: str
    process: str
    epoch: Epoch
    sources: tuple[Source, ...]
    deadline_s: float


@dataclass(frozen=True, slots=True)
class Commit:
    worker_id: str
    process: str
    number: int
    deadline_s: float


@dataclass(frozen=True, slots=True)
class Retire:
    """Let go of what the epochs before `number` needed, and neither `number` nor one that is prepared since."""

    worker_id: str
    process: str
    number: int


@dataclass(frozen=True, slots=True)
class Abort:
    """Drop what was prepared for `number`; go on with the current epoch. Unknown numbers are aborted already."""

    worker_id: str
    process: str
    number: int


@dataclass(frozen=True, slots=True)
class Release:
    """Let go of everything, become a standby. A process that was never started is one at once. keep: the device still counts as a holder of
    its experts (a repair will read them there), so its manager's weights must stay; otherwise they may go, too."""

    worker_id: str
    process: str
    keep: bool = False


@dataclass(frozen=True, slots=True)
class KillProcess:
    """End it; no MemberDied is needed for it any more (one that comes changes nothing)."""

    worker_id: str
    process: str
    reason: str


@dataclass(frozen=True, slots=True, order=True)
class Serving:
    worker_id: str
    incarnation: int
    address: str


@dataclass(frozen=True, slots=True)
class Publish:
    """For the gateways: who serves; the draining ones among them get no new requests."""

    serving: tuple[Serving, ...]
    draining: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Deadline:
    """Send Expired(deadline_id) after after_s. One runs at a time: earlier ones are void, and one that comes late changes nothing."""

    deadline_id: str
    after_s: float


@dataclass(frozen=True, slots=True)
class Note:
    """Something a person wants to read later."""

    kind: str
    text: str
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Finished:
    """state: "done", "aborted" or "failed". permanent: no second try can change the reason (of use at boot)."""

    transition_id: str
    state: str
    reason: str = ""
    permanent: bool = False


Instruction = (
    Answer | GiveProcess | Withdraw | StartWorker | Prepare | Commit | Retire | Abort | Release | KillProcess | Publish | Deadline
    | Note | Finished
)  # fmt: skip
