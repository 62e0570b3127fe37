"""The HTTP client of the load generator: HTTP/1.1 with keep-alive over asyncio's transports, one Exchange a request.

It does what a load test needs and no more, since it shares its core with the clock of the test: what general clients
cost at 2,000 streams a second is told in docs/loadtest.md. A connection carries one exchange at a time; what arrives is
stamped when the loop hands it over. Nothing is retried but a request on a kept connection that the server closed before a byte.
"""

from __future__ import annotations

import asyncio
import errno
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from flexpert.loadtest.events import BadAnswer, Chunks, Events, Head, error_text, parse_chunk, parse_head
from flexpert.loadtest.measure import Outcome
from flexpert.loadtest.target import Target, request_head, tls_context

__all__ = ["Client", "Exchange"]

MAX_ERROR_BYTES = 64 << 10
SWEEP_S = 0.05


@dataclass(slots=True)
class Exchange:
    """A request on its way. on_end is called once, when outcome is complete."""

    content: bytes  # head and body, as sent
    outcome: Outcome
    on_end: Callable[[Exchange], None]
    streamed: bool = True  # else the body is kept whole
    keep_text: bool = False
    gaps_s: list[float] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    body: bytes = b""
    done: bool = False  # [DONE] was seen
    finished: bool = False  # a finish_reason was seen
    connection: Any = None
    task: asyncio.Task[None] | None = None
    ended: bool = False


class _Connection(asyncio.Protocol):
    __slots__ = ("_chunks", "_client", "_events", "_head", "_left", "_rest", "_transport", "exchange", "used")

    def __init__(self, client: Client) -> None:
        self._client = client
        self.exchange: Exchange | None = None
        self.used = False  # it has answered before
        self._transport: Any = None
        self._reset()

    def _reset(self) -> None:
        self._head: Head | None = None
        self._rest = b""
        self._left: int | None = None
        self._chunks: Chunks | None = None
        self._events = Events()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self._client.connections.add(self)

    @property
    def peer(self) -> str:
        """Address of the server."""
        found = self._transport.get_extra_info("peername")
        return str(found[0]) if found else ""

    def start(self, exchange: Exchange) -> None:
        self.exchange = exchange
        exchange.connection = self
        self._transport.write(exchange.content)

    def close(self) -> None:
        self.exchange = None
        self._transport.abort()

    def data_received(self, data: bytes) -> None:
        now_s = self._client.now_s()
        exchange = self.exchange
        if exchange is None:  # nobody asked
            self._client.forget(self)
            self._transport.abort()
            return
        try:
            self._take(exchange, data, now_s)
        except BadAnswer as error:
            self._fail(exchange, str(error))

    def _take(self, exchange: Exchange, data: bytes, now_s: float) -> None:
        head = self._head
        if head is None:
            self._rest += data
            text, found, data = self._rest.partition(b"\r\n\r\n")
            if not found:
                if len(self._rest) > MAX_ERROR_BYTES or not self._rest.startswith(b"HTTP/"[: len(self._rest)]):
                    parse_head(self._rest)
                    raise BadAnswer("headers of more than 64 KiB")
                return
            head = self._head = parse_head(text)
            self._begin_body(exchange, head)
        complete = False
        if self._chunks is not None:
            data = self._chunks.feed(data)
            complete = self._chunks.ended
        elif self._left is not None:
            self._left -= len(data)
            complete = self._left <= 0
        if exchange.streamed and head.status == 200:
            for event in self._events.feed(data):
                self._event(exchange, event, now_s)
        elif len(exchange.body) < MAX_ERROR_BYTES or not exchange.streamed:
            exchange.body += data
        if complete:
            self._complete(exchange, head, now_s)

    def _begin_body(self, exchange: Exchange, head: Head) -> None:
        self._rest = b""
        exchange.outcome.http_status = head.status
        exchange.outcome.retry_after_s = head.retry_after_s
        if head.chunked:
            self._chunks = Chunks()
        else:
            self._left = head.length
        if exchange.streamed and head.status == 200 and head.content_type != "text/event-stream":
            found = head.content_type or "no content type"
            raise BadAnswer(f"answered with {found} instead of an event stream (text/event-stream)")

    def _event(self, exchange: Exchange, data: bytes, now_s: float) -> None:
        if data == b"[DONE]":
            exchange.done = True
            return
        if not data:
            return
        chunk = parse_chunk(data)
        outcome = exchange.outcome
        content, finished = chunk.read()
        if content is not None:
            if outcome.first_s is None:
                outcome.first_s = now_s
            else:
                gap_s = now_s - outcome.last_s  # type: ignore[operator]
                exchange.gaps_s.append(gap_s)
                if gap_s > outcome.longest_gap_s:
                    outcome.longest_gap_s = gap_s
            outcome.last_s = now_s
            outcome.chunks += 1
            if exchange.keep_text:
                exchange.text.append(content)
        usage = chunk.usage
        if usage is not None:
            outcome.prompt_tokens, outcome.output_tokens = usage.prompt_tokens, usage.completion_tokens
            if usage.prompt_tokens_details is not None:
                outcome.cached_tokens = usage.prompt_tokens_details.cached_tokens
        if finished:
            exchange.finished = True

    def _complete(self, exchange: Exchange, head: Head, now_s: float) -> None:
        outcome = exchange.outcome
        if head.status == 200 and exchange.streamed and not exchange.done and not exchange.finished:
            raise BadAnswer(
                f"the stream ended after {outcome.chunks} chunks without a finish_reason and without [DONE]"
            )
        self.exchange, self.used = None, True
        outcome.end_s = now_s
        if head.status == 200:
            outcome.end = "ok"
        else:
            outcome.end = "refused" if head.status in (429, 503) else "failed"
            outcome.error = f"HTTP {head.status}: {error_text(exchange.body)}"
        if head.keep_alive and (self._chunks is not None or head.length is not None):
            self._reset()
            self._client.idle.append(self)
        else:
            self._client.forget(self)
            self._transport.close()
        self._client.end(exchange)

    def connection_lost(self, exc: Exception | None) -> None:
        self._client.forget(self)
        exchange, head = self.exchange, self._head
        if exchange is None:
            return
        if head is not None and self._chunks is None and head.length is None:
            try:
                self._complete(exchange, head, self._client.now_s())
            except BadAnswer as error:
                self._fail(exchange, str(error))
        elif head is not None or self._rest:
            where = f"mid-stream, after {exchange.outcome.chunks} chunks" if exchange.streamed else "mid-answer"
            self._fail(exchange, f"the connection was closed {where}")
        elif self.used:  # it was closed just as we wrote: nothing of this request was answered
            self.exchange = None
            self._client.connect_for(exchange)
        else:
            self._fail(exchange, "the connection was closed without an answer")

    def _fail(self, exchange: Exchange, reason: str) -> None:
        self._client.forget(self)
        self.close()
        self._client.fail(exchange, reason)


class Client:
    """All connections to one server. Times are seconds since `start_s`, a time.perf_counter()."""

    def __init__(self, target: Target, *, timeout_s: float) -> None:
        self.target, self.timeout_s = target, timeout_s
        self.start_s = time.perf_counter()
        self.idle: list[_Connection] = []
        self.connections: set[_Connection] = set()
        self.live: dict[int, Exchange] = {}  # by id(), in the order they were sent
        self.opened = 0
        self._tls = tls_context(target)
        self._loop = asyncio.get_running_loop()
        self._sweeper: asyncio.TimerHandle | None = None
        self._heads: dict[str, bytes] = {}
        self._address = ""

    def now_s(self) -> float:
        return time.perf_counter() - self.start_s

    def request(self, path: str, body: bytes) -> bytes:
        """A POST as it goes over the wire."""
        head = self._heads.get(path)
        if head is None:
            head = self._heads[path] = request_head(self.target, "POST", path, None)
        return b"%s%d\r\n\r\n%s" % (head, len(body), body)

    def send(self, exchange: Exchange) -> None:
        """Begin it now. Ends in exchange.on_end, whatever happens."""
        exchange.outcome.sent_s = self.now_s()
        self.live[id(exchange)] = exchange
        if self._sweeper is None:
            self._sweeper = self._loop.call_later(SWEEP_S, self._sweep)
        if self.idle:
            self.idle.pop().start(exchange)
        else:
            self.connect_for(exchange)

    def connect_for(self, exchange: Exchange) -> None:
        exchange.task = self._loop.create_task(self._connect(exchange))

    async def _connect(self, exchange: Exchange) -> None:
        target = self.target
        try:
            _, connection = await self._loop.create_connection(
                lambda: _Connection(self),
                self._address or target.host,
                target.port,
                ssl=self._tls,
                server_hostname=target.host if self._tls else None,
            )
        except (OSError, ssl.SSLError) as error:
            self.fail(exchange, f"cannot connect to {target.host}:{target.port}: {_why(error)}")
            return
        self.opened += 1
        self._address = connection.peer  # the name is looked up once
        exchange.task = None
        if exchange.ended:
            self.idle.append(connection)
        else:
            connection.start(exchange)

    def fail(self, exchange: Exchange, reason: str, *, timeout: bool = False) -> None:
        exchange.outcome.end = "timeout" if timeout else "failed"
        exchange.outcome.error = reason
        exchange.outcome.end_s = self.now_s()
        self.end(exchange)

    def end(self, exchange: Exchange) -> None:
        if not exchange.ended:
            exchange.ended = True
            exchange.connection = None
            self.live.pop(id(exchange), None)
            exchange.on_end(exchange)

    def forget(self, connection: _Connection) -> None:
        self.connections.discard(connection)
        if connection in self.idle:
            self.idle.remove(connection)

    def _sweep(self) -> None:
        """Give up what was sent too long ago; the oldest stand first."""
        self._sweeper = None
        oldest_s = self.now_s() - self.timeout_s
        for exchange in list(self.live.values()) if self._overdue(oldest_s) else ():
            outcome = exchange.outcome
            if outcome.sent_s is None or outcome.sent_s > oldest_s:
                break
            self._drop(exchange)
            self.fail(exchange, f"timeout: {self._reached(exchange)} within {self.timeout_s:g} s", timeout=True)
        if self.live:
            self._sweeper = self._loop.call_later(SWEEP_S, self._sweep)

    def _reached(self, exchange: Exchange) -> str:
        if exchange.task is not None:
            return "no TLS connection" if self.target.tls else "no connection"
        if exchange.outcome.http_status is None:
            return "no answer"
        if not exchange.streamed:
            return "no whole answer"
        return f"the stream stood still or went on, {exchange.outcome.chunks} chunks had come,"

    def _overdue(self, oldest_s: float) -> bool:
        first = next(iter(self.live.values()), None)
        return first is not None and first.outcome.sent_s is not None and first.outcome.sent_s <= oldest_s

    def _drop(self, exchange: Exchange) -> None:
        if exchange.task is not None:
            exchange.task.cancel()
        if exchange.connection is not None:
            self.forget(exchange.connection)
            exchange.connection.close()

    async def fetch(
        self, method: str, path: str, body: bytes = b"", *, key: str | None = None
    ) -> tuple[Outcome, bytes]:
        """One request that is no part of the load; its answer whole."""
        ended: asyncio.Future[None] = self._loop.create_future()

        def on_end(_: Exchange) -> None:
            if not ended.done():
                ended.set_result(None)

        outcome = Outcome(index=-1, intended_s=self.now_s(), wanted_prompt_tokens=0, wanted_output_tokens=0)
        content = request_head(self.target, method, path, key) + b"%d\r\n\r\n%s" % (len(body), body)
        exchange = Exchange(content, outcome, on_end, streamed=False)
        self.send(exchange)
        await ended
        return outcome, exchange.body

    async def give_up(self) -> None:
        """What still runs ends here and stays "unfinished"."""
        for exchange in list(self.live.values()):
            self._drop(exchange)
            exchange.outcome.end_s = self.now_s()
            exchange.outcome.error = exchange.outcome.error or "still running when the run was stopped"
            self.end(exchange)
        await asyncio.sleep(0)

    async def close(self) -> None:
        await self.give_up()
        if self._sweeper is not None:
            self._sweeper.cancel()
        for connection in list(self.connections):
            connection.close()
        self.connections.clear()
        self.idle.clear()
        await asyncio.sleep(0)


def _why(error: Exception) -> str:
    """ "Connection refused" rather than three lines of addresses."""
    if isinstance(error, ConnectionRefusedError) or f"Errno {errno.ECONNREFUSED}" in str(error):
        return "connection refused; nothing listens there"
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not trusted ({error.verify_message}); name its CA with --ca, or take any with --insecure"
    if isinstance(error, ssl.SSLError):
        return f"no TLS connection ({error.reason}); does it listen with plain http://?"
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return str(text)
