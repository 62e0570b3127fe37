"""The FastAPI application: routes, and every error in OpenAI's shape.

Routes are thin: check, prepare, make a Generation, hand it to `responses`. Built by `server`, which owns the parts.
"""

from __future__ import annotations

import hashlib
import secrets
from dataclasses import dataclass
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.security import HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

import flexpert
from flexpert.controller.gateway import schema
from flexpert.controller.gateway.admin import ControllerDesk, admin_router
from flexpert.controller.gateway.admission import Admission
from flexpert.controller.gateway.cluster import ClusterFacts
from flexpert.controller.gateway.errors import ApiError, bad_request, internal_error
from flexpert.controller.gateway.generation import Generation, Ticket
from flexpert.controller.gateway.metrics import GatewayMetrics
from flexpert.controller.gateway.pool import WorkerPool
from flexpert.controller.gateway.prepare import Prepared, check_supported, choices_of, prepare_chat, prepare_completion
from flexpert.controller.gateway.render import ChatRenderer, CompletionRenderer
from flexpert.controller.gateway.responses import GenerationResponse, error_response, while_connected
from flexpert.controller.gateway.tokenizer import ModelTokenizer
from flexpert.workers.messages import Welcome

_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": schema.ErrorResponse, "description": text}
    for status, text in {
        400: "The request is malformed or asks for what this server does not do.",
        401: "The API key is missing or wrong.",
        404: "There is no such model.",
        413: "The body is too large.",
        429: "The queue is full; Retry-After says when to come back.",
        500: "The server failed.",
        503: "The server is shutting down.",
    }.items()
}
_STREAM = {
    "text/event-stream": {"schema": {"type": "string", "description": "Chunks as `data:` events, then `data: [DONE]`."}}
}


@dataclass(frozen=True, slots=True)
class Parts:
    """What the routes work with."""

    model_id: str
    created: int
    tokenizer: ModelTokenizer
    pool: WorkerPool
    admission: Admission
    metrics: GatewayMetrics
    desk: ControllerDesk
    cluster: ClusterFacts

    @property
    def fingerprint(self) -> str:
        return "fp_" + hashlib.sha256(f"{self.model_id} {flexpert.__version__}".encode()).hexdigest()[:12]


def build_app(parts: Parts, *, draining: Any) -> FastAPI:
    """`draining()` tells whether the gateway is about to stop."""
    app = FastAPI(
        title="flexpert",
        version=flexpert.__version__,
        description="OpenAI-compatible inference on an elastic cluster. See docs/api.md.",
        docs_url=None,
        redoc_url=None,
    )
    _add_error_handlers(app)
    _add_operations(app, parts, draining)
    _add_models(app, parts)
    _add_inference(app, parts)
    app.include_router(admin_router(parts.desk))
    _drop_unused_answers(app.openapi())
    return app


def _drop_unused_answers(document: dict[str, Any]) -> None:
    """FastAPI documents its own 422 for every body; here an invalid body is a 400. The document is made once and kept."""
    for path in document["paths"].values():
        for operation in path.values():
            if operation["responses"].get("422", {}).get("description") == "Validation Error":
                del operation["responses"]["422"]
    for name in ("HTTPValidationError", "ValidationError"):
        document["components"]["schemas"].pop(name, None)


def _add_inference(app: FastAPI, parts: Parts) -> None:
    key = [Depends(HTTPBearer(auto_error=False, description="One of the server's API keys."))]

    @app.post(
        "/v1/completions",
        tags=["inference"],
        dependencies=key,
        responses=_ERRORS | {200: {"model": schema.CompletionResponse, "content": _STREAM}},
        response_class=Response,
    )
    async def create_completion(request: schema.CompletionRequest, connection: Request) -> Response:
        """Continue a prompt."""
        check_supported(request, model_id=parts.model_id)
        ticket = Ticket(parts.admission, choices_of(request))
        try:
            limits = await _limits(parts, connection)
            prepared = await prepare_completion(request, tokenizer=parts.tokenizer, limits=limits)
            generation = _generation(parts, "cmpl", prepared, ticket, stream=bool(request.stream))
            usage = _wants_usage(request)
            renderer = CompletionRenderer(
                generation,
                tokenizer=parts.tokenizer,
                model_id=parts.model_id,
                fingerprint=parts.fingerprint,
                logprobs=request.logprobs,
                echo=bool(request.echo),
                usage=usage,
            )
        except BaseException:
            ticket.release(served=False)
            raise
        return GenerationResponse(generation, renderer, include_usage=usage)

    @app.post(
        "/v1/chat/completions",
        tags=["inference"],
        dependencies=key,
        responses=_ERRORS | {200: {"model": schema.ChatResponse, "content": _STREAM}},
        response_class=Response,
    )
    async def create_chat_completion(request: schema.ChatRequest, connection: Request) -> Response:
        """Answer a conversation."""
        check_supported(request, model_id=parts.model_id)
        ticket = Ticket(parts.admission, choices_of(request))
        try:
            limits = await _limits(parts, connection)
            prepared = await prepare_chat(request, tokenizer=parts.tokenizer, limits=limits)
            generation = _generation(parts, "chatcmpl", prepared, ticket, stream=bool(request.stream))
            usage = _wants_usage(request)
            renderer = ChatRenderer(
                generation,
                tokenizer=parts.tokenizer,
                model_id=parts.model_id,
                fingerprint=parts.fingerprint,
                logprobs=bool(request.logprobs),
                stream=bool(request.stream),
                usage=usage,
            )
        except BaseException:
            ticket.release(served=False)
            raise
        return GenerationResponse(generation, renderer, include_usage=usage)


async def _limits(parts: Parts, connection: Request) -> Welcome:
    """Waits for the first worker, as long as the client does."""
    if parts.pool.limits_known:
        return await parts.pool.limits()
    return await while_connected(parts.pool.limits(), connection)


def _generation(parts: Parts, prefix: str, prepared: Prepared, ticket: Ticket, *, stream: bool) -> Generation:
    return Generation(
        request_id=f"{prefix}-{secrets.token_hex(12)}",
        prepared=prepared,
        tokenizer=parts.tokenizer,
        pool=parts.pool,
        metrics=parts.metrics,
        ticket=ticket,
        stream=stream,
    )


def _wants_usage(request: schema.CompletionRequest | schema.ChatRequest) -> bool:
    return request.stream_options is not None and bool(request.stream_options.include_usage)


def _add_models(app: FastAPI, parts: Parts) -> None:
    card = schema.ModelCard(id=parts.model_id, created=parts.created)

    @app.get("/v1/models", tags=["models"], responses={401: _ERRORS[401]})
    async def list_models() -> schema.ModelList:
        """The models of this server: one."""
        return schema.ModelList(data=[card])

    @app.get("/v1/models/{model_id:path}", tags=["models"], responses={401: _ERRORS[401], 404: _ERRORS[404]})
    async def get_model(model_id: str) -> schema.ModelCard:
        """One model by its id."""
        if model_id != parts.model_id:
            raise ApiError(
                404,
                f"The model {model_id!r} does not exist; this server has {parts.model_id!r}.",
                code="model_not_found",
            )
        return card


def _add_operations(app: FastAPI, parts: Parts, draining: Any) -> None:
    @app.get("/health", tags=["operations"])
    async def health() -> schema.Health:
        """The process is alive. Says nothing about workers."""
        return schema.Health(status="ok")

    @app.get(
        "/ready",
        tags=["operations"],
        responses={503: {"model": schema.Health, "description": "No request would be served now."}},
    )
    async def ready() -> Response:
        """A worker is connected, and the gateway is not shutting down."""
        if draining():
            return JSONResponse({"status": "draining", "reasons": ["the gateway is shutting down"]}, status_code=503)
        if parts.pool.ready:
            return JSONResponse({"status": "ok", "reasons": []})
        reasons = [f"worker {link.worker_id}: {link.problem}" for link in parts.pool.links] or ["no worker is known"]
        return JSONResponse({"status": "no worker", "reasons": reasons}, status_code=503)

    @app.get("/metrics", tags=["operations"], response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def metrics() -> Response:
        """Prometheus text format."""
        await parts.cluster.refresh()
        return Response(parts.metrics.render(), headers={"content-type": CONTENT_TYPE_LATEST})


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(RequestValidationError)
    async def invalid(_request: Request, error: RequestValidationError) -> Response:
        return error_response(_explain(error))

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        if isinstance(error, ApiError):
            return error_response(error)
        if error.status_code == 404:
            return error_response(ApiError(404, f"There is nothing at {request.url.path}.", code="not_found"))
        if error.status_code == 405:
            message = f"{request.method} is not allowed at {request.url.path}."
            return error_response(ApiError(405, message, code="method_not_allowed", headers=dict(error.headers or {})))
        if error.status_code == 400:  # FastAPI's own: its JSON parser gave up
            message = "The body cannot be read as JSON: it is nested too deeply, or has too long a number."
            return error_response(bad_request(message, code="invalid_json"))
        return error_response(ApiError(error.status_code, str(error.detail)))

    @app.exception_handler(Exception)
    async def crash(_request: Request, _error: Exception) -> Response:
        return error_response(internal_error())


def _explain(error: RequestValidationError) -> ApiError:
    """The first problem, named by its field. Of a union's alternatives the one that got furthest is shown."""
    problems = error.errors()
    first = max(problems, key=lambda problem: len(problem["loc"])) if problems[0]["type"] != "missing" else problems[0]
    if first["type"] == "json_invalid":
        return bad_request(
            f"The body is not valid JSON: {first['ctx']['error']} at character {first['loc'][-1]}.", code="invalid_json"
        )
    path = [str(part) for part in first["loc"][1:] if not _is_union_tag(part)]
    if not path:
        return bad_request(
            "The body must be a JSON object, sent with Content-Type: application/json.", code="invalid_json"
        )
    param = ".".join(path)
    found = "" if first["type"] == "missing" else f", found {_short(first['input'])}"
    return bad_request(f"{param}: {first['msg'][0].lower()}{first['msg'][1:]}{found}", param=param)


def _is_union_tag(part: int | str) -> bool:
    """Pydantic names a union's alternative in the path, e.g. "str" or "list[constrained-int]"."""
    return isinstance(part, str) and (part in ("str", "int", "float") or "[" in part)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
