"""The bodies of the admin API, for validation and for the OpenAPI document.

What the controller tells passes through: fields that are named here are promised, further ones may come.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from flexpert.controller.gateway.schema import MAX_INT


def _not_our_own(request_id: str) -> str:
    if request_id.startswith("boot-"):
        raise ValueError("ids that begin with boot- are the cluster's own; draw another id")
    return request_id


RequestId = Annotated[
    str,
    AfterValidator(_not_our_own),
    Field(
        min_length=1, max_length=128, pattern=r"^[!-~]+$",
        description="Sent again with the same id, a request changes nothing and tells of the transition it began. Default: a new one.",
    ),
]  # fmt: skip


class _Told(BaseModel):
    """From the controller."""

    model_config = ConfigDict(extra="allow")


class _Asked(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class _Held(_Asked):
    """Where a policy is active, a size by hand stands against it for a while."""

    owner: str | None = Field(
        None, min_length=1, max_length=128, description="Who asks, for events and for whoever looks next."
    )
    for_s: float | None = Field(
        None,
        gt=0,
        le=30 * 24 * 3600,
        description="For how long, in seconds; then the policy decides again. Default: 900.",
    )


class ScaleRequest(_Held):
    """POST /admin/v1/scale."""

    workers: int = Field(ge=-MAX_INT, le=MAX_INT, description="How many are to serve: 1 to the number of devices.")
    request_id: RequestId | None = None


class DrainRequest(_Held):
    """POST /admin/v1/workers/{worker_id}/drain; the body may be left out."""

    request_id: RequestId | None = None


class Member(_Told):
    worker_id: str
    role: str = Field("", description="stays, joins, leaves or left out")
    step: str = Field("", description="What it does now: process, start, prepare, commit, retire, abort, release.")
    done: bool = False
    moved_bytes: int = 0


class Transition(_Told):
    """The change from one set of workers to another: how far it is, or how it ended."""

    transition_id: str
    request_id: str = ""
    state: Literal["running", "done", "aborted", "failed"]
    kind: str = Field("", description="boot, scale, drain, repair, reload or rejoin")
    phase: str = Field("", description="start, prepare, commit, retire, abort or ended")
    from_workers: list[str] = []
    to_workers: list[str] = []
    epoch: int | None = None
    moved_bytes: int = Field(0, description="Bytes of experts that were read from other workers' memory or from disk.")
    total_bytes: int = Field(0, description="Bytes of experts that must be, by the plan.")
    kv_moved_bytes: int = Field(0, description="Bytes of KV that went along with the requests of workers that left.")
    deadline_s: float | None = Field(None, description="Seconds left for this phase; then the transition is aborted.")
    reason: str = ""
    members: list[Member] = []


class CurrentTransition(BaseModel):
    transition: Transition | None = Field(
        description="The one that runs, else the last one, null where there was none."
    )


class Worker(_Told):
    worker_id: str


class WorkerList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Worker]


class ClusterStatus(_Told):
    """Everything `flexpert status --json` shows."""

    name: str
    phase: str
    ready: bool
    epoch: int
    model: str
    workers: list[dict[str, Any]] = []
    transition: dict[str, Any] | None = None


class Event(_Told):
    sequence: int
    time_s: float = Field(description="Seconds since 1970.")
    kind: str
    text: str


class EventList(BaseModel):
    events: list[Event]
    last: int = Field(description="Number of the newest event; ask with after=last for what comes next.")
