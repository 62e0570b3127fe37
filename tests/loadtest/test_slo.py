"""Objectives: what may be written, what it means when requests fail, and the figures they are held against."""

from __future__ import annotations

import math

import numpy as np
import pytest

from flexpert.loadtest.measure import End, Outcome
from flexpert.loadtest.slo import SloError, met, parse_slo, parse_slos, per_request, verdict
from flexpert.loadtest.summary import Gaps, lag_of, quantiles, step_for, summarise, timeline


def outcome(
    at_s: float, *, ttft_s: float = 0.1, tokens: int = 5, tpot_s: float = 0.01, end: End = "ok", lag_s: float = 0.0
) -> Outcome:
    first_s = at_s + ttft_s
    last_s = first_s + tpot_s * (tokens - 1)
    return Outcome(
        0, at_s, 10, tokens, sent_s=at_s + lag_s, first_s=first_s, last_s=last_s, end_s=last_s, chunks=tokens, prompt_tokens=10,
        output_tokens=tokens, end=end, error="" if end == "ok" else "made up",
    )  # fmt: skip


def judged(text: str, outcomes: list[Outcome]) -> tuple[float | None, bool, str]:
    objectives = parse_slos([text])
    summary = summarise(outcomes, from_s=0, to_s=10, limits=per_request(objectives), gaps=Gaps())
    found = verdict(objectives[0], outcomes, summary, Gaps().statistic)
    return found.value, found.passed, found.text


@pytest.mark.parametrize(
    ("text", "limit"),
    [
        ("ttft_p99<500ms", 0.5), ("ttft_p99.9 <= 2s", 2), ("tpot_mean<50ms", 0.05), ("e2e_max<1m", 60), ("itl_p95<900us", 0.0009),
        ("attainment>0.99", 0.99), ("attainment >= 99.5%", 0.995), ("error_rate<1%", 0.01), ("goodput>10", 10), ("requests_per_s>=5/s", 5),
    ],
)  # fmt: skip
def test_objectives_are_read_with_their_units(text: str, limit: float) -> None:
    assert parse_slo(text).limit == pytest.approx(limit)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("ttft", "expected METRIC<LIMIT"),
        ("ttft_p99=500ms", "expected METRIC<LIMIT"),
        ("tftt_p99<500ms", "did you mean ttft_p99?"),
        ("latency_p99<500ms", "expected ttft, ttft_from_send, tpot, itl, e2e"),
        ("ttft_p99<500", "expected a time with its unit, us, ms, s, m"),
        ("ttft_p99<5 parsecs", "expected a time with its unit"),
        ("ttft_p99>500ms", "write ttft_p99<500ms"),
        ("ttft_p100<500ms", "unknown statistic 'p100'"),
        ("ttft_avg<500ms", "unknown statistic 'avg'"),
        ("attainment>99", "for percent write 99%"),
        ("attainment_p99>0.9", "write attainment alone"),
        ("goodput>10ms", "expected a plain number"),
    ],
)
def test_objective_that_cannot_be_names_what_is_valid(text: str, said: str) -> None:
    with pytest.raises(SloError) as caught:
        parse_slo(text)

    assert said in str(caught.value)


def test_bare_latency_alone_decides_nothing_and_is_refused() -> None:
    with pytest.raises(SloError, match="ttft_p99<500ms"):
        parse_slos(["ttft<500ms"])

    assert per_request(parse_slos(["ttft<500ms", "attainment>0.9"])) == {"ttft": 0.5}


def test_each_request_is_held_against_the_loosest_percentile_or_the_bare_one() -> None:
    assert per_request(parse_slos(["ttft_p50<100ms", "ttft_p99<1s", "tpot_p95<50ms"])) == {"ttft": 1.0, "tpot": 0.05}
    assert per_request(parse_slos(["ttft<300ms", "ttft_p99<1s", "goodput>1"])) == {"ttft": 0.3}
    assert per_request(parse_slos(["ttft_mean<1s", "itl_p99<1s"])) == {}


def test_failed_requests_count_against_attainment_and_into_percentiles() -> None:
    ok = [outcome(i / 10) for i in range(90)]
    lost: list[Outcome] = [
        outcome(9 + i / 100, end=end) for i, end in enumerate(["refused", "timeout", "failed", "unfinished", "failed"])
    ]

    assert judged("attainment>0.99", ok) == (1.0, True, "attainment>0.99: 100.0000%, met")
    assert judged("attainment>0.99", ok + lost)[:2] == (pytest.approx(90 / 95), False)
    assert judged("ttft_p90<500ms", ok + lost)[1]
    assert judged("ttft_p99<500ms", ok + lost) == (
        math.inf,
        False,
        "ttft_p99<500ms: failed requests reach into it (100 ms of the answered ones), MISSED",
    )
    assert judged("error_rate<1%", ok + lost)[:2] == (pytest.approx(5 / 95), False)


def test_objectives_and_tables_agree_on_what_a_percentile_is() -> None:
    outcomes = [outcome(i, ttft_s=(i + 1) / 100) for i in range(100)]
    table = quantiles(each.ttft_s for each in outcomes)

    for name in ("p50", "p90", "p95", "p99"):
        assert judged(f"ttft_{name}<9s", outcomes)[0] == getattr(table, name) == pytest.approx(int(name[1:]) / 100)


def test_nothing_measured_is_no_success() -> None:
    assert judged("ttft_p99<500ms", []) == (None, False, "ttft_p99<500ms: nothing was measured, MISSED")
    assert not judged("attainment>0.5", [])[1]


def test_request_has_to_keep_every_objective() -> None:
    limits = {"ttft": 0.2, "tpot": 0.02}

    assert met(outcome(0), limits)
    assert not met(outcome(0, ttft_s=0.21), limits)
    assert not met(outcome(0, tpot_s=0.03), limits)
    assert met(outcome(0, tokens=1), limits), "one token has no TPOT to miss"
    assert not met(outcome(0, end="failed"), {})


def test_latency_counts_from_the_intended_time() -> None:
    late = outcome(5.0, ttft_s=0.1, lag_s=0.08)

    assert late.ttft_s == pytest.approx(0.1)
    assert late.ttft_from_send_s == pytest.approx(0.02)
    assert late.lag_s == pytest.approx(0.08)


def test_generator_that_lags_is_called_degraded() -> None:
    prompt, lagging = [outcome(i, lag_s=0.001) for i in range(100)], [outcome(i, lag_s=0.03) for i in range(2)]

    assert not lag_of(prompt, limit_s=0.01).degraded
    found = lag_of(prompt + lagging, limit_s=0.01)
    assert found.degraded and "above 10 ms" in found.why
    assert lag_of(prompt, limit_s=0.01, shortage="no free port").why == "no free port"


def test_gaps_have_the_percentiles_of_their_values_to_a_percent() -> None:
    rng = np.random.default_rng(0)
    values = rng.lognormal(-4, 1, 30_000)
    gaps = Gaps()
    for part in values.reshape(-1, 10):
        gaps.add(part.tolist(), tokens=11)

    for name in ("p50", "p95", "p99", "p99.9"):
        assert gaps.statistic(name) == pytest.approx(np.percentile(values, float(name[1:])), rel=0.012)
    assert gaps.statistic("mean") == pytest.approx(values.mean())
    assert (gaps.statistic("max"), gaps.quantiles().count) == (pytest.approx(values.max()), 30_000)


def test_chunk_of_several_tokens_is_several_gaps() -> None:
    gaps = Gaps()
    gaps.add([0.4, 0.4], tokens=9)  # eight gaps between nine tokens, seen as two

    assert gaps.quantiles().count == 8
    assert gaps.statistic("p50") == pytest.approx(0.1, rel=0.01)


def test_timeline_puts_latency_where_requests_were_due_and_answers_where_they_came() -> None:
    outcomes = [
        outcome(0.1, ttft_s=1.5, tokens=1),
        outcome(0.6, end="failed", tokens=1),
        outcome(1.2, tokens=11, tpot_s=0.1),
    ]
    steps = timeline(outcomes, length_s=3, limits={"ttft": 1.0}, step_s=1.0)

    assert [(step.sent, step.failed, step.met, step.finished) for step in steps] == [
        (2, 1, 0, 0),
        (1, 0, 1, 1),
        (0, 0, 0, 1),
    ]
    assert [step.in_flight for step in steps] == [1, 1, 0]
    assert steps[0].ttft_p99_s == pytest.approx(1.5) and steps[2].ttft_p50_s is None
    assert sum(step.output_tokens_per_s for step in steps) == pytest.approx(13)
    assert step_for(60) == 0.2 and step_for(86_400) == 300


def test_quantiles_of_nothing_are_empty() -> None:
    assert quantiles([None, None]).count == 0
    assert quantiles([1.0, None, 3.0]).mean == 2
