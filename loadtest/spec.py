"""Makes shapes from text and from YAML; both become the same plain mapping first, and errors name the key and the valid choices.

    spike rate=2:20 duration=5m
    poisson rate=5 duration=1m then ramp rate=5:50 duration=2m
    2 * (sine rate=1:10 duration=1h) + trace source=azure-conv time=0.1

`then` binds tighter than `+`, `*` before both; values with spaces or with any of ( ) * + stand in quotes.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from flexpert.loadtest.schedule import ScheduleError
from flexpert.loadtest.shapes import Curve, Scale, Sequence, Shape, Sum, Trace

__all__ = ["SHAPES", "ShapeError", "build", "load_shape", "parse_duration", "parse_shape"]

SINE_STEPS = 128  # straight pieces a period: within 0.03% of the amplitude
# Shape -> its keys; "!" marks those without a default.
SHAPES: dict[str, tuple[str, ...]] = {
    "constant": ("rate!", "duration!"),
    "poisson": ("rate!", "duration!"),
    "gamma": ("rate!", "duration!", "cv!"),
    "ramp": ("rate!", "duration!", "cv"),
    "step": ("rate!", "duration!", "cv", "steps"),
    "sine": ("rate!", "duration!", "cv", "period"),
    "spike": ("rate!", "duration!", "cv", "at", "length"),
    "piecewise": ("points!", "cv"),
    "trace": ("source!", "format", "start", "end", "time", "rate", "tokens"),
}
_DEFAULTS_OF_OPTIONS = ("rate", "duration", "cv")
_COMBINATIONS = ("sum", "sequence", "scale")
_UNITS_S = {"": 1.0, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_RATE_UNITS = {"": 1.0, "/s": 1.0, "/min": 1 / 60, "/m": 1 / 60, "/h": 1 / 3600}


class ShapeError(ScheduleError):
    """A shape that cannot be; the message names what was found and what is valid."""


def parse_shape(text: str, *, defaults: Mapping[str, Any] | None = None) -> Shape:
    """The short form. defaults: rate, duration and cv for shapes that name none of their own."""
    return build(_Reader(text).read(), defaults=defaults)


def load_shape(path: Path, *, defaults: Mapping[str, Any] | None = None) -> Shape:
    """From YAML: a mapping as build() takes it."""
    try:
        found = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ShapeError(f"{path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ShapeError(f"{path}: no YAML: {' '.join(str(error).split())}") from error
    try:
        return build(found, defaults=defaults)
    except ShapeError as error:
        raise ShapeError(f"{path}: {error}") from error


def build(spec: Any, *, defaults: Mapping[str, Any] | None = None, where: str = "shape") -> Shape:
    """spec: {shape: NAME, ...}, {sum: [...]}, {sequence: [...]} or {scale: ..., rate: 2, time: 0.5}; a text is read as the short form."""
    if isinstance(spec, str):
        return parse_shape(spec, defaults=defaults)
    if not isinstance(spec, Mapping):
        raise ShapeError(f"{where}: found {spec!r}, expected a mapping with one of shape, {', '.join(_COMBINATIONS)}")
    kinds = [key for key in ("shape", *_COMBINATIONS) if key in spec]
    if len(kinds) != 1:
        found = " and ".join(kinds) or ", ".join(map(str, spec)) or "nothing"
        raise ShapeError(f"{where}: found {found}, expected exactly one of shape, {', '.join(_COMBINATIONS)}")
    kind = kinds[0]
    if kind == "shape":
        return _leaf(spec, {key: value for key, value in (defaults or {}).items() if value is not None})
    allowed = ("scale", "rate", "time") if kind == "scale" else (kind,)
    for key in spec:
        if key not in allowed:
            raise ShapeError(f"{where}: {key!r} does not belong to {kind}; expected {', '.join(allowed)}")
    if kind == "scale":
        part = build(spec["scale"], defaults=defaults, where=f"{where}.scale")
        return Scale(part, _factor(spec, "rate", kind), _factor(spec, "time", kind))
    items = spec[kind]
    if not isinstance(items, list) or not items:
        raise ShapeError(f"{where}.{kind}: expected a list of shapes")
    parts = tuple(build(item, defaults=defaults, where=f"{where}.{kind}[{i}]") for i, item in enumerate(items))
    return Sum(parts) if kind == "sum" else Sequence(parts)


def _leaf(spec: Mapping[str, Any], defaults: Mapping[str, Any]) -> Shape:
    name = spec["shape"]
    keys = SHAPES.get(name) if isinstance(name, str) else None
    if keys is None:
        raise ShapeError(f"unknown shape {name!r}{_meant(str(name), SHAPES)}; expected one of {', '.join(SHAPES)}")
    plain = [key.rstrip("!") for key in keys]
    for key in spec:
        if key != "shape" and key not in plain:
            raise ShapeError(f"{name}: unknown key {key!r}{_meant(str(key), plain)}; expected {', '.join(plain)}")
    given = {
        key: value
        for key, value in defaults.items()
        if key in plain and key in _DEFAULTS_OF_OPTIONS and name != "trace"
    }
    given |= {key: value for key, value in spec.items() if key != "shape"}
    for key in keys:
        if key.endswith("!") and key[:-1] not in given:
            raise ShapeError(f"{name}: {key[:-1]} is missing; {name} takes {', '.join(plain)}")
    text = " ".join([name, *(f"{key}={_quoted(value)}" for key in plain if (value := given.get(key)) is not None)])
    return _trace(given, text) if name == "trace" else _curve(name, given, text)


def _trace(given: dict[str, Any], text: str) -> Trace:
    end = given.get("end")
    return Trace(
        source=str(given["source"]),
        text=text,
        format=str(given.get("format", "")),
        start_s=parse_duration(given.get("start", 0), key="trace: start"),
        end_s=None if end is None else parse_duration(end, key="trace: end"),
        **{key: _factor(given, key, "trace") for key in ("time", "rate", "tokens")},
    )


def _curve(name: str, given: dict[str, Any], text: str) -> Curve:
    cv = 0.0 if name == "constant" else 1.0
    if "cv" in given:
        cv = _number(given["cv"], f"{name}: cv", "a number from 0 (perfect order) to 10")
        if not 0 <= cv <= 10:
            raise ShapeError(f"{name}: cv {cv:g}: expected 0 (perfect order) to 10")
    points = _points(given["points"]) if name == "piecewise" else _points_of(name, given)
    if not any(rate for _, rate in points):
        raise ShapeError(f"{name}: the rate is 0 throughout, nothing would be sent")
    return Curve(tuple(points), cv, text)


def _points_of(name: str, given: dict[str, Any]) -> list[tuple[float, float]]:
    length_s = parse_duration(given["duration"], key=f"{name}: duration")
    if not length_s > 0:
        raise ShapeError(f"{name}: duration {given['duration']}: expected more than 0")
    rates = _rates(given["rate"], name)
    if name in ("constant", "poisson", "gamma"):
        return [(0.0, rates[0]), (length_s, rates[0])]
    low, high = rates
    match name:
        case "ramp":
            return [(0.0, low), (length_s, high)]
        case "step":
            steps = _number(given.get("steps", 4), "step: steps", "a whole number from 2 on")
            if steps != int(steps) or not 2 <= steps <= 10_000:
                raise ShapeError(f"step: steps {steps:g}: expected a whole number from 2 on")
            count = int(steps)
            levels = [low + (high - low) * i / (count - 1) for i in range(count)]
            return [(length_s * (i + side) / count, level) for i, level in enumerate(levels) for side in (0, 1)]
        case "sine":
            period_s = parse_duration(given.get("period", length_s), key="sine: period")
            if not period_s > 0:
                raise ShapeError("sine: period: expected more than 0")
            count = max(1, math.ceil(length_s / period_s * SINE_STEPS))
            times = [length_s * i / count for i in range(count + 1)]
            middle, swing = (low + high) / 2, (high - low) / 2
            return [(at_s, middle - swing * math.cos(2 * math.pi * at_s / period_s)) for at_s in times]
        case _:
            at_s = parse_duration(given.get("at", length_s * 0.4), key="spike: at")
            end_s = at_s + parse_duration(given.get("length", length_s * 0.2), key="spike: length")
            if not at_s < end_s <= length_s:
                raise ShapeError(
                    f"spike: it lasts from {at_s:g} s to {end_s:g} s, expected within the duration of {length_s:g} s"
                )
            return [(0.0, low), (at_s, low), (at_s, high), (end_s, high), (end_s, low), (length_s, low)]


def _rates(value: Any, name: str) -> list[float]:
    """One for even shapes, two (from:to, low:high, base:peak) for the others."""
    parts = str(value).split(":")
    wanted = 1 if name in ("constant", "poisson", "gamma") else 2
    if len(parts) != wanted:
        form = "one rate, like 10" if wanted == 1 else "two rates, like 2:20"
        raise ShapeError(f"{name}: rate {value}: expected {form}")
    return [_rate(part, name) for part in parts]


def _rate(text: str, name: str) -> float:
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*(/\w+)?\s*", text)
    if not found or (found[2] or "") not in _RATE_UNITS:
        raise ShapeError(
            f"{name}: rate {text!r}: expected requests a second like 10 or 0.5, or with a unit: 10/s, 30/min, 100/h"
        )
    return float(found[1]) * _RATE_UNITS[found[2] or ""]


def _points(value: Any) -> list[tuple[float, float]]:
    """ "0:2,30s:20,60s:2", or in YAML also a list of [time, rate]."""
    pairs = [str(pair).rpartition(":")[::2] for pair in value.split(",")] if isinstance(value, str) else value
    points: list[tuple[float, float]] = []
    try:
        for at, rate in pairs:
            points.append((parse_duration(at, key="piecewise: points"), _rate(str(rate), "piecewise")))
    except (TypeError, ValueError) as error:
        if isinstance(error, ShapeError):
            raise
        raise ShapeError(
            f"piecewise: points {value!r}: expected TIME:RATE,TIME:RATE,... like 0:2,30s:20,1m:2"
        ) from error
    if (
        len(points) < 2
        or points[0][0] != 0
        or points[-1][0] == 0
        or sorted(points, key=lambda point: point[0]) != points
    ):
        raise ShapeError(f"piecewise: points {value!r}: expected two points or more, the first at 0, times rising")
    return points


def parse_duration(value: Any, *, key: str) -> float:
    """Seconds of "5m", "90s", "500ms", "1.5h", or of a plain number of seconds. Raises ShapeError."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([a-z]*)\s*", str(value))
    if not found or found[2] not in _UNITS_S:
        raise ShapeError(f"{key} {value!r}: expected a time like 500ms, 90s, 5m or 1h")
    return float(found[1]) * _UNITS_S[found[2]]


def _factor(spec: Mapping[str, Any], key: str, name: str) -> float:
    found = _number(spec.get(key, 1.0), f"{name}: {key}", "a factor above 0")
    if not 0 < found < math.inf:
        raise ShapeError(f"{name}: {key} {found:g}: expected a factor above 0")
    return found


def _number(value: Any, key: str, expected: str) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ShapeError(f"{key} {value!r}: expected {expected}") from None


def _meant(found: str, choices: Any) -> str:
    close = difflib.get_close_matches(found, list(choices), n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def _quoted(value: Any) -> str:
    text = ",".join(f"{at}:{rate}" for at, rate in value) if isinstance(value, list) else str(value)
    return f'"{text}"' if re.search(r"[\s()*+]", text) else text


class _Reader:
    """Recursive descent over the short form; gives the mapping that build() takes."""

    _TOKEN = re.compile(
        r"""\s*(?:(?P<key>[A-Za-z_]\w*)=(?:"(?P<quoted>[^"]*)"|(?P<value>[^\s()*+"]+))|(?P<word>[()*+]|[^\s()*+=]+))"""
    )

    def __init__(self, text: str) -> None:
        self._text = text
        self._tokens: list[re.Match[str]] = []
        position = 0
        while text[position:].strip():
            found = self._TOKEN.match(text, position)
            if found is None:
                raise ShapeError(f"shape {text!r}: cannot read {text[position:].strip()!r}")
            self._tokens.append(found)
            position = found.end()
        self._next = 0

    def read(self) -> Any:
        if not self._tokens:
            raise ShapeError(f"no shape was given; expected one of {', '.join(SHAPES)}")
        found = self._sum()
        if self._next < len(self._tokens):
            raise ShapeError(
                f"shape {self._text!r}: {self._tokens[self._next][0].strip()!r} is not expected there; {self._help()}"
            )
        return found

    @staticmethod
    def _help() -> str:
        return "join shapes by + (together) or `then` (one after the other), and give values as key=value"

    def _word(self) -> str | None:
        return self._tokens[self._next]["word"] if self._next < len(self._tokens) else None

    def _took(self, word: str) -> bool:
        if self._word() == word:
            self._next += 1
            return True
        return False

    def _sum(self) -> Any:
        parts = [self._sequence()]
        while self._took("+"):
            parts.append(self._sequence())
        return parts[0] if len(parts) == 1 else {"sum": parts}

    def _sequence(self) -> Any:
        parts = [self._item()]
        while self._took("then"):
            parts.append(self._item())
        return parts[0] if len(parts) == 1 else {"sequence": parts}

    def _item(self) -> Any:
        word = self._word()
        if word is not None and re.fullmatch(r"\d+(\.\d+)?", word):
            return self._scaled("rate")
        if word == "time":
            self._next += 1
            return self._scaled("time")
        if self._took("("):
            found = self._sum()
            if not self._took(")"):
                raise ShapeError(f"shape {self._text!r}: a closing bracket is missing")
            return found
        if word is None or word in ("+", "*", ")", "then"):
            at = "the end" if self._next >= len(self._tokens) else repr(self._tokens[self._next][0].strip())
            raise ShapeError(f"shape {self._text!r}: expected the name of a shape at {at}: {', '.join(SHAPES)}")
        self._next += 1
        spec = {"shape": word}
        while self._next < len(self._tokens) and (key := self._tokens[self._next]["key"]):
            if key in spec:
                raise ShapeError(f"shape {self._text!r}: {key} is given twice for {word}")
            spec[key] = self._tokens[self._next]["quoted"] or self._tokens[self._next]["value"] or ""
            self._next += 1
        return spec

    def _scaled(self, key: str) -> Any:
        factor = self._word()
        self._next += 1
        if not self._took("*"):
            raise ShapeError(f"shape {self._text!r}: expected * after the factor {factor}")
        return {"scale": self._item(), key: factor}
