"""What the controller writes down: facts that a restarted controller needs, and the events a person reads.

`controller.json` is replaced before an order that depends on it is carried out: an incarnation or an epoch is on disk before a
worker hears of it;
`events.jsonl` grows by a line for each thing that happened. Both lie in the runtime directory, readable for the user alone.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass, field
from typing import Any

import msgspec

from flexpert.controller.runtime_dir import RuntimeDir, read_json, write_bytes

MAX_EVENTS_BYTES = 1 << 20
MAX_EVENTS_KEPT = 1000


@dataclass
class Facts:
    """run: which `up` this was written under. next_process, generation: names that are taken. processes: those of the pool that were not
    ended -> (worker or "", agent). managers: device -> pid. model: its shape, {} before it is known. transitions: their snapshot, {} before
    they began."""

    run: str = ""
    next_process: int = 0
    generation: int = 0
    processes: dict[str, tuple[str, str]] = field(default_factory=dict)
    managers: dict[str, int] = field(default_factory=dict)
    model: dict[str, int] = field(default_factory=dict)
    transitions: dict[str, Any] = field(default_factory=dict)


class Journal:
    def __init__(self, runtime: RuntimeDir) -> None:
        self._runtime = runtime
        found = read_json(runtime.journal) or {}
        self.facts = Facts(**{name: found[name] for name in Facts.__dataclass_fields__ if name in found})
        self._saved = b""
        self._rotate()
        self._events = os.fdopen(
            os.open(runtime.events, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "w", buffering=1
        )
        self.events = read_events(runtime)[-MAX_EVENTS_KEPT:]
        self._sequence = self.events[-1]["sequence"] if self.events else 0

    @property
    def last(self) -> int:
        """Number of the newest event."""
        return self._sequence

    def save(self) -> None:
        """Write the facts, where they changed."""
        facts = msgspec.json.encode(self.facts)
        if facts != self._saved:
            write_bytes(self._runtime.journal, facts)
            self._saved = facts

    def tell(self, kind: str, text: str, **details: Any) -> dict[str, Any]:
        """Add an event; returns it."""
        self._sequence += 1
        event = {"sequence": self._sequence, "time_s": round(time.time(), 3), "kind": kind, "text": text, **details}
        self._events.write(json.dumps(event) + "\n")
        self.events.append(event)
        del self.events[:-MAX_EVENTS_KEPT]
        return event

    def _rotate(self) -> None:
        path = self._runtime.events
        if path.exists() and path.stat().st_size > MAX_EVENTS_BYTES:
            path.replace(path.with_suffix(".old.jsonl"))


def read_events(runtime: RuntimeDir) -> list[dict[str, Any]]:
    """All events of the file, oldest first; a line cut short by a crash is left out."""
    try:
        lines = runtime.events.read_text().splitlines()
    except FileNotFoundError:
        return []
    found = []
    for line in lines:
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found
