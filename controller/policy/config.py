"""The policy as the decision core reads it. `controller.policy.spec` makes it from what the operator wrote; nothing is checked here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Mode = Literal["Active", "Advisory", "Paused"]
Select = Literal["Max", "Min", "Disabled"]
SignalType = Literal["slo", "kv_utilization", "queue_time", "tokens_per_second", "prometheus", "schedule", "forecast"]


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkersConfig:
    min: int
    max: int
    standby: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class SloConfig:
    """A request meets it when its time to first token and its mean time per output token are within; None: not asked for."""

    ttft_s: float | None = None
    tpot_s: float | None = None
    attainment: float = 0.99


@dataclass(frozen=True, slots=True, kw_only=True)
class SignalConfig:
    """One signal. `name` is unique within a policy; `Observation.readings` is keyed by it (prometheus, schedule, forecast).

    target: kv_utilization a share 0..1, queue_time seconds (p95), prometheus the value wanted.
    prefill, decode: tokens_per_second only, tokens/s of one worker; None: the measured capacity.
    per: prometheus only: "worker": the query gives a total, wanted = value / target; "cluster": wanted = ready x value / target.
    The windows of a schedule and the model of a forecast concern the live loop only; their results come as readings.
    """

    type: SignalType
    name: str
    target: float | None = None
    prefill: float | None = None
    decode: float | None = None
    per: Literal["worker", "cluster"] = "worker"


@dataclass(frozen=True, slots=True, kw_only=True)
class RuleConfig:
    """At most `value` workers, or percent of those there at its begin, in `period_s`."""

    type: Literal["workers", "percent"]
    value: float
    period_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class DirectionConfig:
    """As in Kubernetes HPA v2. tolerance: a share, 0.1 = 10%. select: of several rules the one that allows most, or least."""

    stabilization_s: float
    tolerance: float = 0.1
    select: Select = "Max"
    rules: tuple[RuleConfig, ...] = ()


def _default_up() -> DirectionConfig:
    return DirectionConfig(
        stabilization_s=0.0,
        rules=(
            RuleConfig(type="workers", value=4, period_s=15.0),
            RuleConfig(type="percent", value=100, period_s=15.0),
        ),
    )


def _default_down() -> DirectionConfig:
    return DirectionConfig(stabilization_s=300.0, rules=(RuleConfig(type="percent", value=50, period_s=60.0),))


@dataclass(frozen=True, slots=True, kw_only=True)
class PanicConfig:
    """As Knative's: load averaged over window_s at or above threshold x what the ready workers take. threshold 0: never."""

    window_s: float = 10.0
    threshold: float = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class FallbackConfig:
    """Without fresh numbers: keep the size, or grow by one rule's step once they are older than after_s. Never shrink."""

    behavior: Literal["hold", "scale_up_if_stale"] = "hold"
    after_s: float = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyConfig:
    """consolidation_margin: the survivors of a shrink must stay below this share of every target.

    budget_devices: None: no budget besides workers.max. cost_per_device_hour: what the shrink that stalls streams is weighed against.
    stall_cost_per_stream_hour: what an hour in which one stream stands still costs, in the same money; None: as much as a device-hour.
    """

    name: str = "default"
    workers: WorkersConfig
    slo: SloConfig | None = None
    signals: tuple[SignalConfig, ...] = ()
    up: DirectionConfig = field(default_factory=_default_up)
    down: DirectionConfig = field(default_factory=_default_down)
    panic: PanicConfig = PanicConfig()
    fallback: FallbackConfig = FallbackConfig()
    budget_devices: int | None = None
    cost_per_device_hour: float = 1.0
    stall_cost_per_stream_hour: float | None = None
    grow_timeout_s: float = 300.0
    interval_s: float = 5.0
    consolidation_margin: float = 0.85
    mode: Mode = "Active"
