"""The operator's policy as pydantic models: what may be written in a `ScalingPolicy`, its defaults, `to_config()` for the decision core.

Field names carry units, the written keys do not: `ttft: 500ms` is `ttft_s=0.5`. `parse` makes a policy of YAML with the line of every
error; `checks` holds what no single value shows: settings that contradict each other. The same models give the JSON schema (`schema`).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationInfo, model_validator

from flexpert.controller.policy import types
from flexpert.controller.policy.checks import contradictions, show_path
from flexpert.controller.policy.fields import Cron, HttpUrl, Number, Seconds, Share, Whole, Zone, fault

API_VERSION = "flexpert.dev/v1alpha1"
KIND = "ScalingPolicy"
UNCHECKED = "unchecked"  # validation context: leave contradictions to the caller

Mode = Literal["Active", "Advisory", "Paused"]
Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([a-z0-9.-]{0,61}[a-z0-9])?$")]
SignalName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,62}$")]
HOUR_S = 3600.0
DAY_S = 24 * HOUR_S
MONEY = Number(with_low=True, unit="any currency", example="2.5")


class Part(BaseModel):
    """A mapping of the file: keys that it does not know are errors, and nothing changes once it is read."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=False, use_attribute_docstrings=True)


class Metadata(Part):
    name: Name = "default"
    """Names the policy in decisions and reports: small letters, digits, dots and hyphens."""
    namespace: Name | None = None
    """Kubernetes only."""
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}


class Workers(Part):
    min: Annotated[int, Whole(1, 100_000, "workers")] = 1
    """The fewest workers that serve."""
    max: Annotated[int, Whole(1, 100_000, "workers")] = Field(examples=[8])
    """The most workers that serve."""
    standby: Annotated[int, Whole(0, 64, "processes")] = 1
    """Warm processes kept beside the workers, to join or to replace one at once."""


class Slo(Part):
    """What a request is promised. At least one of the two times."""

    ttft_s: Annotated[float, Seconds(0.001, HOUR_S)] | None = Field(default=None, alias="ttft")
    """Time to the first token, from the arrival at the gateway."""
    tpot_s: Annotated[float, Seconds(0.0001, 60.0)] | None = Field(default=None, alias="tpot")
    """Mean time per output token after the first."""
    attainment: Annotated[float, Share()] = 0.99
    """The share of all requests, failed ones included, that is to meet it."""


class SloSignal(Part):
    """Enough workers that `spec.slo` is met."""

    type: Literal["slo"]
    name: SignalName = "slo"


class KvUtilizationSignal(Part):
    """KV cache in use, as a share of what the ready workers have."""

    type: Literal["kv_utilization"]
    name: SignalName = "kv_utilization"
    target: Annotated[float, Share()] = Field(default=0.8, examples=[0.8])


class QueueTimeSignal(Part):
    """How long requests wait before they are first computed, p95."""

    type: Literal["queue_time"]
    name: SignalName = "queue_time"
    target_s: Annotated[float, Seconds(0.001, HOUR_S)] = Field(alias="target", examples=["200ms"])


class TokensPerSecondSignal(Part):
    """Tokens a second of one worker, prompt and output apart. What is left out is taken from measurement."""

    type: Literal["tokens_per_second"]
    name: SignalName = "tokens_per_second"
    prefill: Annotated[float, Number(unit="tokens per second")] | None = None
    """Prompt tokens per second that one worker is to take."""
    decode: Annotated[float, Number(unit="tokens per second")] | None = None
    """Output tokens per second that one worker is to give."""


class PrometheusSignal(Part):
    """One number, asked of a Prometheus server at every tick."""

    type: Literal["prometheus"]
    name: SignalName = "prometheus"
    url: Annotated[str, HttpUrl()] = Field(examples=["http://prometheus:9090"])
    query: Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)] = Field(
        examples=["sum(my_queue_length)"]
    )
    """PromQL with one value as its result."""
    target: Annotated[float, Number(unit="what the query counts", example="10")] = Field(examples=[10])
    per: Literal["worker", "cluster"] = "worker"
    """worker: the query gives a total, of which one worker is to have `target`. cluster: the query gives a level that is to be `target`."""
    timeout_s: Annotated[float, Seconds(0.1, 60.0)] = Field(default=3.0, alias="timeout")


class Window(Part):
    """Open from each `start` to the next `end`."""

    start: Annotated[str, Cron()] = Field(examples=["'0 8 * * mon-fri'"])
    end: Annotated[str, Cron()] = Field(examples=["'0 18 * * mon-fri'"])
    min: Annotated[int, Whole(1, 100_000, "workers")] | None = None
    """The fewest workers while it is open."""
    max: Annotated[int, Whole(1, 100_000, "workers")] | None = None
    """The most workers while it is open."""


class ScheduleSignal(Part):
    """Bounds by the clock."""

    type: Literal["schedule"]
    name: SignalName = "schedule"
    timezone: Annotated[str, Zone()] = "UTC"
    windows: Annotated[tuple[Window, ...], Field(min_length=1)] = Field(
        examples=["[{start: '0 8 * * *', end: '0 18 * * *', min: 2}]"]
    )


class ForecastSignal(Part):
    """A floor from the load that past seasons lead to expect. It never asks for fewer workers."""

    type: Literal["forecast"]
    name: SignalName = "forecast"
    season_s: Annotated[float, Seconds(60.0, 31 * DAY_S)] = Field(default=DAY_S, alias="season")
    """After how long the load repeats itself."""
    step_s: Annotated[float, Seconds(1.0, DAY_S)] = Field(default=300.0, alias="step")
    """Load is averaged over this long before it is forecast."""
    history_s: Annotated[float, Seconds(120.0, 366 * DAY_S)] = Field(default=7 * DAY_S, alias="history")
    """How far back it looks."""
    horizon_s: Annotated[float, Seconds(1.0, DAY_S)] | None = Field(default=None, alias="horizon")
    """How far ahead it looks; by default as long as a worker was measured to need to join."""


Signal = Annotated[
    SloSignal
    | KvUtilizationSignal
    | QueueTimeSignal
    | TokensPerSecondSignal
    | PrometheusSignal
    | ScheduleSignal
    | ForecastSignal,
    Field(discriminator="type"),
]


class Rule(Part):
    """At most this much change in a period."""

    type: Literal["workers", "percent"] = Field(examples=["workers"])
    value: Annotated[int, Whole(1, 100_000)] = Field(examples=[4])
    """Workers, or percent of the workers there were when the period began, rounded up."""
    period_s: Annotated[float, Seconds(0.1, HOUR_S)] = Field(alias="period", examples=["60s"])


class Direction(Part):
    """How fast a size may change, as in the behavior of a Kubernetes HorizontalPodAutoscaler v2."""

    stabilization_s: Annotated[float, Seconds(0.0, HOUR_S)] | None = Field(default=None, alias="stabilizationWindow")
    """Up: the lowest size wanted in this window counts. Down: the highest. Default: 0s up, 300s down."""
    tolerance: Annotated[float, Share(0.0, 0.9, with_low=True)] = 0.1
    """Loads this close to the target change nothing."""
    select: Literal["Max", "Min", "Disabled"] = "Max"
    """Of several policies the one that allows most, the one that allows least; Disabled: never in this direction."""
    policies: Annotated[tuple[Rule, ...], Field(min_length=1)] | None = Field(
        default=None, examples=["[{type: percent, value: 50, period: 60s}]"]
    )
    """How much may change in a period. Default: up by 4 workers or 100% in 15s, down by 50% in 60s."""

    def to_config(self, default: types.DirectionConfig) -> types.DirectionConfig:
        rules = tuple(
            types.RuleConfig(type=rule.type, value=rule.value, period_s=rule.period_s) for rule in self.policies or ()
        )
        return types.DirectionConfig(
            stabilization_s=default.stabilization_s if self.stabilization_s is None else self.stabilization_s,
            tolerance=self.tolerance,
            select=self.select,
            rules=rules or default.rules,
        )


class Behavior(Part):
    scale_up: Direction = Field(default=Direction(), alias="scaleUp")
    scale_down: Direction = Field(default=Direction(), alias="scaleDown")


class Panic(Part):
    """A jump of load is answered at once, and nothing shrinks until it is over."""

    window_s: Annotated[float, Seconds(0.1, HOUR_S)] | None = Field(default=None, alias="window")
    """Load is averaged over this long. Default: 10s, or one interval if that is longer."""
    threshold: Annotated[
        float, Number(with_low=True, high=1000.0, unit="times the load that the workers take", example="2")
    ] = 2.0
    """How many times what the ready workers take; 0: never."""


class Fallback(Part):
    """Without fresh numbers nothing shrinks."""

    behavior: Literal["hold", "scale_up_if_stale"] = "hold"
    """hold: keep the size. scale_up_if_stale: grow as far as one policy of scaleUp allows."""
    after_s: Annotated[float, Seconds(0.1, HOUR_S)] | None = Field(default=None, alias="after")
    """A number older than this is not used. Default: 30s, or three intervals if that is longer."""


class Budget(Part):
    devices: Annotated[int, Whole(1, 100_000, "devices")] | None = None
    """The most devices in use at one time."""
    cost_per_device_hour: Annotated[float, MONEY] = Field(default=1.0, alias="costPerDeviceHour")
    """What a device costs in an hour. A shrink whose stall costs more than it saves is not made."""
    stall_cost_per_stream_hour: Annotated[float, MONEY] | None = Field(default=None, alias="stallCostPerStreamHour")
    """What an hour in which one stream stands still costs. Default: as much as a device-hour."""


class Consolidation(Part):
    margin: Annotated[float, Share()] = 0.85
    """Those who stay after a shrink must stay below this share of every target."""


class Spec(Part):
    mode: Mode = "Active"
    """Active: decide and do. Advisory: decide and write it down. Paused: decide nothing."""
    interval_s: Annotated[float, Seconds(0.1, 600.0)] = Field(default=5.0, alias="interval")
    """Time between two decisions."""
    workers: Workers = Field(examples=["{min: 1, max: 8}"])
    slo: Slo | None = None
    signals: Annotated[tuple[Signal, ...], Field(min_length=1)] = Field(
        examples=["[{type: kv_utilization, target: 0.8}]"]
    )
    """What the size follows. The largest size that any of them asks for is taken; schedule bounds it, forecast only raises it."""
    behavior: Behavior = Behavior()
    panic: Panic = Panic()
    fallback: Fallback = Fallback()
    budget: Budget = Budget()
    consolidation: Consolidation = Consolidation()
    grow_timeout_s: Annotated[float, Seconds(0.1, 24 * HOUR_S)] = Field(default=300.0, alias="growTimeout")
    """A growth that is not done by then is given up, and tried again later."""


class ScalingPolicy(Part):
    """When a flexpert cluster grows and shrinks, how far and how fast."""

    api_version: Literal["flexpert.dev/v1alpha1"] = Field(alias="apiVersion", examples=[API_VERSION])
    kind: Literal["ScalingPolicy"] = Field(examples=[KIND])
    metadata: Metadata = Metadata()
    spec: Spec = Field(examples=["{workers: {max: 8}, signals: [{type: kv_utilization}]}"])

    @model_validator(mode="after")
    def _consistent(self, info: ValidationInfo) -> Self:
        if not (isinstance(info.context, dict) and info.context.get(UNCHECKED)):
            for found in contradictions(self):
                path, what = found.told()
                raise fault(f"{show_path(path)}: {what}", found.todo)
        return self

    def to_config(self) -> types.PolicyConfig:
        """As the decision core reads it."""
        spec, slo = self.spec, self.spec.slo
        default = types.PolicyConfig(workers=types.WorkersConfig(min=1, max=1))
        return types.PolicyConfig(
            name=self.metadata.name,
            workers=types.WorkersConfig(min=spec.workers.min, max=spec.workers.max, standby=spec.workers.standby),
            slo=None
            if slo is None
            else types.SloConfig(ttft_s=slo.ttft_s, tpot_s=slo.tpot_s, attainment=slo.attainment),
            signals=tuple(_signal_config(signal) for signal in spec.signals),
            up=spec.behavior.scale_up.to_config(default.up),
            down=spec.behavior.scale_down.to_config(default.down),
            panic=types.PanicConfig(window_s=panic_window_s(spec), threshold=spec.panic.threshold),
            fallback=types.FallbackConfig(behavior=spec.fallback.behavior, after_s=fallback_after_s(spec)),
            budget_devices=spec.budget.devices,
            cost_per_device_hour=spec.budget.cost_per_device_hour,
            stall_cost_per_stream_hour=spec.budget.stall_cost_per_stream_hour,
            grow_timeout_s=spec.grow_timeout_s,
            interval_s=spec.interval_s,
            consolidation_margin=spec.consolidation.margin,
            mode=spec.mode,
        )

    def as_written(self) -> dict[str, Any]:
        """The policy with every default filled in, as it would be written: `parse` reads it back unchanged."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)


def panic_window_s(spec: Spec) -> float:
    """What is written, or long enough to hold a tick."""
    return spec.panic.window_s or max(10.0, spec.interval_s)


def fallback_after_s(spec: Spec) -> float:
    """What is written, or long enough for a number to be missed twice."""
    return spec.fallback.after_s or max(30.0, 3 * spec.interval_s)


def _signal_config(signal: Signal) -> types.SignalConfig:
    match signal:
        case KvUtilizationSignal():
            return types.SignalConfig(type=signal.type, name=signal.name, target=signal.target)
        case QueueTimeSignal():
            return types.SignalConfig(type=signal.type, name=signal.name, target=signal.target_s)
        case TokensPerSecondSignal():
            return types.SignalConfig(type=signal.type, name=signal.name, prefill=signal.prefill, decode=signal.decode)
        case PrometheusSignal():
            return types.SignalConfig(type=signal.type, name=signal.name, target=signal.target, per=signal.per)
        case _:
            return types.SignalConfig(type=signal.type, name=signal.name)
