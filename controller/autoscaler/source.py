"""Where the policy comes from: a watched file, or a text given by the admin API. What cannot be used never replaces what is in use."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flexpert.controller.policy.spec import ScalingPolicy

MAX_BYTES = 1 << 20


class UnusablePolicy(ValueError):
    """All that is wrong with it, a line each."""


def read_policy(text: str) -> ScalingPolicy:
    """A policy that can be used here. Raises UnusablePolicy. Imports what knows policies: a controller without one starts without that."""
    from flexpert.controller.autoscaler import forecast
    from flexpert.controller.policy.parse import PolicyError, parse_policy
    from flexpert.controller.policy.spec import ForecastSignal

    try:
        policy = parse_policy(text)
    except PolicyError as error:
        raise UnusablePolicy(str(error)) from error
    if any(isinstance(signal, ForecastSignal) for signal in policy.spec.signals) and not forecast.library_is_there():
        raise UnusablePolicy(forecast.MISSING_LIBRARY)
    return policy


@dataclass(frozen=True)
class Change:
    """What `poll` found: a policy that is in use from now on, or a problem with what was written."""

    policy: ScalingPolicy | None
    text: str


class PolicySource:
    """path None: only texts that are `put`. text: of the policy in use, "" where there is none; origin: where it came from.
    problem: why the file as it is now is not in use, "" where it is."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.policy: ScalingPolicy | None = None
        self.text = self.origin = self.problem = ""
        self._seen: list[int] | None = None  # of the file as it was read last

    def restore(self, saved: Any) -> None:
        """As `to_json` gave it, so that a bad file does not take the policy from a restarted controller."""
        if not isinstance(saved, dict) or not saved.get("text"):
            return
        try:
            self.policy = read_policy(str(saved["text"]))
        except UnusablePolicy as error:
            self.problem = f"the policy that was in use cannot be read any more: {error}"
            return
        self.text, self.origin = str(saved["text"]), str(saved.get("origin", ""))
        self.problem, self._seen = str(saved.get("problem", "")), saved.get("seen")

    def to_json(self) -> dict[str, Any]:
        return {"text": self.text, "origin": self.origin, "problem": self.problem, "seen": self._seen}

    def poll(self, *, force: bool = False) -> Change | None:
        """Read the file where it changed since it was read last (or always); None where nothing changed."""
        if self.path is None:
            return None
        try:
            found = self.path.stat()
            seen = [found.st_mtime_ns, found.st_ino, found.st_size]
        except OSError as error:
            return self._refuse([0], f"{self.path} cannot be read: {error.strerror}", force=force)
        if seen == self._seen and not force:
            return None
        try:
            if found.st_size > MAX_BYTES:
                return self._refuse(
                    seen, f"{self.path} has {found.st_size} bytes; a policy has at most {MAX_BYTES}", force=force
                )
            text = self.path.read_text()
        except (OSError, UnicodeDecodeError) as error:
            return self._refuse(seen, f"{self.path} cannot be read: {error}", force=force)
        self._seen = seen
        if text == self.text and self.policy is not None and not self.problem and not force:
            return None
        try:
            return self._use(text, str(self.path))
        except UnusablePolicy as error:
            self.problem = f"{self.path}: {error}"
            return Change(None, self.problem)

    def put(self, text: str, *, origin: str) -> Change:
        """Use this text until the file changes. Raises UnusablePolicy, and nothing has changed then."""
        if len(text.encode(errors="replace")) > MAX_BYTES:
            raise UnusablePolicy(f"the policy is longer than {MAX_BYTES} bytes")
        return self._use(text, origin)

    def _use(self, text: str, origin: str) -> Change:
        policy = read_policy(text)
        self.policy, self.text, self.origin, self.problem = policy, text, origin, ""
        return Change(policy, text)

    def _refuse(self, seen: list[int], problem: str, *, force: bool) -> Change | None:
        """Told once for each state of the file."""
        if seen == self._seen and problem == self.problem and not force:
            return None
        self._seen, self.problem = seen, problem
        return Change(None, problem)
