"""Plots as inline SVG: figures are described as data (panels, lines, marks), and drawn by matplotlib.

matplotlib is imported when the first figure is drawn, and its drawing state is not touched: no pyplot, no global settings. The same
description gives the same bytes with one release of matplotlib. Colours are those of Okabe and Ito, which colour-blind people can
tell apart; lines differ in style as well. Used by the reports of the load test and of the simulator.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import StringIO
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "BLACK", "BLUE", "COLOURS", "GREEN", "GREY", "ORANGE", "PURPLE", "RED", "SKY", "Line", "Mark", "Panel", "PlotError", "as_svg",
    "figure", "require_plots", "tails", "time_axis", "timeline",
]  # fmt: skip

BLUE, RED, GREEN, ORANGE, PURPLE, SKY, BLACK = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#E69F00",
    "#CC79A7",
    "#56B4E9",
    "#222222",
)
GREY = "#8a8a8a"
COLOURS = (BLUE, RED, GREEN, PURPLE, ORANGE, SKY, BLACK, GREY)
WIDTH_IN, PANEL_IN = 10.0, 1.75
LEFT_IN, RIGHT_IN, TOP_IN, BOTTOM_IN = 0.95, 1.6, 0.3, 0.5
LONGEST_LABEL = 22
LABEL_GAP = 0.045  # of the width: marks closer than this share a label
MOST_LABELS = 24
LOG_FROM = 6.0  # a logarithmic panel is one only where its values differ by so much

_DECIMALS = re.compile(r"(\.\d\d)\d+")  # a hundredth of a point is not seen

_SETTINGS: Any = {
    "svg.fonttype": "none", "svg.hashsalt": "flexpert", "font.family": "sans-serif", "font.size": 9, "axes.labelsize": 9,
    "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#666666", "axes.labelcolor": BLACK, "axes.axisbelow": True,
    "axes.grid": True, "grid.color": "#e4e4e4", "grid.linewidth": 0.7, "xtick.color": "#444444", "ytick.color": "#444444",
    "legend.frameon": False, "legend.fontsize": 8.5, "lines.linewidth": 1.5, "path.simplify": True, "axes.unicode_minus": True,
    "text.parse_math": False,
}  # fmt: skip


class PlotError(RuntimeError):
    """Plots cannot be drawn on this machine; the message says what to install."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """x in seconds; y in the panel's unit, None: nothing was measured there. step: y holds from its x to the next."""

    label: str
    x: Sequence[float]
    y: Sequence[float | None]
    colour: str = BLUE
    style: str = "-"
    step: bool = False
    fill: bool = False
    thin: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """title: with the unit. limit: (label, y) of a dashed line. top: y axis to there. zoom: not from 0 where no value comes near it."""

    title: str
    lines: Sequence[Line]
    limit: tuple[str, float] | None = None
    log: bool = False
    top: float | None = None
    percent: bool = False
    whole: bool = False
    zoom: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """Something that happened: a vertical line through all panels; shaded to end_s where it took time."""

    at_s: float
    label: str = ""
    end_s: float | None = None
    colour: str = GREY


def time_axis(span_s: float) -> tuple[float, str]:
    """Seconds in the unit that suits a span of that length, and its name."""
    if span_s >= 5 * 86400:
        return 86400.0, "days"
    if span_s >= 5 * 3600:
        return 3600.0, "hours"
    return (60.0, "minutes") if span_s >= 600 else (1.0, "seconds")


def timeline(
    panels: Sequence[Panel],
    *,
    span_s: float,
    marks: Sequence[Mark] = (),
    heights: Sequence[float] = (),
    name: str,
    alt: str,
) -> str:
    """Panels over one time axis, one below the other. name: makes the ids of this figure its own; alt: for who cannot see it.

    heights: of the panels, 1 is the usual one.
    """
    unit_s, unit = time_axis(span_s)
    if not panels:
        raise ValueError("a timeline needs a panel")
    heights = heights or [1.0] * len(panels)
    height_in = TOP_IN + BOTTOM_IN + PANEL_IN * sum(heights)
    with figure(height_in) as drawn:
        from matplotlib.ticker import MultipleLocator

        axes: list[Axes] = list(drawn.subplots(len(panels), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0])
        for ax, panel in zip(axes, panels, strict=True):
            _draw_panel(ax, panel, unit_s)
            _draw_marks(ax, marks, unit_s)
        axes[-1].set_xlabel(f"time since the start ({unit})")
        axes[-1].set_xlim(0, span_s / unit_s)
        if unit == "hours":
            axes[-1].xaxis.set_major_locator(
                MultipleLocator(next(step for step in (1, 2, 3, 4, 6, 12) if span_s / 3600 / step <= 12))
            )
        _label_marks(axes[0], marks, span_s, unit_s)
        for ax in axes:
            ax.yaxis.set_label_coords(-0.72 / (WIDTH_IN - LEFT_IN - RIGHT_IN), 0.5)
        return as_svg(drawn, name=name, alt=alt)


def _draw_panel(ax: Axes, panel: Panel, unit_s: float) -> None:
    for line in panel.lines:
        x = [at_s / unit_s for at_s in line.x]
        y = [math.nan if value is None else value for value in line.y]
        if line.fill:
            ax.fill_between(x, y, step="post" if line.step else None, color=line.colour, alpha=0.15, linewidth=0)
        ax.plot(
            x, y, drawstyle="steps-post" if line.step else "default", color=line.colour, linestyle=line.style, label=_shown(line.label),
            linewidth=0.9 if line.thin else 1.5, zorder=2 if line.thin else 2.5,
        )  # fmt: skip
        # A lone value between two gaps has no line: it gets a dot.
        lone = [
            i for i, value in enumerate(y)
            if not math.isnan(value) and all(math.isnan(each) for each in (*y[max(i - 1, 0) : i], *y[i + 1 : i + 2]))
        ]  # fmt: skip
        ax.plot(
            [x[i] for i in lone], [y[i] for i in lone], linestyle="none", marker="o", markersize=2.5, color=line.colour
        )
    if panel.limit is not None:
        label, value = panel.limit
        ax.axhline(value, color=BLACK, linestyle=(0, (4, 3)), linewidth=1.0, label=label)
    _shape_axis(ax, panel)
    ax.set_ylabel(panel.title)
    if len(panel.lines) > 1 or panel.limit is not None:
        ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.04), borderaxespad=0.4, handlelength=1.8)


def _shown(label: str) -> str:
    """As long as the margin is wide; matplotlib hides labels that begin with an underscore."""
    label = label if len(label) <= LONGEST_LABEL else f"{label[: LONGEST_LABEL - 1]}…"
    return f"\u200a{label}" if label.startswith("_") else label


def _shape_axis(ax: Axes, panel: Panel) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    values = [value for line in panel.lines for value in line.y if value is not None and math.isfinite(value)]
    values += [panel.limit[1]] if panel.limit else []
    positive = [value for value in values if value > 0]
    if panel.log and positive and max(positive) > LOG_FROM * min(positive):
        ax.set_yscale("log")
        ax.set_ylim(min(positive) / 1.5, max(positive) * 1.5)
        decades = math.log10(max(positive) / min(positive))
        ax.yaxis.set_major_locator(LogLocator(subs=(1.0,) if decades > 1.7 else (1.0, 2.0, 5.0)))
        ax.yaxis.set_minor_formatter(NullFormatter())
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        return
    low = min(values, default=0.0)
    bottom = next((each for each in (0.98, 0.9, 0.75) if panel.zoom and low > each), 0.0)
    # A line that lies on 0% is seen above the axis.
    ax.set_ylim(
        bottom or (-0.03 if panel.percent else 0.0),
        panel.top if panel.top is not None else max([*values, 0]) * 1.08 or 1,
    )
    if panel.zoom and bottom:
        ax.set_ylim(top=1 + 0.04 * (1 - bottom))
    if panel.percent:
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.3g}%"))
    else:
        ax.yaxis.set_major_locator(MaxNLocator(nbins=5, integer=panel.whole))
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))


def _draw_marks(ax: Axes, marks: Sequence[Mark], unit_s: float) -> None:
    for mark in marks:
        if mark.end_s is not None and mark.end_s > mark.at_s:
            ax.axvspan(mark.at_s / unit_s, mark.end_s / unit_s, color=mark.colour, alpha=0.13, linewidth=0, zorder=0.5)
        ax.axvline(mark.at_s / unit_s, color=mark.colour, linewidth=0.9, linestyle=(0, (1, 1.2)), zorder=0.9)


def _label_marks(ax: Axes, marks: Sequence[Mark], span_s: float, unit_s: float) -> None:
    """Above the top panel, where they do not run into one another."""
    last_s = -math.inf
    labelled = [mark for mark in sorted(marks, key=lambda mark: mark.at_s) if mark.label and 0 <= mark.at_s <= span_s]
    for mark in labelled if len(labelled) <= MOST_LABELS else []:
        room_s = LABEL_GAP * span_s * max(len(mark.label) / 4, 1)
        if mark.at_s - last_s >= room_s:
            ax.annotate(
                mark.label, (mark.at_s / unit_s, 1.0), xycoords=("data", "axes fraction"), xytext=(0, 3),
                textcoords="offset points", ha="center", va="bottom", fontsize=8, color=BLACK, annotation_clip=False,
            )  # fmt: skip
            last_s = mark.at_s


def tails(
    lines: Sequence[Line], *, title: str, limits: Sequence[tuple[str, float, str]] = (), name: str, alt: str
) -> str:
    """Share of all requests that took longer than x; both axes are logarithmic, so the slowest 0.1% are seen. limits: label, x, colour."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    with figure(3.4) as drawn:
        ax = drawn.subplots()
        for line in lines:
            ax.plot(line.x, [value or math.nan for value in line.y], color=line.colour, linestyle=line.style, label=line.label)  # fmt: skip
        for label, x, colour in limits:
            ax.axvline(x, color=colour, linestyle=(0, (4, 3)), linewidth=1.0, label=label)
        ax.set_xscale("log")
        ax.set_yscale("log")
        ax.set_ylim(top=1.0)
        ax.set_xlabel(title)
        ax.set_ylabel("share of requests that took longer")
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}%"))
        ax.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_minor_formatter(NullFormatter())
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.02), borderaxespad=0.4)
        return as_svg(drawn, name=name, alt=alt)


def require_plots() -> None:
    """Raises PlotError where no plot can be drawn: for those who want to know before a long run."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise PlotError("plots need matplotlib, which is not installed: pip install flexpert[report]") from error


@contextmanager
def figure(height_in: float) -> Iterator[Figure]:
    require_plots()
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_SETTINGS):
        drawn = Figure(figsize=(WIDTH_IN, height_in))
        # Fixed margins: a layout that is computed takes seconds for a tall figure.
        drawn.subplots_adjust(
            left=LEFT_IN / WIDTH_IN, right=1 - RIGHT_IN / WIDTH_IN, bottom=BOTTOM_IN / height_in, top=1 - TOP_IN / height_in, hspace=0.12
        )  # fmt: skip
        yield drawn


def as_svg(figure: Figure, *, name: str, alt: str) -> str:
    """The <svg> element alone: without prolog, metadata, name spaces and style rules, with ids of its own."""
    from html import escape

    written = StringIO()
    figure.savefig(written, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = written.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"\s*<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<style type=\"text/css\">.*?</style>", "", text, flags=re.DOTALL)
    text = text.replace("xlink:href=", "href=")
    text = re.sub(r"(\bid=\"|\"#|url\(#)", rf"\g<1>{name}-", text)
    text = re.sub(r" d=\"[^\"]*\"", lambda path: _DECIMALS.sub(r"\1", path[0]).replace(" \n", " "), text)
    text = re.sub(r" font-family: [^;]*;", "", text)  # the page's own
    opening = re.compile(r"<svg\b[^>]*?(viewBox=\"[^\"]*\")[^>]*>")
    return opening.sub(rf'<svg \1 role="img" aria-label="{escape(alt)}">', text, count=1).strip()
