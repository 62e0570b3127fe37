"""How `flexpert status` reaches a running `flexpert up`: a Unix socket in the runtime directory (mode 0600), one JSON object each way."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
from collections.abc import Awaitable, Callable
from typing import Any

from flexpert.cli.errors import CommandError
from flexpert.controller.runtime_dir import RuntimeDir

MAX_REQUEST_BYTES = 4096
TIMEOUT_S = 10.0
log = logging.getLogger(__name__)

Answer = Callable[[str], Awaitable[dict[str, Any]]]


async def serve_admin(runtime: RuntimeDir, answer: Answer) -> asyncio.Server:
    """Answer requests {"ask": word} with what `answer(word)` gives."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            asked = json.loads(await asyncio.wait_for(reader.readline(), TIMEOUT_S))
            reply = await answer(str(asked["ask"]))
        except Exception as error:
            log.warning("an admin request failed: %r", error)
            reply = {"error": f"{type(error).__name__}: {error}"}
        try:
            writer.write(json.dumps(reply).encode() + b"\n")
            await writer.drain()
        except ConnectionError as error:
            log.info("an admin client went away: %r", error)
        finally:
            writer.close()

    runtime.admin_socket.unlink(missing_ok=True)
    old_mask = os.umask(0o177)
    try:
        return await asyncio.start_unix_server(serve, path=str(runtime.admin_socket), limit=MAX_REQUEST_BYTES)
    finally:
        os.umask(old_mask)


def ask(runtime: RuntimeDir, word: str) -> dict[str, Any]:
    """Ask the running `up`. Raises CommandError where none runs or it does not answer."""
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(TIMEOUT_S)
            connection.connect(str(runtime.admin_socket))
            connection.sendall(json.dumps({"ask": word}).encode() + b"\n")
            with connection.makefile("rb") as file:
                reply = json.loads(file.readline() or b"{}")
    except (FileNotFoundError, ConnectionError) as error:
        raise CommandError("stopped", f"no cluster named {runtime.name!r} runs; start one with: flexpert up") from error
    except TimeoutError as error:
        raise CommandError(
            "internal", f"the cluster {runtime.name!r} did not answer within {TIMEOUT_S:g} s; see: flexpert logs up"
        ) from error
    if not reply or "error" in reply:
        raise CommandError(
            "internal", f"the cluster {runtime.name!r} could not answer: {reply.get('error', 'empty reply')}"
        )
    return dict(reply)
