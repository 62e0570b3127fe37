"""Attainment against cost: which runs no other beats, and a picture of it. Used by the report.

What is drawn is drawn by matplotlib, imported when the first figure is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flexpert.loadtest import plots

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Point", "front", "scatter"]

MOST_NINES = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    x: float
    y: float
    label: str
    colour: str = plots.BLUE
    hollow: bool = False


def front(points: Sequence[Point]) -> list[Point]:
    """Those that no other beats: less x and as much y, or more y at as much x. By x."""
    best: list[Point] = []
    for point in sorted(points, key=lambda point: (point.x, -point.y)):
        if not best or point.y > best[-1].y:
            best.append(point)
    return best


def scatter(
    points: Sequence[Point], *, x_title: str, y_title: str, limit: tuple[str, float] | None = None, name: str, alt: str
) -> str:
    """Named points, and the front of those that none beats as a stepped line. y is a share, drawn by its nines: 90%, 99% and 99.9% stand
    equally far apart."""
    with plots.figure(4.4) as drawn:
        ax = drawn.subplots()
        best = front(points)
        if len(best) > 1:
            ax.plot(
                [point.x for point in best], [_nines(point.y) for point in best], drawstyle="steps-post", color="#bbbbbb",
                linewidth=1.4, zorder=1, label="unbeaten in both",
            )  # fmt: skip
        for point in points:
            ax.plot(
                point.x, _nines(point.y), marker="s" if point.hollow else "o", markersize=7, linestyle="none", zorder=3,
                markerfacecolor="white" if point.hollow else point.colour, markeredgecolor=point.colour, markeredgewidth=1.6,
            )  # fmt: skip
        if limit is not None:
            ax.axhline(
                _nines(limit[1]), color=plots.BLACK, linestyle=(0, (4, 3)), linewidth=1.0, label=limit[0], zorder=1
            )
        ax.set_xlabel(x_title)
        ax.set_ylabel(y_title)
        _shape_scatter(ax, points, limit)
        if len(best) > 1 or limit is not None:
            ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.04), borderaxespad=0.4)
        _label_points(ax, points)
        return plots.as_svg(drawn, name=name, alt=alt)


def _nines(share: float) -> float:
    """0.9 -> 1, 0.99 -> 2, 0.999 -> 3; all of it -> MOST_NINES."""
    return -math.log10(max(1 - share, 10**-MOST_NINES))


def _shape_scatter(ax: Axes, points: Sequence[Point], limit: tuple[str, float] | None) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter

    xs = [point.x for point in points] or [1.0]
    room = max(max(xs) - min(xs), 0.4 * max(xs)) or 1.0  # a difference of a hundredth is not to look like the world
    middle = (min(xs) + max(xs)) / 2
    ax.set_xlim(max(middle - 0.58 * room, 0), middle + 0.72 * room)
    nines = [_nines(point.y) for point in points] + ([_nines(limit[1])] if limit else [])
    low, high = min(nines, default=0.0), max(nines, default=1.0)
    ax.set_ylim(max(low - 0.12 * (high - low) - 0.05, 0), high + 0.12 * (high - low) + 0.05)
    shares = [0.0, 0.2, 0.4, 0.6, 0.7, 0.8] + [
        1 - miss * 10**-n for n in range(1, int(MOST_NINES)) for miss in (1, 0.5, 0.2)
    ]
    ticks = [_nines(each) for each in shares] + [MOST_NINES]
    ax.yaxis.set_major_locator(FixedLocator(_apart(ticks, (high - low) / 12)))
    ax.yaxis.set_major_formatter(
        FuncFormatter(lambda value, _: "100%" if value >= MOST_NINES else f"{100 * (1 - 10**-value):.6g}%")
    )


def _apart(ticks: Sequence[float], gap: float) -> list[float]:
    """Those of them that stand at least a gap apart; whole nines come first."""
    kept: list[float] = []
    for tick in sorted(ticks, key=lambda tick: (abs(tick - round(tick)) > 1e-9, tick)):
        if all(abs(tick - other) >= gap for other in kept):
            kept.append(tick)
    return sorted(kept)


def _label_points(ax: Axes, points: Sequence[Point]) -> None:
    """Beside each point; moved up or down where that would run into another label or point."""
    scale = 72.0 / ax.figure.dpi  # transforms count in pixels, offsets in points
    at = [tuple(value * scale for value in ax.transData.transform((point.x, _nines(point.y)))) for point in points]
    taken = [(x - 5, x + 5, y) for x, y in at]  # left, right, middle
    for point, (x, y) in sorted(zip(points, at, strict=True), key=lambda pair: -pair[1][1]):
        left, right = x + 8, x + 8 + 5.2 * len(point.label)
        tried = (y + side * step for step in range(0, 78, 6) for side in ((1, -1) if step else (1,)))
        height = next((h for h in tried if not any(left < b and a < right and abs(h - c) < 10 for a, b, c in taken)), y)
        taken.append((left, right, height))
        ax.annotate(
            point.label, (point.x, _nines(point.y)), xytext=(8, height - y), textcoords="offset points", va="center", fontsize=8.5,
            bbox=dict(facecolor="white", edgecolor="none", alpha=0.85, pad=0.6),
            arrowprops=dict(arrowstyle="-", color="#aaaaaa", linewidth=0.7, shrinkA=0, shrinkB=4) if abs(height - y) > 8 else None,
        )  # fmt: skip
