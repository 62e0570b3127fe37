"""Transitions of the modelled cluster: how long a change of size takes, what it moves, and when it commits.

One at a time, as in the controller. Joiners take standbys first (warm), others start cold; all enter at one commit, when the slowest is
ready and has its expert slabs. How many those are is what controller.planner plans. Leavers serve until the commit.

Standbys are kept as controller.supervision keeps them: beside the workers, whatever devices are free. Those of leavers stay though they are
more than wanted, and of a surplus the longest idle end first, a minute after they were last of use.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from flexpert.controller.planner import groups_held, plan
from flexpert.simulator.profile import Duration, Profile
from flexpert.simulator.results import ScaleEvent

__all__ = ["Placement", "Scaling", "Transition"]

# Beyond this the plan's bound from below stands for the plan: it takes longer than the step that it simulates.
MOST_PLANNED_SLABS = 4096
MOST_PLANNED_WORKERS = 64
SURPLUS_S = 60.0  # of controller.supervision_types.SupervisionConfig


class Placement:
    """Who holds which expert slabs; `change` tells what the next members must fetch."""

    def __init__(self, profile: Profile, workers: int) -> None:
        self._profile = profile
        self._slabs = profile.layers * profile.experts
        self._count = workers
        self._next = workers
        self._members = [f"worker-{number}" for number in range(workers)]
        self._held: dict[str, list[int]] | None = {}
        self.change(workers)

    def change(self, workers: int) -> tuple[int, int]:
        """Bytes that move in all, and to the one who fetches most."""
        before, self._count = self._count, workers
        while len(self._members) < workers:
            self._members.append(f"worker-{self._next}")
            self._next += 1
        del self._members[workers:]
        if self._slabs > MOST_PLANNED_SLABS or max(workers, before) > MOST_PLANNED_WORKERS or workers > self._slabs:
            self._held = None
            return self._least(before, workers)
        found = plan(
            layers=self._profile.layers,
            experts=self._profile.experts,
            members=[(worker, self._slabs) for worker in self._members],
            held=self._held or {},
            slab_bytes=max(1, self._profile.slab_bytes),
        )
        known, self._held = self._held, groups_held(found.holders, found.members)
        if not known:
            return self._least(before, workers)
        most = max((sum(map(len, sources.values())) for sources in found.fetches.values()), default=0)
        return found.moved_groups * self._profile.slab_bytes, most * self._profile.slab_bytes

    def _least(self, before: int, after: int) -> tuple[int, int]:
        """What any balanced placement must move: joiners get their share, survivors what leavers held."""
        share = self._slabs / after
        moved = self._slabs * abs(after - before) / max(before, after)
        most = share if after > before else share - self._slabs / before
        return math.ceil(moved * self._profile.slab_bytes), math.ceil(most * self._profile.slab_bytes) if moved else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Transition:
    """One that runs. deadline_s: when the one who ordered it gives it up; math.inf: never."""

    id: str
    event: ScaleEvent
    began_s: float
    commits_s: float
    deadline_s: float
    cold: int = 0

    @property
    def from_workers(self) -> int:
        return self.event.from_workers

    @property
    def to_workers(self) -> int:
        return self.event.to_workers


class Scaling:
    """`order` begins a transition, `commit` ends it; the caller asks for `next_s` and changes the cluster."""

    def __init__(self, profile: Profile, *, workers: int, standby: int, rng: np.random.Generator) -> None:
        self.running: Transition | None = None
        self.ended: Transition | None = None
        self.ended_s = 0.0
        self.events: list[ScaleEvent] = []
        self.joins_s: list[float] = []
        self.leaves_s: list[float] = []
        self.stalls_s: list[float] = []
        self._profile = profile
        self._standbys_wanted = standby
        self._idle: list[float] = [0.0] * standby  # since when each warm standby waits, the longest first
        self._warming: list[float] = []  # when each new standby is ready, rising
        self._rng = rng
        self._placement = Placement(profile, workers)
        self._number = 0

    def standbys(self, now_s: float) -> int:
        """Warm processes that wait now."""
        while self._warming and self._warming[0] <= now_s:
            self._idle.append(self._warming.pop(0))
        if self.running is None:
            surplus = len(self._idle) + len(self._warming) - self._standbys_wanted
            ended = [since_s for since_s in self._idle[: max(0, surplus)] if since_s + SURPLUS_S <= now_s]
            del self._idle[: len(ended)]
        return len(self._idle)

    def starting_until_s(self, now_s: float) -> float:
        """When the last process that starts beside the workers is warm; now_s where none does."""
        return max(now_s, self._warming[-1]) if self._warming else now_s

    @property
    def next_s(self) -> float:
        return self.running.commits_s if self.running is not None else math.inf

    def order(self, event: ScaleEvent, *, timeout_s: float = math.inf) -> Transition:
        """Begin the change that `event` tells of. Raises RuntimeError while another runs."""
        if self.running is not None:
            raise RuntimeError(f"transition {self.running.id} still runs: one at a time")
        self._number += 1
        now_s, more = event.at_s, event.to_workers - event.from_workers
        moved_bytes, most_bytes = self._placement.change(event.to_workers)
        cold = 0
        if more > 0:
            warm = min(more, self.standbys(now_s))
            cold = more - warm
            del self._idle[:warm]
            takes_s = max(self._draw(self._profile.join_warm, warm), self._draw(self._profile.join_cold, cold))
        else:
            takes_s = self._draw(self._profile.leave, 1)
        takes_s += most_bytes / self._profile.move_bytes_per_s
        self.running = Transition(
            id=f"t-{self._number}",
            event=replace(event, moved_bytes=moved_bytes),
            began_s=now_s,
            commits_s=now_s + takes_s,
            deadline_s=now_s + timeout_s,
            cold=cold,
        )
        return self.running

    def commit(self) -> ScaleEvent:
        """The running transition ends, done; its event tells how long streams stand still."""
        transition = self._end()
        stall_s = self._draw(self._profile.stall, 1)
        event = replace(transition.event, ended_s=transition.commits_s, state="done", stall_s=round(stall_s, 6))
        grew = event.to_workers > event.from_workers
        (self.joins_s if grew else self.leaves_s).append(transition.commits_s - transition.began_s)
        self.stalls_s.append(stall_s)
        self.events.append(event)
        self.ended_s = transition.commits_s
        self.standbys(transition.commits_s)
        if not grew:
            self._idle += [transition.commits_s] * (event.from_workers - event.to_workers)
        self._replace_standbys(transition.commits_s)
        return event

    def abort(self, now_s: float) -> ScaleEvent:
        """The running transition is given up: the size stays."""
        transition = self._end()
        self._placement.change(transition.from_workers)
        event = replace(transition.event, ended_s=now_s, state="aborted")
        self.events.append(event)
        self.ended_s = now_s
        self._replace_standbys(now_s)
        return event

    def _end(self) -> Transition:
        transition, self.running = self.running, None
        if transition is None:
            raise RuntimeError("no transition runs")
        self.ended = transition
        return transition

    def _replace_standbys(self, now_s: float) -> None:
        missing = self._standbys_wanted - self.standbys(now_s) - len(self._warming)
        self._warming += [now_s + self._profile.standby_s] * max(0, missing)

    def _draw(self, duration: Duration, count: int) -> float:
        """The longest of `count` draws."""
        if count <= 0 or duration.mean_s <= 0:
            return 0.0
        mu, sigma = duration.spread
        return float(np.exp(mu + sigma * np.max(self._rng.standard_normal(count))))
