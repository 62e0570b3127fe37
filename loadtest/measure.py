"""What a load test measured: one Outcome a request, and the RunResult that live view, JSON, CSV and the report read.

The definitions stand here and nowhere else. Times of a request are seconds since the run began, by one monotonic
clock; `intended_s` is when the schedule wanted it sent, and every latency counts from there, so a generator or a
server that falls behind cannot hide it (coordinated omission). Figures over many requests are made in summary.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

__all__ = [
    "ENDS", "End", "Interval", "Lag", "Outcome", "Quantiles", "RunResult", "ServerEvent", "Summary", "Verdict", "percentiles",
]  # fmt: skip

# ok: the stream ended as it should. refused: 429 or 503. failed: anything else that is no answer. timeout: no end in time.
# unfinished: still running when the run was stopped.
End = Literal["ok", "refused", "failed", "timeout", "unfinished"]
ENDS: tuple[End, ...] = ("ok", "refused", "failed", "timeout", "unfinished")


@dataclass(slots=True)
class Outcome:
    """One request: what was asked, when what happened, how it ended."""

    index: int
    intended_s: float
    wanted_prompt_tokens: int
    wanted_output_tokens: int
    session: str = ""
    turn: int = 0
    sent_s: float | None = None  # when the generator turned to it: connect or write; None: never
    first_s: float | None = None  # first chunk with content, reasoning or a tool call
    last_s: float | None = None  # last such chunk
    end_s: float | None = None  # last byte, or when it was given up
    chunks: int = 0  # those with content
    longest_gap_s: float = 0.0  # between two of them
    prompt_tokens: int | None = None  # of the server's usage; None: it gave none
    output_tokens: int | None = None  # the same
    cached_tokens: int | None = None  # the same: prompt tokens that it had already
    end: End = "unfinished"
    http_status: int | None = None
    error: str = ""  # why it is not ok
    retry_after_s: float | None = None

    @property
    def tokens(self) -> int:
        """Output tokens: the server's usage, else the chunks, each taken for one token."""
        return self.chunks if self.output_tokens is None else self.output_tokens

    @property
    def lag_s(self) -> float | None:
        """Schedule lag: how late the generator itself was."""
        return None if self.sent_s is None else self.sent_s - self.intended_s

    @property
    def ttft_s(self) -> float | None:
        """Time to first token, from the intended send time."""
        return None if self.first_s is None else self.first_s - self.intended_s

    @property
    def ttft_from_send_s(self) -> float | None:
        return None if self.first_s is None or self.sent_s is None else self.first_s - self.sent_s

    @property
    def tpot_s(self) -> float | None:
        """Time per output token: (last - first) / (tokens - 1); None below two tokens."""
        if self.first_s is None or self.last_s is None or self.tokens < 2:
            return None
        return (self.last_s - self.first_s) / (self.tokens - 1)

    @property
    def e2e_s(self) -> float | None:
        """Intended send time to last byte, of requests that ended well."""
        return None if self.end != "ok" or self.end_s is None else self.end_s - self.intended_s


def percentiles(values: npt.NDArray[np.float64], percents: Sequence[float]) -> list[float]:
    """By nearest rank, in tables, timelines and objectives alike: the smallest value that so many percent of all do not exceed. Always
    the value of some request, also where failed ones are infinite and there is no between."""
    found: list[float] = np.percentile(values, percents, method="inverted_cdf").tolist()
    return found


@dataclass(frozen=True, slots=True)
class Quantiles:
    """Of one measure. All None where count is 0."""

    count: int = 0
    mean: float | None = None
    min: float | None = None
    p50: float | None = None
    p90: float | None = None
    p95: float | None = None
    p99: float | None = None
    p999: float | None = None
    max: float | None = None


@dataclass(frozen=True, slots=True)
class Lag:
    """Of the generator itself, not of the server. degraded: its figures say less about the server than they seem to; why says so."""

    quantiles_s: Quantiles
    limit_s: float
    degraded: bool
    why: str = ""


@dataclass(frozen=True, slots=True)
class Summary:
    """Figures over the requests intended in [from_s, to_s)."""

    from_s: float
    to_s: float
    sent: int
    ends: dict[str, int]  # by End
    errors: dict[str, int]  # by text, the most frequent first
    ttft_s: Quantiles
    ttft_from_send_s: Quantiles
    itl_s: Quantiles  # of whole-run figures only; from a histogram with buckets of 1%
    tpot_s: Quantiles
    e2e_s: Quantiles
    lag_s: Quantiles
    one_token: int  # answers too short for a TPOT
    met: int  # requests that ended ok and kept every per-request objective
    attainment: float | None  # met / sent
    goodput_per_s: float
    requests_per_s: float  # ended ok
    prompt_tokens_per_s: float
    output_tokens_per_s: float
    without_usage: int  # answered without usage: their tokens are counted by chunks
    prompt_mismatch: int  # the server counted another number of prompt tokens than was asked for
    output_mismatch: int  # it gave another number of output tokens than was asked for


@dataclass(frozen=True, slots=True)
class Interval:
    """One step of the timeline: the requests intended in [from_s, from_s + seconds), but for `finished` and `output_tokens_per_s`."""

    from_s: float
    seconds: float
    sent: int
    failed: int  # every end but ok
    finished: int  # ended ok in this interval, whenever intended
    in_flight: int  # at its end
    met: int
    attainment: float | None
    ttft_p50_s: float | None
    ttft_p95_s: float | None
    ttft_p99_s: float | None
    tpot_p50_s: float | None
    tpot_p95_s: float | None
    tpot_p99_s: float | None
    e2e_p99_s: float | None
    lag_p99_s: float | None
    output_tokens_per_s: float


@dataclass(frozen=True, slots=True)
class Verdict:
    """One --slo. value is None where there was nothing to measure, and infinite where failed requests reach into the percentile."""

    expression: str
    metric: str
    relation: str
    limit: float
    value: float | None
    passed: bool
    text: str


@dataclass(frozen=True, slots=True)
class ServerEvent:
    """What the server's admin API told of the time of the run."""

    at_s: float  # since the run began; the clocks of both machines are taken to agree
    kind: str  # "scale", "worker", "died", ...
    text: str
    fields: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class RunResult:
    """A whole run, all that the report shows."""

    url: str
    model: str
    endpoint: str  # "completions" or "chat"
    mode: str  # "open" or "closed"
    shape: str  # in words
    seed: int
    started_unix_s: float
    duration_s: float  # of the schedule
    ended_s: float  # when the last request ended, since the run began
    objectives: dict[str, float]  # per request, by "ttft", "tpot", "e2e": seconds that attainment asks of each request
    whole: Summary
    window: Summary  # without warm-up and cool-down, by intended time; the same as whole where there are none
    lag: Lag
    timeline: list[Interval]
    verdicts: list[Verdict]
    outcomes: list[Outcome]
    events: list[ServerEvent] = field(default_factory=list)
    notes: list[str] = field(
        default_factory=list
    )  # what a reader must know: sources of token counts, interruptions, ...
    settings: dict[str, Any] = field(default_factory=dict)  # what was asked for, as typed
    tool: str = ""  # name and version

    @property
    def passed(self) -> bool:
        """No --slo failed."""
        return all(verdict.passed for verdict in self.verdicts)
