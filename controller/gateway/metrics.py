"""What Prometheus sees. Definitions stand in docs/api.md; all durations are of this process's monotonic clock.

One registry for each gateway, so that two in one process (tests) do not collide. Worker numbers are read from the pool at each scrape.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from flexpert.controller.gateway.link import WorkerLink
from flexpert.controller.gateway.window import LoadWindow

_TTFT_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0)
_TOKEN_BUCKETS_S = (
    0.001,
    0.0025,
    0.005,
    0.01,
    0.015,
    0.02,
    0.03,
    0.04,
    0.05,
    0.075,
    0.1,
    0.15,
    0.25,
    0.5,
    1.0,
    2.5,
    10.0,
)
_E2E_BUCKETS_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0)
_ATTAINMENT_WINDOW_S = 60.0
_QUEUE_BUCKETS_S = (0.001, 0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


class GatewayMetrics:
    """`live` and `waiting` are asked at each scrape. `window` is beside them for the scaling policy."""

    def __init__(
        self,
        *,
        live: Callable[[], int],
        waiting: Callable[[], int],
        links: Callable[[], Iterable[WorkerLink]],
        connections: Mapping[str, int],
    ) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        self.window = LoadWindow(began_s=time.monotonic())
        self.ttft = self._histogram(
            "ttft_seconds", "Arrival of a request to the first token of a choice.", _TTFT_BUCKETS_S
        )
        self.itl = self._histogram(
            "inter_token_latency_seconds", "Gap between two tokens of one choice.", _TOKEN_BUCKETS_S
        )
        self.tpot = self._histogram(
            "tpot_seconds",
            "Mean time per output token after the first, one sample for each choice of two tokens or more.",
            _TOKEN_BUCKETS_S,
        )
        self.e2e = self._histogram("e2e_latency_seconds", "Arrival of a request to its last byte.", _E2E_BUCKETS_S)
        self.queue_time = self._histogram(
            "queue_time_seconds", "Arrival of a request until a choice of it was given to a worker.", _QUEUE_BUCKETS_S
        )
        self.requests = Counter(
            "flexpert_requests",
            "Requests to the inference endpoints by outcome.",
            ["endpoint", "outcome"],
            registry=self.registry,
        )
        self.prompt_tokens = Counter(
            "flexpert_prompt_tokens", "Prompt tokens of finished requests.", registry=self.registry
        )
        self.cached_tokens = Counter(
            "flexpert_cached_prompt_tokens",
            "Prompt tokens that a worker reused from its cache.",
            registry=self.registry,
        )
        self.generation_tokens = Counter(
            "flexpert_generation_tokens", "Tokens generated for clients.", registry=self.registry
        )
        self._gauge("flexpert_requests_live", "Choices that are queued or running.", live)
        self._gauge("flexpert_requests_waiting", "Choices that no worker has taken yet.", waiting)
        self.registry.register(_Attainment(self.window))
        self.registry.register(_WorkerCollector(links, connections))

    def render(self) -> bytes:
        return generate_latest(self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"flexpert_request_{name}", text, buckets=buckets, registry=self.registry)

    def _gauge(self, name: str, text: str, read: Callable[[], int]) -> None:
        Gauge(name, text, registry=self.registry).set_function(read)


class _Attainment(Collector):
    """Absent without an SLO, and where no choice ended in the window: neither is 0 nor 1."""

    def __init__(self, window: LoadWindow) -> None:
        self._window = window

    def collect(self) -> Iterator[Metric]:
        found = self._window.look(time.monotonic(), window_s=_ATTAINMENT_WINDOW_S)
        family = GaugeMetricFamily(
            "flexpert_slo_attainment", "Share of the choices that ended in the last minute within the policy's SLO."
        )
        if judged := found["met"] + found["missed"]:
            family.add_metric([], found["met"] / judged)
        yield family


class _WorkerCollector(Collector):
    """The last Stats of each worker; counters begin again with each incarnation, as Prometheus expects of a restarted process."""

    _GAUGES = (
        ("flexpert_worker_waiting", "Choices in the worker's own queue.", "waiting"),
        ("flexpert_worker_running", "Choices in the worker's batch.", "running"),
        ("flexpert_worker_kv_used_tokens", "KV in use, in tokens.", "kv_used_tokens"),
        ("flexpert_worker_kv_capacity_tokens", "KV that the worker could use, in tokens.", "kv_capacity_tokens"),
        ("flexpert_worker_step_seconds", "Duration of the last step.", "step_s"),
        ("flexpert_worker_host_seconds", "Part of the last step spent in scheduling and batch building.", "host_s"),
    )
    _COUNTERS = (
        ("flexpert_worker_steps", "Steps done.", "steps"),
        ("flexpert_worker_prefill_tokens", "Prompt tokens computed.", "prefill_tokens"),
        ("flexpert_worker_decode_tokens", "Tokens decoded.", "decode_tokens"),
        ("flexpert_worker_cached_prompt_tokens", "Prompt tokens reused instead of computed.", "cached_prompt_tokens"),
        ("flexpert_worker_preemptions", "Requests put back for want of KV.", "preemptions"),
    )

    def __init__(self, links: Callable[[], Iterable[WorkerLink]], connections: Mapping[str, int]) -> None:
        self._links = links
        self._connections = connections

    def collect(self) -> Iterator[Metric]:
        links = list(self._links())
        up = GaugeMetricFamily(
            "flexpert_worker_up", "Whether the worker is connected to this gateway.", labels=["worker"]
        )
        connections = CounterMetricFamily(
            "flexpert_worker_connections",
            "Streams opened to the worker; each replacement is one more.",
            labels=["worker"],
        )
        for link in links:
            up.add_metric([link.worker_id], float(link.connected))
        for worker_id, count in self._connections.items():
            connections.add_metric([worker_id], count)
        yield up
        yield connections
        for name, text, field in self._GAUGES:
            yield _fill(GaugeMetricFamily(name, text, labels=["worker"]), links, field)
        for name, text, field in self._COUNTERS:
            yield _fill(CounterMetricFamily(name, text, labels=["worker"]), links, field)


def _fill(family: GaugeMetricFamily | CounterMetricFamily, links: list[WorkerLink], field: str) -> Metric:
    for link in links:
        if link.stats is not None:
            family.add_metric([link.worker_id], float(getattr(link.stats, field)))
    return family
