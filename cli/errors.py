"""Errors that end a command: a message for a person and an exit code for a script."""

from __future__ import annotations

EXIT_CODES = {
    "internal": 1,
    "usage": 2,
    "settings": 2,
    "running": 3,
    "port": 4,
    "model": 5,
    "checkpoint": 6,
    "memory": 7,
    "limits": 8,
    "device": 9,
    "ray": 10,
    "directory": 11,
    "stopped": 12,
    "unauthorised": 13,
    "not_found": 14,
    "conflict": 15,
    "impossible": 16,
    "unreachable": 17,
    "transition": 18,
}


class CommandError(Exception):
    """kind: a key of EXIT_CODES."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind

    @property
    def exit_code(self) -> int:
        return EXIT_CODES.get(self.kind, 1)
