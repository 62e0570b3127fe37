"""Reads an answer's bytes: HTTP/1.1 heads and chunks, server-sent events, and what an OpenAI chunk says about tokens.

Pure: bytes in, values out. client.py feeds it; every error is a BadAnswer whose text stands in the report.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

__all__ = ["BadAnswer", "Chunk", "Chunks", "Events", "Head", "error_text", "parse_chunk", "parse_head"]

MAX_BUFFER_BYTES = 16 << 20


class BadAnswer(Exception):
    """The server's answer is not what it should be; the message says what was found."""


_ABSENT = msgspec.Raw(b"null")  # Raw | None would mean None alone


class _Details(msgspec.Struct, gc=False):
    cached_tokens: int | None = None


class Usage(msgspec.Struct, gc=False):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: _Details | None = None


class _Delta(msgspec.Struct, gc=False):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: msgspec.Raw = _ABSENT


class _Choice(msgspec.Struct, gc=False):
    text: str | None = None
    delta: _Delta | None = None
    finish_reason: str | None = None


class Chunk(msgspec.Struct, gc=False):
    """One event of a stream."""

    choices: list[_Choice] = []
    usage: Usage | None = None
    error: msgspec.Raw = _ABSENT

    def read(self) -> tuple[str | None, bool]:
        """(text, whether a choice has finished). Text is "" where it bears tokens but no text (a tool call), None where it bears none."""
        text, finished = None, False
        for choice in self.choices:
            delta = choice.delta
            piece = choice.text if delta is None else delta.content or delta.reasoning_content or delta.reasoning
            if piece:
                text = piece if text is None else text + piece
            elif delta is not None and bytes(delta.tool_calls) not in (b"null", b"[]"):
                text = text or ""
            if choice.finish_reason:
                finished = True
        return text, finished


_decode = msgspec.json.Decoder(Chunk).decode


def parse_chunk(data: bytes) -> Chunk:
    """Raises BadAnswer where the event is no chunk, or says that the request failed."""
    try:
        chunk = _decode(data)
    except msgspec.MsgspecError as error:
        raise BadAnswer(f"an event that is no chunk of a completion ({error}): {_excerpt(data)}") from error
    if chunk.error is not _ABSENT and bytes(chunk.error) != b"null":
        raise BadAnswer(f"the server ended the stream with an error: {error_text(data)}")
    return chunk


@dataclass(frozen=True, slots=True)
class Head:
    """length: of the body; None: until the connection closes, unless chunked."""

    status: int
    content_type: str
    chunked: bool
    length: int | None
    keep_alive: bool
    retry_after_s: float | None


def parse_head(head: bytes) -> Head:
    """head: without the empty line. Raises BadAnswer where it is no HTTP/1.x."""
    first, *lines = head.split(b"\r\n")
    if not first.startswith(b"HTTP/1.") or not first[9:12].isdigit():
        raise BadAnswer(f"no HTTP answer: {_excerpt(first)}")
    fields = {}
    for line in lines:
        name, _, value = line.partition(b":")
        fields[name.lower()] = value.strip()
    connection = fields.get(b"connection", b"").lower()
    length, retry = fields.get(b"content-length", b""), fields.get(b"retry-after", b"")
    return Head(
        status=int(first[9:12]),
        content_type=fields.get(b"content-type", b"").decode("latin-1").partition(";")[0].strip().lower(),
        chunked=b"chunked" in fields.get(b"transfer-encoding", b"").lower(),
        length=int(length) if length.isdigit() else None,
        keep_alive=connection != b"close" and (first[:8] == b"HTTP/1.1" or connection == b"keep-alive"),
        retry_after_s=float(retry) if retry.isdigit() else None,
    )


class Chunks:
    """Takes HTTP's chunked encoding off."""

    __slots__ = ("_rest", "ended")

    def __init__(self) -> None:
        self._rest = b""
        self.ended = False

    def feed(self, data: bytes) -> bytes:
        """The payload that is whole by now. Raises BadAnswer."""
        if self._rest:
            data = self._rest + data
        position, length = 0, len(data)
        parts: list[bytes] = []
        while position < length and (line_end := data.find(b"\r\n", position)) >= 0:
            size = _chunk_size(data[position:line_end])
            if size == 0:
                if data.find(b"\r\n\r\n", line_end) < 0:
                    break
                self.ended = True
                return b"".join(parts)
            end = line_end + 2 + size
            if length < end + 2:
                break
            parts.append(data[line_end + 2 : end])
            position = end + 2
        self._rest = data[position:] if position < length else b""
        if len(self._rest) > MAX_BUFFER_BYTES:
            raise BadAnswer(f"one chunk of more than {MAX_BUFFER_BYTES >> 20} MiB")
        return parts[0] if len(parts) == 1 else b"".join(parts)


def _chunk_size(line: bytes) -> int:
    try:
        return int(line, 16)
    except ValueError:
        pass
    try:
        return int(line.partition(b";")[0], 16)
    except ValueError:
        raise BadAnswer(f"broken chunked encoding: {_excerpt(line)}") from None


class Events:
    """Cuts a stream into the data of its events."""

    __slots__ = ("_rest",)

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[bytes]:
        """Those that are whole by now. Raises BadAnswer where one never ends."""
        if self._rest:
            data = self._rest + data
        elif data[:6] == b"data: " and data.find(b"\n") == len(data) - 2 and data[-1:] == b"\n":
            return [data[6:-2]]  # one whole event of one line, as nearly all are
        if b"\r" in data:
            data = data.replace(b"\r\n", b"\n")
        events = data.split(b"\n\n")
        self._rest = events.pop()
        if len(self._rest) > MAX_BUFFER_BYTES:
            raise BadAnswer(f"one event of more than {MAX_BUFFER_BYTES >> 20} MiB")
        return [event[6:] if event.startswith(b"data: ") and b"\n" not in event else _data(event) for event in events]

    @property
    def rest(self) -> bytes:
        return self._rest


def _data(event: bytes) -> bytes:
    """Of an event with other fields or several lines; b"" for a comment."""
    lines = [line[5:].removeprefix(b" ") for line in event.split(b"\n") if line.startswith(b"data:")]
    return b"\n".join(lines)


class _Error(msgspec.Struct):
    message: str | None = None


class _ErrorBody(msgspec.Struct):
    error: _Error | str | None = None
    detail: msgspec.Raw = _ABSENT


def error_text(body: bytes) -> str:
    """What an error's body says: OpenAI's message where it has one, else its beginning."""
    try:
        found = msgspec.json.decode(body, type=_ErrorBody)
    except msgspec.MsgspecError:
        return _excerpt(body)
    if isinstance(found.error, str):
        return found.error
    if found.error is not None and found.error.message:
        return found.error.message
    return _excerpt(body if found.detail is _ABSENT else bytes(found.detail))


def _excerpt(data: bytes) -> str:
    text = " ".join(data[:120].decode("utf-8", "replace").split())
    return repr(text) if text else "nothing"
