"""How often a component failed in a row, and what follows: again at once, after a growing pause, or no more. Pure; used by supervision."""

from __future__ import annotations

from dataclasses import dataclass

from flexpert.controller.supervision_types import SupervisionConfig


@dataclass(slots=True)
class Trouble:
    """failures: ends in a row, forgiven after stable_s of service. start_failures: those since it last served.
    pausing: left alone for a moment. ready_at_s: since when it serves, None where it does not.
    """

    failures: int = 0
    start_failures: int = 0
    pausing: bool = False
    ready_at_s: float | None = None
    was_ready: bool = False


class Troubles:
    """Those of each component, by name."""

    def __init__(self, config: SupervisionConfig) -> None:
        self._config = config
        self._of: dict[str, Trouble] = {}

    def of(self, component: str) -> Trouble:
        return self._of.setdefault(component, Trouble())

    def pausing(self, component: str) -> bool:
        return self.of(component).pausing

    def served(self, component: str, now_s: float) -> None:
        """It serves from now on."""
        self.of(component).ready_at_s = now_s
        self.succeeded(component)

    def succeeded(self, component: str) -> None:
        """Its start did not fail."""
        trouble = self.of(component)
        trouble.was_ready, trouble.start_failures = True, 0

    def failed(self, component: str, *, permanent: bool, now_s: float) -> tuple[bool, float]:
        """It is gone. Whether it is hopeless (it failed to start, too often or for a reason that stays), and for how many seconds it is
        left alone from now on."""
        trouble, config = self.of(component), self._config
        served_s = 0.0 if trouble.ready_at_s is None else now_s - trouble.ready_at_s
        started, trouble.ready_at_s = trouble.ready_at_s is not None, None
        trouble.failures = 1 if served_s >= config.stable_s else trouble.failures + 1
        trouble.start_failures += not started
        too_often = trouble.start_failures >= config.max_start_failures
        hopeless = not started and (too_often or (permanent and not trouble.was_ready))
        if trouble.pausing or (started and trouble.failures == 1):
            return hopeless, 0.0  # one that had been fine is replaced at once
        delay_s = min(config.backoff_max_s, config.backoff_base_s * 2 ** min(trouble.failures - 1, 16))
        delay_s -= served_s  # what keeps restarts apart is the time between them, not the time down
        trouble.pausing = delay_s > 0
        return hopeless, max(0.0, delay_s)
