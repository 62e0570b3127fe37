"""What is valid of a policy that is not: read with everything taken out that was refused, so that contradictions in the rest are told in
the same turn. Asked by `parse`.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from flexpert.controller.policy.checks import Path
from flexpert.controller.policy.spec import UNCHECKED, ScalingPolicy

ROUNDS = 8
_MANY = 100_000
# What must be there and may be refused: stands in until the rest is read, and nothing is told about it.
FILLERS: dict[Path, Any] = {
    ("apiVersion",): "flexpert.dev/v1alpha1",
    ("kind",): "ScalingPolicy",
    ("spec",): {"workers": {"max": _MANY}, "signals": [{"type": "kv_utilization"}]},
    ("spec", "workers"): {"max": _MANY},
    ("spec", "workers", "max"): _MANY,
    ("spec", "signals"): [{"type": "kv_utilization"}],
}


@dataclass
class Remainder:
    """policy: None where nothing can be left. errors: those of the whole, with their paths. refused: all that was taken out."""

    policy: ScalingPolicy | None = None
    errors: list[tuple[Path, ErrorDetails]] = field(default_factory=list)
    refused: list[Path] = field(default_factory=list)
    kept: dict[Path, list[int]] = field(default_factory=dict)  # of a list that lost items: the old places of the others

    def origin(self, path: Path) -> Path:
        """Where a setting of the remainder stands in the file."""
        old: Path = ()
        for part in path:
            old = (*old, self.kept[old][part] if isinstance(part, int) and old in self.kept else part)
        return old

    def concerns(self, path: Path) -> bool:
        """Was this setting, a part of it or something around it refused?"""
        return any(path[: len(other)] == other or other[: len(path)] == path for other in self.refused)


def validate(values: Any) -> Remainder:
    """Reads it, then reads what is left without what was refused, until nothing is. Contradictions are not looked for."""
    left, remainder = copy.deepcopy(values), Remainder()
    for turn in range(ROUNDS):
        try:
            remainder.policy = ScalingPolicy.model_validate(left, context={UNCHECKED: True})
            break
        except ValidationError as error:
            found = [
                (_path(detail["loc"]), detail)
                for detail in error.errors(include_url=False)
                if not _empty_in_consequence(detail)
            ]
        if not turn:
            remainder.errors = found
        paths = [path for path, _ in found]
        remainder.refused += [remainder.origin(path) for path in paths]
        if not isinstance(left, dict):
            break
        _take_out(left, paths, remainder.kept)
    return remainder


def _empty_in_consequence(detail: ErrorDetails) -> bool:
    """A list whose items were all refused counts as too short, too."""
    return detail["type"] == "too_short" and bool(detail["input"])


def _path(loc: tuple[str | int, ...]) -> Path:
    """Where an error is: without the type that pydantic puts behind the place of a signal."""
    return (*loc[:3], *loc[4:]) if loc[:2] == ("spec", "signals") else loc


def _take_out(values: dict[str, Any], paths: list[Path], kept: dict[Path, list[int]]) -> None:
    """Removes the smallest part that may be left out: an optional key, else the item of a list around it."""
    items: set[Path] = set()
    for path in paths:
        holder = get(values, path[:-1])
        if path in FILLERS:
            for inside in [inner for inner in kept if inner[: len(path)] == path]:
                del kept[inside]
            if isinstance(holder, dict):
                holder[path[-1]] = copy.deepcopy(FILLERS[path])
        elif isinstance(holder, dict) and path[-1] in holder:
            del holder[path[-1]]
        else:
            items.add(_item_around(path))
    for item in sorted(items, key=_places, reverse=True):
        holder, last = get(values, item[:-1]), item[-1] if item else None
        if isinstance(holder, list) and isinstance(last, int):
            kept.setdefault(item[:-1], list(range(len(holder)))).pop(last)
            del holder[last]
        elif isinstance(holder, dict) and isinstance(last, str):
            holder.pop(last, None)


def _item_around(path: Path) -> Path:
    """The nearest item of a list that holds it, or the mapping it was missed in."""
    for length in range(len(path), 0, -1):
        if isinstance(path[length - 1], int):
            return path[:length]
    return path[:-1]


def _places(path: Path) -> list[int]:
    return [part if isinstance(part, int) else -1 for part in path]


def get(values: Any, path: Path) -> Any:
    """What stands there, or None."""
    for part in path:
        if isinstance(values, list):
            values = values[part] if isinstance(part, int) and part < len(values) else None
        else:
            values = values.get(part) if isinstance(values, dict) else None
    return values
