"""Where the load goes: a server's URL taken apart, the head of each request to it, its TLS."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

__all__ = ["BadUrl", "Target", "parse_url", "request_head", "tls_context"]


class BadUrl(ValueError):
    """The message says what was found and what was expected."""


@dataclass(frozen=True)
class Target:
    """base: path before /v1, mostly empty. ca: a file with the certificates to trust, instead of those of this machine."""

    host: str
    port: int
    tls: bool
    base: str
    key: str | None = None
    verify: bool = True
    ca: Path | None = None

    @property
    def url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http{'s' * self.tls}://{host}:{self.port}{self.base}"


def parse_url(url: str, *, key: str | None = None, verify: bool = True, ca: Path | None = None) -> Target:
    """The server's URL, with or without /v1. Raises BadUrl."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise BadUrl(f"{url!r}: {error}; expected a URL like http://host:8000") from error
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
        raise BadUrl(f"{url!r}: expected a URL like http://host:8000")
    tls = parts.scheme == "https"
    base = parts.path.rstrip("/").removesuffix("/v1")
    if key is not None and not (key.isascii() and key.isprintable()):
        raise BadUrl("the API key has characters that no header can carry")
    target = Target(parts.hostname, port or (443 if tls else 80), tls, base, key, verify, ca)
    if ca is not None and not tls:
        raise BadUrl(f"--ca {ca} belongs to an https:// URL; found {url!r}")
    tls_context(target)
    return target


def request_head(target: Target, method: str, path: str, key: str | None) -> bytes:
    """Up to the number of bytes of the body. key: another than the target's."""
    host = f"[{target.host}]" if ":" in target.host else target.host
    key = target.key if key is None else key
    lines = [f"{method} {target.base}{path} HTTP/1.1", f"host: {host}:{target.port}", "user-agent: flexpert-loadtest"]
    lines += ["accept: text/event-stream, application/json", "content-type: application/json"]
    lines += [f"authorization: Bearer {key}"] if key else []
    return "\r\n".join([*lines, "content-length: "]).encode()


def tls_context(target: Target) -> ssl.SSLContext | None:
    """Raises BadUrl for a file without certificates."""
    if not target.tls:
        return None
    try:
        context = ssl.create_default_context(cafile=target.ca)
    except (OSError, ValueError) as error:
        why = (
            "expected certificates in PEM form"
            if isinstance(error, ssl.SSLError)
            else getattr(error, "strerror", error)
        )
        raise BadUrl(f"--ca {target.ca}: {why}") from error
    if not target.verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context
