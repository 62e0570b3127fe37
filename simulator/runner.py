"""One simulation: a load, a cluster, somebody who decides; played from the first arrival to the last answer.

Seeded and deterministic: equal arguments give equal results, byte for byte. No clock is read.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, replace

import numpy as np

from flexpert.simulator.cluster import Cluster
from flexpert.simulator.load import Load
from flexpert.simulator.metrics import Records, Sizes, count_flaps, percentiles, sampling_of, timeline_of
from flexpert.simulator.observe import Observer, window_of
from flexpert.simulator.profile import Profile
from flexpert.simulator.results import ScaleEvent, SimulationResult, Slo
from flexpert.simulator.scalers import Scaler, Wish
from flexpert.simulator.scaling import Scaling
from flexpert.simulator.service import Request

__all__ = ["START_S", "Setting", "simulate"]

START_S = 1_700_006_400.0  # a midnight (UTC): the unix time at which every trace begins
MOST_DRAIN_S = 7 * 86400.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What is the same for everybody who is compared. workers: at the begin. timeline_s 0: the span in 480 parts, a second at least."""

    profile: Profile
    devices: int
    slo: Slo
    workers: int = 1
    seed: int = 0
    timeline_s: float = 0.0
    start_s: float = START_S


def simulate(load: Load, scaler: Scaler, setting: Setting) -> SimulationResult:
    """Raises ValueError where the setting cannot be."""
    if not 1 <= setting.workers <= setting.devices:
        raise ValueError(
            f"{setting.workers} workers at the begin: expected 1 to {setting.devices}, the devices there are"
        )
    return _Run(load, scaler, setting).play()


class _Run:
    def __init__(self, load: Load, scaler: Scaler, setting: Setting) -> None:
        self.load, self.scaler, self.setting = load, scaler, setting
        profile = setting.profile
        self.records = Records(slo=setting.slo)
        self.cluster = Cluster(
            profile,
            workers=setting.workers,
            stands_for=load.stands_for,
            on_first=self.records.on_first,
            on_end=self.records.on_end,
            on_route=self.records.on_route,
        )
        self.scaling = Scaling(
            profile,
            workers=setting.workers,
            standby=scaler.standby,
            rng=np.random.default_rng([setting.seed, 1]),
        )
        self.observer = Observer(
            self.cluster, self.records, self.scaling, slo=setting.slo, devices=setting.devices, start_s=setting.start_s,
            window_s=window_of(scaler),
        )  # fmt: skip
        self.calm_s = 0.0  # from when on no process starts, as far as is known
        self.sizes = Sizes([], [], [], [])
        self.samples: list[tuple[int, float, float, float]] = []
        self.reasons: Counter[str] = Counter()
        self.wanted = setting.workers
        self.ticks = 0
        self.stalled_stream_s = 0.0
        self.arrived = 0.0
        self.arrived_tokens = 0.0
        self.rejected = 0.0
        # A request whose tokens no worker can ever hold is refused, as the gateway does; the smallest cluster sets the limit.
        self.most_tokens = min(profile.kv_capacity(1), profile.max_context_tokens)
        self._note_sizes(0.0)

    def play(self) -> SimulationResult:
        load, cluster, scaling = self.load, self.cluster, self.scaling
        weight, most_tokens = float(load.stands_for), self.most_tokens
        interval_s = self.setting.timeline_s or max(1.0, math.ceil(load.span_s / 480))
        arrivals = zip(load.at_s, load.prompt_tokens, load.output_tokens, strict=True)
        upcoming = next(arrivals, None)
        tick_s, sample_s = 0.0, min(interval_s, load.span_s)
        end_s = load.span_s + MOST_DRAIN_S
        while True:
            cluster.slow = self.setting.profile.starting if cluster.now_s < self.calm_s else 1.0
            stop_s = min(tick_s, scaling.next_s, sample_s, self.calm_s if cluster.slow > 1.0 else math.inf)
            while upcoming is not None and upcoming[0] <= stop_s:
                at_s, prompt, output = upcoming
                cluster.advance(at_s)
                self.arrived += weight
                self.arrived_tokens += weight * prompt
                if prompt + output > most_tokens:
                    self.rejected += weight
                else:
                    cluster.submit(Request(at_s, prompt, output, weight))
                upcoming = next(arrivals, None)
            cluster.advance(stop_s)
            if stop_s > end_s:
                raise RuntimeError(
                    f"{cluster.live:g} requests did not end within {MOST_DRAIN_S:g} s after the last arrival"
                )
            if stop_s == scaling.next_s:
                self._commit()
            if stop_s == tick_s:
                self._tick(tick_s)
                tick_s += self.scaler.interval_s
            if stop_s == sample_s:
                self._sample(sample_s)
                sample_s = math.inf if sample_s >= load.span_s else min(sample_s + interval_s, load.span_s)
            if upcoming is None and cluster.live <= 1e-9 and stop_s >= load.span_s:
                return self._result(interval_s)

    # Deciding

    def _tick(self, now_s: float) -> None:
        self.ticks += 1
        if self.scaler.blind:
            observation = self.observer.glance(now_s)
        else:
            observation = self.observer.look(now_s, arrived=self.arrived, arrived_tokens=self.arrived_tokens)
        wish = self.scaler.decide(observation)
        self.reasons[wish.reason] += 1
        self.wanted = wish.wanted
        if wish.abort and self.scaling.running is not None:
            self.scaling.abort(now_s)
            self._calm(now_s)
            self._note_sizes(now_s)
        elif wish.target is not None and self.scaling.running is None:
            self._order(wish, now_s)

    def _order(self, wish: Wish, now_s: float) -> None:
        now, target = self.cluster.workers, min(max(wish.target or 1, 1), self.setting.devices)
        if target == now:
            return
        self.scaling.order(
            ScaleEvent(
                at_s=now_s,
                ended_s=None,
                from_workers=now,
                to_workers=target,
                reason=wish.reason,
                text=wish.text,
                decision_id=wish.decision_id,
            )
        )
        self.calm_s = math.inf
        self._note_sizes(now_s)

    def _calm(self, now_s: float) -> None:
        """A transition is over; standbys that it took are replaced now."""
        self.calm_s = self.scaling.starting_until_s(now_s)

    def _commit(self) -> None:
        event = self.scaling.commit()
        change = event.to_workers - event.from_workers
        if change > 0:
            self.cluster.grow(change)
        else:
            self.cluster.shrink(-change)
        self.cluster.pause(event.stall_s)
        self.stalled_stream_s += event.stall_s * self.cluster.running
        self._calm(event.ended_s or 0.0)
        self._note_sizes(event.ended_s or 0.0)

    def _note_sizes(self, now_s: float) -> None:
        ready, running = self.cluster.workers, self.scaling.running
        joining = max(0, running.to_workers - running.from_workers) if running is not None else 0
        self.sizes.note(now_s, ready=ready, devices=ready + joining, standby=self.scaling.standbys(now_s))

    def _sample(self, now_s: float) -> None:
        cluster = self.cluster
        if self.scaling.standbys(now_s) != self.sizes.standby[-1]:
            self._note_sizes(now_s)
        used = sum(lane.kv_used(cluster.step) * lane.workers for lane in cluster.lanes)
        room = sum(lane.kv_capacity * lane.workers for lane in cluster.lanes)
        self.samples.append((self.wanted, cluster.running, cluster.live - cluster.running, used / room))

    # The figures

    def _result(self, interval_s: float) -> SimulationResult:
        load, records, setting = self.load, self.records, self.setting
        table = records.table()
        met = records.met(table[:, 2], table[:, 3])
        weights = table[:, 5]
        finished, met_weight = float(weights.sum()), float(weights[met].sum())
        whole = np.array([0.0, load.span_s])
        ready_s, devices_s, standby_s = (
            float(self.sizes.integral(values, whole)[0])
            for values in (self.sizes.ready, self.sizes.devices, self.sizes.standby)
        )
        events = list(self.scaling.events)
        if self.scaling.running is not None:
            events.append(replace(self.scaling.running.event, ended_s=None))
        count = math.ceil(load.span_s / interval_s)
        places = np.minimum((np.array(load.at_s) / interval_s).astype(int), max(0, count - 1))
        arrivals = np.bincount(places, minlength=count).astype(float) * load.stands_for
        return SimulationResult(
            name=self.scaler.name,
            kind=self.scaler.kind,
            requests=self.arrived,
            finished=finished,
            rejected=self.rejected,
            attainment=round(met_weight / self.arrived, 8) if self.arrived else 1.0,
            met=met_weight,
            ttft_s=percentiles(table[:, 2], weights),
            tpot_s=percentiles(table[:, 3], weights),
            queue_s=percentiles(table[:, 4], weights),
            worker_hours=round(ready_s / 3600, 6),
            device_hours=round(devices_s / 3600, 6),
            standby_hours=round(standby_s / 3600, 6),
            mean_workers=round(ready_s / load.span_s, 4),
            peak_workers=max(self.sizes.ready),
            scale_events=tuple(events),
            flaps=count_flaps(events),
            stall_s=round(sum(event.stall_s for event in events), 6),
            stalled_stream_s=round(self.stalled_stream_s, 3),
            preemptions=round(self.cluster.preemptions, 6),
            steps=self.cluster.step,
            ticks=self.ticks,
            reasons=dict(sorted(self.reasons.items())),
            sampling=sampling_of(
                table,
                met,
                stands_for=load.stands_for,
                simulated=len(load.at_s),
                rng=np.random.default_rng([setting.seed, 2]),
            ),
            timeline=timeline_of(
                table,
                met,
                self.sizes,
                span_s=load.span_s,
                interval_s=interval_s,
                arrivals=arrivals,
                samples=self.samples,
            ),
        )
