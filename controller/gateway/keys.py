"""Who may call: API keys for inference, admin keys for the admin API, and no key is both.

`front` asks for each request, before anything of it is read.
"""

from __future__ import annotations

import hashlib
import hmac

from starlette.datastructures import Headers

from flexpert.controller.gateway.errors import ApiError


class ApiKeys:
    """Several keys, each compared in full and in constant time. None at all: everybody may come in."""

    def __init__(self, keys: tuple[str, ...]) -> None:
        self._digests = [_digest(key) for key in keys]

    def check(self, headers: Headers) -> ApiError | None:
        if not self._digests:
            return None
        given = _given(headers)
        if given is None:
            return _unauthorised("No API key was given. Send it as 'Authorization: Bearer <key>'.", "missing_api_key")
        if self.has(given):
            return None
        return _unauthorised("The API key is not one of this server's keys.", "invalid_api_key")

    def has(self, key: str) -> bool:
        digest = _digest(key)
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        return any(matches)


class AdminKeys:
    """Without any the admin API is off. A valid API key is told that it is not enough, which is no secret to its holder."""

    def __init__(self, keys: tuple[str, ...], *, api_keys: ApiKeys) -> None:
        self._keys = ApiKeys(keys)
        self._on = bool(keys)
        self._api_keys = api_keys

    def check(self, headers: Headers) -> ApiError | None:
        if not self._on:
            return ApiError(
                403, "The admin API is off: the server was started without an admin key.", code="admin_api_off"
            )
        given = _given(headers)
        if given is None:
            message = "No admin key was given. Send it as 'Authorization: Bearer <admin key>'."
            return _unauthorised(message, "missing_admin_key")
        if self._keys.has(given):
            return None
        if self._api_keys.has(given):
            message = "This is an API key: it may ask the model. The admin API needs the admin key, see `flexpert up`."
            return ApiError(403, message, code="not_an_admin_key")
        return _unauthorised("The admin key is not one of this server's.", "invalid_admin_key")


def _given(headers: Headers) -> str | None:
    scheme, _, given = headers.get("authorization", "").partition(" ")
    return given.strip() or None if scheme.lower() == "bearer" else None


def _unauthorised(message: str, code: str) -> ApiError:
    return ApiError(401, message, code=code, headers={"WWW-Authenticate": "Bearer"})


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
