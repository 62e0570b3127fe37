"""What `flexpert policy show`, `explain` and `dry-run` print, as text from the admin API's values."""

from __future__ import annotations

import time
from typing import Any

import yaml

from flexpert.controller.policy.units import show_duration

_WIDTH = 10


def describe_policy(found: dict[str, Any]) -> str:
    """State, last decision, and the policy itself with every default filled in."""
    text = describe_state(found)
    if not found["active"]:
        return text
    written = yaml.safe_dump(found["policy"], sort_keys=False, allow_unicode=True, width=120)
    return f"{text}\n\n{written.rstrip()}"


def describe_state(found: dict[str, Any]) -> str:
    if not found["active"]:
        rows = [("policy", "none: flexpert up --policy FILE, or flexpert policy reload FILE")]
        return _table(rows + ([("problem", found["problem"])] if found.get("problem") else []))
    workers = found["workers"]
    rows = [
        (
            "policy",
            f"{found['name']} of {found['origin']}: {workers['min']} to {workers['max']} workers, mode {found['mode']}",
        )
    ]
    if by_hand := found.get("mode_by_hand"):
        rows.append(("mode", f"{by_hand['mode']} by {by_hand['owner']}, until it is taken back"))
    if pause := found.get("pause"):
        rows.append(("paused", f"by {pause['owner']}, for {_about(pause['left_s'])} more"))
    if override := found.get("override"):
        rows.append(
            ("override", f"{override['workers']} workers by {override['owner']}, for {_about(override['left_s'])} more")
        )
    if not found["leads"] and (lease := found.get("lease")):
        rows.append(("lease", f"held by {lease['owner']}: this cluster only looks on"))
    if found.get("problem"):
        rows.append(("problem", f"{found['problem']}\nThe policy above stays in use."))
    if last := found.get("last"):
        rows.append(("decision", _line(last)))
    return _table(rows)


def describe_decisions(found: dict[str, Any]) -> str:
    return "\n".join(_line(decision) for decision in found["decisions"]) or "no decision changed the size yet"


def explain(found: dict[str, Any]) -> str:
    """One decision: what was there, what each signal asked for, what the rules made of it, what became of it."""
    rows = [
        (
            "decision",
            f"{found['decision_id']} at {_clock(found['at_s'])}, policy {found['policy']}, mode {found['mode']}",
        ),
        ("reason", f"{found['reason']}: {found['text']}"),
        ("workers", f"{found['now']} ready, {found['wanted']} wanted"),
    ]
    for proposal in found["proposals"]:
        wanted = "nothing" if proposal["wanted"] is None else f"{proposal['wanted']} workers"
        rows.append(("signal", f"{proposal['signal']} asks for {wanted}: {proposal['why']}"))
    for rejected in found["rejected"]:
        rows.append(
            (
                "rule",
                f"{rejected['rule']}: {rejected['from_workers']} -> {rejected['to_workers']} workers, {rejected['why']}",
            )
        )
    action, would = found["action"], found["would"]
    if action:
        following = f"transition {found['transition_id']}" if found.get("transition_id") else "not begun"
        following = f"refused: {found['refused']}" if found.get("refused") else following
        rows.append(("ordered", f"{action['kind']} {action['from_workers']} -> {action['target']} ({following})"))
    elif would:
        rows.append(
            ("ordered", f"nothing; in mode Active: {would['kind']} {would['from_workers']} -> {would['target']}")
        )
    else:
        rows.append(("ordered", "nothing"))
    outcome = found.get("outcome")
    rows.append(("outcome", outcome["text"] if outcome else "not measured yet: five minutes after the decision"))
    return _table(rows)


def describe_dry_run(found: dict[str, Any]) -> str:
    rows = [
        (
            "policy",
            f"{found['policy']}, tried on {found['ticks']} ticks over {_about(found['to_s'] - found['from_s'])}",
        ),
        (
            "devices",
            f"{found['device_hours']:.3g} device-hours (recorded: {found['recorded_device_hours']:.3g}), cost {found['cost']:.3g}",
        ),
        ("changes", str(found["changes_total"])),
    ]
    for change in found["changes"]:
        rows.append(
            (
                "",
                f"{_clock(change['at_s'])}  {change['from_workers']} -> {change['to_workers']}  {change['reason']}: {change['text']}",
            )
        )
    rows.append(("now", f"{found['workers']} workers; {found['now']}"))
    rows.append(("attainment", _attainment(found)))
    return _table(rows)


def _attainment(found: dict[str, Any]) -> str:
    if found["recorded_attainment"] is None:
        return "not recorded: no request ended, or the recorded policy had no slo"
    known, unknown = found["attainment_where_as_many_workers"], found["attainment_unknown_share"]
    text = f"recorded {found['recorded_attainment']:.2%}"
    if known is not None:
        text += f"; {known:.2%} while it would have had as many workers or more"
    return text + (f"; not known for {unknown:.1%} of the requests, when it would have had fewer" if unknown else "")


def _line(decision: dict[str, Any]) -> str:
    change = (
        f"{decision['now']} -> {decision['wanted']}" if decision["now"] != decision["wanted"] else str(decision["now"])
    )
    return f"{decision['decision_id']} at {_clock(decision['at_s'])}: {change} workers, {decision['reason']}: {decision['text']}"


def _clock(at_s: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at_s))


def _about(seconds: float) -> str:
    return show_duration(round(max(0.0, seconds)))


def _table(rows: list[tuple[str, str]]) -> str:
    indent = "\n" + " " * (_WIDTH + 1)
    return "\n".join(f"{name:<{_WIDTH}} {text.replace(chr(10), indent)}" for name, text in rows)
