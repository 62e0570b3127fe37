"""What a valid policy becomes: defaults, units, the decision core's configuration; its schema; and the examples that are shipped."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from flexpert.controller.policy import types, units
from flexpert.controller.policy.parse import parse_policy
from flexpert.controller.policy.schema import schema, schema_text
from flexpert.controller.policy.spec import ScalingPolicy, Workers

WHOLE = """\
apiVersion: flexpert.dev/v1alpha1
kind: ScalingPolicy
metadata: {name: chat, namespace: prod, labels: {team: a}}
spec:
  mode: Advisory
  interval: 500ms
  workers: {min: 2, max: 8, standby: 3}
  slo: {ttft: 1.5s, tpot: 35ms, attainment: 99.5%}
  signals:
    - {type: slo}
    - {type: kv_utilization, target: 75%}
    - {type: queue_time, target: 200ms}
    - {type: tokens_per_second, prefill: 20000, decode: 1500.5}
    - {type: prometheus, name: jobs, url: 'http://prometheus:9090/', query: sum(jobs), target: 20, per: cluster, timeout: 1s}
    - {type: prometheus, name: other, url: 'http://prometheus:9090', query: sum(jobs), target: 20}
    - type: schedule
      timezone: Europe/Berlin
      windows: [{start: 0  8 * * mon-fri, end: 0 18 * * mon-fri, min: 4, max: 6}]
    - {type: forecast, season: 1d, step: 10m, history: 14d, horizon: 90s}
  behavior:
    scaleUp: {stabilizationWindow: 10s, tolerance: 0, select: Min, policies: [{type: workers, value: 2, period: 1m}]}
    scaleDown: {stabilizationWindow: 1h, select: Disabled}
  panic: {window: 5s, threshold: 3}
  fallback: {behavior: scale_up_if_stale, after: 1m30s}
  budget: {devices: 6, costPerDeviceHour: 2.5, stallCostPerStreamHour: 0}
  consolidation: {margin: 80%}
  growTimeout: 2m
"""


def test_every_setting_reaches_the_decision_core() -> None:
    config = parse_policy(WHOLE).to_config()

    assert config == types.PolicyConfig(
        name="chat",
        workers=types.WorkersConfig(min=2, max=8, standby=3),
        slo=types.SloConfig(ttft_s=1.5, tpot_s=0.035, attainment=0.995),
        signals=(
            types.SignalConfig(type="slo", name="slo"),
            types.SignalConfig(type="kv_utilization", name="kv_utilization", target=0.75),
            types.SignalConfig(type="queue_time", name="queue_time", target=0.2),
            types.SignalConfig(type="tokens_per_second", name="tokens_per_second", prefill=20000.0, decode=1500.5),
            types.SignalConfig(type="prometheus", name="jobs", target=20.0, per="cluster"),
            types.SignalConfig(type="prometheus", name="other", target=20.0),
            types.SignalConfig(type="schedule", name="schedule"),
            types.SignalConfig(type="forecast", name="forecast"),
        ),
        up=types.DirectionConfig(
            stabilization_s=10.0,
            tolerance=0.0,
            select="Min",
            rules=(types.RuleConfig(type="workers", value=2, period_s=60.0),),
        ),
        down=types.DirectionConfig(
            stabilization_s=3600.0,
            select="Disabled",
            rules=(types.RuleConfig(type="percent", value=50, period_s=60.0),),
        ),
        panic=types.PanicConfig(window_s=5.0, threshold=3.0),
        fallback=types.FallbackConfig(behavior="scale_up_if_stale", after_s=90.0),
        budget_devices=6,
        cost_per_device_hour=2.5,
        stall_cost_per_stream_hour=0.0,
        grow_timeout_s=120.0,
        interval_s=0.5,
        consolidation_margin=0.8,
        mode="Advisory",
    )


def test_what_is_left_out_has_the_core_s_defaults(repository: Path) -> None:
    config = parse_policy((repository / "examples/policies/minimal.yaml").read_text()).to_config()

    assert config == types.PolicyConfig(
        workers=types.WorkersConfig(min=1, max=4, standby=1),
        signals=(types.SignalConfig(type="kv_utilization", name="kv_utilization", target=0.8),),
    )


def test_long_intervals_stretch_the_defaults_that_depend_on_them() -> None:
    text = WHOLE.replace("interval: 500ms", "interval: 40s")
    text = text.replace("  panic: {window: 5s, threshold: 3}\n", "").replace(", after: 1m30s", "")
    config = parse_policy(text).to_config()

    assert (config.panic.window_s, config.fallback.after_s) == (40.0, 120.0)


def test_what_the_live_loop_reads_of_signals_from_outside() -> None:
    by_name = {signal.name: signal for signal in parse_policy(WHOLE).spec.signals}
    jobs, hours, forecast = by_name["jobs"], by_name["schedule"], by_name["forecast"]

    assert jobs.type == "prometheus"
    assert (jobs.url, jobs.query, jobs.timeout_s) == ("http://prometheus:9090", "sum(jobs)", 1.0)
    assert hours.type == "schedule"
    assert (hours.timezone, hours.windows[0].start, hours.windows[0].min) == ("Europe/Berlin", "0 8 * * mon-fri", 4)
    assert forecast.type == "forecast"
    assert (forecast.season_s, forecast.step_s, forecast.history_s, forecast.horizon_s) == (86400, 600, 14 * 86400, 90)


def test_a_policy_written_again_is_the_same_policy() -> None:
    policy = parse_policy(WHOLE)
    again = parse_policy(yaml.safe_dump(policy.as_written()))

    assert again == policy
    assert policy.as_written()["spec"]["slo"] == {"ttft": "1.5s", "tpot": "35ms", "attainment": 0.995}


def test_nobody_makes_a_policy_that_contradicts_itself() -> None:
    values = yaml.safe_load(WHOLE)
    values["spec"]["workers"]["min"] = 9
    with pytest.raises(
        ValidationError, match=r"spec\.workers\.min: 9 is above max, which is 8; lower min or raise max"
    ):
        ScalingPolicy.model_validate(values)
    with pytest.raises(ValidationError, match="frozen"):
        parse_policy(WHOLE).spec.workers.min = 3


def test_values_at_the_edge_of_what_is_allowed_are_allowed() -> None:
    edges = """\
apiVersion: flexpert.dev/v1alpha1
kind: ScalingPolicy
spec:
  interval: 10s
  workers: {min: 3, max: 3}
  slo: {ttft: 1h, attainment: 1}
  signals:
    - {type: kv_utilization, target: 100%}
    - {type: queue_time, target: 3599s}
    - {type: schedule, windows: [{start: 0 8 * * *, end: 0 9 * * *, min: 3, max: 3}]}
    - {type: forecast, season: 1d, history: 2d, step: 6h}
  behavior: {scaleDown: {stabilizationWindow: 0, policies: [{type: percent, value: 100, period: 1h}]}}
  panic: {window: 10s}
  fallback: {after: 10s}
  growTimeout: 10s
  budget: {devices: 3}
"""
    assert parse_policy(edges).spec.budget.devices == 3


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("500ms", 0.5), ("35ms", 0.035), ("1s", 1.0), ("1.5 s", 1.5), ("5m", 300.0), ("2h", 7200.0), ("7d", 604800.0),
        ("1h30m", 5400.0), ("1h 30m 5s", 5405.0), ("0", 0.0), (0, 0.0), ("0s", 0.0),
    ],
)  # fmt: skip
def test_times_are_read_with_their_units(text: object, seconds: float) -> None:
    assert units.parse_duration(text) == seconds


@pytest.mark.parametrize(
    "text", ["", " ", "s", "5", 5, 0.5, "5 S", "5m3", "1e3s", "-1s", "1..5s", "٣s", None, True, [], "9" * 400 + "d"]
)
def test_what_is_no_time_is_refused(text: object) -> None:
    with pytest.raises(units.UnitError):
        units.parse_duration(text)


@given(st.integers(min_value=0, max_value=10**9))
def test_times_survive_being_written(milliseconds: int) -> None:
    seconds = milliseconds / 1000
    assert units.parse_duration(units.show_duration(seconds)) == pytest.approx(seconds, rel=1e-9)


def test_shares_are_read_and_shown() -> None:
    assert [units.parse_share(text) for text in (0.8, "80%", "99.5 %", 1)] == [0.8, 0.8, 0.995, 1.0]
    assert [units.show_share(share) for share in (0.8, 0.995, 1.0)] == ["80%", "99.5%", "100%"]
    for text in ("0.8.1", "eighty", None, True):
        with pytest.raises(units.UnitError, match=r"write a share such as 0\.8 or 80%"):
            units.parse_share(text)


# --- the schema and the examples


def test_schema_in_manifests_is_current(repository: Path) -> None:
    kept = (repository / "manifests/scalingpolicy.schema.json").read_text()
    assert kept == schema_text(), (
        "run: python -m flexpert.controller.policy.schema > manifests/scalingpolicy.schema.json"
    )


def test_schema_knows_keys_defaults_and_patterns() -> None:
    found: dict[str, Any] = schema()
    spec = found["$defs"]["Spec"]

    assert found["required"] == ["apiVersion", "kind", "spec"]
    assert spec["required"] == ["workers", "signals"]
    assert spec["additionalProperties"] is False
    assert spec["properties"]["interval"]["default"] == "5s"
    assert set(found["$defs"]["Workers"]["properties"]) == set(Workers.model_fields)
    pattern = re.compile(found["$defs"]["Slo"]["properties"]["ttft"]["anyOf"][0]["pattern"])
    assert [bool(pattern.search(text)) for text in ("500ms", "1h30m", "1h 30m", "1.5 s", "500", "5 parsecs")] == [
        True
    ] * 4 + [False] * 2


def test_schema_and_parser_know_the_same_signals() -> None:
    kinds = schema()["$defs"]["Spec"]["properties"]["signals"]["items"]["discriminator"]["mapping"]
    assert sorted(kinds) == sorted(
        ["slo", "kv_utilization", "queue_time", "tokens_per_second", "prometheus", "schedule", "forecast"]
    )


def test_schema_takes_what_the_parser_takes(repository: Path) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    validator = jsonschema.Draft202012Validator(schema())
    validator.check_schema(schema())
    texts = [WHOLE, *(file.read_text() for file in (repository / "examples/policies").glob("*.yaml"))]

    for text in texts:
        assert not list(validator.iter_errors(yaml.safe_load(text)))
        assert not list(validator.iter_errors(parse_policy(text).as_written()))
    for good, bad in [
        ("ttft: 1.5s", "ttft: 1500"), ("target: 75%", "target: 75"), ("min: 2,", "minn: 2,"), ("max: 8", "max: 0"),
        ("type: slo", "type: sla"),
        ("select: Min", "select: Most"), ("0  8 * * mon-fri", "8 o'clock"), ("kind: ScalingPolicy\n", ""),
        ("query: sum(jobs), target: 20}", "target: 20}"),
    ]:  # fmt: skip
        assert good in WHOLE
        assert list(validator.iter_errors(yaml.safe_load(WHOLE.replace(good, bad)))), bad


def test_shipped_examples_are_valid(repository: Path) -> None:
    files = sorted((repository / "examples/policies").glob("*.yaml"))

    assert {file.stem for file in files} >= {"default", "minimal", "business-hours", "external-signal"}
    for file in files:
        policy = parse_policy(file.read_text())
        assert policy.metadata.name in {file.stem, "default"}
        json.dumps(policy.as_written())


def test_default_policy_spells_out_the_defaults(repository: Path) -> None:
    config = parse_policy((repository / "examples/policies/default.yaml").read_text()).to_config()
    default = types.PolicyConfig(workers=config.workers)

    assert (config.up, config.down) == (default.up, default.down)
    assert (config.panic, config.fallback) == (default.panic, default.fallback)
