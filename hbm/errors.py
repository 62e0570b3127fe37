"""What can go wrong with the HBM manager, as exceptions that travel: the daemon sends `kind` and the text, the client
raises the class.

Every text says what was found, what was expected and what to do. Used by all modules of this package and by its
callers.
"""

from __future__ import annotations


class HbmError(Exception):
    """Base of every error of this package."""

    kind = "error"


class FencedError(HbmError):
    """A newer fencing token has been seen: the caller has been replaced and must end."""

    kind = "fenced"


class BudgetError(HbmError):
    """The pool has fewer free granules than were asked for."""

    kind = "budget"


class LoadError(HbmError):
    """Weights could not be loaded: a file is missing or short, the plan is wrong, or the loader helper died."""

    kind = "load"


class LimitError(HbmError):
    """A limit of the machine (descriptors, mappings, memory) is too low for what was asked."""

    kind = "limit"


class BusyError(HbmError):
    """What was asked for is held by someone who has to let go first."""

    kind = "busy"


class NotFoundError(HbmError):
    """No weights or arena of that name."""

    kind = "not_found"


class ProtocolError(HbmError):
    """The peer sent what the protocol does not allow; nothing behind it can be trusted."""

    kind = "protocol"


class ManagerGoneError(HbmError):
    """The manager closed the connection, died or does not answer."""

    kind = "gone"


_BY_KIND = {
    cls.kind: cls
    for cls in (
        HbmError,
        FencedError,
        BudgetError,
        LoadError,
        LimitError,
        BusyError,
        NotFoundError,
        ProtocolError,
        ManagerGoneError,
    )
}


def error_of_kind(kind: str, text: str) -> HbmError:
    """The exception for an error frame; an unknown kind is a plain HbmError."""
    return _BY_KIND.get(kind, HbmError)(text)
