"""What the controller writes down: facts that a restarted controller needs, and the events a person reads.

`controller.json` is replaced before an order that depends on it is carried out: an incarnation or an epoch is on disk before a
worker hears of it (unless the disk is full).
`events.jsonl` grows by a line for each thing that happened, up to 1 MiB; then it becomes `events.old.jsonl`, and the numbers go on in a
new one. All lie in the runtime directory, readable for the user alone.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

import msgspec

from flexpert.controller.runtime_dir import RuntimeDir, read_json, write_bytes

log = logging.getLogger(__name__)

MAX_EVENTS_BYTES = 1 << 20
MAX_EVENTS_KEPT = 1000


@dataclass
class Facts:
    """run: which `up` this was written under. next_process, generation: names that are taken. processes: those of the pool
    that were not ended -> (worker or "", agent). managers: device -> pid. nodes: (id, host) of each device. model: its
    shape, {} before it is known. transitions: their snapshot, {} before they began. began_s: when the first controller of
    this run began, seconds since 1970. transition_began_s: the one that runs -> when it began, by the monotonic clock of
    this machine, which all controllers of a run share."""

    run: str = ""
    next_process: int = 0
    generation: int = 0
    processes: dict[str, tuple[str, str]] = field(default_factory=dict)
    managers: dict[str, int] = field(default_factory=dict)
    model: dict[str, int] = field(default_factory=dict)
    nodes: list[tuple[str, str]] = field(default_factory=list)
    transitions: dict[str, Any] = field(default_factory=dict)
    began_s: float = 0.0
    transition_began_s: dict[str, float] = field(default_factory=dict)


class Journal:
    """On a full disk it goes on in memory: that is told once, and what is missing is written as soon as there is room."""

    def __init__(self, runtime: RuntimeDir) -> None:
        self._runtime = runtime
        found = read_json(runtime.journal) or {}
        self.facts = Facts(**{name: found[name] for name in Facts.__dataclass_fields__ if name in found})
        self._saved = b""
        self._trouble = False
        self._file = self._open()
        cut_short = runtime.events.stat().st_size and not runtime.events.read_bytes().endswith(b"\n")
        self._unwritten = b"\n" if cut_short else b""  # lines of events, or the rest of one
        kept = read_events(runtime)[-MAX_EVENTS_KEPT:]
        self._lines = deque((json.dumps(event).encode() for event in kept), maxlen=MAX_EVENTS_KEPT)
        self._sequence = kept[-1]["sequence"] if kept else 0

    @property
    def last(self) -> int:
        """Number of the newest event."""
        return self._sequence

    @property
    def events(self) -> list[dict[str, Any]]:
        """Those that are kept, oldest first."""
        return self.since(0)

    def since(self, number: int) -> list[dict[str, Any]]:
        """The events after this one, oldest first."""
        found = list(takewhile(lambda event: event["sequence"] > number, self.backwards()))
        return found[::-1]

    def backwards(self) -> Iterator[dict[str, Any]]:
        """The events that are kept, newest first."""
        return map(json.loads, reversed(self._lines))

    def save(self) -> None:
        """Write the facts, where they changed."""
        facts = msgspec.json.encode(self.facts)
        if facts == self._saved:
            return
        try:
            write_bytes(self._runtime.journal, facts)
        except OSError as error:
            self._failed(error)
        else:
            self._saved = facts
            self._recovered()

    def tell(self, kind: str, text: str, **details: Any) -> dict[str, Any]:
        """Add an event; returns it."""
        self._sequence += 1
        told = {"sequence": self._sequence, "time_s": round(time.time(), 3), "kind": kind, "text": text, **details}
        line = json.dumps(told).encode()
        self._lines.append(line)
        self._unwritten += line + b"\n"
        try:
            self._write()
        except OSError as error:
            self._failed(error)
        event: dict[str, Any] = json.loads(line)  # as it is read back
        return event

    def _write(self) -> None:
        if os.fstat(self._file).st_size > MAX_EVENTS_BYTES:
            self._runtime.events.replace(self._runtime.old_events)
            os.close(self._file)
            self._file = self._open()
        while self._unwritten:
            self._unwritten = self._unwritten[os.write(self._file, self._unwritten) :]

    def _open(self) -> int:
        return os.open(self._runtime.events, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)

    def _failed(self, error: OSError) -> None:
        log.warning("the journal cannot be written: %s", error)
        if len(self._unwritten) > MAX_EVENTS_BYTES:
            self._unwritten = b""  # the newest are still in memory
        if not self._trouble:
            self._trouble = True
            where = self._runtime.path
            self.tell(
                "journal", f"the journal in {where} cannot be written ({error.strerror}); make room: serving goes on"
            )

    def _recovered(self) -> None:
        if self._trouble:
            self._trouble = False
            self.tell("journal", "the journal is written again")


def read_events(runtime: RuntimeDir) -> list[dict[str, Any]]:
    """All events that are kept, oldest first; a line cut short by a crash is left out."""
    found = []
    for path in (runtime.old_events, runtime.events):
        try:
            lines = path.read_text().splitlines()
        except FileNotFoundError:
            continue
        for line in lines:
            try:
                found.append(json.loads(line))
            except json.JSONDecodeError:
                continue
    return found
