"""The one error that an operator's request to the controller can end with; carried through Ray and shown by the admin API and the CLI."""

from __future__ import annotations

ADMIN_CODES = ("invalid", "conflict", "impossible", "not_found")


class AdminError(Exception):
    """Nothing was changed. code: "invalid" (the request makes no sense), "conflict" (not now), "impossible" (not with what there is),
    "not_found". message: what was found, what was expected, what is possible instead."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(code, message)  # both, so that it survives pickling
        self.code, self.message = code, message

    def __str__(self) -> str:
        return self.message
