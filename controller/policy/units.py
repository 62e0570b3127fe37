"""Times, shares and rates as an operator writes them, as numbers, and back as text. Pure; asked by the policy file's models and by `words`.

A time has a unit (`500ms`, `30s`, `5m`, `2h`, `7d`, also `1h30m`), because 500 alone has been milliseconds to one reader and seconds to the
next; only 0 needs none. A share is 0.8 or `80%`.
"""

from __future__ import annotations

import math
import re

SECONDS_PER_UNIT = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
TIME_EXAMPLES = "500ms, 30s, 5m, 2h or 7d"
DURATION_PATTERN = r"^(0|([0-9]+(\.[0-9]+)?\s?(ms|s|m|h|d)\s?)+)$"
SHARE_PATTERN = r"^[0-9]+(\.[0-9]+)?\s?%$"

_PART = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([^\s\d]*)")
_WORDS = {
    "ms": {"msec", "msecs", "millis", "millisecond", "milliseconds"},
    "s": {"sec", "secs", "second", "seconds"},
    "m": {"min", "mins", "minute", "minutes"},
    "h": {"hr", "hrs", "hour", "hours"},
    "d": {"day", "days"},
}


class UnitError(ValueError):
    """what: what is wrong with the text; todo: what to write instead."""

    def __init__(self, what: str, todo: str) -> None:
        super().__init__(f"{what}; {todo}")
        self.what = what
        self.todo = todo


def parse_duration(value: object) -> float:
    """Seconds of "500ms", "1h30m", "1.5 s" or 0. Raises UnitError."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise UnitError(f"found {show_value(value)}, which is no time", f"write one such as {TIME_EXAMPLES}")
    if isinstance(value, int | float):
        if value == 0:
            return 0.0
        raise UnitError(f"found {value}, which has no unit", f"write a time with one, such as {TIME_EXAMPLES}")
    if value.strip() == "0":
        return 0.0
    if value.lstrip().startswith("-"):
        raise UnitError(f"found {value!r}, a time below zero", f"write one such as {TIME_EXAMPLES}")
    return _sum_of_parts(value)


def _sum_of_parts(text: str) -> float:
    seconds, at = 0.0, 0
    while at < len(text.rstrip()) or at == 0:
        part = _PART.match(text, at)
        if part is None:
            raise UnitError(f"found {text!r}, which is no time", f"write one such as {TIME_EXAMPLES}")
        number, unit = part.groups()
        if not unit:
            raise UnitError(f"found {text!r}, which has no unit", f"write a time with one, such as {TIME_EXAMPLES}")
        if unit not in SECONDS_PER_UNIT:
            meant = next((short for short, long in _WORDS.items() if unit.lower() in {short, *long}), None)
            hint = f"did you mean {number}{meant}? " if meant else ""
            raise UnitError(
                f"found {text!r}, whose unit {unit!r} is unknown",
                f"{hint}expected one of {', '.join(SECONDS_PER_UNIT)}",
            )
        # Scaled down by a division where that is exact in decimal: 35ms is 0.035, not 35 * 0.001 = 0.035000000000000003.
        seconds += float(number) / 1000 if unit == "ms" else float(number) * SECONDS_PER_UNIT[unit]
        at = part.end()
    if not math.isfinite(seconds):
        raise UnitError(f"found {text!r}, which is too long", f"write a time such as {TIME_EXAMPLES}")
    return seconds


def show_duration(seconds: float) -> str:
    """As it is written in a policy, in the largest unit that gives a whole number: 0.5 -> "500ms", 5400 -> "90m"."""
    if seconds == 0:
        return "0s"
    for unit in ("d", "h", "m", "s"):
        count = seconds / SECONDS_PER_UNIT[unit]
        if count == int(count):
            return f"{int(count)}{unit}"
    return f"{_plain(seconds * 1000)}ms" if seconds < 1 else f"{_plain(seconds)}s"


def parse_share(value: object) -> float:
    """0.8 of 0.8, "0.8" or "80%". Raises UnitError; the range is the caller's to check."""
    todo = "write a share such as 0.8 or 80%"
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise UnitError(f"found {show_value(value)}, which is no share", todo)
    if isinstance(value, str):
        percent = re.fullmatch(r"\s*(-?[0-9]+(?:\.[0-9]+)?)\s*%\s*", value)
        if percent is None:
            raise UnitError(f"found {value!r}, which is no share", todo)
        return float(percent[1]) / 100
    return float(value)


def show_share(share: float) -> str:
    """0.995 -> "99.5%"."""
    return f"{_plain(round(share * 100, 6))}%"


def show_number(number: float) -> str:
    """Without a needless .0 and with thousands apart: 20000.0 -> "20,000"."""
    return f"{int(number):,}" if number == int(number) else f"{number:,}"


def show_value(value: object) -> str:
    """What was found in a file, as a person would name it."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list | tuple):
        return "a list"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _plain(number: float) -> str:
    return f"{number:.10g}"
