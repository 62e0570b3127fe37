"""Errors as OpenAI's API shapes them: {"error": {"message", "type", "param", "code"}}.

Everything the gateway refuses is an ApiError with the HTTP status it deserves; `error_body` turns it into bytes, for an answer
or, once a stream has begun, for an event in it.
"""

from __future__ import annotations

import msgspec
from starlette.exceptions import HTTPException

_TYPE_OF_STATUS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class ApiError(HTTPException):
    """One refused or failed request. An HTTPException, so that FastAPI lets it through while it reads a body."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(status_code=status, detail=message, headers=headers)
        self.message = message
        self.param = param
        self.code = code

    @property
    def type(self) -> str:
        default = "server_error" if self.status_code >= 500 else "invalid_request_error"
        return _TYPE_OF_STATUS.get(self.status_code, default)


def error_body(error: ApiError) -> bytes:
    fields = {"message": error.message, "type": error.type, "param": error.param, "code": error.code}
    # What a client sent may be quoted here, and need not be Unicode.
    safe = {
        name: None if value is None else value.encode("utf-8", "replace").decode() for name, value in fields.items()
    }
    return msgspec.json.encode({"error": safe})


def bad_request(message: str, *, param: str | None = None, code: str | None = None) -> ApiError:
    return ApiError(400, message, param=param, code=code)


def unsupported(param: str, what: str) -> ApiError:
    return bad_request(f"{param}: {what} is not supported by this server", param=param, code="unsupported_parameter")


def context_too_long(*, limit_tokens: int, prompt_tokens: int, wanted_tokens: int, param: str) -> ApiError:
    return bad_request(
        f"This model's maximum context length is {limit_tokens} tokens; this request has {prompt_tokens} in the prompt and asks for "
        f"{wanted_tokens} more. Shorten the prompt or ask for fewer tokens.",
        param=param,
        code="context_length_exceeded",
    )


def too_long_now(*, limit_tokens: int, wanted_tokens: int) -> ApiError:
    return ApiError(
        503,
        f"The worker that had memory for this request is gone: it needs room for {wanted_tokens} tokens, those that serve now hold at most "
        f"{limit_tokens} each. Ask again for fewer tokens, or once there is more memory.",
        code="insufficient_memory",
    )


def shutting_down() -> ApiError:
    return ApiError(
        503, "The server is shutting down.", code="shutting_down", headers={"Retry-After": "5", "Connection": "close"}
    )


def internal_error(message: str = "The server had an error while processing the request.") -> ApiError:
    return ApiError(500, message, code="internal_error")
