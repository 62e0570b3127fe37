"""Decisions on disk, in lines that the core can replay, and what became of each some minutes later. Bounded in memory and on disk.

`decisions.jsonl` is a record as `controller.policy.record` defines it: a line with the core's state where it begins and after each change
of the policy or its mode, a line a tick, outcomes in between. A full file becomes `decisions.old.jsonl`, in place of the one before.
"""

from __future__ import annotations

import logging
import os
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from flexpert.controller.policy import record
from flexpert.controller.policy.types import Decision, Observation, Outcome, PolicyConfig, State

log = logging.getLogger(__name__)

FILE, OLD_FILE = "decisions.jsonl", "decisions.old.jsonl"
MAX_BYTES = 16 << 20
MAX_KEPT = 2000  # decisions in memory


@dataclass(slots=True)
class Entry:
    """A decision, the transition that it began ("" where none), or why its order was not taken, and its outcome once it is known."""

    decision: Decision
    transition_id: str = ""
    refused: str = ""
    outcome: Outcome | None = None

    def to_json(self) -> dict[str, Any]:
        found: dict[str, Any] = msgspec.to_builtins(self.decision)
        found["transition_id"] = self.transition_id or None
        found["refused"] = self.refused or None
        found["outcome"] = None if self.outcome is None else msgspec.to_builtins(self.outcome)
        return found


class DecisionLog:
    def __init__(self, directory: Path, *, max_bytes: int = MAX_BYTES) -> None:
        self._directory, self._max_bytes = directory, max_bytes
        self._entries: OrderedDict[str, Entry] = OrderedDict()
        self._unmeasured: OrderedDict[str, Entry] = OrderedDict()
        self._config: PolicyConfig | None = None
        self._written_bytes: int | None = None  # None: the file is not known yet

    @property
    def entries(self) -> list[Entry]:
        """Oldest first."""
        return list(self._entries.values())

    def find(self, decision_id: str) -> Entry | None:
        return self._entries.get(decision_id)

    def add(self, before: State, observation: Observation, decision: Decision, config: PolicyConfig) -> None:
        """before: the core's state that it decided with."""
        lines = [record.tick_line(observation, decision)]
        full = self._written_bytes is None or self._written_bytes > self._max_bytes
        if full and (self._directory / FILE).exists() and self._size() > self._max_bytes:
            (self._directory / FILE).replace(self._directory / OLD_FILE)
            self._config = None
        if config != self._config:
            lines.insert(0, record.begin_line(before, config))
            self._config = config
        self._write(lines)
        self._keep(Entry(decision))

    def ordered(self, decision_id: str, transition_id: str) -> None:
        if (entry := self._entries.get(decision_id)) is not None:
            entry.transition_id, entry.refused = transition_id, ""

    def refused(self, decision_id: str, reason: str) -> None:
        """The order of this decision was not taken; another try may be."""
        if (entry := self._entries.get(decision_id)) is not None:
            entry.refused = reason

    def orders(self) -> dict[str, list[str]]:
        """What became of orders, for `load`: decision -> transition and refusal."""
        return {
            name: [entry.transition_id, entry.refused]
            for name, entry in self._entries.items()
            if entry.transition_id or entry.refused
        }

    def measure(
        self, seen: Mapping[str, Any], *, workers: int, state_of: Callable[[str], str], now_s: float, after_s: float
    ) -> list[Outcome]:
        """The outcome of each decision that is after_s old. seen: the traffic since about then (see LoadWindow.look)."""
        found = []
        while self._unmeasured:
            entry = next(iter(self._unmeasured.values()))
            if now_s - entry.decision.at_s < after_s:
                break
            self._unmeasured.popitem(last=False)
            state = state_of(entry.transition_id) if entry.transition_id else ""
            entry.outcome = _outcome(entry, seen, workers=workers, state=state, now_s=now_s)
            found.append(entry.outcome)
        if found:
            self._write([record.outcome_line(outcome) for outcome in found])
        return found

    def lines(self) -> list[bytes]:
        """All that is on disk, oldest first."""
        found: list[bytes] = []
        for name in (OLD_FILE, FILE):
            path = self._directory / name
            if path.exists():
                found += path.read_bytes().splitlines()
        return found

    def load(self, orders: Any = None) -> None:
        """Take over what an earlier controller of this run wrote; a line cut short is left out. orders: as `orders` gave them."""
        for line in self.lines():
            try:
                (found,) = record.read([line])
            except (record.RecordError, ValueError):
                continue
            if isinstance(found, record.Tick):
                self._keep(Entry(found.decision))
            elif isinstance(found, record.Measured) and found.outcome.decision_id in self._entries:
                self._entries[found.outcome.decision_id].outcome = found.outcome
                self._unmeasured.pop(found.outcome.decision_id, None)
        for name, (transition_id, refused) in (orders or {}).items():
            if (entry := self._entries.get(name)) is not None:
                entry.transition_id, entry.refused = str(transition_id), str(refused)

    def forget(self) -> None:
        """What is on disk is another run's: it stays readable as the old file."""
        path = self._directory / FILE
        if path.exists():
            path.replace(self._directory / OLD_FILE)

    def _keep(self, entry: Entry) -> None:
        decision_id = entry.decision.decision_id
        self._entries[decision_id] = self._unmeasured[decision_id] = entry
        while len(self._entries) > MAX_KEPT:
            gone, _ = self._entries.popitem(last=False)
            self._unmeasured.pop(gone, None)

    def _size(self) -> int:
        self._written_bytes = (self._directory / FILE).stat().st_size
        return self._written_bytes

    def _write(self, lines: list[bytes]) -> None:
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        data = b"".join(line + b"\n" for line in lines)
        try:
            descriptor = os.open(self._directory / FILE, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
            with os.fdopen(descriptor, "ab") as file:
                if file.tell() and not _ends_with_newline(self._directory / FILE):
                    data = b"\n" + data
                file.write(data)
                self._written_bytes = file.tell()
        except OSError:
            log.exception("decisions could not be written down")


def _ends_with_newline(path: Path) -> bool:
    """Whether the last writer finished its line."""
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


def _outcome(entry: Entry, seen: Mapping[str, Any], *, workers: int, state: str, now_s: float) -> Outcome:
    met, missed = int(seen["met"]), int(seen["missed"])
    parts = [f"{workers} workers"]
    if met + missed:
        parts.append(f"{met / (met + missed):.2%} of {met + missed} requests within the SLO")
    if seen["ttft_s"] is not None:
        parts.append(f"p95 to the first token {seen['ttft_s']:.3g} s")
    if state:
        parts.append(f"{entry.transition_id} {state}")
    elif entry.refused:
        state = "failed"
        parts.append(f"the order was refused: {entry.refused}")
    return Outcome(
        decision_id=entry.decision.decision_id, at_s=now_s, workers=workers, met=met, missed=missed, ttft_s=seen["ttft_s"],
        tpot_s=seen["tpot_s"], transition=state, text=", ".join(parts),  # type: ignore[arg-type]
    )  # fmt: skip
