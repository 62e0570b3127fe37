"""Where `flexpert status` and `flexpert events` read: the admin API, and for a cluster of this machine what works without a gateway."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

from flexpert.cli.admin import ask
from flexpert.cli.api import URL_VARIABLE, find_api, runtime_of
from flexpert.cli.errors import CommandError
from flexpert.controller.journal import read_events

LOCAL_PATIENCE_S = 0.0  # a cluster of this machine can be asked another way


def read_status(name: str, *, url: str | None, admin_key: str | None) -> dict[str, Any]:
    """Through the gateway; where that of a local cluster does not listen, from `up` itself."""
    local = _is_local(url)
    try:
        api = find_api(name, url=url, admin_key=admin_key)
        status = (dataclasses.replace(api, patience_s=LOCAL_PATIENCE_S) if local else api).status()
    except CommandError as error:
        if error.kind != "unreachable" or not local:
            raise
        return ask(runtime_of(name), "status")
    state = (runtime_of(name).read_state() if local else None) or {}
    return {**status, "url": api.url, "up": state.get("up")}


def read_history(name: str, *, after: int, url: str | None, admin_key: str | None) -> list[dict[str, Any]]:
    """A local cluster's from its file, which holds more than the controller keeps and stays when the cluster has ended."""
    if _is_local(url):
        return [event for event in read_events(runtime_of(name)) if event["sequence"] > after]
    return find_api(name, url=url, admin_key=admin_key).events(after=after)


def _is_local(url: str | None) -> bool:
    return not (url or os.environ.get(URL_VARIABLE))
