"""The report of a simulation: one HTML page that compares policies and baselines on one trace.

render_report(simulation) -> str; write_report(simulation, path). Every figure is one of results.Simulation. Needs matplotlib
(`pip install flexpert[report]`), else PlotError. Called by `flexpert simulate --report`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from flexpert.loadtest import page, plots
from flexpert.loadtest.plots import Line, Mark, Panel
from flexpert.simulator.front import Point, front, scatter
from flexpert.simulator.results import FLAP_WINDOW_S, ScaleEvent, Simulation, SimulationResult, Timeline

__all__ = ["render_report", "write_report"]

MOST_ROWS = 200  # of a table of scale events
MOST_COMPARED = len(plots.COLOURS)  # lines of one plot that can still be told apart
MOST_OPEN = 3  # results whose own part is unfolded


def write_report(simulation: Simulation, path: Path) -> None:
    """Raises PlotError before anything is written."""
    path.write_text(render_report(simulation), encoding="utf-8")


def render_report(simulation: Simulation) -> str:
    """The whole page. Equal simulations give equal text. Raises PlotError; ValueError where there is no result."""
    if not simulation.results:
        raise ValueError("a report needs at least one result; this simulation has none")
    results = simulation.results
    own = [result for result in results if result.kind == "policy"]
    opened = (own or list(results))[:MOST_OPEN]
    body = [
        _banner(simulation, own),
        page.section("Compared", *_comparison(simulation), *_notes(simulation)),
        page.section("What it costs to keep the objectives", _front(simulation)),
        page.section("Workers over time", *_workers(simulation)),
        *(_one(simulation, result, number, folded=result not in opened) for number, result in enumerate(results)),
        page.section("Settings", _settings(simulation)),
        page.section("What the figures mean", *_meanings()),
    ]
    slo = ", ".join(_objectives(simulation)) or "no objective of latency"
    part = f", {simulation.half} half" if simulation.half else ""
    scale = f", {simulation.scale:g}x" if simulation.scale != 1 else ""
    lead = (
        f"{simulation.trace}{part}{scale} · {page.seconds(simulation.span_s)} · up to {simulation.devices:,} devices · {slo} · "
        f"{len(results)} runs"
    )
    return page.page(title="Simulation", lead=lead, body=body, tool="flexpert")


def _objectives(simulation: Simulation) -> list[str]:
    slo = simulation.slo
    limits = (("TTFT", slo.ttft_s), ("TPOT", slo.tpot_s))
    return [f"{name} {page.seconds(value)}" for name, value in limits if value is not None] + [
        f"attainment {page.share(slo.attainment)}"
    ]


def _banner(simulation: Simulation, own: Sequence[SimulationResult]) -> str:
    """The cheapest policy that keeps the attainment (or the best one, if none does) against the cheapest baseline that keeps it."""
    asked = simulation.slo.attainment
    keeping = [result for result in own if result.attainment >= asked]
    if not own:
        return ""
    if not keeping:
        best = max(own, key=lambda result: result.attainment)
        text = f"No policy keeps the attainment of {page.share(asked)}; {best.name} comes nearest with {page.share(best.attainment)}."
        return page.banner(text, kind="bad")
    best = min(keeping, key=lambda result: result.device_hours)
    found = f"{page.share(best.attainment)} with {page.amount(best.device_hours)} device-hours"
    text = f"{best.name} keeps the attainment of {page.share(asked)}: {found}."
    others = [
        each
        for each in simulation.results
        if each.kind == "baseline" and each.attainment >= asked and each.device_hours > 0
    ]
    if others:
        listed = (
            f"{other.name} {page.amount(other.device_hours)} ({other.device_hours / max(best.device_hours, 1e-9):.2f}x)"
            for other in sorted(others, key=lambda result: result.device_hours)
        )
        text += f" Baselines that keep it too: {', '.join(listed)}."
    return page.banner(text, kind="good")


def _comparison(simulation: Simulation) -> tuple[str, str]:
    """What each run cost and attained, and how long its requests took."""
    points = _points(simulation)
    best = {(point.x, point.y) for point in front(points)}
    strong = [number for number, point in enumerate(points) if (point.x, point.y) in best]
    costs = (
        "", "kind", "attainment", "missed", "device-hours", "worker-hours", "standby-hours", "mean workers", "peak",
        "changes", "flaps", "stall",
    )  # fmt: skip
    caption = "Bold: no other run has both fewer device-hours and more attainment."
    times = ("", "TTFT mean", "p50", "p95", "p99", "TPOT mean", "p50", "p95", "p99", "queue mean", "p50", "p95", "p99")
    return (
        page.table(
            costs, [_costs(result) for result in simulation.results], text=(0, 1), strong=strong, caption=caption
        ),
        page.table(times, [_times(result) for result in simulation.results]),
    )


def _costs(result: SimulationResult) -> tuple[str, ...]:
    error = result.sampling.attainment_error
    return (
        result.name,
        result.kind,
        page.share(result.attainment) + (f" ± {100 * error:.2f}" if error else ""),
        page.count(result.requests - result.met),
        *map(page.amount, (result.device_hours, result.worker_hours, result.standby_hours, result.mean_workers)),
        *map(page.count, (result.peak_workers, len(result.scale_events), result.flaps)),
        page.seconds(result.stall_s),
    )


def _times(result: SimulationResult) -> tuple[str, ...]:
    kinds = (result.ttft_s, result.tpot_s, result.queue_s)
    return (
        result.name,
        *(page.seconds(value) for each in kinds for value in (each.mean, each.p50, each.p95, each.p99)),
    )


def _points(simulation: Simulation) -> list[Point]:
    return [
        Point(
            x=result.device_hours, y=result.attainment, label=result.name, hollow=result.kind == "baseline",
            colour=plots.GREY if result.kind == "baseline" else plots.BLUE,
        )
        for result in simulation.results
    ]  # fmt: skip


def _front(simulation: Simulation) -> str:
    svg = scatter(
        _points(simulation), x_title="device-hours", y_title="attainment", limit=("asked for", simulation.slo.attainment),
        name="front", alt="Attainment and device-hours of every run",
    )  # fmt: skip
    return page.figure(svg, "Up and to the left is better. Filled: policies; hollow: baselines.")


def _notes(simulation: Simulation) -> list[str]:
    sampled = [result for result in simulation.results if result.sampling.stands_for != 1]
    if not sampled:
        return []
    first = sampled[0].sampling
    return [
        f"<p>One simulated request stands for {first.stands_for:g} of the load ({first.simulated:,} were simulated). The ± are standard "
        "errors of that sample, in percentage points; what the model itself gets wrong is not in them.</p>"
    ]


def _stepped(
    timeline: Timeline,
    y: Sequence[float | None],
    label: str,
    colour: str,
    style: str = "-",
    *,
    fill: bool = False,
    thin: bool = False,
) -> Line:
    """Row i holds from at_s[i] over the interval."""
    x = [*timeline.at_s, timeline.at_s[-1] + timeline.interval_s]
    return Line(label=label, x=x, y=[*y, y[-1]], colour=colour, style=style, step=True, fill=fill, thin=thin)


def _workers(simulation: Simulation) -> list[str]:
    shown = [result for result in simulation.results if result.timeline.at_s]
    if not shown:
        return ["<p>No timeline was kept.</p>"]
    # The policies first, then what they are compared with, as far as colours reach.
    shown = sorted(shown, key=lambda result: result.kind != "policy")
    lines = [
        _stepped(
            result.timeline,
            result.timeline.workers,
            result.name,
            plots.COLOURS[i],
            thin=result.kind != "policy",
        )
        for i, result in enumerate(shown[:MOST_COMPARED])
    ]
    first = shown[0].timeline
    rate = [value / first.interval_s for value in first.arrivals]
    panels = [
        Panel(title="requests/s", lines=[_stepped(first, rate, "arriving", plots.GREY, fill=True)]),
        Panel(title="workers", lines=lines, whole=True),
    ]
    svg = plots.timeline(
        panels,
        span_s=_span_s(simulation),
        heights=(1.0, 2.0),
        name="workers",
        alt="Load and workers of every run over time",
    )
    left = [result.name for result in shown[MOST_COMPARED:]]
    return [page.figure(svg, f"Not drawn: {', '.join(left)}." if left else "Thick: policies; thin: baselines.")]


def _span_s(simulation: Simulation) -> float:
    ends = [
        result.timeline.at_s[-1] + result.timeline.interval_s for result in simulation.results if result.timeline.at_s
    ]
    return simulation.span_s or max(ends, default=1.0)


def _one(simulation: Simulation, result: SimulationResult, number: int, *, folded: bool) -> str:
    parts = [_course(simulation, result, number)] if result.timeline.at_s else []
    parts.append(
        f"<h3>{page.count(len(result.scale_events))} changes of size</h3>"
        if result.scale_events
        else "<p>It never changed its size.</p>"
    )
    if result.scale_events:
        parts.append(_changes(result.scale_events))
    if result.reasons:
        rows = sorted(result.reasons.items(), key=lambda item: (-item[1], item[0]))
        parts.append("<h3>Decisions</h3>")
        parts.append(
            page.table(
                ("reason", "ticks"),
                [(reason, page.count(ticks)) for reason, ticks in rows],
                caption=f"of {result.ticks:,} ticks",
            )
        )
    figures = [
        (
            "requests",
            page.count(result.requests),
            f"{page.count(result.finished)} finished, {page.count(result.rejected)} never fitted",
        ),
        ("met the objectives", page.count(result.met), page.share(result.attainment)),
        (
            "stalled",
            page.seconds(result.stall_s),
            f"{page.seconds(result.stalled_stream_s)} times the streams that ran",
        ),
        ("preempted", page.count(result.preemptions), "requests that lost their KV and were computed again"),
    ]
    parts.append(page.table(("", "", ""), figures, text=(0, 2)))
    title = f"{result.name} ({result.kind})"
    return page.section(title, *parts, folded=folded)


def _course(simulation: Simulation, result: SimulationResult, number: int) -> str:
    timeline, slo = result.timeline, simulation.slo
    rate = [value / timeline.interval_s for value in timeline.arrivals]
    held = [met / came if came else None for met, came in zip(timeline.arrived_met, timeline.arrivals, strict=True)]
    panels = [
        Panel(title="requests/s", lines=[_stepped(timeline, rate, "arriving", plots.GREY, fill=True)]),
        Panel(title="workers", lines=[
            _stepped(timeline, timeline.devices, "devices held", plots.SKY, fill=True),
            _stepped(timeline, timeline.workers, "ready", plots.BLUE),
            _stepped(timeline, timeline.wanted, "wanted", plots.RED, ":"),
        ], whole=True),
        Panel(title="attainment", top=1.04, zoom=True, percent=True, limit=("asked for", slo.attainment),
              lines=[_stepped(timeline, held, "by arrival", plots.GREEN)]),
        Panel(title="TTFT p95 (s)", log=True, limit=None if slo.ttft_s is None else ("objective", slo.ttft_s),
              lines=[_stepped(timeline, timeline.ttft_p95_s, "p95", plots.ORANGE)]),
        Panel(title="TPOT p95 (s)", log=True, limit=None if slo.tpot_s is None else ("objective", slo.tpot_s),
              lines=[_stepped(timeline, timeline.tpot_p95_s, "p95", plots.PURPLE)]),
        Panel(title="requests", lines=[
            _stepped(timeline, timeline.running, "running", plots.BLUE), _stepped(timeline, timeline.waiting, "waiting", plots.RED, "--"),
        ]),
        Panel(title="KV in use", top=1.04, percent=True, lines=[_stepped(timeline, timeline.kv_share, "KV", plots.BLACK)]),
    ]  # fmt: skip
    # Few changes are marked one by one; many would hide the lines, and the worker panel shows them anyway.
    marks = [_mark(event) for event in result.scale_events] if len(result.scale_events) <= 40 else []
    svg = plots.timeline(
        panels, span_s=_span_s(simulation), marks=marks, name=f"run{number}", alt=f"The course of {result.name}"
    )
    return page.figure(
        svg, f"Steps of {page.seconds(timeline.interval_s)}." + (" Shaded: a change of size." if marks else "")
    )


def _mark(event: ScaleEvent) -> Mark:
    colour = plots.RED if event.state == "aborted" else plots.SKY
    return Mark(at_s=event.at_s, end_s=event.ended_s, label=f"{event.from_workers}→{event.to_workers}", colour=colour)


def _changes(events: Sequence[ScaleEvent]) -> str:
    rows = [
        (
            page.moment(event.at_s), f"{event.from_workers} → {event.to_workers}", event.state,
            page.seconds(None if event.ended_s is None else event.ended_s - event.at_s), page.seconds(event.stall_s),
            _size(event.moved_bytes), event.reason, event.text,
        )
        for event in events[:MOST_ROWS]
    ]  # fmt: skip
    more = f"The first {MOST_ROWS} of {len(events):,}." if len(events) > MOST_ROWS else ""
    headers = ("at", "workers", "", "took", "stall", "moved", "reason", "why")
    return page.table(headers, rows, text=(1, 2, 6, 7), long=(7,), caption=more)


def _size(number_bytes: int) -> str:
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if number_bytes >= unit:
            return f"{number_bytes / unit:.3g} {name}"
    return f"{number_bytes} B"


def _settings(simulation: Simulation) -> str:
    rows = [
        ("trace", simulation.trace), ("part", f"{simulation.half} half" if simulation.half else "the whole"),
        ("load", f"{simulation.scale:g} times the recorded"),
        ("length", page.seconds(simulation.span_s)), ("devices at most", page.count(simulation.devices)), ("profile", simulation.profile),
        ("objectives", ", ".join(_objectives(simulation))), ("seed", str(simulation.seed)),
    ]  # fmt: skip
    return page.table(("setting", "value"), rows, text=(0, 1), long=(1,))


def _meanings() -> list[str]:
    return [
        "<p>Attainment: requests that met the objectives, of all that arrived; those that can never fit count as missed. Device-hours: "
        "serving, joining and leaving workers over the length of the trace; worker-hours: those that serve; standby-hours: warm processes "
        "beside them.</p>",
        "<p>Flaps: changes of size against the direction of the one before, within "
        f"{page.seconds(FLAP_WINDOW_S)} of it. Stall: how long all streams stood still at the commits of changes, added up.</p>",
    ]
