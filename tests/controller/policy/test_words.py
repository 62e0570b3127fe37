"""What a policy would do, told in words."""

from __future__ import annotations

from pathlib import Path

import pytest

from flexpert.controller.policy.parse import parse_policy
from flexpert.controller.policy.types import DirectionConfig, RuleConfig
from flexpert.controller.policy.words import clock, describe, ramp

HEAD = "apiVersion: flexpert.dev/v1alpha1\nkind: ScalingPolicy\nmetadata: {name: chat}\nspec:\n"


def words(settings: str) -> str:
    return "\n".join(describe(parse_policy(HEAD + "".join(f"  {line}\n" for line in settings.splitlines()))))


def test_default_policy_in_words(repository: Path) -> None:
    assert describe(parse_policy((repository / "examples/policies/default.yaml").read_text())) == [
        "Policy default decides every 5s and acts.",
        "From 1 to 4 workers serve; 1 warm process waits beside.",
        "A request is promised its first token within 500ms and each further one within 50ms on average; "
        "99% of all requests are to get that.",
        "It takes as many workers as the most demanding of these asks for:",
        "  - slo: so many that the promise is kept",
        "  - kv_utilization: so many that 80% of their KV cache is in use",
        "  - tokens_per_second: so many that each has at most 75% to 90% of the prompt and output tokens per second "
        "that it was measured to take",
        "It grows at once, by at most 4 workers in 15s or 100% in 15s, whichever is more; at the fastest 1 -> 4 in one step.",
        "It shrinks to the highest size asked for in the last 5m, by at most 50% in 1m; at the fastest 4 -> 2 -> 1 takes 1m.",
        "Loads within 10% of what is there change nothing.",
        "It shrinks only if those who stay would be below 85% of every target, hold the model and all live KV, "
        "and the stall costs less than the devices.",
        "Panic is a load of 2 times what the workers take, over 10s: it grows without waiting, and does not shrink until that is over.",
        "Without numbers of the last 30s it keeps its size; it never shrinks then.",
        "A growth that is not done after 5m is given up and tried again later.",
    ]  # fmt: skip


def test_schedules_forecasts_budgets_and_costs_are_told(repository: Path) -> None:
    said = describe(parse_policy((repository / "examples/policies/business-hours.yaml").read_text()))

    for line in (
        "From 1 to 12 workers serve; 2 warm processes wait beside.",
        "The budget of 12 devices stands before workers.max, which is 16.",
        "At 2.5 for a device-hour that is 2.5 to 30 an hour.",
        "forecast may raise that, never lower it: it looks as far ahead as a worker takes to join, "
        "at loads averaged over 5m of the last 14d, "
        "which repeat themselves after 1d.",
        "schedule bounds it, by the clock of Europe/Berlin:",
        "  - from 07:45 mon-fri to 18:00 mon-fri: at least 4",
        "  - from 20:00 to 06:00: at most 4",
    ):  # fmt: skip
        assert line in said


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ("mode: Advisory", "Policy chat decides every 5s and writes down what it would do, without doing it."),
        ("mode: Paused", "Policy chat is paused: it decides nothing until it is resumed."),
        ("slo: {tpot: 50ms}", "It is measured; no signal of type slo follows it."),
        ("behavior: {scaleDown: {select: Disabled}}", "It never shrinks."),
        ("behavior: {scaleUp: {tolerance: 0.2}}", "Loads up to 20% above what is there, or 10% below, change nothing."),
        ("behavior: {scaleUp: {stabilizationWindow: 30s}}", "It grows to the lowest size asked for in the last 30s,"),
        ("fallback: {behavior: scale_up_if_stale}", "Without numbers of the last 30s it grows, as far as one period allows;"),
        ("behavior: {scaleDown: {stabilizationWindow: 5s}}", "note: scaleDown.stabilizationWindow is 5s; a dip hardly longer"),
        (
            "behavior: {scaleUp: {select: Min, "
            "policies: [{type: workers, value: 1, period: 10s}, {type: percent, value: 50, period: 10s}]}}",
            "by at most 1 worker in 10s or 50% in 10s, whichever is less; at the fastest 1 -> 2 -> 3 -> 4 -> ... -> 9 takes 70s.",
        ),
    ],
)  # fmt: skip
def test_settings_change_the_words(settings: str, line: str) -> None:
    assert line in words(f"workers: {{max: 9}}\nsignals: [{{type: kv_utilization}}]\n{settings}")


def test_a_size_that_never_changes_is_told_so() -> None:
    said = words("workers: {min: 3, max: 3, standby: 0}\nsignals: [{type: kv_utilization}]\npanic: {threshold: 0}")

    assert "3 workers serve at all times; no warm processes wait beside." in said
    assert "grows" not in said.replace("A growth", "")
    assert "Panic" not in said


def test_without_standbys_it_is_told_what_that_costs() -> None:
    assert "note: without standby processes" in words(
        "workers: {max: 3, standby: 0}\nsignals: [{type: kv_utilization}]"
    )


def test_token_rates_given_or_measured() -> None:
    signal = "workers: {{max: 3}}\nsignals: [{{type: tokens_per_second, {}}}]"

    assert "at most 20,000 prompt and 1,500 output tokens per second\n" in words(
        signal.format("prefill: 20000, decode: 1500")
    )
    assert "at most 20,000 prompt tokens per second and 75% to 90% of the output tokens per second that it" in words(
        signal.format("prefill: 20000")
    )


@pytest.mark.parametrize(
    ("per", "goal"), [("worker", "one for each 20 of"), ("cluster", "so many that there is 20 of")]
)
def test_prometheus_signal_says_what_its_target_is_of(per: str, goal: str) -> None:
    signal = f"{{type: prometheus, name: jobs, url: 'http://p:9090', query: sum(q), target: 20, per: {per}}}"
    said = words(f"workers: {{max: 3}}\nsignals: [{signal}]")
    assert f"  - prometheus 'jobs': {goal} what http://p:9090 answers to sum(q)\n" in said


def test_ramps_follow_the_rules_over_their_periods() -> None:
    two_a_minute = DirectionConfig(stabilization_s=0, rules=(RuleConfig(type="workers", value=2, period_s=60.0),))
    half = DirectionConfig(stabilization_s=0, rules=(RuleConfig(type="percent", value=50, period_s=30.0),))

    assert ramp(two_a_minute, 1, 6) == ([1, 3, 5, 6], 120.0)
    assert ramp(half, 8, 1) == ([8, 4, 2, 1], 60.0)
    assert ramp(half, 1, 4) == ([1, 2, 3, 4], 60.0)


def test_clock_times_are_shown_where_they_are_simple() -> None:
    assert [clock(text) for text in ("5 8 * * *", "0 18 * * mon-fri", "*/5 8 * * *")] == [
        "08:05",
        "18:00 mon-fri",
        "'*/5 8 * * *'",
    ]
