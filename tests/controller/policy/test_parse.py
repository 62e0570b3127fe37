"""What an operator may get wrong in a policy file: each mistake has its line, its key, what is wrong and what to write."""

from __future__ import annotations

import textwrap

import pytest

from flexpert.controller.policy.parse import PolicyError, parse_policy

# Settings under test follow in line 5 and after.
HEAD = """\
apiVersion: flexpert.dev/v1alpha1
kind: ScalingPolicy
metadata: {name: chat}
spec:
"""
WORKERS = "workers: {min: 1, max: 8}\n"
SIGNALS = "signals: [{type: kv_utilization, target: 0.8}]\n"
TYPES = "slo, kv_utilization, queue_time, tokens_per_second, prometheus, schedule, forecast"
TIME = "write a time with one, such as 500ms, 30s, 5m, 2h or 7d"
UNITS = "expected one of ms, s, m, h, d"
SECTIONS = "mode, interval, workers, slo, signals, behavior, panic, fallback, budget, consolidation, growTimeout"
CRON = "which is no time of cron; write minute, hour, day, month and day of the week, such as '0 8 * * mon-fri'"


def errors(text: str) -> list[str]:
    with pytest.raises(PolicyError) as caught:
        parse_policy(text)
    return str(caught.value).splitlines()


def errors_of_spec(settings: str) -> list[str]:
    return errors(HEAD + textwrap.indent(textwrap.dedent(settings), "  "))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        # keys
        (
            "workers:\n  max: 8\n  minn: 1\n" + SIGNALS,
            "line 7: spec.workers.minn: unknown key; did you mean min? expected one of min, max, standby",
        ),
        (
            WORKERS + SIGNALS + "minReplicas: 3\n",
            f"line 7: spec.minReplicas: unknown key; expected one of {SECTIONS}",
        ),
        (
            "workers: {minReplicas: 3, max: 4}\n" + SIGNALS,
            "line 5: spec.workers.minReplicas: unknown key; did you mean min? expected one of min, max, standby",
        ),
        (
            WORKERS + SIGNALS + "growTimeOut: 60s\n",
            f"line 7: spec.growTimeOut: unknown key; did you mean growTimeout? expected one of {SECTIONS}",
        ),
        (
            WORKERS + "signals:\n  - {type: slo}\n  - {type: kv_utilization, targt: 0.8}\nslo: {ttft: 1s}\n",
            "line 8: spec.signals[1].targt: unknown key; did you mean target? expected one of type, name, target",
        ),
        (
            WORKERS + SIGNALS + "behavior:\n  scaleUp:\n    stabilizationWindowSeconds: 0\n",
            "line 9: spec.behavior.scaleUp.stabilizationWindowSeconds: unknown key; did you mean stabilizationWindow? "
            "expected one of stabilizationWindow, tolerance, select, policies",
        ),
        (
            "workers:\n  min: 1\n  max: 8\n  min: 2\n" + SIGNALS,
            "line 8: spec.workers.min: given twice, first in line 6; keep one of the two",
        ),
        (WORKERS, "line 4: spec.signals: missing; add signals: [{type: kv_utilization, target: 0.8}]"),
        ("workers: {min: 1}\n" + SIGNALS, "line 5: spec.workers.max: missing; add max: 8"),
        (
            WORKERS + SIGNALS + "behavior:\n  scaleUp: {policies: [{type: workers, value: 4}]}\n",
            "line 8: spec.behavior.scaleUp.policies[0].period: missing; add period: 60s",
        ),
        # units
        (WORKERS + SIGNALS + "slo: {ttft: '500'}\n", f"line 7: spec.slo.ttft: found '500', which has no unit; {TIME}"),
        (WORKERS + SIGNALS + "slo: {ttft: 500}\n", f"line 7: spec.slo.ttft: found 500, which has no unit; {TIME}"),
        (
            WORKERS + SIGNALS + "slo: {ttft: 5 parsecs}\n",
            f"line 7: spec.slo.ttft: found '5 parsecs', whose unit 'parsecs' is unknown; {UNITS}",
        ),
        (
            WORKERS + SIGNALS + "growTimeout: 5min\n",
            f"line 7: spec.growTimeout: found '5min', whose unit 'min' is unknown; did you mean 5m? {UNITS}",
        ),
        (
            WORKERS + SIGNALS + "interval: -5s\n",
            "line 7: spec.interval: found '-5s', a time below zero; write one such as 500ms, 30s, 5m, 2h or 7d",
        ),
        (
            WORKERS + SIGNALS + "interval: soon\n",
            "line 7: spec.interval: found 'soon', which is no time; write one such as 500ms, 30s, 5m, 2h or 7d",
        ),
        (
            WORKERS + "signals: [{type: tokens_per_second, prefill: 20k}]\n",
            "line 6: spec.signals[0].prefill: found '20k'; expected a number of tokens per second, such as 20000",
        ),
        (
            WORKERS + "signals: [{type: kv_utilization, target: 800ms}]\n",
            "line 6: spec.signals[0].target: found '800ms', which is no share; write a share such as 0.8 or 80%",
        ),
        (
            WORKERS + "signals: [{type: queue_time, target: 80%}]\n",
            "line 6: spec.signals[0].target: found '80%', whose unit '%' is unknown; " + UNITS,
        ),
        # ranges
        (
            WORKERS + "signals: [{type: kv_utilization, target: 80}]\n",
            "line 6: spec.signals[0].target: found 80; did you mean 80%? expected a share above 0 and at most 1",
        ),
        (
            WORKERS + "signals: [{type: kv_utilization, target: 0}]\n",
            "line 6: spec.signals[0].target: found 0; expected a share above 0 and at most 1",
        ),
        (
            WORKERS + "signals: [{type: queue_time, target: 3h}]\n",
            "line 6: spec.signals[0].target: found '3h'; expected from 1ms to 1h",
        ),
        (
            WORKERS + "signals: [{type: tokens_per_second, decode: 0}]\n",
            "line 6: spec.signals[0].decode: found 0; expected a number of tokens per second above 0",
        ),
        (
            "workers: {min: 0, max: 8}\n" + SIGNALS,
            "line 5: spec.workers.min: found 0; expected a whole number from 1 to 100000",
        ),
        (
            "workers: {min: 1.5, max: 8}\n" + SIGNALS,
            "line 5: spec.workers.min: found 1.5; expected a whole number from 1 to 100000",
        ),
        (
            "workers: {min: one, max: 8}\n" + SIGNALS,
            "line 5: spec.workers.min: found 'one'; expected a whole number of workers from 1 to 100000",
        ),
        (
            WORKERS + SIGNALS + "slo: {ttft: 1s, attainment: 1.2}\n",
            "line 7: spec.slo.attainment: found 1.2; did you mean 1.2%? expected a share above 0 and at most 1",
        ),
        # choices
        (
            WORKERS + SIGNALS + "mode: active\n",
            "line 7: spec.mode: found 'active'; did you mean Active? expected one of Active, Advisory, Paused",
        ),
        (
            WORKERS + "signals: [{type: kv_utilisation}]\n",
            f"line 6: spec.signals[0].type: found 'kv_utilisation'; did you mean kv_utilization? expected one of {TYPES}",
        ),
        (WORKERS + "signals: [{target: 0.8}]\n", f"line 6: spec.signals[0].type: missing; expected one of {TYPES}"),
        (
            WORKERS + SIGNALS + "behavior: {scaleUp: {policies: [{type: Pods, value: 4, period: 15s}]}}\n",
            "line 7: spec.behavior.scaleUp.policies[0].type: found 'Pods'; did you mean workers? expected one of workers, percent",
        ),
        (
            WORKERS + SIGNALS + "fallback: {behavior: static}\n",
            "line 7: spec.fallback.behavior: found 'static'; expected one of hold, scale_up_if_stale",
        ),
        # kinds of value
        ("workers: 8\n" + SIGNALS, "line 5: spec.workers: found 8; expected a mapping of min, max, standby"),
        (WORKERS + "signals: slo\n", "line 6: spec.signals: found 'slo'; expected a list, each item behind a -"),
        (
            WORKERS + "signals: []\n",
            "line 6: spec.signals: found nothing in it; write signals: [{type: kv_utilization, target: 0.8}]",
        ),
        (
            WORKERS + "signals: [slo]\n",
            "line 6: spec.signals[0]: found 'slo'; expected a mapping such as {type: slo}",
        ),
        # signals from outside
        (
            WORKERS + "signals: [{type: prometheus, url: 'prometheus:9090', query: up, target: 1}]\n",
            "line 6: spec.signals[0].url: found 'prometheus:9090', which is no http or https URL; "
            "write one such as http://prometheus:9090",
        ),
        (
            WORKERS + "signals: [{type: prometheus, url: 'http://p:9090', query: '  ', target: 1}]\n",
            "line 6: spec.signals[0].query: found nothing in it; write query: sum(my_queue_length)",
        ),
        (
            WORKERS + "signals:\n  - {type: kv_utilization}\n"
            "  - {type: schedule, timezone: Mars/Base, windows: [{start: 0 8 * * *, end: 0 9 * * *, min: 2}]}\n",
            "line 8: spec.signals[1].timezone: found 'Mars/Base', which this machine knows as no time zone; "
            "write one of the IANA data base, such as Europe/Berlin or UTC",
        ),
        (
            WORKERS + "signals:\n  - {type: kv_utilization}\n"
            "  - type: schedule\n    windows:\n      - {start: 8 o'clock, end: 0 9 * * *, min: 2}\n",
            f'line 10: spec.signals[1].windows[0].start: found "8 o\'clock", {CRON}',
        ),
        (
            WORKERS + "signals:\n  - {type: kv_utilization}\n"
            "  - {type: schedule, windows: [{start: 0 8 30 2 *, end: 0 9 * * *, min: 2}]}\n",
            f"line 8: spec.signals[1].windows[0].start: found '0 8 30 2 *', {CRON}",
        ),
    ],
)  # fmt: skip
def test_one_mistake_gets_its_line(settings: str, said: str) -> None:
    assert errors_of_spec(settings) == [said]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ("workers:\n  min: 9\n  max: 8\n" + SIGNALS, "line 6: spec.workers.min: 9 is above max, which is 8; lower min or raise max"),
        (
            "workers: {min: 4, max: 8}\nbudget: {devices: 3}\n" + SIGNALS,
            "line 6: spec.budget.devices: 3 is below workers.min, which is 4, and each worker has a device; "
            "raise devices or lower workers.min",
        ),
        (
            WORKERS + SIGNALS + "slo: {attainment: 0.99}\n",
            "line 7: spec.slo: promises nothing; give ttft, tpot or both, such as {ttft: 500ms, tpot: 50ms}",
        ),
        (
            WORKERS + "signals:\n  - {type: slo}\n",
            "line 7: spec.signals[0]: type slo follows spec.slo, which is not there; add slo: {ttft: 500ms, tpot: 50ms} to spec",
        ),
        (
            WORKERS + "signals:\n  - {type: kv_utilization, target: 0.8}\n  - {type: kv_utilization, target: 0.5}\n",
            "line 8: spec.signals[1]: a second signal of type kv_utilization, which contradicts signals[0]; keep one of the two",
        ),
        (
            WORKERS + "signals:\n  - {type: kv_utilization, target: 0.8}\n  - {type: kv_utilization, target: 80%}\n",
            "line 8: spec.signals[1]: a second signal of type kv_utilization, the same as signals[0]; keep one of the two",
        ),
        (
            WORKERS + "signals:\n  - {type: tokens_per_second, prefill: 9}\n  - {type: tokens_per_second, decode: 9}\n",
            "line 8: spec.signals[1]: a second signal of type tokens_per_second, which contradicts signals[0]; "
            "keep one, with prefill and decode in it",
        ),
        (
            WORKERS + "slo: {ttft: 500ms}\nsignals:\n  - type: queue_time\n    target: 2s\n",
            "line 9: spec.signals[0].target: 2s in the queue contradicts slo.ttft, which is 500ms: "
            "a request that waits so long has missed it; "
            ""
            "lower target below slo.ttft, or raise slo.ttft",
        ),
        (
            WORKERS + "signals:\n  - {type: kv_utilization, name: a}\n  - {type: queue_time, target: 1s, name: a}\n",
            "line 8: spec.signals[1].name: 'a' is the name of signals[0], too; give each signal a name of its own",
        ),
        (
            WORKERS + "signals:\n  - {type: prometheus, url: 'http://p', query: q, target: 1}\n"
            "  - {type: prometheus, name: b, url: 'http://p', query: q, target: 2}\n",
            "line 8: spec.signals[1].target: 2 for the query of signals[0], which has target 1: they contradict; keep one of the two",
        ),
        (
            WORKERS + "signals:\n  - {type: schedule, windows: [{start: 0 8 * * *, end: 0 9 * * *, min: 2}]}\n",
            "line 6: spec.signals: only bound the size, and none follows the load that is there; "
            "add one of slo, kv_utilization, queue_time, tokens_per_second, prometheus",
        ),
        (
            WORKERS + SIGNALS + "behavior: {scaleDown: {select: Disabled, policies: [{type: workers, value: 1, period: 60s}]}}\n",
            "line 7: spec.behavior.scaleDown.policies: can never count, since select is Disabled; remove them, or write select: Max",
        ),
        (
            WORKERS + SIGNALS + "behavior:\n  scaleDown:\n    policies:\n      - {type: percent, value: 150, period: 60s}\n",
            "line 10: spec.behavior.scaleDown.policies[0].value: 150 percent of the workers cannot leave; write 100 or less",
        ),
        (
            WORKERS + SIGNALS + "behavior:\n  scaleUp:\n    policies:\n"
            "      - {type: workers, value: 1, period: 60s}\n      - {type: workers, value: 3, period: 1m}\n",
            "line 11: spec.behavior.scaleUp.policies[1]: limits workers in 1m again, as policies[0] does; keep one of the two",
        ),
        (
            WORKERS + SIGNALS + "panic: {window: 2s}\n",
            "line 7: spec.panic.window: 2s is shorter than interval, which is 5s, so it may hold no number; "
            "lengthen window or shorten interval",
        ),
        (
            WORKERS + SIGNALS + "panic: {threshold: 0.5}\n",
            "line 7: spec.panic.threshold: 0.5 would mean panic at the load that the workers take; write more than 1, or 0 for never",
        ),
        (
            WORKERS + SIGNALS + "fallback: {after: 1s}\n",
            "line 7: spec.fallback.after: 1s is shorter than interval, which is 5s: every number would be stale; "
            "lengthen after or shorten interval",
        ),
        (
            WORKERS + SIGNALS + "growTimeout: 1s\n",
            "line 7: spec.growTimeout: 1s is shorter than interval, which is 5s; lengthen it",
        ),
        (
            WORKERS + "signals:\n  - {type: kv_utilization}\n  - {type: forecast, history: 1d}\n",
            "line 8: spec.signals[1].history: 1d is shorter than two seasons of 1d, and one season shows no repetition; "
            "lengthen history or shorten season",
        ),
        (
            WORKERS + "signals:\n  - {type: kv_utilization}\n  - {type: forecast, step: 12h}\n",
            "line 8: spec.signals[1].step: 12h is longer than a quarter of season, which is 1d; shorten step or lengthen season",
        ),
    ],
)  # fmt: skip
def test_settings_that_contradict_each_other_are_told(settings: str, said: str) -> None:
    assert errors_of_spec(settings) == [said]


def windows(*lines: str) -> str:
    listed = "".join(f"      - {{{line}}}\n" for line in lines)
    return WORKERS + "signals:\n  - {type: kv_utilization}\n  - type: schedule\n    windows:\n" + listed


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (
            ["start: 0 8 * * *, end: 0 18 * * *, min: 9"],
            "line 10: spec.signals[1].windows[0].min: 9 is outside workers, which are 1 to 8; choose min from 1 to 8, or change workers",
        ),
        (
            ["start: 0 8 * * *, end: 0 18 * * *, min: 4, max: 2"],
            "line 10: spec.signals[1].windows[0].min: 4 is above max of this window, which is 2; lower min or raise max",
        ),
        (
            ["start: 0 8 * * *, end: 0 18 * * *"],
            "line 10: spec.signals[1].windows[0]: bounds nothing; give min, max or both",
        ),
        (
            ["start: 0 8 * * *, end: 0  8 * * *, min: 2"],
            "line 10: spec.signals[1].windows[0].end: '0 8 * * *' is start, too, so it is never open; give another end",
        ),
        (
            ["start: 0 8 * * *, end: 0 18 * * *, min: 4", "start: 0 12 * * *, end: 0 13 * * *, max: 2"],
            "line 10: spec.signals[1].windows[0].min: 4 is above max of windows[1], which is 2, and the two are open at the same time; "
            "make them agree, or open at different times",
        ),
    ],
)  # fmt: skip
def test_windows_that_contradict_are_told(lines: list[str], said: str) -> None:
    assert errors_of_spec(windows(*lines)) == [said]


def two_schedules(floor: str, ceiling: str) -> str:
    return WORKERS + "".join(
        ["signals:\n  - {type: kv_utilization}\n"]
        + [
            f"  - type: schedule\n    name: {name}\n    timezone: {zone}\n    windows:\n      - {{{line}}}\n"
            for name, zone, line in (("floor", "Europe/Berlin", floor), ("ceiling", "UTC", ceiling))
        ]
    )


def test_schedules_that_contradict_each_other_are_told() -> None:
    """8 to 18 in Berlin is 7 to 17 or 6 to 16 in UTC."""
    day = "start: 0 8 * * *, end: 0 18 * * *, min: 4"
    assert errors_of_spec(two_schedules(day, "start: 30 16 * * *, end: 0 6 * * *, max: 2")) == [
        "line 12: spec.signals[1].windows[0].min: 4 is above max of signals[2].windows[0], which is 2, "
        "and the two are open at the same time; make them agree, or open at different times"
    ]
    parse_policy(HEAD + textwrap.indent(two_schedules(day, "start: 0 17 * * *, end: 0 6 * * *, max: 2"), "  "))


def test_windows_at_different_times_do_not_contradict() -> None:
    day, night = "start: 0 8 * * *, end: 0 18 * * *, min: 4", "start: 0 18 * * *, end: 0 8 * * *, max: 2"
    parse_policy(HEAD + textwrap.indent(windows(day, night), "  "))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "line 1: found nothing; expected a mapping of apiVersion, kind, metadata, spec"),
        ("- 1", "line 1: found a list; expected a mapping of apiVersion, kind, metadata, spec"),
        (
            HEAD + "  workers: {min: 1, max: 8\n  signals: []\n",
            "line 6: not YAML: ",
        ),
        (HEAD + "\tworkers: 1\n", "line 5: not YAML: a tab; indent with spaces"),
        (
            "a: 1\n---\nb: 2\n",
            "line 2: a second document begins here; write one policy in a file, without a line of ---",
        ),
        ("a: \x07", "line 1: has the character U+0007, which YAML forbids; remove it"),
        ("[" * 5000, "line 1: is nested too deeply; a policy has at most eight levels"),
        ("x" * 300_000, "line 1: 300,000 characters; a policy has at most 262,144"),
    ],
)
def test_text_that_is_no_policy_at_all(text: str, said: str) -> None:
    found = errors(text)
    assert len(found) == 1
    if said.endswith("YAML: "):  # what follows is the YAML library's
        assert found[0].endswith("; check indentation, quotes, colons and brackets here and in the line before")
    assert found[0].startswith(said)


def test_head_must_say_what_it_is() -> None:
    assert errors(
        "apiVersion: flexpert.dev/v1\nkind: Policy\nspec:\n  workers: {max: 1}\n  signals: [{type: kv_utilization}]\n"
    ) == [
        "line 1: apiVersion: found 'flexpert.dev/v1'; did you mean flexpert.dev/v1alpha1? expected flexpert.dev/v1alpha1",
        "line 2: kind: found 'Policy'; did you mean ScalingPolicy? expected ScalingPolicy",
    ]
    assert errors(HEAD.replace("chat", "My Chat") + "  " + WORKERS + "  " + SIGNALS) == [
        "line 3: metadata.name: found 'My Chat'; expected a name of small letters, digits, dots and hyphens, such as chat-1"
    ]


def test_aliases_and_tags_are_refused() -> None:
    text = HEAD + "  workers: &w {max: 2}\n  signals: [{type: kv_utilization}]\n  budget: *w\n  mode: !secret x\n"
    assert errors(text) == [
        "line 7: spec.budget: repeats another part by an alias (*); write it out, a policy has no anchors",
        "line 8: spec.mode: has the tag !secret; remove it, values need none",
    ]


def test_all_errors_of_a_file_come_at_once() -> None:
    settings = """\
    mode: Of
    workers:
      min: 9
      max: 8
      minn: 1
    slo: {ttft: 500, tpot: 50ms}
    signals:
      - {type: prometheus, url: nowhere, query: q, target: 1}
      - {type: kv_utilization, target: 0.8}
      - {type: queue_time, target: 2s}
      - {type: kv_utilization, target: 0.5}
    interval: 20s
    panic: {window: 10s}
    """
    assert errors_of_spec(settings) == [
        "line 5: spec.mode: found 'Of'; expected one of Active, Advisory, Paused",
        "line 7: spec.workers.min: 9 is above max, which is 8; lower min or raise max",
        "line 9: spec.workers.minn: unknown key; did you mean min? expected one of min, max, standby",
        f"line 10: spec.slo.ttft: found 500, which has no unit; {TIME}",
        "line 12: spec.signals[0].url: found 'nowhere', which is no http or https URL; write one such as http://prometheus:9090",
        "line 15: spec.signals[3]: a second signal of type kv_utilization, which contradicts signals[1]; keep one of the two",
        "line 17: spec.panic.window: 10s is shorter than interval, which is 20s, so it may hold no number; "
        "lengthen window or shorten interval",
    ]  # fmt: skip


def test_a_refused_value_brings_no_second_error() -> None:
    """max is refused, so nothing is told about min against it; nor about the slo signal where slo itself is wrong."""
    assert errors_of_spec("workers: {min: 9, max: eight}\nslo: 500ms\nsignals: [{type: slo}]\n") == [
        "line 5: spec.workers.max: found 'eight'; expected a whole number of workers from 1 to 100000",
        "line 6: spec.slo: found '500ms'; expected a mapping of ttft, tpot, attainment",
    ]
    assert errors_of_spec(WORKERS + "signals: [{type: kv}]\n") == [
        f"line 6: spec.signals[0].type: found 'kv'; expected one of {TYPES}"
    ]


def test_numbers_are_read_as_yaml_1_2_does() -> None:
    policy = parse_policy(
        HEAD + "  workers: {min: 0o1, max: 8}\n  signals: [{type: kv_utilization}]\n".replace("0o1", "1")
    )
    assert policy.spec.workers.min == 1
    text = HEAD + "  workers: {max: 8:30}\n  signals: [{type: kv_utilization}]\n"
    assert errors(text) == [
        "line 5: spec.workers.max: found '8:30'; expected a whole number of workers from 1 to 100000"
    ]


def test_json_is_yaml_too() -> None:
    policy = parse_policy(
        '{"apiVersion": "flexpert.dev/v1alpha1", "kind": "ScalingPolicy", "spec":'
        ' {"workers": {"max": 3}, "signals": [{"type": "kv_utilization"}]}}'
    )
    assert policy.spec.workers.max == 3
