"""`flexpert profile --url`: measures a running cluster from outside, at several sizes, as a file for `flexpert simulate`.

It scales the cluster by its admin API and asks it as any client does: what a gateway, HTTP and shared cores cost is in what it finds.
"""

from __future__ import annotations

import asyncio
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from flexpert.cli.api import AdminApi
from flexpert.cli.errors import CommandError
from flexpert.cli.profile import check_out, write_profile
from flexpert.loadtest import event_loop
from flexpert.loadtest.conduct import LoadTest, conduct
from flexpert.loadtest.measure import Outcome, RunResult
from flexpert.loadtest.preflight import Unusable
from flexpert.loadtest.schedule import Arrival
from flexpert.loadtest.target import parse_url
from flexpert.simulator.changes import read_changes, with_changes
from flexpert.simulator.fit import MeasureError
from flexpert.simulator.profile import Profile, ProfileError, load_profile
from flexpert.simulator.served import Noise, measure_served

__all__ = ["ClusterOptions", "profile_cluster", "settle"]

TRANSITION_TIMEOUT_S, STANDBY_TIMEOUT_S, POLL_S = 180.0, 60.0, 0.1
CYCLES = 2  # from the smallest size to the largest and back
CALM_S = 4.0  # after each change
SURPLUS_S = 75.0  # for a leaver's process to end: a minute, and the time until that is seen
CYCLE_TOKENS = 32  # of each answer meanwhile: short beside a start, so that many see nothing else
SETTLE_S = 1.0
ROUND_LIMIT_S = 600.0


@dataclass(frozen=True, kw_only=True)
class ClusterOptions:
    """As typed. base: a profile of the same model and machine, by `flexpert profile` without --url."""

    api: AdminApi
    key: str | None
    base: str
    sizes: tuple[int, ...]
    name: str
    max_running: int
    max_batch_tokens: int
    repeats: int
    out: Path


def profile_cluster(options: ClusterOptions, *, say: Callable[[str], None]) -> None:
    """Leaves the cluster at the smallest size. Raises CommandError."""
    check_out(options.out)
    cluster = _Cluster(options.api, options.key)
    noise = Noise()
    try:
        base = _base(options, cluster)
        served = []
        for workers in options.sizes:
            cluster.resize(workers)
            served.append(
                measure_served(cluster.play, workers=workers, base=base, noise=noise, repeats=options.repeats, seed=workers, say=say)
            )  # fmt: skip
        first = served[0]
        found = replace(
            base, served=tuple(served), decode=first.decode, prefill=first.prefill, answer_s=first.answer[0][1],
            exchange=tuple((float(each.workers), max(0.0, each.decode[1][1] - first.decode[1][1])) for each in served),
        )  # fmt: skip
        if len(options.sizes) > 1:
            say(f"joins and leaves, {CYCLES} of each, under load")
            found = cluster.cycle(found, options.sizes)
    except (MeasureError, ProfileError, Unusable) as error:
        raise CommandError("model", f"the cluster could not be measured: {error}") from error
    say(f"noise: {noise}")
    source = f"measured by flexpert profile on a serving cluster of {', '.join(map(str, options.sizes))} workers; {noise}; {base.source}"
    write_profile(replace(found, name=options.name, source=source).check(), options.out)


def _base(options: ClusterOptions, cluster: _Cluster) -> Profile:
    """The base profile with this cluster's limits and memory."""
    base = load_profile(options.base)
    cluster.resize(min(options.sizes))
    stats = cluster.status()["workers"][0].get("stats") or {}
    kv_tokens = int(stats.get("kv_capacity_tokens") or base.kv_tokens)
    return replace(
        base, max_running=options.max_running, max_batch_tokens=max(options.max_batch_tokens, options.max_running), kv_tokens=kv_tokens
    ).check()  # fmt: skip


class _Cluster:
    """The one that is measured: loads are played at it, sizes ordered."""

    def __init__(self, api: AdminApi, key: str | None) -> None:
        self._api, self._key = api, key
        self._seed = secrets.randbits(24)

    def status(self) -> dict[str, Any]:
        return self._api.status()

    def play(self, arrivals: Sequence[Arrival]) -> list[Outcome]:
        self._seed += 1  # other prompts each time: none is known already
        return self._run(self._test(lambda: iter(arrivals), arrivals[-1].at_s + 1e-3)).outcomes

    def _test(self, schedule: Callable[[], Iterator[Arrival]], duration_s: float) -> LoadTest:
        return LoadTest(
            target=parse_url(self._api.url, key=self._key), words="profile", duration_s=duration_s, schedule=schedule, seed=self._seed
        )  # fmt: skip

    def _run(self, test: LoadTest, stop: threading.Event | None = None) -> RunResult:
        """As `flexpert loadtest` does, whose share of the cores is in what is found."""
        return event_loop.run(self._conduct(test, stop))

    async def _conduct(self, test: LoadTest, stop: threading.Event | None) -> RunResult:
        ending = asyncio.Event()

        async def watch() -> None:
            while stop is not None and not stop.is_set():
                await asyncio.sleep(POLL_S)
            if stop is not None:
                ending.set()

        watching = asyncio.create_task(watch())
        try:
            return await conduct(test, stop=ending)
        finally:
            watching.cancel()

    def resize(self, workers: int) -> None:
        """To so many workers, and until nothing starts any more."""
        if len(self.status()["workers"]) != workers:
            self._change(workers)
        settle(self._api)

    def _standbys(self) -> int:
        return sum(process["phase"] == "warm" for process in self.status()["processes"].values())

    def _change(self, workers: int) -> None:
        transition = self._api.scale(workers, request_id=f"profile-{secrets.token_hex(8)}")
        ends_s = time.monotonic() + TRANSITION_TIMEOUT_S
        while transition["state"] == "running" and time.monotonic() < ends_s:
            time.sleep(POLL_S)
            transition = self._api.transition(transition["transition_id"])
        if transition["state"] != "done":
            raise MeasureError(
                f"the change to {workers} workers is {transition['state']}: {transition.get('reason') or 'no reason'}"
            )

    def cycle(self, profile: Profile, sizes: Sequence[int]) -> Profile:
        """Up and down, with half of the smallest size's places busy. The first join finds the standbys that are kept and no more, so that
        the one that it takes is replaced."""
        low, high = min(sizes), max(sizes)
        kept = self._standbys()
        self.resize(low)
        _wait_while(lambda: self._standbys() > kept, limit_s=SURPLUS_S)
        after = max((event["sequence"] for event in self._api.events(after=0)), default=0)
        apart_s = CYCLE_TOKENS * profile.decode[-1][1] / max(1, low * profile.max_running // 2)
        length_s = CYCLES * 2 * STANDBY_TIMEOUT_S
        light = self._test(
            lambda: (Arrival(n * apart_s, 16, CYCLE_TOKENS) for n in range(int(length_s / apart_s))), length_s
        )
        stop, results = threading.Event(), []
        load = threading.Thread(target=lambda: results.append(self._run(light, stop)), name="load", daemon=True)
        load.start()
        try:
            time.sleep(CALM_S)
            for workers in [high, low] * CYCLES:
                self._change(workers)
                settle(self._api)
                time.sleep(CALM_S)
        finally:
            stop.set()
            load.join(ROUND_LIMIT_S)
        if not results:
            raise MeasureError("the load beside the changes came to nothing")
        (result,) = results
        seen = [
            (result.started_unix_s + outcome.first_s, result.started_unix_s + outcome.last_s, outcome.tpot_s)
            for outcome in result.outcomes
            if outcome.first_s is not None and outcome.last_s is not None and outcome.tpot_s is not None
        ]
        return with_changes(profile, read_changes(self._api.events(after=after), workers=low), seen)


def settle(api: AdminApi, *, seconds: float = SETTLE_S) -> None:
    """Wait until no process starts: a standby that was used is replaced a moment after the change."""
    time.sleep(seconds)
    _wait_while(
        lambda: any(process["phase"] not in ("warm", "serving") for process in api.status()["processes"].values()),
        limit_s=STANDBY_TIMEOUT_S,
    )
    time.sleep(seconds)


def _wait_while(condition: Callable[[], bool], *, limit_s: float) -> None:
    ends_s = time.monotonic() + limit_s
    while time.monotonic() < ends_s and condition():
        time.sleep(POLL_S)
