"""Turns what was typed into values: sizes and counts with their units, or an error that names the option."""

from __future__ import annotations

import getpass
import re
import socket

from flexpert.cli.errors import CommandError
from flexpert.controller.policy.units import UnitError, parse_duration

_UNITS = {
    "": 1,
    "b": 1,
    "kib": 1 << 10,
    "mib": 1 << 20,
    "gib": 1 << 30,
    "tib": 1 << 40,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
}
_UNITS |= {"k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*")


def parse_bytes(text: str, *, option: str) -> int:
    """ "4GiB", "512 MB", "1.5g" or a plain number of bytes. Raises CommandError."""
    found = _SIZE.fullmatch(text)
    unit = None if found is None else _UNITS.get(found[2].lower())
    size = 0 if found is None or unit is None else int(float(found[1]) * unit)
    if size <= 0:
        raise CommandError("usage", f"{option} {text!r}: expected a size above zero like 512MiB, 4GiB or 4000000000")
    return size


def parse_time(text: str, *, option: str) -> float:
    """ "90s", "30m", "2h": seconds. Raises CommandError."""
    try:
        seconds = parse_duration(text)
    except UnitError as error:
        raise CommandError("usage", f"{option}: {error.what}; {error.todo}") from error
    if seconds <= 0:
        raise CommandError("usage", f"{option} {text!r}: expected a time above zero like 30m or 2h")
    return seconds


def owner() -> str:
    """Who types: for events, and for whoever looks next."""
    try:
        name = getpass.getuser()
    except (KeyError, OSError):
        name = "somebody"
    return f"{name}@{socket.gethostname()}"[:128]


def show_bytes(size: float) -> str:
    """For people: three digits and a binary unit."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:.4g} TiB"
