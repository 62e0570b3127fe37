"""The answer to one inference request: runs its generation while it watches the client.

Streams start with the first output, so that a request the worker refuses still gets its HTTP status. A client that goes away ends the
generation at once, also while nothing is being sent.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from flexpert.controller.gateway.errors import ApiError, error_body
from flexpert.controller.gateway.generation import Generation
from flexpert.controller.gateway.render import DONE, Renderer, error_event

# The front reads here how a request ended, where its HTTP status does not say it.
OUTCOME_KEY = "flexpert.outcome"
_STREAM_HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",
}


Result = TypeVar("Result")


def error_response(error: ApiError) -> Response:
    return Response(
        error_body(error), status_code=error.status_code, headers=error.headers, media_type="application/json"
    )


async def while_connected(work: Coroutine[Any, Any, Result], request: Request) -> Result:
    """The result of this work, for a request whose body was read. If its client leaves first, the work is cancelled, and an error
    that nobody will see ends the request."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnected(request.receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        request.scope[OUTCOME_KEY] = "cancelled"
        raise ApiError(499, "The client left before its request could begin.")
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class GenerationResponse(Response):
    """An ASGI answer. Not sent through StreamingResponse: one task watches the client, the other writes what is there."""

    def __init__(self, generation: Generation, renderer: Renderer, *, include_usage: bool) -> None:
        super().__init__()
        self._generation = generation
        self._renderer = renderer
        self._include_usage = include_usage

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        watcher = asyncio.create_task(self._watch(receive))
        try:
            self._generation.start()
            if self._generation.stream:
                await self._send_stream(scope, receive, send)
            else:
                await self._send_whole(scope, receive, send)
        finally:
            scope[OUTCOME_KEY] = self._generation.close()
            watcher.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watcher

    async def _watch(self, receive: Receive) -> None:
        await _disconnected(receive)
        self._generation.leave()

    async def _send_whole(self, scope: Scope, receive: Receive, send: Send) -> None:
        generation = self._generation
        await generation.wait_over()
        if generation.client_gone:
            return
        error = generation.first_error()
        if error is not None:
            answer = error_response(error)
        else:
            answer = Response(self._renderer.body(generation), media_type="application/json")
        await answer(scope, receive, send)

    async def _send_stream(self, scope: Scope, receive: Receive, send: Send) -> None:
        generation = self._generation
        await generation.wait()
        error = generation.first_error()
        if error is not None:
            await error_response(error)(scope, receive, send)
            return
        await send({"type": "http.response.start", "status": 200, "headers": _raw(_STREAM_HEADERS)})
        opened: set[int] = set()
        while not generation.client_gone:
            over = generation.over
            data = self._new_events(opened)
            error = generation.first_error()
            if error is not None:
                data += error_event(error)
            elif over:
                data += self._renderer.usage_event(generation) if self._include_usage else b""
                data += DONE
            if data:
                await send({"type": "http.response.body", "body": data, "more_body": not over})
            if over:
                return
            await generation.wait()

    def _new_events(self, opened: set[int]) -> bytes:
        """Events of every choice that has something new."""
        data = []
        for output in self._generation.outputs:
            if output.told_finish:
                continue
            delta = output.take()
            if not (delta.text or delta.entries or delta.finish_reason):
                continue
            if output.index not in opened:
                opened.add(output.index)
                data.append(self._renderer.opening(output))
            output.told_finish = delta.finish_reason is not None
            data.append(self._renderer.events(output, delta))
        return b"".join(data)


def _raw(headers: dict[str, str]) -> list[tuple[bytes, bytes]]:
    return [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
