"""The report of a load test: one HTML page with every figure of the result, and latency over time beside what the server did.

render_report(result) -> str; write_report(result, path). Figures are those of measure.RunResult; only the timeline is made anew where its
steps hold too few requests. Needs matplotlib (`pip install flexpert[report]`), else PlotError. Called by `flexpert loadtest --report`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from flexpert.loadtest import aligned, page, plots
from flexpert.loadtest.aligned import Change
from flexpert.loadtest.measure import Interval, Outcome, Quantiles, RunResult, Summary
from flexpert.loadtest.plots import Line, Mark, Panel
from flexpert.loadtest.summary import timeline

__all__ = ["render_report", "write_report"]

MOST_ROWS = 200  # of a table of events
TAIL_POINTS = 400
LEAST_SENT = 10  # requests of one step of the timeline, on average
LEAST_STEPS = 30


def write_report(result: RunResult, path: Path) -> None:
    """Raises PlotError before anything is written."""
    path.write_text(render_report(result), encoding="utf-8")


def render_report(result: RunResult) -> str:
    """The whole page. Equal results give equal text. Raises PlotError."""
    found = aligned.changes(result.events)
    began = datetime.fromtimestamp(result.started_unix_s, UTC)
    lead = (
        f"{result.shape} · {'open' if result.mode == 'open' else 'closed'} loop · {result.model} at {result.url} · "
        f"{began:%Y-%m-%d %H:%M:%S} UTC"
    )
    parts = [
        *_banners(result),
        page.tiles(_tiles(result)),
        _objectives(result),
        page.section("Over time", *_over_time(result, found)),
        page.section("How long the slowest took", *_tails(result)),
        page.section("Figures", *_figures(result)),
        _errors(result),
        *_server(result, found),
        page.section("Settings", _settings(result)),
        page.section("What the figures mean", *_meanings(result)),
    ]
    return page.page(title="Load test", lead=lead, body=[part for part in parts if part], tool=result.tool)


def _banners(result: RunResult) -> list[str]:
    found = []
    failed = [verdict for verdict in result.verdicts if not verdict.passed]
    if failed:
        found.append(page.banner(f"{len(failed)} of {len(result.verdicts)} objectives missed: "
                                 + "; ".join(verdict.text for verdict in failed), kind="bad"))  # fmt: skip
    elif result.verdicts:
        found.append(page.banner(f"All {len(result.verdicts)} objectives kept.", kind="good"))
    if result.lag.degraded:
        text = f"The generator itself was degraded, so these figures say less about the server than they seem to: {result.lag.why}."
        found.append(page.banner(text, kind="warn"))
    return found + [page.banner(note, kind="note") for note in result.notes]


def _tiles(result: RunResult) -> list[tuple[str, str, str]]:
    window = result.window
    failed = window.sent - window.ends.get("ok", 0)
    return [
        ("attainment", page.share(window.attainment), f"{window.met:,} of {window.sent:,} requests"),
        ("goodput", page.per_second(window.goodput_per_s), "requests that met every objective"),
        ("TTFT p99", page.seconds(window.ttft_s.p99), f"p50 {page.seconds(window.ttft_s.p50)}, from the intended time"),
        ("TPOT p99", page.seconds(window.tpot_s.p99), f"p50 {page.seconds(window.tpot_s.p50)}, per output token"),
        ("failed", page.count(failed), "refused, failed, timed out or unfinished"),
        ("output tokens", page.per_second(window.output_tokens_per_s), f"prompt tokens {page.per_second(window.prompt_tokens_per_s)}"),
    ]  # fmt: skip


def _objectives(result: RunResult) -> str:
    if not result.verdicts:
        return ""
    rows = [
        (
            verdict.expression,
            _value(verdict.metric, verdict.value),
            "kept" if verdict.passed else "missed",
            verdict.text,
        )
        for verdict in result.verdicts
    ]
    missed = [number for number, verdict in enumerate(result.verdicts) if not verdict.passed]
    return page.section(
        "Objectives", page.table(("objective", "found", "", "in words"), rows, text=(0, 2, 3), long=(3,), strong=missed)
    )


def _value(metric: str, value: float | None) -> str:
    if metric.startswith(("ttft", "tpot", "itl", "e2e", "lag")):
        return page.seconds(value)
    return page.share(value) if metric in ("attainment", "error_rate") else page.count(value)


def _rows(result: RunResult) -> list[Interval]:
    """The timeline, in longer steps where its own would hold too few requests to tell a percentile of."""
    rows = result.timeline
    sent = sum(row.sent for row in rows)
    while len(rows) >= 2 * LEAST_STEPS and sent < LEAST_SENT * len(rows):
        length_s = rows[-1].from_s + rows[-1].seconds
        rows = timeline(result.outcomes, length_s=length_s, limits=result.objectives, step_s=2 * rows[0].seconds)
    return rows


def _over_time(result: RunResult, found: Sequence[Change]) -> list[str]:
    rows = _rows(result)
    if not rows:
        return ["<p>Nothing was sent.</p>"]
    span_s = max(rows[-1].from_s + rows[-1].seconds, 1e-3)
    panels = _panels(result, rows)
    at_s, workers = aligned.workers_over_time(found, span_s)
    if at_s:
        panels.append(
            Panel(
                title="workers",
                lines=[Line(label="workers", x=at_s, y=workers, colour=plots.BLACK, step=True, fill=True)],
                whole=True,
            )
        )
    marks = [
        Mark(
            at_s=change.at_s,
            end_s=change.ended_s,
            label=change.label,
            colour=plots.RED if change.aborted else plots.SKY,
        )
        for change in found
    ]
    marks += [Mark(at_s=event.at_s, colour=plots.RED) for event in aligned.troubles(result.events)]
    marks += [Mark(at_s=event.at_s, colour=plots.BLACK) for event in aligned.decisions(result.events)]
    svg = plots.timeline(
        panels, span_s=span_s, marks=marks, name="time", alt="Rates, latencies, attainment and workers over the run"
    )
    step = page.seconds(rows[0].seconds)
    told = (
        "Shaded: a change of the number of workers, from its begin to its end; red: one that was aborted, a death or another failure; "
        "black: a decision of the scaling policy. "
        if marks
        else "The server told of no event. "
        if result.events or "admin" in str(result.settings)
        else ""
    )
    return [page.figure(svg, f"Steps of {step}; each request counts where it was intended to be sent. {told}")]


def _panels(result: RunResult, rows: Sequence[Interval]) -> list[Panel]:
    x = [row.from_s for row in rows]

    def line(
        label: str,
        value: Callable[[Interval], float | None],
        colour: str,
        style: str = "-",
        step: bool = False,
        fill: bool = False,
    ) -> Line:
        y = [value(row) for row in rows]
        # A step's value stands in its middle, or holds over the whole of it.
        at = (
            [*x, x[-1] + rows[-1].seconds]
            if step
            else [at_s + row.seconds / 2 for at_s, row in zip(x, rows, strict=True)]
        )
        return Line(label=label, x=at, y=[*y, y[-1]] if step else y, colour=colour, style=style, step=step, fill=fill)

    def limit(key: str) -> tuple[str, float] | None:
        value = result.objectives.get(key)
        return None if value is None else ("objective", value)

    panels = [
        Panel(title="requests/s", lines=[
            line("sent", lambda row: row.sent / row.seconds, plots.GREY, step=True, fill=True),
            line("finished", lambda row: row.finished / row.seconds, plots.BLUE),
            line("failed", lambda row: row.failed / row.seconds, plots.RED, "--"),
        ]),
        Panel(title="TTFT (s)", log=True, limit=limit("ttft"), lines=[
            line("p99", lambda row: row.ttft_p99_s, plots.RED, ":"),
            line("p95", lambda row: row.ttft_p95_s, plots.ORANGE, "--"),
            line("p50", lambda row: row.ttft_p50_s, plots.BLUE),
        ]),
        Panel(title="TPOT (s)", log=True, limit=limit("tpot"), lines=[
            line("p99", lambda row: row.tpot_p99_s, plots.RED, ":"),
            line("p95", lambda row: row.tpot_p95_s, plots.ORANGE, "--"),
            line("p50", lambda row: row.tpot_p50_s, plots.BLUE),
        ]),
        Panel(title="attainment", top=1.04, zoom=True, percent=True, lines=[line("attainment", lambda row: row.attainment, plots.GREEN)]),
        Panel(title="in flight", lines=[line("in flight", lambda row: row.in_flight, plots.PURPLE, step=True)], whole=True),
        Panel(title="output tokens/s", lines=[line("tokens", lambda row: row.output_tokens_per_s, plots.BLUE, step=True, fill=True)]),
    ]  # fmt: skip
    if not result.objectives:  # every answered request then counts as met
        del panels[3]
    return panels


def _tails(result: RunResult) -> list[str]:
    sent = len(result.outcomes)
    kinds: list[tuple[str, Callable[[Outcome], float | None], str, str, str]] = [
        ("TTFT", lambda outcome: outcome.ttft_s, plots.BLUE, "-", "ttft"),
        ("whole answer", lambda outcome: outcome.e2e_s, plots.RED, "--", "e2e"),
        ("TPOT", lambda outcome: outcome.tpot_s, plots.GREEN, "-.", "tpot"),
    ]
    lines, limits = [], []
    for label, value, colour, style, key in kinds:
        times = np.sort([time for outcome in result.outcomes if (time := value(outcome)) is not None and time > 0])
        if len(times):
            lines.append(_tail(label, times, len(times) if key == "tpot" else sent, colour, style))
            if key in result.objectives:
                limits.append((f"objective of {label}", result.objectives[key], colour))
    if not lines:
        return ["<p>No request was answered.</p>"]
    svg = plots.tails(
        lines, title="seconds", limits=limits, name="tails", alt="Share of requests that took longer, by time"
    )
    return [
        page.figure(
            svg,
            "Of all requests sent: one that never got an answer took longer than any time. TPOT: of those that have one.",
        )
    ]


def _tail(label: str, times: np.ndarray, of: int, colour: str, style: str) -> Line:
    """At TAIL_POINTS values, denser towards the slowest."""
    ranks = len(times) - np.unique(np.geomspace(1, len(times), TAIL_POINTS).astype(int))[::-1]
    slower = (len(times) - 1 - ranks + (of - len(times))) / of
    return Line(label=label, x=times[ranks].tolist(), y=slower.tolist(), colour=colour, style=style)


def _figures(result: RunResult) -> list[str]:
    whole, window = result.whole, result.window
    trimmed = (window.from_s, window.to_s) != (whole.from_s, whole.to_s)
    title = (
        f"Without warm-up and cool-down: {page.seconds(window.from_s)} to {page.seconds(window.to_s)}"
        if trimmed
        else "The whole run"
    )
    parts = [f"<h3>{title}</h3>", _latencies(window), _counts(window)]
    if trimmed:
        parts.append(page.section("The whole run", _latencies(whole), _counts(whole), folded=True))
    return parts


def _latencies(summary: Summary) -> str:
    kinds: list[tuple[str, Quantiles]] = [
        ("TTFT", summary.ttft_s), ("TTFT from the actual sending", summary.ttft_from_send_s), ("gap between tokens (ITL)", summary.itl_s),
        ("TPOT", summary.tpot_s), ("whole answer (E2E)", summary.e2e_s), ("schedule lag of the generator", summary.lag_s),
    ]  # fmt: skip
    rows = [
        (
            name,
            page.count(each.count),
            *(
                page.seconds(value)
                for value in (each.mean, each.p50, each.p90, each.p95, each.p99, each.p999, each.max)
            ),
        )
        for name, each in kinds
    ]
    return page.table(("", "of", "mean", "p50", "p90", "p95", "p99", "p99.9", "max"), rows)


def _counts(summary: Summary) -> str:
    rows = [
        ("sent", page.count(summary.sent), ""),
        *((f"… {end}", page.count(number), "") for end, number in summary.ends.items()),
        ("met every objective", page.count(summary.met), f"attainment {page.share(summary.attainment)}"),
        ("answered", page.per_second(summary.requests_per_s), f"goodput {page.per_second(summary.goodput_per_s)}"),
        ("prompt tokens", page.per_second(summary.prompt_tokens_per_s), f"{summary.prompt_mismatch:,} prompts longer or shorter"),
        ("output tokens", page.per_second(summary.output_tokens_per_s), f"{summary.output_mismatch:,} answers longer or shorter"),
        ("answers of one token", page.count(summary.one_token), "have no TPOT"),
        ("answers without usage", page.count(summary.without_usage), "tokens counted by chunks"),
    ]  # fmt: skip
    return page.table(("", "", ""), rows, text=(0, 2))


def _errors(result: RunResult) -> str:
    if not result.whole.errors:
        return ""
    rows = [(page.count(number), text) for text, number in list(result.whole.errors.items())[:MOST_ROWS]]
    return page.section("Errors", page.table(("requests", "error"), rows, text=(1,), long=(1,)))


def _server(result: RunResult, found: Sequence[Change]) -> list[str]:
    if not result.events:
        return []
    rows = []
    for change in found[:MOST_ROWS]:
        near = aligned.touched(change, result.timeline)
        seconds = None if change.ended_s is None else change.ended_s - change.at_s
        rows.append(
            (f"{change.at_s:,.1f} s", change.label, page.seconds(seconds), page.seconds(change.pause_s), page.count(near.sent),
             page.count(near.failed), page.count(near.missed), page.seconds(near.worst_ttft_p95_s), change.text)
        )  # fmt: skip
    headers = ("at", "workers", "took", "pause", "sent", "failed", "missed", "worst TTFT p95", "what")
    told = f"sent, failed and missed: of requests intended from the begin of a change to {aligned.AFTER_S:.0f} s after its end."
    others = [(f"{event.at_s:,.1f} s", event.kind, event.text) for event in aligned.others(result.events)]
    parts = [page.table(headers, rows, text=(1, 8), long=(8,), caption=told)] if rows else []
    if len(found) > MOST_ROWS:
        parts.append(f"<p>and {len(found) - MOST_ROWS} more changes.</p>")
    if others:
        parts.append(
            page.table(("at", "event", "what"), others[:MOST_ROWS], text=(1, 2), long=(2,), caption="Other events")
        )
    return [page.section("What the server did", *parts)]


def _settings(result: RunResult) -> str:
    fixed = {
        "url": result.url, "endpoint": result.endpoint, "model": result.model, "shape": result.shape, "seed": result.seed,
        "duration of the schedule": page.seconds(result.duration_s), "last request ended": page.seconds(result.ended_s),
        **{f"objective: {key}": page.seconds(value) for key, value in result.objectives.items()},
    }  # fmt: skip
    rows = [
        (key.replace("_", " "), ", ".join(value) if isinstance(value, list) else str(value))
        for key, value in {**fixed, **result.settings}.items()
        if value not in (None, "", [], ())
    ]
    return page.table(("setting", "value"), rows, text=(0, 1), long=(1,))


def _meanings(result: RunResult) -> list[str]:
    return [
        "<p>Every time counts from when the schedule wanted a request sent, so a server or a generator that falls behind cannot hide it. "
        "TTFT: to the first token. TPOT: (last token - first token) / (output tokens - 1). E2E: to the last byte. Attainment: requests "
        "that met every objective, of all that were sent; failures, refusals and time-outs count as missed. Goodput: those a second.</p>",
        "<p>A percentile is the smallest time that so many percent of the requests do not exceed. An objective's is over all sent, "
        "a failed one counted as endlessly late; those in tables and plots are of the requests that have the figure.</p>",
        f"<p>Schedule lag is how late the generator itself was: p99 {page.seconds(result.lag.quantiles_s.p99)}, "
        f"and above {page.seconds(result.lag.limit_s)} the run is called degraded.</p>",
    ]
