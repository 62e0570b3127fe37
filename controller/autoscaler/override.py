"""What people have said against the policy: a pause, another mode, a size by hand. Each with who said it. Pure.

A pause and a size by hand end by themselves; a mode stays until it is taken back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from flexpert.controller.policy.types import Mode, Override

HOLD_S = 900.0  # a size by hand, where nobody said for how long
LONGEST_S = 30 * 24 * 3600.0
MODES: tuple[Mode, ...] = ("Active", "Advisory", "Paused")


@dataclass(slots=True, kw_only=True)
class Controls:
    """mode: "" leaves it to the policy. workers 0: no size by hand. Times are unix times, 0.0: none."""

    mode: str = ""
    mode_by: str = ""
    paused_until_s: float = 0.0
    paused_by: str = ""
    workers: int = 0
    workers_by: str = ""
    workers_until_s: float = 0.0

    def effective(self, policy_mode: Mode, now_s: float) -> Mode:
        """A pause comes first, then what was set by hand, then the policy."""
        if now_s < self.paused_until_s:
            return "Paused"
        return next((mode for mode in MODES if mode == self.mode), policy_mode)

    def override(self, now_s: float) -> Override | None:
        if not self.workers or now_s >= self.workers_until_s:
            return None
        return Override(workers=self.workers, owner=self.workers_by, until_s=self.workers_until_s)

    def pause(self, *, until_s: float, owner: str) -> None:
        self.paused_until_s, self.paused_by = until_s, owner

    def hold(self, workers: int, *, until_s: float, owner: str) -> None:
        self.workers, self.workers_until_s, self.workers_by = workers, until_s, owner

    def set_mode(self, mode: Mode | None, *, owner: str) -> None:
        """None: as the policy says."""
        self.mode, self.mode_by = mode or "", owner if mode else ""

    def resume(self) -> list[str]:
        """End the pause and the size by hand, and leave the mode to the policy; says what there was."""
        ended = [
            *([f"the pause by {self.paused_by}"] if self.paused_until_s else []),
            *([f"{self.workers} workers by {self.workers_by}"] if self.workers else []),
            *([f"mode {self.mode} by {self.mode_by}"] if self.mode else []),
        ]
        self.pause(until_s=0.0, owner="")
        self.hold(0, until_s=0.0, owner="")
        self.set_mode(None, owner="")
        return ended

    def expire(self, now_s: float) -> list[str]:
        """Forget what is over; says what it was, once."""
        over = []
        if self.paused_until_s and now_s >= self.paused_until_s:
            over.append(f"the pause by {self.paused_by} is over")
            self.pause(until_s=0.0, owner="")
        if self.workers and now_s >= self.workers_until_s:
            over.append(f"the size of {self.workers} by {self.workers_by} is over, the policy decides again")
            self.hold(0, until_s=0.0, owner="")
        return over

    def to_json(self, now_s: float) -> dict[str, Any]:
        """For people: what is in force, with the seconds left."""
        found: dict[str, Any] = {"mode_by_hand": None, "pause": None, "override": None}
        if self.mode:
            found["mode_by_hand"] = {"mode": self.mode, "owner": self.mode_by}
        if now_s < self.paused_until_s:
            found["pause"] = {"owner": self.paused_by, "left_s": round(self.paused_until_s - now_s, 1)}
        if override := self.override(now_s):
            found["override"] = {
                "workers": override.workers, "owner": override.owner, "left_s": round(override.until_s - now_s, 1)
            }  # fmt: skip
        return found
