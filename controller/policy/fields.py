"""The kinds of value that a policy has, as annotations of its pydantic models: a time, a share, a number, an expression of cron.

Each reads what was written, checks its range, and says what was found, what was expected and what to write; each knows its JSON schema.
"""

from __future__ import annotations

import math
import zoneinfo
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from flexpert.controller.policy import cron, units
from flexpert.controller.policy.units import UnitError, show_duration, show_number, show_share, show_value

FAULT = "fault"  # type of the errors that are raised here; their context has `what` and `todo`


def fault(what: str, todo: str) -> PydanticCustomError:
    """An error whose text is ready for the operator."""
    return PydanticCustomError(FAULT, "{what}; {todo}", {"what": what, "todo": todo})


class Kind:
    """One kind of value: `read` turns what was written into it, or raises UnitError."""

    def read(self, value: Any) -> Any:
        raise NotImplementedError

    def show(self, value: Any) -> Any:
        """How it is written again."""
        return value

    def schema(self) -> dict[str, Any]:
        raise NotImplementedError

    def _read(self, value: Any) -> Any:
        try:
            return self.read(value)
        except UnitError as error:
            raise fault(error.what, error.todo) from error

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(
            self._read,
            serialization=core_schema.plain_serializer_function_ser_schema(self.show, when_used="json-unless-none"),
        )

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return self.schema()


@dataclass(frozen=True)
class Seconds(Kind):
    """A time between two; held in seconds."""

    low_s: float
    high_s: float

    def read(self, value: Any) -> float:
        seconds = units.parse_duration(value)
        if not self.low_s <= seconds <= self.high_s:
            raise _outside(show_value(value), show_duration(self.low_s), show_duration(self.high_s))
        return seconds

    def show(self, value: Any) -> str:
        return show_duration(value)

    def schema(self) -> dict[str, Any]:
        limits = (
            f"A time from {show_duration(self.low_s)} to {show_duration(self.high_s)}, such as {units.TIME_EXAMPLES}."
        )
        written = {"type": "string", "pattern": units.DURATION_PATTERN, "description": limits}
        return {"anyOf": [written, {"const": 0}]} if self.low_s == 0 else written


@dataclass(frozen=True)
class Share(Kind):
    """A part of a whole: 0.8 or 80%. Above low (or equal to it, where `with_low`), at most high."""

    low: float = 0.0
    high: float = 1.0
    with_low: bool = False

    def read(self, value: Any) -> float:
        share = units.parse_share(value)
        if share > self.high or share < self.low or (share == self.low and not self.with_low):
            after = "from" if self.with_low else "above"
            hint = f"did you mean {units.show_share(share / 100)}? " if 1 < share <= 100 and self.high <= 1 else ""
            raise UnitError(
                f"found {show_value(value)}", f"{hint}expected a share {after} {show_number(self.low)} and at most {show_number(self.high)}"
            )  # fmt: skip
        return share

    def schema(self) -> dict[str, Any]:
        lower = "minimum" if self.with_low else "exclusiveMinimum"
        return {
            "anyOf": [
                {"type": "number", lower: self.low, "maximum": self.high},
                {"type": "string", "pattern": units.SHARE_PATTERN, "description": f"Up to {show_share(self.high)}."},
            ]
        }


@dataclass(frozen=True)
class Whole(Kind):
    """A whole number between two; unit: what it counts."""

    low: int
    high: int
    unit: str = ""

    def read(self, value: Any) -> int:
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or value != value
            or value in (math.inf, -math.inf)
        ):
            counted = f"a whole number of {self.unit}" if self.unit else "a whole number"
            raise UnitError(f"found {show_value(value)}", f"expected {counted} from {self.low} to {self.high}")
        if value != int(value) or not self.low <= value <= self.high:
            raise UnitError(f"found {value}", f"expected a whole number from {self.low} to {self.high}")
        return int(value)

    def schema(self) -> dict[str, Any]:
        return {"type": "integer", "minimum": self.low, "maximum": self.high}


@dataclass(frozen=True)
class Number(Kind):
    """A number; above `low` (or from it, where `with_low`). unit: what it counts, for the message."""

    low: float = 0.0
    high: float = 1e15
    with_low: bool = False
    unit: str = ""
    example: str = "20000"

    def read(self, value: Any) -> float:
        counted = f"a number of {self.unit}" if self.unit else "a number"
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise UnitError(f"found {show_value(value)}", f"expected {counted}, such as {self.example}")
        if value > self.high or value < self.low or (value == self.low and not self.with_low):
            after = "of at least" if self.with_low else "above"
            raise UnitError(f"found {value}", f"expected {counted} {after} {show_number(self.low)}")
        return float(value)

    def show(self, value: Any) -> float | int:
        return int(value) if value == int(value) else float(value)

    def schema(self) -> dict[str, Any]:
        return {"type": "number", "minimum" if self.with_low else "exclusiveMinimum": self.low}


class Cron(Kind):
    """Five fields of cron: minute, hour, day of the month, month, day of the week."""

    def read(self, value: Any) -> str:
        todo = "write minute, hour, day, month and day of the week, such as '0 8 * * mon-fri'"
        if not isinstance(value, str):
            raise UnitError(f"found {show_value(value)}, which is no time of cron", todo)
        if not cron.is_valid(value):
            raise UnitError(f"found {value!r}, which is no time of cron", todo)
        return " ".join(value.split())

    def schema(self) -> dict[str, Any]:
        return {"type": "string", "pattern": r"^\s*(\S+\s+){4}\S+\s*$", "examples": ["0 8 * * mon-fri"]}


class Zone(Kind):
    """A time zone of the IANA data base."""

    def read(self, value: Any) -> str:
        todo = "write one of the IANA data base, such as Europe/Berlin or UTC"
        try:
            return zoneinfo.ZoneInfo(value).key if isinstance(value, str) else _no_zone(value, todo)
        except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError) as error:
            raise UnitError(f"found {value!r}, which this machine knows as no time zone", todo) from error

    def schema(self) -> dict[str, Any]:
        return {"type": "string", "examples": ["UTC", "Europe/Berlin"]}


class HttpUrl(Kind):
    """Where a server is: http or https, with a host."""

    def read(self, value: Any) -> str:
        todo = "write one such as http://prometheus:9090"
        if not isinstance(value, str):
            raise UnitError(f"found {show_value(value)}, which is no URL", todo)
        try:
            parts = urlsplit(value)
            whole = parts.scheme in {"http", "https"} and bool(parts.hostname) and (parts.port or 1) > 0
        except ValueError:
            whole = False
        if not whole or any(char.isspace() for char in value):
            raise UnitError(f"found {value!r}, which is no http or https URL", todo)
        return value.rstrip("/")

    def schema(self) -> dict[str, Any]:
        return {"type": "string", "pattern": r"^https?://\S+$"}


def _outside(found: str, low: str, high: str) -> UnitError:
    return UnitError(f"found {found}", f"expected from {low} to {high}")


def _no_zone(value: Any, todo: str) -> str:
    raise UnitError(f"found {show_value(value)}, which is no time zone", todo)
