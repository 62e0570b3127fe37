"""What the decision core reads and what it answers: plain values, all of them msgspec (JSON) encodable.

Made by the autoscaler's live loop and by the simulator, read by `controller.policy.decide`. Nothing is computed here.
Times are seconds; `..._at_s`, `now_s`, `began_s`, `ended_s`, `deadline_s`, `until_s` and `since_s` are unix times given from outside.

Three states of a number are told apart everywhere: a value (also 0.0: nothing happens), None (never measured), and a value whose
`age_s` is beyond the policy's `fallback.after_s` (stale).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from flexpert.controller.policy.config import (
    DirectionConfig,
    FallbackConfig,
    Mode,
    PanicConfig,
    PolicyConfig,
    RuleConfig,
    Select,
    SignalConfig,
    SignalType,
    SloConfig,
    WorkersConfig,
)
from flexpert.controller.policy.reasons import Reason

__all__ = [
    "Change",
    "Decision",
    "DirectionConfig",
    "EndedTransition",
    "FallbackConfig",
    "Measured",
    "Mode",
    "Observation",
    "Order",
    "Outcome",
    "Override",
    "PanicConfig",
    "Plan",
    "PolicyConfig",
    "Proposal",
    "Reading",
    "Reason",
    "Rejected",
    "RuleConfig",
    "Sample",
    "Select",
    "SignalConfig",
    "SignalType",
    "SloConfig",
    "State",
    "TrafficReading",
    "TransitionReading",
    "WorkerReading",
    "WorkersConfig",
]


# --- what is seen at one tick


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerReading:
    """One worker's load. age_s None: it never said anything. Rates are of the last few seconds, waiting is its own queue."""

    worker_id: str
    phase: Literal["ready", "joining", "leaving"] = "ready"
    age_s: float | None = None
    running: int = 0
    waiting: int = 0
    kv_used_tokens: int = 0
    kv_capacity_tokens: int = 0
    prefill_tokens_per_s: float = 0.0
    decode_tokens_per_s: float = 0.0
    longest_context_tokens: int = 0
    max_running: int = 0  # 0: not known
    waiting_tokens: int = 0  # prompt tokens not computed yet, of waiting and running requests


@dataclass(frozen=True, slots=True, kw_only=True)
class TrafficReading:
    """What the gateway saw. age_s None: it never answered. Rates are of requests that arrive (prompt) and tokens that go out.

    queue_s, ttft_s, tpot_s: p95 of the requests of the window that began at since_s; None: no request ended there (which is no fault).
    met, missed: requests of the window within and beyond the SLO; failures count as missed. live: accepted and not ended; waiting: of
    those, without a first token.
    """

    age_s: float | None = None
    requests_per_s: float = 0.0
    prompt_tokens_per_s: float = 0.0
    output_tokens_per_s: float = 0.0
    live: int = 0
    waiting: int = 0
    queue_s: float | None = None
    ttft_s: float | None = None
    tpot_s: float | None = None
    met: int = 0
    missed: int = 0
    since_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """A signal from outside. value None: there is none, `error` says why.

    prometheus: value. schedule: low and high (workers) of the windows open now, None where none says. forecast: the load that is
    expected at now + horizon_s as tokens/s that arrive and go out, or `value` in workers.
    """

    value: float | None = None
    age_s: float | None = None
    error: str = ""
    low: int | None = None
    high: int | None = None
    prompt_tokens_per_s: float | None = None
    output_tokens_per_s: float | None = None
    horizon_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TransitionReading:
    """The transition that runs. kind: of controller.transition ("scale", "drain", "repair", ...)."""

    id: str
    from_workers: int
    to_workers: int
    phase: str = ""
    began_s: float
    deadline_s: float | None = None
    kind: str = "scale"


@dataclass(frozen=True, slots=True, kw_only=True)
class EndedTransition:
    id: str
    from_workers: int
    to_workers: int
    state: Literal["done", "aborted", "failed"]
    reason: str = ""
    began_s: float
    ended_s: float
    kind: str = "scale"


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """How long something took, where it was measured."""

    mean_s: float
    p95_s: float
    count: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Override:
    """A person's wish, which stands before every signal until it ends. Bounds still hold."""

    workers: int
    owner: str
    until_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """One tick.

    devices: the most workers that could serve now, those that do included; None: not known. memory_floor: the fewest that hold the model
    and the live KV. join_s: from order to serving; leave_s: from order to gone; stall_s: how long a stream stands still at a change.
    restarted_at_s: when the process that decides began.
    """

    now_s: float
    workers: tuple[WorkerReading, ...] = ()
    traffic: TrafficReading = TrafficReading()
    readings: dict[str, Reading] = field(default_factory=dict)
    transition: TransitionReading | None = None
    last_transition: EndedTransition | None = None
    devices: int | None = None
    memory_floor: int = 1
    join_s: Measured | None = None
    leave_s: Measured | None = None
    stall_s: Measured | None = None
    restarted_at_s: float | None = None
    override: Override | None = None


# --- what is answered


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to order. abort: give up the transition `transition_id`, whose target becomes from_workers again."""

    kind: Literal["grow", "shrink", "abort"]
    from_workers: int
    target: int
    deadline_s: float
    transition_id: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposal:
    """What one signal asks for. wanted None: it has no (fresh) number, `why` says so. load: the same, not rounded."""

    signal: str
    wanted: int | None
    why: str
    load: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejected:
    """A rule that changed what was wanted, in the order in which the rules were asked."""

    rule: str
    from_workers: int
    to_workers: int
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """now: ready workers. wanted: the size that is right after all rules. action: what to order; None in Advisory and Paused.

    would: what would be ordered if the mode were Active (equal to action where it is).
    """

    decision_id: str
    at_s: float
    now: int
    wanted: int
    action: Plan | None
    reason: Reason
    text: str
    proposals: tuple[Proposal, ...] = ()
    rejected: tuple[Rejected, ...] = ()
    mode: Mode = "Active"
    would: Plan | None = None
    panic: bool = False
    policy: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of a decision, measured some minutes after it."""

    decision_id: str
    at_s: float
    workers: int
    met: int = 0
    missed: int = 0
    ttft_s: float | None = None
    tpot_s: float | None = None
    transition: Literal["done", "aborted", "failed", "running", ""] = ""
    text: str = ""


# --- what is kept from tick to tick


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    at_s: float
    value: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """A change of size that was ordered."""

    at_s: float
    from_workers: int
    to_workers: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """A plan that was ordered and whose end has not been seen."""

    decision_id: str
    plan: Plan
    at_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """Between two ticks; opaque to everybody but the core. `State(run_id=...)` is a fresh start; run_id makes decision ids unique.

    peaks and dips: the load in workers, kept as falling and rising steps, so that the highest and the lowest of a window are at their
    front. loads: the same as it was, for the panic window. trend: of it what says how much work there is, while nothing was full.
    joins: how long the last ones took, newest last. sized_workers, sized_load: the size last ordered and the load it was right for.
    smooth: the load as peaks has it, evened out. missed_share: of requests that missed the SLO, over minutes, since the last change.
    computing: workers that prompts keep busy, evened out.
    demands: tokens/s that come and go, as falling steps. sized_s, sized_demand: when the last size was ordered and the highest demand
    since. few_*: the size that was too few when it last grew, for which demand, and when. trial_*: the last shrink that went below what
    tokens say, because latencies were low, or the last time when workers had too much. *_capacity: tokens/s of one worker, measured
    when it had more to do.
    """

    run_id: str = "d"
    tick: int = 0
    began_s: float | None = None
    last_s: float | None = None
    peaks: tuple[Sample, ...] = ()
    dips: tuple[Sample, ...] = ()
    loads: tuple[Sample, ...] = ()
    trend: tuple[Sample, ...] = ()
    changes: tuple[Change, ...] = ()
    order: Order | None = None
    panic_until_s: float | None = None
    grow_failures: int = 0
    grow_again_s: float | None = None
    joins: tuple[float, ...] = ()
    join_ewma_s: float | None = None
    seen_transition: str = ""
    prefill_capacity: float | None = None
    decode_capacity: float | None = None
    strained_ticks: int = 0
    sized_workers: int = 0
    sized_load: float = 0.0
    sized_s: float = 0.0
    sized_demand: float = 0.0
    few_workers: int = 0
    few_demand: float = 0.0
    few_s: float = 0.0
    smooth: float | None = None
    missed_share: float = 0.0
    computing: float | None = None
    demands: tuple[Sample, ...] = ()
    trial_s: float | None = None
    trial_demand: float = 0.0
    low_since_s: float | None = None
    fallback_grown: bool = False
