"""The outermost layer, plain ASGI: what holds for every answer before any route is looked at.

Gives each request its id, asks for the API key, refuses what is too large without keeping it, refuses new work while the gateway
drains, and counts how requests ended. No body is parsed here.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flexpert.controller.gateway.errors import ApiError, error_body, shutting_down
from flexpert.controller.gateway.keys import AdminKeys, ApiKeys
from flexpert.controller.gateway.metrics import GatewayMetrics
from flexpert.controller.gateway.responses import OUTCOME_KEY

INFERENCE_PATHS = {"/v1/completions": "completions", "/v1/chat/completions": "chat_completions"}
_REQUEST_ID_CHARS = 128
# A refused body is read to its end and thrown away, so that the client sees the answer instead of a reset; within these bounds.
_DISCARD_S = 5.0
_DISCARD_BODIES = 8


class Front:
    """Wraps the application. `draining` is asked for each request."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        keys: ApiKeys,
        admin_keys: AdminKeys,
        max_body_bytes: int,
        draining: Callable[[], bool],
        metrics: GatewayMetrics,
    ) -> None:
        self._app = app
        self._keys, self._admin_keys = keys, admin_keys
        self._max_body_bytes = max_body_bytes
        self._draining = draining
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        request_id = _request_id(headers)
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message.get("headers", ()), (b"x-request-id", request_id)]}
            await send(message)

        try:
            await self._answer(scope, headers, receive, send_with_id)
        finally:
            endpoint = INFERENCE_PATHS.get(scope["path"])
            if endpoint is not None:
                outcome = scope.get(OUTCOME_KEY) or _outcome(status)
                self._metrics.requests.labels(endpoint, outcome).inc()
                if outcome == "rejected":
                    self._metrics.window.refused(time.monotonic())

    async def _answer(self, scope: Scope, headers: Headers, receive: Receive, send: Send) -> None:
        error = self._refusal(scope, headers)
        if error is not None:
            await _refuse(error, receive, send, discard_bytes=self._max_body_bytes * _DISCARD_BODIES)
            return
        body = _LimitedBody(receive, self._max_body_bytes)
        await self._app(scope, body.receive, body.watch(send))
        if body.exceeded:
            await body.discard()

    def _refusal(self, scope: Scope, headers: Headers) -> ApiError | None:
        if scope["path"].startswith("/v1/"):
            error = self._keys.check(headers)
            if error is not None:
                return error
            if self._draining() and scope["method"] == "POST":
                return shutting_down()
        elif scope["path"].startswith("/admin/") and (error := self._admin_keys.check(headers)) is not None:
            return error
        length = headers.get("content-length", "")
        if length.isdigit() and int(length) > self._max_body_bytes:
            return _too_large(self._max_body_bytes)
        return None


class _LimitedBody:
    """A request's body, counted as it is read. More than allowed raises the 413 in whoever reads it."""

    def __init__(self, receive: Receive, max_bytes: int) -> None:
        self._receive = receive
        self._max_bytes = max_bytes
        self._read_bytes = 0
        self.exceeded = False

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.request":
            self._read_bytes += len(message.get("body", b""))
            if self._read_bytes > self._max_bytes:
                self.exceeded = True
                raise _too_large(self._max_bytes)
        return message

    def watch(self, send: Send) -> Send:
        """Keeps the answer to an oversized body open until `discard` has read the rest."""

        async def send_held(message: Message) -> None:
            if self.exceeded and message["type"] == "http.response.body":
                message = {**message, "more_body": True}
            await send(message)

        self._send = send
        return send_held

    async def discard(self) -> None:
        await _discard(self._receive, self._max_bytes * _DISCARD_BODIES)
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})


async def _refuse(error: ApiError, receive: Receive, send: Send, *, discard_bytes: int) -> None:
    body = error_body(error)
    fixed = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    extra = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in (error.headers or {}).items()]
    await send({"type": "http.response.start", "status": error.status_code, "headers": fixed + extra})
    await send({"type": "http.response.body", "body": body, "more_body": True})
    await _discard(receive, discard_bytes)
    await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _discard(receive: Receive, limit_bytes: int) -> None:
    """Read the rest of a body and keep nothing of it."""
    deadline_s = time.monotonic() + _DISCARD_S
    read_bytes = 0
    while read_bytes <= limit_bytes and time.monotonic() < deadline_s:
        try:
            message = await asyncio.wait_for(receive(), deadline_s - time.monotonic())
        except TimeoutError:
            return
        if message["type"] != "http.request" or not message.get("more_body"):
            return
        read_bytes += len(message.get("body", b""))


def _request_id(headers: Headers) -> bytes:
    """The client's own id if it is short and printable, else a new one."""
    given = headers.get("x-request-id", "")
    if 0 < len(given) <= _REQUEST_ID_CHARS and given.isascii() and given.isprintable():
        return given.encode()
    return b"req_" + secrets.token_hex(16).encode()


def _outcome(status: int) -> str:
    if status == 429:
        return "rejected"
    if 400 <= status < 500:
        return "invalid"
    return "completed" if 200 <= status < 300 else "failed"


def _too_large(limit_bytes: int) -> ApiError:
    return ApiError(
        413, f"The request's body is larger than the {limit_bytes} bytes that this server reads.", code="body_too_large"
    )
