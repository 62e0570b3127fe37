"""A transition as people see it: a value for the admin API, the command line and the dashboard."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class MemberProgress:
    """role: "stays", "joins", "leaves" or "left out". step: what it does now ("process", "start", ... or "" before anything)."""

    worker_id: str
    role: str
    step: str
    done: bool
    process: str
    moved_bytes: int
    seconds: dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """kind: "boot", "scale", "drain", "repair", "reload" or "rejoin". phase: "start", "prepare", "commit", "retire", "abort" or "ended".
    state: "running", "done", "aborted" or "failed". deadline_id: the one that runs; when it ends is known where the clock is."""

    transition_id: str
    request_id: str
    kind: str
    asked: str
    epoch: int
    from_workers: tuple[str, ...]
    to_workers: tuple[str, ...]
    phase: str
    state: str
    reason: str
    moved_bytes: int
    kv_moved_bytes: int
    total_bytes: int
    deadline_id: str
    members: tuple[MemberProgress, ...]
