"""The admin API as the commands use it: where a cluster's is, one call at a time, and its refusals as the CLI's errors.

A cluster of this machine is found through its runtime directory, any other by its URL and admin key. A call that finds nobody, because
gateway or controller are being restarted, is made again for a while: every request carries an id, so asking twice is harmless.
"""

from __future__ import annotations

import http.client
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlencode, urlsplit

from flexpert.cli.errors import CommandError
from flexpert.controller.processes import ProcessId
from flexpert.controller.runtime_dir import RuntimeDir, RuntimeDirError, find

PREFIX = "/admin/v1"
URL_VARIABLE, KEY_VARIABLE = "FLEXPERT_URL", "FLEXPERT_ADMIN_KEY"
CALL_TIMEOUT_S = 30.0  # the gateway itself waits 15 s for a controller that is restarted
PATIENCE_S = 20.0
_AGAIN_S = 0.2
_KIND_OF_STATUS = {
    400: "usage",
    401: "unauthorised",
    403: "unauthorised",
    404: "not_found",
    409: "conflict",
    422: "impossible",
}


@dataclass(frozen=True)
class AdminApi:
    """url: of the gateway, without a path. key: the admin key. alive: whether it is worth asking again; sleep: between two tries."""

    url: str
    key: str
    alive: Callable[[], bool] = lambda: True
    patience_s: float = PATIENCE_S
    sleep: Callable[[float], None] = time.sleep

    def status(self) -> dict[str, Any]:
        return self._call("GET", "/status")

    def scale(self, workers: int, *, request_id: str, hold: dict[str, Any] | None = None) -> dict[str, Any]:
        """hold: who asks and for how long that stands against a policy."""
        return self._call("POST", "/scale", {"workers": workers, "request_id": request_id, **(hold or {})})

    def drain(self, worker_id: str, *, request_id: str, hold: dict[str, Any] | None = None) -> dict[str, Any]:
        path = f"/workers/{quote(worker_id, safe='')}/drain"
        return self._call("POST", path, {"request_id": request_id, **(hold or {})})

    def policy(self, method: str, path: str = "", body: dict[str, Any] | None = None) -> dict[str, Any]:
        """The scaling policy: what it is and does, or a change to it."""
        return self._call(method, f"/policy{path}", body)

    def decision(self, decision_id: str) -> dict[str, Any]:
        return self._call("GET", f"/decisions/{quote(decision_id, safe='')}")

    def decisions(self, *, limit: int, changes: bool) -> dict[str, Any]:
        return self._call("GET", "/decisions?" + urlencode({"limit": limit, "changes": str(changes).lower()}))

    def transition(self, transition_id: str) -> dict[str, Any]:
        return self._call("GET", f"/transitions/{quote(transition_id, safe='')}")

    def events(self, *, after: int) -> list[dict[str, Any]]:
        """All that are newer, page by page."""
        found: list[dict[str, Any]] = []
        while page := self._call("GET", "/events?" + urlencode({"after": after}))["events"]:
            found += page
            after = page[-1]["sequence"]
        return found

    def _call(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        deadline_s = time.monotonic() + self.patience_s
        while True:
            try:
                status, found = self._once(method, path, body)
                if status != 503:
                    break
                problem = _message(found) or "it is shutting down"
            except (OSError, http.client.HTTPException) as error:
                problem = str(error) or type(error).__name__
            if not self.alive():
                raise CommandError("stopped", "the cluster has ended; what happened: flexpert events")
            if time.monotonic() >= deadline_s:
                raise CommandError("unreachable", f"the admin API at {self.url} does not answer: {problem}")
            self.sleep(_AGAIN_S)
        if isinstance(found, dict) and 200 <= status < 300:
            return found
        message = _message(found)
        if message is None:
            raise CommandError(
                "unreachable", f"{self.url} is no flexpert gateway: it answered {method} {PREFIX}{path} with {status}"
            )
        raise CommandError(_KIND_OF_STATUS.get(status, "internal"), message)

    def _once(self, method: str, path: str, body: dict[str, Any] | None) -> tuple[int, Any]:
        parts = urlsplit(self.url)
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        connection = kind(parts.hostname or "", parts.port, timeout=CALL_TIMEOUT_S)
        try:
            headers = {"Authorization": f"Bearer {self.key}", "Content-Type": "application/json"}
            content = None if body is None else json.dumps(body)
            connection.request(method, parts.path.rstrip("/") + PREFIX + path, content, headers)
            answer = connection.getresponse()
            try:
                return answer.status, json.loads(answer.read())
            except ValueError:
                return answer.status, None
        finally:
            connection.close()


def find_api(name: str, *, url: str | None, admin_key: str | None) -> AdminApi:
    """By URL where one is given (or FLEXPERT_URL is set), else the cluster of that name on this machine. Raises CommandError."""
    url = url or os.environ.get(URL_VARIABLE) or None
    if url is None:
        return _local(name, admin_key)
    parts = urlsplit(url)
    try:
        well_formed = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        well_formed = False
    if not well_formed:
        raise CommandError("usage", f"--url {url!r}: expected the gateway's URL, like http://host:8000")
    key = admin_key or os.environ.get(KEY_VARIABLE)
    if not key:
        raise CommandError(
            "unauthorised", f"no admin key for {url}: give --admin-key or set {KEY_VARIABLE}; `flexpert up` printed it"
        )
    return AdminApi(url.rstrip("/").removesuffix("/v1"), key)


def _local(name: str, admin_key: str | None) -> AdminApi:
    runtime = runtime_of(name)
    state = runtime.read_state()
    if state is None or not _runs(state):
        raise CommandError("stopped", f"no cluster named {name!r} runs; start one with: flexpert up")
    if not state.get("url"):
        raise CommandError(
            "unreachable",
            f"the cluster {name!r} is still starting, its gateway does not listen yet; see: flexpert logs -f",
        )
    return AdminApi(state["url"], admin_key or state.get("admin_key") or "", alive=lambda: _runs(state))


def runtime_of(name: str) -> RuntimeDir:
    try:
        return find(name)
    except RuntimeDirError as error:
        raise CommandError("directory", str(error)) from error


def _runs(state: dict[str, Any]) -> bool:
    return ProcessId.from_json(state["up"]).alive


def _message(found: Any) -> str | None:
    try:
        return str(found["error"]["message"])
    except (KeyError, TypeError):
        return None
