"""What the manager needs from the server to speak to its clients, whom it knows by number. `server.Server` implements
it; tests may.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Peers(Protocol):
    """What the manager needs from the server."""

    def send(self, client_id: int, message: object, descriptors: Sequence[int] = ()) -> None:
        """Never blocks; closes the descriptors; a client that is gone or does not read is the server's matter."""

    def is_keeping_up(self, client_id: int) -> bool:
        """Whether everything sent to it so far has gone out."""

    def kill(self, client_id: int) -> None:
        """SIGKILL."""
