"""A result as JSON, as CSV (one line a request) and as the text that ends a run."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flexpert.loadtest.measure import Quantiles, RunResult, Summary

__all__ = ["as_json", "summary_lines", "write_csv", "write_json"]

_MEASURED = ("ttft_s", "ttft_from_send_s", "tpot_s", "e2e_s", "lag_s")


def as_json(result: RunResult, *, requests: bool = True) -> dict[str, Any]:
    """requests: every single one too. What is infinite or missing is null."""
    found = {
        field.name: getattr(result, field.name) for field in dataclasses.fields(result) if field.name != "outcomes"
    }
    plain: dict[str, Any] = {name: _plain(value) for name, value in found.items()}
    plain["passed"] = result.passed
    if requests:
        plain["requests"] = [
            {**_plain(outcome), **{name: _plain(getattr(outcome, name)) for name in _MEASURED}}
            for outcome in result.outcomes
        ]
    return plain


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, float):
        return round(value, 9) if math.isfinite(value) else None
    return value if isinstance(value, str | int | bool | None) else str(value)


def write_json(result: RunResult, path: Path) -> None:
    path.write_text(json.dumps(as_json(result), indent=1) + "\n")


def write_csv(result: RunResult, path: Path) -> None:
    """Times in seconds since the run began; empty where there is none."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        names = [field.name for field in dataclasses.fields(type(result.outcomes[0]))] if result.outcomes else []
        writer.writerow([*names, *_MEASURED])
        for outcome in result.outcomes:
            values = [getattr(outcome, name) for name in (*names, *_MEASURED)]
            writer.writerow(
                ["" if value is None else round(value, 9) if isinstance(value, float) else value for value in values]
            )


def summary_lines(result: RunResult) -> Iterator[str]:
    """For people, the verdicts last."""
    window = result.window
    yield f"{result.mode} loop, {result.shape}, against {result.model} at {result.url} ({result.endpoint}), seed {result.seed}"
    yield ""
    if result.window is not result.whole:
        yield f"steady state, {window.from_s:g} s to {window.to_s:g} s, of {result.whole.sent} requests in all:"
    yield from _counts(window)
    yield ""
    yield from _table(window)
    if window.errors:
        yield ""
        yield "errors"
        for text, count in list(window.errors.items())[:8]:
            yield f"  {count:>8}  {text}"
        if len(window.errors) > 8:
            yield f"  {sum(list(window.errors.values())[8:]):>8}  others, of {len(window.errors) - 8} kinds"
    for note in result.notes:
        yield f"note: {note}"
    if result.events:
        yield f"events of the server: {len(result.events)}, the last: {result.events[-1].text}"
    lag = result.lag
    yield (
        f"DEGRADED: {lag.why}"
        if lag.degraded
        else f"generator kept up: p99 of its schedule lag {_ms(lag.quantiles_s.p99)}"
    )
    for verdict in result.verdicts:
        yield f"{'ok  ' if verdict.passed else 'FAIL'} {verdict.text}"


def _counts(summary: Summary) -> Iterator[str]:
    ends = ", ".join(f"{count} {end}" for end, count in summary.ends.items() if count)
    yield f"requests    {summary.sent} sent" + (f": {ends}" if ends else "")
    attained = "-" if summary.attainment is None else f"{summary.attainment:.4%}"
    yield f"attainment  {attained} met every objective, {summary.goodput_per_s:.4g}/s"
    yield (
        f"throughput  {summary.requests_per_s:.4g} requests/s, {summary.output_tokens_per_s:.5g} output tokens/s, "
        f"{summary.prompt_tokens_per_s:.5g} prompt tokens/s"
    )


def _table(summary: Summary) -> Iterator[str]:
    columns = ("mean", "p50", "p90", "p95", "p99", "p999", "max")
    yield f"{'':<16}" + "".join(f"{name.replace('p999', 'p99.9'):>11}" for name in columns)
    rows: dict[str, Quantiles] = {
        "ttft": summary.ttft_s, "ttft from send": summary.ttft_from_send_s, "tpot": summary.tpot_s, "itl": summary.itl_s,
        "e2e": summary.e2e_s, "schedule lag": summary.lag_s,
    }  # fmt: skip
    for name, found in rows.items():
        yield f"{name:<16}" + "".join(f"{_ms(getattr(found, column)):>11}" for column in columns)


def _ms(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value * 1e3:.4g} ms" if value < 1 else f"{value:.4g} s"
