"""What the gateway knows of the cluster beyond its own workers, for /metrics: epoch, transitions and their times, memory held.

Asked of the controller when somebody scrapes, at most once a second, and never waited for longer than half a second: a scrape while the
controller is away shows what was known last. Each transition that ended since this gateway started is counted once.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, SummaryMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from flexpert.controller.errors import AdminError
from flexpert.controller.gateway.admin import CallController, ControllerAway

log = logging.getLogger("flexpert.gateway")

_FRESH_S = 1.0
_WAIT_S = 0.5
_CALL_TIMEOUT_S = 10.0
_WAY_IN = ("process", "start", "prepare")  # steps of a joiner before it can be committed
_JOIN_BUCKETS_S = (0.05, 0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0)
_PAUSE_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)


class ClusterFacts(Collector):
    """`call` None: nothing is known, and no metric of the cluster appears but zeros."""

    def __init__(self, call: CallController | None, *, registry: CollectorRegistry) -> None:
        self._call = call
        self._status: dict[str, Any] = {}
        self._asked_s = -_FRESH_S
        self._asking: asyncio.Task[None] | None = None
        self._last_event = 0
        self._followed: set[str] = set()  # transitions that were seen to begin and not to end
        self._began_s = time.time()
        self._transitions = Counter(
            "flexpert_transitions", "Transitions that ended.", ["kind", "state"], registry=registry
        )
        self._moved_bytes = Counter(
            "flexpert_transition_moved_bytes", "Expert bytes moved by transitions that ended.", registry=registry
        )
        self._kv_moved_bytes = Counter(
            "flexpert_transition_kv_moved_bytes", "KV bytes moved by transitions that ended.", registry=registry
        )
        self._duration = Histogram(
            "flexpert_transition_seconds", "Begin to end of a transition.", ["kind"], buckets=_JOIN_BUCKETS_S,
            registry=registry,
        )  # fmt: skip
        self._join = Histogram(
            "flexpert_join_seconds", "A worker's way into an epoch, cold (with the start of its process) or warm.", ["start"],
            buckets=_JOIN_BUCKETS_S, registry=registry,
        )  # fmt: skip
        self._pause = Histogram(
            "flexpert_commit_pause_seconds", "How long a worker stood still for a commit.", buckets=_PAUSE_BUCKETS_S,
            registry=registry,
        )  # fmt: skip
        registry.register(self)

    async def refresh(self) -> None:
        """Ask the controller where the last answer is old; returns in half a second in any case."""
        if self._call is None:
            return
        if self._asking is None and time.monotonic() - self._asked_s >= _FRESH_S:
            self._asking = asyncio.get_running_loop().create_task(self._ask(self._call))
        if self._asking is not None:
            await asyncio.wait({self._asking}, timeout=_WAIT_S)

    async def _ask(self, call: CallController) -> None:
        try:
            async with asyncio.timeout(_CALL_TIMEOUT_S):
                self._status = await call("status")
                await self._follow(call)
        except (ControllerAway, TimeoutError) as error:
            log.info("no news of the cluster for /metrics: %r", error)
        except Exception:
            log.exception("the news of the cluster for /metrics could not be read")
        finally:
            self._asking, self._asked_s = None, time.monotonic()

    async def _follow(self, call: CallController) -> None:
        told = await call("events", self._last_event)
        for event in told["events"]:
            transition_id = event.get("transition_id")
            if transition_id and event["sequence"] > self._last_event and event["time_s"] >= self._began_s:
                self._followed.add(transition_id)
        self._last_event = max(self._last_event, told["last"])
        for transition_id in sorted(self._followed):
            try:
                progress = await call("transition", transition_id)
            except AdminError:  # so long ago that the controller has forgotten it
                self._followed.discard(transition_id)
                continue
            if progress and progress["state"] != "running":
                self._followed.discard(transition_id)
                self._count(progress)

    def _count(self, progress: dict[str, Any]) -> None:
        if not progress["members"]:
            return  # nothing was to be done
        self._transitions.labels(progress["kind"], progress["state"]).inc()
        self._moved_bytes.inc(progress.get("moved_bytes") or 0)
        self._kv_moved_bytes.inc(progress.get("kv_moved_bytes") or 0)
        if progress.get("seconds") is not None:
            self._duration.labels(progress["kind"]).observe(progress["seconds"])
        if progress["state"] != "done":
            return
        for member in progress.get("members", ()):
            seconds = member.get("seconds") or {}
            if member["role"] == "joins":
                way_s = [seconds[step] for step in _WAY_IN if step in seconds]
                if way_s:
                    self._join.labels("cold" if member.get("cold") else "warm").observe(sum(way_s))
            elif member["role"] == "stays" and "commit" in seconds:
                self._pause.observe(seconds.get("pause", seconds["commit"]))

    # At each scrape

    def collect(self) -> Iterator[Metric]:
        status = self._status
        yield _gauge("flexpert_epoch", "Number of the epoch that serves.", status.get("epoch") or 0)
        workers = [worker for worker in status.get("workers") or () if worker and worker.get("worker_id")]
        serving = [worker for worker in workers if worker.get("serving", worker.get("address"))]
        yield _gauge("flexpert_workers_serving", "Workers that take part in the epoch.", len(serving))
        yield self._running(status.get("transition") or {})
        yield _by_worker("flexpert_worker_kv_bytes", "Memory for KV.", workers, "kv_bytes")
        yield _by_worker("flexpert_worker_experts", "Expert slabs that it holds.", workers, "experts_held")
        yield from _of_policy(status.get("policy") or {})

    def describe(self) -> Iterator[Metric]:
        return iter(())

    def _running(self, transition: dict[str, Any]) -> Metric:
        family = GaugeMetricFamily(
            "flexpert_transition_running", "1 while a transition is in that phase.", labels=["kind", "phase"]
        )
        if transition.get("state") == "running":
            family.add_metric([transition.get("kind") or "", transition.get("phase") or ""], 1.0)
        return family


def _of_policy(policy: dict[str, Any]) -> Iterator[Metric]:
    """Without samples where the cluster has no policy."""
    desired = GaugeMetricFamily("flexpert_workers_desired", "Workers that the policy wants.")
    if policy.get("desired") is not None:
        desired.add_metric([], float(policy["desired"]))
    yield desired
    decisions = CounterMetricFamily(
        "flexpert_scaling_decisions", "Decisions of the policy, by reason.", labels=["reason"]
    )
    for reason, count in sorted((policy.get("decisions") or {}).items()):
        decisions.add_metric([reason], float(count))
    yield decisions
    ticks = SummaryMetricFamily("flexpert_autoscaler_tick_seconds", "How long a tick of the autoscaler took.")
    if policy:
        ticks.add_metric([], policy.get("ticks") or 0, policy.get("tick_sum_s") or 0.0)
    yield ticks


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(name, text, value=float(value))


def _by_worker(name: str, text: str, workers: list[dict[str, Any]], field: str) -> Metric:
    family = GaugeMetricFamily(name, text, labels=["worker"])
    for worker in workers:
        if isinstance(worker.get(field), int | float):
            family.add_metric([worker["worker_id"]], float(worker[field]))
    return family
