"""A server that only looks like one: streams made-up tokens at set times, and fails on purpose where told to.

    python -m flexpert.loadtest.stub --port 8001 --ttft-ms 20 --tpot-ms 10

Tests script it, the benchmark of the generator drives it: it does so little that the generator is the slower one. One
asyncio.Protocol a connection, HTTP/1.1 with keep-alive; it trusts its clients and is no server for anything else.
"""

from __future__ import annotations

import asyncio
import json
import re
import ssl
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec

from flexpert.loadtest import event_loop

__all__ = ["Behaviour", "Fault", "Reply", "StubServer", "serve"]

Fault = Literal[
    "", "error", "refuse", "hang", "close", "close_mid_stream", "hang_mid_stream", "error_mid_stream", "no_done",
    "not_sse", "not_http", "bad_event",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Reply:
    """How one request is answered. Faults `..._mid_stream` strike after half of the tokens."""

    ttft_s: float = 0.0
    tpot_s: float = 0.0
    fault: Fault = ""
    tokens_per_chunk: int = 1
    usage: bool = True
    status: int = 500  # of fault "error"
    max_tokens: int | None = None  # ends earlier than asked


Behaviour = Callable[[int, dict[str, Any]], Reply]  # (number of the request from 0, its fields) -> Reply


class _Asked(msgspec.Struct):
    prompt: msgspec.Raw = msgspec.Raw(b"")
    messages: msgspec.Raw = msgspec.Raw(b"")
    max_tokens: int = 16
    max_completion_tokens: int | None = None
    stream: bool = False


_decode = msgspec.json.Decoder(_Asked).decode
_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


@dataclass
class StubServer:
    """What all connections share. base_tokens: what a prompt costs besides its words, as a chat template does."""

    behaviour: Behaviour = lambda number, fields: Reply()
    key: str | None = None
    admin_key: str | None = None
    model: str = "stub"
    events: list[dict[str, Any]] = field(default_factory=list)
    vocab_size: int = 32_000
    accepts_ids: bool = True
    base_tokens: int = 0
    requests: int = 0
    bodies: list[dict[str, Any]] | None = None  # a list here keeps every body
    connections: set[_Connection] = field(default_factory=set)
    url: str = ""
    tls: ssl.SSLContext | None = None
    _server: asyncio.Server | None = None

    async def start(self, *, host: str = "127.0.0.1", port: int = 0) -> str:
        """Listen; returns the URL."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: _Connection(self), host, port, backlog=4096, ssl=self.tls)
        self.url = f"http{'s' * (self.tls is not None)}://{host}:{self._server.sockets[0].getsockname()[1]}"
        return self.url

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
            for connection in list(self.connections):
                connection.abort()

    async def __aenter__(self) -> StubServer:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()


class _Connection(asyncio.Protocol):
    def __init__(self, stub: StubServer) -> None:
        self._stub = stub
        self._loop = asyncio.get_running_loop()
        self._buffer = b""
        self._transport: Any = None
        self._timer: asyncio.TimerHandle | None = None
        self._busy = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self._stub.connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stub.connections.discard(self)
        if self._timer is not None:
            self._timer.cancel()

    def abort(self) -> None:
        self._transport.abort()

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        if not self._busy:
            self._next()

    def _next(self) -> None:
        if self._buffer[:1] == b"\x16":  # TLS begins so
            self._error(400, "plain HTTP is spoken here")
            self._transport.close()
            return
        head, found, rest = self._buffer.partition(b"\r\n\r\n")
        if not found:
            return
        length = re.search(rb"\r\ncontent-length: *(\d+)", head, re.IGNORECASE)
        size = int(length[1]) if length else 0
        if len(rest) < size:
            return
        self._buffer = rest[size:]
        self._busy = True
        self._handle(head, rest[:size])

    def _handle(self, head: bytes, body: bytes) -> None:
        method, path = head.split(b" ", 2)[:2]
        admin = path.startswith(b"/admin/")
        key = self._stub.admin_key if admin else self._stub.key
        if key is not None and f"authorization: bearer {key}".encode() not in head.lower().replace(
            b"\r\n", b"\n"
        ).split(b"\n"):
            self._error(401, "the API key is missing or wrong")
        elif admin:
            after = int((re.search(rb"after=(\d+)", path) or [b"", b"0"])[1])
            page = [event for event in self._stub.events if event["sequence"] > after]
            self._json(200, {"events": page, "last": max([after, *(event["sequence"] for event in page)])})
        elif method == b"GET" and path == b"/v1/models":
            self._json(200, {"object": "list", "data": [{"id": self._stub.model, "object": "model"}]})
        elif method == b"POST" and path in (b"/v1/completions", b"/v1/chat/completions"):
            self._complete(body, chat=path.endswith(b"/chat/completions"))
        else:
            self._error(404, f"no such path: {path.decode()}")

    def _complete(self, body: bytes, *, chat: bool) -> None:
        stub = self._stub
        asked = _decode(body)
        fields = {} if stub.bodies is None else json.loads(body)
        if stub.bodies is not None:
            stub.bodies.append(fields)
        prompt = bytes(asked.messages if chat else asked.prompt)
        if prompt.startswith(b"[") and not chat:
            ids = prompt.count(b",") + 1
            if not stub.accepts_ids:
                self._error(400, "prompt: expected a text")
                return
            largest = max(map(int, prompt[1:-1].split(b","))) if len(prompt) < 64 else 0  # long ones are taken on trust
            if largest >= stub.vocab_size:
                self._error(400, f"prompt: token id {largest} is outside the vocabulary (0 to {stub.vocab_size - 1})")
                return
        else:
            texts = [m["content"] for m in json.loads(prompt)] if chat else [json.loads(prompt)]
            ids = sum(len(text.split()) for text in texts) + stub.base_tokens
        reply = stub.behaviour(stub.requests, fields)
        stub.requests += 1
        tokens = asked.max_completion_tokens or asked.max_tokens
        if reply.max_tokens is not None:
            tokens = min(tokens, reply.max_tokens)
        if reply.fault or not asked.stream:
            self._unusual(reply, ids, tokens, chat=chat)
        else:
            self._stream(reply, ids, tokens, chat=chat)

    def _unusual(self, reply: Reply, prompt_tokens: int, tokens: int, *, chat: bool) -> None:
        match reply.fault:
            case "":
                usage = {"prompt_tokens": prompt_tokens, "completion_tokens": tokens}
                text = "w " * tokens
                choice = {"message": {"content": text}} if chat else {"text": text}
                self._json(200, {"choices": [{**choice, "finish_reason": "length"}], "usage": usage})
            case "error":
                self._error(reply.status, "made to fail")
            case "refuse":
                self._error(429, "the queue is full", headers="retry-after: 3\r\n")
            case "hang":
                pass
            case "close":
                self._transport.close()
            case "not_http":
                self._transport.write(b"SSH-2.0-OpenSSH_9.6\r\n")
                self._transport.close()
            case "not_sse":
                page = b"<html>hello</html>"
                self._transport.write(
                    b"HTTP/1.1 200 OK\r\ncontent-type: text/html\r\ncontent-length: %d\r\n\r\n%s" % (len(page), page)
                )
                self._done()
            case _:
                self._stream(reply, prompt_tokens, tokens, chat=chat)

    def _stream(self, reply: Reply, prompt_tokens: int, tokens: int, *, chat: bool) -> None:
        chunks = [reply.tokens_per_chunk] * (tokens // reply.tokens_per_chunk)
        if rest := tokens % reply.tokens_per_chunk:
            chunks.append(rest)
        if reply.fault.endswith("mid_stream") or reply.fault in ("no_done", "bad_event"):
            chunks = chunks[: max(1, len(chunks) // 2)]
        pieces = [
            _piece(count, last=i == len(chunks) - 1 and not reply.fault, chat=chat) for i, count in enumerate(chunks)
        ]
        end = (
            _event(b'{"choices":[],"usage":{"prompt_tokens":%d,"completion_tokens":%d}}' % (prompt_tokens, tokens))
            if reply.usage
            else b""
        )
        pieces.append(_tail(reply.fault, end))
        if not reply.ttft_s and not reply.tpot_s:
            self._transport.write(_HEAD + b"".join(pieces))
            self._finish(reply)
            return
        self._timer = self._loop.call_later(reply.ttft_s, self._write, reply, pieces, 0)

    def _write(self, reply: Reply, pieces: list[bytes], index: int) -> None:
        head = _HEAD if index == 0 else b""
        if index == len(pieces) - 2 or not reply.tpot_s:
            self._transport.write(head + b"".join(pieces[index:]))
            self._finish(reply)
            return
        self._transport.write(head + pieces[index])
        self._timer = self._loop.call_later(reply.tpot_s, self._write, reply, pieces, index + 1)

    def _finish(self, reply: Reply) -> None:
        if reply.fault == "close_mid_stream":
            self._transport.close()
        elif reply.fault != "hang_mid_stream":
            self._done()

    def _json(self, status: int, value: dict[str, Any], *, headers: str = "") -> None:
        content = json.dumps(value).encode()
        head = (
            f"HTTP/1.1 {status} X\r\ncontent-type: application/json\r\n{headers}content-length: {len(content)}\r\n\r\n"
        )
        self._transport.write(head.encode() + content)
        self._done()

    def _error(self, status: int, message: str, *, headers: str = "") -> None:
        self._json(
            status, {"error": {"message": message, "type": "stub", "param": None, "code": None}}, headers=headers
        )

    def _done(self) -> None:
        self._busy = False
        if self._buffer:
            self._loop.call_soon(self._next)


def _event(data: bytes) -> bytes:
    data = b"data: %s\n\n" % data
    return b"%x\r\n%s\r\n" % (len(data), data)


_pieces: dict[tuple[int, bool, bool], bytes] = {}


def _piece(tokens: int, *, last: bool, chat: bool) -> bytes:
    found = _pieces.get((tokens, last, chat))
    if found is None:
        text = " word" * tokens
        choice: dict[str, Any] = {"index": 0, "finish_reason": "length" if last else None}
        choice |= {"delta": {"content": text}} if chat else {"text": text}
        found = _event(
            json.dumps(
                {"id": "cmpl-stub", "object": "chunk", "created": 0, "model": "stub", "choices": [choice]}
            ).encode()
        )
        _pieces[tokens, last, chat] = found
    return found


def _tail(fault: Fault, end: bytes) -> bytes:
    match fault:
        case "close_mid_stream" | "hang_mid_stream":
            return b""
        case "error_mid_stream":
            return _event(b'{"error": {"message": "the worker was lost"}}') + b"0\r\n\r\n"
        case "no_done":
            return b"0\r\n\r\n"
        case "bad_event":
            return _event(b'{"choices": 7}') + b"0\r\n\r\n"
        case _:
            return end + _event(b"[DONE]") + b"0\r\n\r\n"


async def serve(stub: StubServer, *, host: str, port: int) -> None:
    """Until cancelled; prints the URL first, for a parent that waits for it."""
    print(await stub.start(host=host, port=port), flush=True)  # noqa: T201
    await asyncio.Event().wait()


def _main() -> None:
    import argparse

    parser = argparse.ArgumentParser(description="A stub of an OpenAI server.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--ttft-ms", type=float, default=0.0)
    parser.add_argument("--tpot-ms", type=float, default=0.0)
    parser.add_argument("--fault", default="")
    options = parser.parse_args()
    reply = Reply(ttft_s=options.ttft_ms / 1e3, tpot_s=options.tpot_ms / 1e3, fault=options.fault)
    stub = StubServer(behaviour=lambda number, fields: reply)
    try:
        event_loop.run(serve(stub, host=options.host, port=options.port))
    except KeyboardInterrupt:
        return


if __name__ == "__main__":
    _main()
