"""The admin API: look at the cluster, change its size, follow a transition. Routes below /admin/v1 on the gateway's own port.

Decides nothing: each call goes to the controller, by whatever the gateway's owner gave it for that (`CallController`). While the
controller is restarted, calls wait for it; the request id makes asking again harmless. `keys` has let the caller in before.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from typing import Annotated, Any, Protocol

from fastapi import APIRouter, Depends, Query
from fastapi.security import HTTPBearer
from starlette.responses import JSONResponse, Response

from flexpert.controller.errors import AdminError
from flexpert.controller.gateway import admin_schema as words
from flexpert.controller.gateway.admin_policy import add_policy_routes
from flexpert.controller.gateway.errors import ApiError
from flexpert.controller.gateway.schema import ErrorResponse

log = logging.getLogger("flexpert.gateway")

PREFIX = "/admin/v1"
CONTROLLER_WAIT_S = 15.0  # Ray restarts a controller within a few seconds
_AGAIN_S = 0.1
_STATUS_OF_CODE = {"invalid": 400, "not_found": 404, "conflict": 409, "impossible": 422}
_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorResponse, "description": text}
    for status, text in {
        400: "The request makes no sense.",
        401: "The admin key is missing or wrong.",
        403: "This is an API key, or the admin API is off.",
        404: "There is no such worker, transition or decision; or no policy.",
        409: "Not now: another transition runs, or the request id was used for something else.",
        422: "Not with these devices or this memory; the text says what is possible instead.",
        503: "The controller is being restarted; Retry-After says when to ask again.",
    }.items()
}


class ControllerAway(Exception):
    """The controller cannot be asked just now."""


class CallController(Protocol):
    async def __call__(self, method: str, *arguments: Any) -> Any:
        """Raises AdminError for what the controller refuses, ControllerAway where there is none."""


class ControllerDesk:
    """Asks the controller on behalf of the routes, and turns what it refuses into HTTP errors."""

    def __init__(self, call: CallController | None, *, wait_s: float = CONTROLLER_WAIT_S) -> None:
        self._call = call
        self._wait_s = wait_s

    async def ask(self, method: str, *arguments: Any) -> Any:
        try:
            async with asyncio.timeout(self._wait_s):
                return await self._ask_until_answered(method, *arguments)
        except AdminError as error:
            raise ApiError(_STATUS_OF_CODE.get(error.code, 400), error.message, code=error.code) from error
        except TimeoutError as error:
            log.warning("the controller did not answer %s within %.1f s", method, self._wait_s)
            raise ApiError(
                503,
                "The controller does not answer; it is being restarted. Ask again, with the same request_id where there is one.",
                code="controller_unavailable",
                headers={"Retry-After": "2"},
            ) from error

    async def _ask_until_answered(self, method: str, *arguments: Any) -> Any:
        while True:
            try:
                if self._call is None:
                    raise ControllerAway("this gateway was given no controller")
                return await self._call(method, *arguments)
            except ControllerAway as error:
                log.info("the controller is away: %s", error)
                await asyncio.sleep(_AGAIN_S)


def admin_router(desk: ControllerDesk) -> APIRouter:
    """Everything below /admin/v1."""
    router = APIRouter(
        prefix=PREFIX,
        tags=["admin"],
        dependencies=[Depends(HTTPBearer(auto_error=False, scheme_name="AdminKey", description="The admin key."))],
        responses={status: _ERRORS[status] for status in (401, 403, 503)},
    )
    _add_reads(router, desk)
    _add_changes(router, desk)
    add_policy_routes(router, desk, _ERRORS)
    return router


def _add_reads(router: APIRouter, desk: ControllerDesk) -> None:
    @router.get("/status", responses={200: {"model": words.ClusterStatus}})
    async def cluster_status() -> Response:
        """The cluster: epoch, workers, devices, experts and KV held by each, the transition in progress."""
        status = await desk.ask("status")
        return JSONResponse({**status, "workers": [worker for worker in status["workers"] if worker]})

    @router.get("/workers", responses={200: {"model": words.WorkerList}})
    async def list_workers() -> Response:
        """The workers that serve, join or leave."""
        status = await desk.ask("status")
        return JSONResponse({"object": "list", "data": [worker for worker in status["workers"] if worker]})

    @router.get("/transition", responses={200: {"model": words.CurrentTransition}})
    async def current_transition() -> Response:
        """The transition that runs, else the last one."""
        return JSONResponse({"transition": await desk.ask("transition", None) or None})

    @router.get("/transitions/{transition_id}", responses={200: {"model": words.Transition}, 404: _ERRORS[404]})
    async def get_transition(transition_id: str) -> Response:
        """One transition by its id."""
        return JSONResponse(await desk.ask("transition", transition_id))

    @router.get("/events", responses={200: {"model": words.EventList}, 400: _ERRORS[400]})
    async def list_events(
        after: Annotated[int, Query(ge=0, le=2**53, description="Only those with a higher sequence number.")] = 0,
        limit: Annotated[int, Query(ge=1, le=1000, description="At most so many, the oldest first.")] = 1000,
    ) -> Response:
        """What happened and why, oldest first. The controller keeps the last 1000."""
        told = await desk.ask("events", after)
        events = [event for event in told["events"] if event["sequence"] > after][:limit]
        return JSONResponse({"events": events, "last": events[-1]["sequence"] if events else told["last"]})


def _add_changes(router: APIRouter, desk: ControllerDesk) -> None:
    begun: dict[int | str, dict[str, Any]] = {
        200: {"model": words.Transition, "description": "Nothing is left to do."},
        202: {"model": words.Transition, "description": "The transition runs; Location says where to follow it."},
        **{status: _ERRORS[status] for status in (400, 409, 422)},
    }

    @router.post("/scale", responses=begun)
    async def scale(request: words.ScaleRequest) -> Response:
        """Change the number of workers. Answers at once; requests go on meanwhile."""
        request_id = request.request_id or _new_request_id()
        return _begun(await desk.ask("scale", request.workers, request_id, *_hold(request)), request_id)

    @router.post("/workers/{worker_id}/drain", responses={**begun, 404: _ERRORS[404]})
    async def drain_worker(worker_id: str, request: words.DrainRequest | None = None) -> Response:
        """Take one worker out, any of them; its requests go on at the others."""
        request_id = (request and request.request_id) or _new_request_id()
        return _begun(await desk.ask("drain", worker_id, request_id, *_hold(request)), request_id)


def _hold(request: words.ScaleRequest | words.DrainRequest | None) -> tuple[Any, ...]:
    """Who asks, and for how long that stands against a policy; () where nothing is said about either."""
    if request is None or (request.owner is None and request.for_s is None):
        return ()
    return (request.owner or "admin API", request.for_s)


def _begun(transition: dict[str, Any], request_id: str) -> Response:
    running = transition.get("state") == "running"
    headers = {"Location": f"{PREFIX}/transitions/{transition['transition_id']}"} if running else {}
    return JSONResponse({"request_id": request_id, **transition}, status_code=202 if running else 200, headers=headers)


def _new_request_id() -> str:
    return "admin-" + secrets.token_hex(8)
