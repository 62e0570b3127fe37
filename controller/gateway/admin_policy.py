"""The admin API's part about the scaling policy: /policy and /decisions below /admin/v1. As in `admin`, calls go to the controller."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Annotated, Any, Protocol

from fastapi import APIRouter, Query
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import JSONResponse, Response

Errors = dict[int | str, dict[str, Any]]
Owner = Annotated[
    str | None, Field(min_length=1, max_length=128, description="Who asks, for events and for whoever looks next.")
]
PolicyText = Annotated[str, Field(min_length=1, max_length=1 << 20, description="YAML, as in docs/policy.md.")]


class AskController(Protocol):
    async def ask(self, method: str, *arguments: Any) -> Any: ...


class _Asked(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class PutPolicyRequest(_Asked):
    """PUT /admin/v1/policy; without a body, or without text, the file is read again."""

    text: PolicyText | None = None
    owner: Owner = None


class PauseRequest(_Asked):
    """POST /admin/v1/policy/pause."""

    for_s: float = Field(gt=0, le=30 * 24 * 3600, description="After so many seconds the policy goes on by itself.")
    owner: Owner = None


class ResumeRequest(_Asked):
    """POST /admin/v1/policy/resume; the body may be left out."""

    owner: Owner = None


class ModeRequest(_Asked):
    """POST /admin/v1/policy/mode."""

    mode: str = Field(description="active, advisory, paused; or policy: what is written in it.")
    owner: Owner = None


class DryRunRequest(_Asked):
    """POST /admin/v1/policy/dry-run."""

    text: PolicyText


class PolicyState(BaseModel):
    """The policy in use and what stands against it; only `active` and `problem` where there is none."""

    model_config = ConfigDict(extra="allow")
    active: bool
    problem: str | None = Field(description="Why the policy file as it is now is not in use.")
    mode: str | None = None
    desired: int | None = None


class DecisionState(BaseModel):
    """One decision with its signals, the rules that shaped it, and from five minutes after it on its outcome."""

    model_config = ConfigDict(extra="allow")
    decision_id: str
    reason: str
    text: str
    transition_id: str | None
    refused: str | None = Field(default=None, description="Why its order was not taken.")
    outcome: dict[str, Any] | None


class DecisionList(BaseModel):
    decisions: list[DecisionState]


class DryRun(BaseModel):
    """What another policy would have done with the recorded signals."""

    model_config = ConfigDict(extra="allow")
    policy: str
    changes: list[dict[str, Any]]
    device_hours: float
    recorded_device_hours: float


def add_policy_routes(router: APIRouter, desk: AskController, errors: Errors) -> None:
    async def ask(word: str, body: BaseModel | None = None, **arguments: Any) -> Response:
        given = {} if body is None else body.model_dump(exclude_none=True)
        return JSONResponse(await desk.ask("policy", word, {**given, **arguments}))

    _add_reads(router, ask, errors)
    _add_changes(router, ask, errors)


def _add_reads(router: APIRouter, ask: Callable[..., Awaitable[Response]], errors: Errors) -> None:
    @router.get("/policy", responses={200: {"model": PolicyState}})
    async def show_policy() -> Response:
        """The policy in use, its mode, pause and override, and the last decision."""
        return await ask("show")

    @router.get("/decisions", responses={200: {"model": DecisionList}, 400: errors[400]})
    async def list_decisions(
        limit: Annotated[int, Query(ge=1, le=1000)] = 50,
        changes: Annotated[bool, Query(description="Only those that changed the size, or would have.")] = False,
    ) -> Response:
        """The last decisions, newest first. The controller keeps 2000 at hand, and more in its file."""
        return await ask("decisions", limit=limit, changes=changes)

    @router.get("/decisions/{decision_id}", responses={200: {"model": DecisionState}, 404: errors[404]})
    async def get_decision(decision_id: str) -> Response:
        """One decision by its id."""
        return await ask("decision", decision_id=decision_id)


def _add_changes(router: APIRouter, ask: Callable[..., Awaitable[Response]], errors: Errors) -> None:
    changed: Errors = {200: {"model": PolicyState}, 400: errors[400], 404: errors[404]}

    @router.put("/policy", responses={200: {"model": PolicyState}, 400: errors[400]})
    async def put_policy(request: PutPolicyRequest | None = None) -> Response:
        """Use another policy, or read the file again. A policy with errors is refused, and the one in use stays."""
        return await ask("put", request)

    @router.post("/policy/pause", responses=changed)
    async def pause_policy(request: PauseRequest) -> Response:
        """Decide nothing for a while."""
        return await ask("pause", request)

    @router.post("/policy/resume", responses=changed)
    async def resume_policy(request: ResumeRequest | None = None) -> Response:
        """End the pause and a size by hand; the mode is the policy's again."""
        return await ask("resume", request)

    @router.post("/policy/mode", responses=changed)
    async def set_policy_mode(request: ModeRequest) -> Response:
        """Set the mode in place of the policy's."""
        return await ask("mode", request)

    @router.post("/policy/dry-run", responses={200: {"model": DryRun}, 400: errors[400], 409: errors[409]})
    async def dry_run_policy(request: DryRunRequest) -> Response:
        """What that policy would have done with what this cluster recorded."""
        return await ask("dry_run", request)
