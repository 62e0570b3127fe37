"""What the transitions remember: the current epoch, the processes that serve it, the transition that runs, and those that ended.

Plain values, written to the journal whole (`to_journal`) after each event and read back by a restarted controller (`from_journal`).
Changed by `controller.transition` only.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import msgspec

from flexpert.controller.planner import Holders
from flexpert.controller.transition_progress import MemberProgress, Progress
from flexpert.controller.transition_types import Serving, Source
from flexpert.workers.epoch import Epoch

FORMAT = 1


@dataclass(slots=True, kw_only=True)
class Live:
    """A process that runs as this worker and takes, or took, part in an epoch."""

    process: str
    incarnation: int
    exchange_address: str
    serve_address: str
    manager_socket: str


@dataclass(slots=True, kw_only=True)
class Part:
    """One worker in the transition. role: "stays", "joins", "leaves", "left out". step: what it does in this phase; asked: the instruction
    went out; done: it answered, or need not. live: its process, with addresses from WorkerStarted on; gone: that process ended.
    moved_bytes: of experts, those of the steps that answered (settled_bytes) and what the present step has told so far."""

    role: str
    step: str = ""
    asked: bool = False
    done: bool = True
    live: Live | None = None
    gone: bool = False
    attempts: int = 0
    sources: list[Source] = field(default_factory=list)
    moved_bytes: int = 0
    settled_bytes: int = 0
    kv_moved_bytes: int = 0
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def process(self) -> str:
        return self.live.process if self.live and not self.gone else ""

    def next(self, step: str) -> None:
        self.step, self.asked, self.done = step, False, False

    def finish(self) -> None:
        self.done = True

    def settle(self, moved_bytes: int) -> None:
        """So much this step has moved in all."""
        self.settled_bytes += moved_bytes
        self.moved_bytes = self.settled_bytes


@dataclass(slots=True, kw_only=True)
class Transition:
    """number: of the epoch it makes. waited: a repair waited for processes as long as it may."""

    transition_id: str
    request_id: str
    kind: str
    asked: str
    number: int
    from_workers: tuple[str, ...]
    to_workers: tuple[str, ...]
    phase: str = "start"
    state: str = "running"
    reason: str = ""
    permanent: bool = False
    deadline_id: str = ""
    waited: bool = False
    total_bytes: int = 0
    holders: Holders = ()
    parts: dict[str, Part] = field(default_factory=dict)

    @property
    def mends(self) -> bool:
        """Whether it brings back what should be there, and so tries again where others give up."""
        return self.kind in ("boot", "repair", "reload")

    def progress(self) -> Progress:
        return Progress(
            transition_id=self.transition_id,
            request_id=self.request_id,
            kind=self.kind,
            asked=self.asked,
            epoch=self.number,
            from_workers=self.from_workers,
            to_workers=self.to_workers,
            phase=self.phase,
            state=self.state,
            reason=self.reason,
            moved_bytes=sum(part.moved_bytes for part in self.parts.values()),
            kv_moved_bytes=sum(part.kv_moved_bytes for part in self.parts.values()),
            total_bytes=self.total_bytes,
            deadline_id=self.deadline_id,
            members=tuple(
                MemberProgress(
                    worker_id=worker,
                    role=part.role,
                    step=part.step,
                    done=part.done,
                    process=part.process,
                    moved_bytes=part.moved_bytes,
                    seconds=dict(part.seconds),
                )
                for worker, part in sorted(self.parts.items())
            ),
        )


@dataclass(slots=True, kw_only=True)
class State:
    """live: processes that serve the current epoch or leave it. broken: why the group of the current epoch does not step, "" where it does.
    lost: workers whose manager died since the current epoch began. missing: workers that were left out and are wanted back -> the process
    that waits for its turn, or "". requests: request id -> (what was asked, transition id). failures: repairs or boots that failed in a
    row; shunned: workers that the next repair does without if it can, for that reason. boot_workers: what a boot shall bring up."""

    current: Epoch | None = None
    live: dict[str, Live] = field(default_factory=dict)
    broken: str = ""
    lost: set[str] = field(default_factory=set)
    missing: dict[str, str] = field(default_factory=dict)
    incarnations: dict[str, int] = field(default_factory=dict)
    last_epoch: int = 0
    last_transition: int = 0
    last_deadline: int = 0
    running: Transition | None = None
    ended: list[Transition] = field(default_factory=list)
    requests: dict[str, tuple[str, str]] = field(default_factory=dict)
    failures: int = 0
    shunned: set[str] = field(default_factory=set)
    pause_id: str = ""
    boot_workers: int = 0
    published: tuple[tuple[Serving, ...], tuple[str, ...]] | None = None

    @property
    def members(self) -> tuple[str, ...]:
        return () if self.current is None else tuple(member.worker_id for member in self.current.members)

    @property
    def dead(self) -> tuple[str, ...]:
        """Members of the current epoch without a process."""
        return tuple(worker for worker in self.members if worker not in self.live)

    def find(self, transition_id: str) -> Transition | None:
        candidates = [*self.ended, *([self.running] if self.running else [])]
        return next((found for found in candidates if found.transition_id == transition_id), None)


def to_journal(state: State) -> dict[str, Any]:
    """A value of JSON."""
    found: dict[str, Any] = msgspec.to_builtins(state, order="deterministic")
    return {"format": FORMAT, **found}


def from_journal(journal: dict[str, Any]) -> State:
    """Raises ValueError for what another version wrote or what is no journal."""
    if journal.get("format") != FORMAT:
        raise ValueError(
            f"the journal of transitions has format {journal.get('format')!r}, this version reads {FORMAT}"
        )
    return msgspec.convert({name: value for name, value in journal.items() if name != "format"}, State)
