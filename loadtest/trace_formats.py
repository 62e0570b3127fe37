"""Readers of files that hold one request a line: Azure, BurstGPT (CSV); Mooncake, Bailian (JSON Lines).

A format is told by its columns or keys. Reading is strict: the first line that is wrong ends it with a TraceError that names the line, what
was found and what was expected. Used by traces.py; the columns are described in docs/traces.md.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import numpy as np

from flexpert.loadtest.records import Records, TraceError

__all__ = ["FORMATS", "detect", "read_records"]

COLUMNS = {
    "azure": ("TIMESTAMP", "ContextTokens", "GeneratedTokens"),
    "burstgpt": ("Timestamp", "Request tokens", "Response tokens"),
    "bailian": ("timestamp", "input_length", "output_length", "hash_ids", "chat_id", "parent_chat_id"),
    "mooncake": ("timestamp", "input_length", "output_length", "hash_ids"),
}  # of two JSON formats the one with more keys first: Bailian's has Mooncake's as well
CSV_FORMATS = ("azure", "burstgpt")
FORMATS = tuple(COLUMNS)
PREFIX_BLOCK_TOKENS = {"mooncake": 512, "bailian": 16}
_WALL_CLOCK = re.compile(r"(\d{4}-\d\d-\d\d)[ T](\d\d:\d\d:\d\d)(\.\d{1,9})?(?:Z|\+00:00)?")


@dataclass(slots=True)
class _Rows:
    """What was read so far; where() names the line in hand."""

    name: str
    time_column: str
    line: int = 0
    at_s: list[float] = field(default_factory=list)
    prompt_tokens: list[int] = field(default_factory=list)
    output_tokens: list[int] = field(default_factory=list)
    sessions: list[str] = field(default_factory=list)
    prefixes: list[tuple[int, ...]] = field(default_factory=list)

    def error(self, text: str) -> TraceError:
        return TraceError(f"{self.name}: line {self.line}: {text}")

    def add(self, at_s: float, written: object, prompt_tokens: int, output_tokens: int) -> None:
        if self.at_s and at_s < self.at_s[-1]:
            raise self.error(
                f"{self.time_column} {written} is before that of the line above; sort the file by {self.time_column}"
            )
        self.at_s.append(at_s)
        self.prompt_tokens.append(max(prompt_tokens, 1))  # an arrival has a token each way
        self.output_tokens.append(max(output_tokens, 1))


def detect(first_line: str, name: str) -> str:
    """The format of a file that begins with this line. Raises TraceError where it is none of them."""
    if first_line.lstrip().startswith("{"):
        return _known(set(_json_object(first_line, _Rows(name, "", line=1))), name, line=1)
    return _known({column.strip() for column in next(csv.reader([first_line]), [])}, name, line=1)


def _known(columns: set[str], name: str, line: int) -> str:
    for format_name, wanted in COLUMNS.items():
        if columns >= set(wanted):
            return format_name
    choices = "; ".join(f"{format_name}: {', '.join(wanted)}" for format_name, wanted in COLUMNS.items())
    found = ", ".join(sorted(columns)[:12]) or "nothing"
    raise TraceError(f"{name}: line {line}: found the columns {found}; expected those of one format: {choices}")


def read_records(lines: Iterator[str], *, name: str, format_name: str = "") -> tuple[Records, str]:
    """All requests of a file, times from 0 on, and its format. format_name: empty, as the first line tells."""
    first = next(lines, "").removeprefix("\ufeff")
    if not first.strip():
        raise TraceError(f"{name}: line 1 is empty; expected a header, or one JSON object a line")
    format_name = format_name or detect(first, name)
    rows = _Rows(name, COLUMNS[format_name][0])
    if format_name in CSV_FORMATS:
        _read_csv(first, lines, rows, format_name)
    else:
        _read_json(first, lines, rows, format_name)
    if not rows.at_s:
        raise TraceError(f"{name}: no request below the header; expected one a line")
    at_s = np.array(rows.at_s)
    records = Records(
        at_s=at_s - at_s[0],
        prompt_tokens=np.array(rows.prompt_tokens, dtype=np.int64),
        output_tokens=np.array(rows.output_tokens, dtype=np.int64),
        sessions=tuple(rows.sessions) if any(rows.sessions) else None,
        prefixes=tuple(rows.prefixes) if any(rows.prefixes) else None,
        prefix_block_tokens=PREFIX_BLOCK_TOKENS.get(format_name, 0),
    )
    return records, format_name


def _read_csv(header_line: str, lines: Iterator[str], rows: _Rows, format_name: str) -> None:
    header = [column.strip() for column in next(csv.reader([header_line]))]
    rows.line = 1
    missing = [column for column in COLUMNS[format_name] if column not in header]
    if missing:
        raise rows.error(
            f"no column {', '.join(missing)} for {format_name}; found {', '.join(header)}; expected {', '.join(COLUMNS[format_name])}"
        )
    at, prompt, output = (header.index(column) for column in COLUMNS[format_name])
    session = header.index("Session ID") if "Session ID" in header else -1
    reader = csv.reader(lines)
    clock: Callable[[str, _Rows], float] = _WallClock().seconds if format_name == "azure" else _seconds
    for cells in reader:
        rows.line = reader.line_num + 1
        if not cells:
            continue
        if len(cells) != len(header):
            raise rows.error(f"{len(cells)} columns; expected {len(header)}: {', '.join(header)}")
        counts = (_tokens(cells[prompt], header[prompt], rows), _tokens(cells[output], header[output], rows))
        rows.add(clock(cells[at], rows), cells[at], *counts)
        rows.sessions.append(cells[session].strip() if session >= 0 else "")


class _WallClock:
    """Azure's times: a date and a time of day, to 100 ns; seconds from the first one on, so that no digit is lost."""

    def __init__(self) -> None:
        self.first: datetime | None = None

    def seconds(self, text: str, rows: _Rows) -> float:
        match = _WALL_CLOCK.fullmatch(text.strip())
        try:
            moment = datetime.fromisoformat(f"{match[1]} {match[2]}") if match else None
        except ValueError:
            moment = None
        if match is None or moment is None:
            raise rows.error(f"{rows.time_column} {text!r} is no time like 2023-11-16 18:15:46.6805900")
        self.first = self.first or moment
        return (moment - self.first).total_seconds() + float(match[3] or 0.0)


def _seconds(written: object, rows: _Rows) -> float:
    try:
        seconds = float(written)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        seconds = float("nan")
    if isinstance(written, bool) or not seconds < float("inf"):
        raise rows.error(f"{rows.time_column} {written!r} is no number; expected a time from 0 on")
    if seconds < 0:
        raise rows.error(f"{rows.time_column} {written} is negative; expected a time from 0 on")
    return seconds


def _tokens(written: object, column: str, rows: _Rows) -> int:
    try:
        count = float(written) if not isinstance(written, bool) else -1.0  # type: ignore[arg-type]
    except (TypeError, ValueError):
        count = -1.0
    if not 0 <= count < 2**31 or count != int(count):
        raise rows.error(f"{column} {written!r} is no whole number of tokens from 0 on")
    return int(count)


def _read_json(first: str, lines: Iterator[str], rows: _Rows, format_name: str) -> None:
    wanted = COLUMNS[format_name]
    seconds_a_unit = 1e-3 if format_name == "mooncake" else 1.0
    roots: dict[str, str] = {}  # chat -> the first chat of its conversation
    for rows.line, line in enumerate(_with(first, lines), start=1):
        if not line.strip():
            continue
        fields = _json_object(line, rows)
        missing = [key for key in wanted if key not in fields]
        if missing:
            raise rows.error(
                f"no key {', '.join(missing)} for {format_name}; found {', '.join(fields)}; expected {', '.join(wanted)}"
            )
        at_s = _seconds(fields["timestamp"], rows) * seconds_a_unit
        counts = (_tokens(fields[key], key, rows) for key in ("input_length", "output_length"))
        rows.add(at_s, fields["timestamp"], *counts)
        rows.prefixes.append(_blocks(fields["hash_ids"], rows))
        rows.sessions.append(_conversation(fields, roots) if format_name == "bailian" else "")


def _with(first: str, others: Iterator[str]) -> Iterator[str]:
    yield first
    yield from others


def _json_object(line: str, rows: _Rows) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except ValueError as error:
        raise rows.error(f"no JSON ({error}); expected one object a line") from error
    if not isinstance(found, dict):
        raise rows.error(f"found a JSON {type(found).__name__}; expected one object a line")
    return found


def _blocks(found: object, rows: _Rows) -> tuple[int, ...]:
    if not isinstance(found, list) or not all(type(block) is int and block >= 0 for block in found):
        raise rows.error(f"hash_ids {str(found)[:60]} is no list of whole numbers from 0 on")
    return tuple(found)


def _conversation(fields: dict[str, Any], roots: dict[str, str]) -> str:
    chat, parent = str(fields["chat_id"]), str(fields["parent_chat_id"])
    root = chat if parent in ("-1", "None", "") else roots.get(parent, parent)
    roots[chat] = root
    return root
