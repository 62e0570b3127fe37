"""One HTML page that needs nothing else: no script, no style sheet or font from elsewhere; plots are inline SVG.

Everything that comes from a run is escaped here. Used by the reports of the load test and of the simulator.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape

__all__ = [
    "amount",
    "banner",
    "count",
    "figure",
    "moment",
    "page",
    "per_second",
    "seconds",
    "section",
    "share",
    "table",
    "tiles",
]

NONE = "–"

_STYLE = """
:root { color-scheme: light; }
body { margin: 0; background: #f6f6f4; color: #222; font: 15px/1.5 system-ui, "DejaVu Sans", sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 24px 28px 48px; background: #fff; }
h1 { font-size: 24px; line-height: 1.25; margin: 0 0 4px; }
h2 { font-size: 18px; margin: 36px 0 8px; border-bottom: 1px solid #ddd; padding-bottom: 4px; }
h3 { font-size: 15px; margin: 20px 0 6px; }
p { margin: 6px 0; max-width: 78ch; }
.lead { color: #555; max-width: none; }
.banner { padding: 10px 14px; border-left: 6px solid #8a8a8a; background: #f2f2f0; margin: 12px 0; }
.good { border-color: #009E73; background: #eef7f3; }
.bad { border-color: #D55E00; background: #fcf1ea; }
.warn { border-color: #E69F00; background: #fdf6e6; }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(165px, 1fr)); gap: 10px; margin: 16px 0; }
.tile { border: 1px solid #ddd; padding: 8px 12px; }
.tile b { display: block; white-space: nowrap; font-size: 18px; font-weight: 600; font-variant-numeric: tabular-nums; }
.tile span { color: #555; font-size: 13px; } .tile small { display: block; color: #555; font-size: 12px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13.5px; margin: 8px 0; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 4px 10px; border-bottom: 1px solid #e6e6e6; vertical-align: top; white-space: nowrap; }
th { font-weight: 600; white-space: normal; vertical-align: bottom; border-bottom: 2px solid #bbb; } td.text, th.text { text-align: left; }
td.long { white-space: normal; min-width: 22ch; }
tr.strong td { font-weight: 600; }
caption { text-align: left; color: #555; padding-bottom: 4px; }
figure { margin: 12px 0; overflow-x: auto; } figcaption { color: #555; font-size: 13px; }
svg { width: 100%; min-width: 720px; height: auto; } svg * { stroke-linejoin: round; stroke-linecap: butt; }
svg text { font-family: system-ui, "DejaVu Sans", sans-serif !important; }
details > summary { cursor: pointer; padding: 6px 0; font-weight: 600; }
code { font: 13px/1.4 ui-monospace, "DejaVu Sans Mono", monospace; background: #f2f2f0; padding: 1px 4px; }
footer { color: #777; font-size: 12.5px; margin-top: 36px; }
@media (max-width: 600px) { main { padding: 16px 12px 32px; } }
@media print { svg { min-width: 0; } body { background: #fff; } main { max-width: none; } figure, tr { break-inside: avoid; } }
"""


def page(*, title: str, lead: str, body: Iterable[str], tool: str = "") -> str:
    """The whole document. lead: one line below the title; body: elements as HTML."""
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}</title>",
            f"<style>{_STYLE}</style>",
            "</head>",
            "<body>",
            "<main>",
            f"<h1>{escape(title)}</h1>",
            f'<p class="lead">{escape(lead)}</p>',
            *body,
            f"<footer>{escape(f'Written by {tool}.' if tool else '')}</footer>",
            "</main>",
            "</body>",
            "</html>",
            "",
        ]
    )


def section(title: str, *parts: str, folded: bool = False) -> str:
    """folded: closed until it is clicked."""
    if folded:
        return "\n".join([f"<details>\n<summary>{escape(title)}</summary>", *parts, "</details>"])
    return "\n".join([f"<section>\n<h2>{escape(title)}</h2>", *parts, "</section>"])


def banner(text: str, *, kind: str) -> str:
    """kind: good, bad or warn."""
    return f'<div class="banner {kind}">{escape(text)}</div>'


def tiles(items: Sequence[tuple[str, str, str]]) -> str:
    """(what, figure, small print) of each."""
    cells = (
        f'<div class="tile"><span>{escape(what)}</span><b>{escape(value)}</b><small>{escape(note)}</small></div>'
        for what, value, note in items
    )
    return "\n".join(['<div class="tiles">', *cells, "</div>"])


def table(
    headers: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    text: Sequence[int] = (0,),
    long: Sequence[int] = (),
    strong: Sequence[int] = (),
    caption: str = "",
) -> str:
    """Numbers stand right. text: columns that are words; long: those that may wrap; strong: rows that stand out."""

    def cell(tag: str, column: int, value: str) -> str:
        classes = [name for name, columns in (("text", text), ("long", long)) if column in columns]
        return (
            f'<{tag} class="{" ".join(classes)}">{escape(value)}</{tag}>'
            if classes
            else f"<{tag}>{escape(value)}</{tag}>"
        )

    head = "".join(cell("th", column, value) for column, value in enumerate(headers))
    body = [
        ('<tr class="strong">' if number in strong else "<tr>")
        + "".join(cell("td", column, value) for column, value in enumerate(row))
        + "</tr>"
        for number, row in enumerate(rows)
    ]
    title = [f"<caption>{escape(caption)}</caption>"] if caption else []
    parts = ['<div class="scroll"><table>', *title, f"<thead><tr>{head}</tr></thead>", "<tbody>", *body, "</tbody>"]
    return "\n".join([*parts, "</table></div>"])


def figure(svg: str, caption: str = "") -> str:
    return f"<figure>\n{svg}\n<figcaption>{escape(caption)}</figcaption>\n</figure>"


def seconds(value: float | None) -> str:
    """A time to three digits, in the unit that suits it."""
    if value is None or math.isnan(value):
        return NONE
    if math.isinf(value):
        return "∞"
    if value == 0:
        return "0 s"
    if abs(value) >= 7200:
        return f"{value / 3600:.3g} h"
    if abs(value) >= 100:
        return f"{value:,.0f} s"
    if abs(value) >= 1:
        return f"{value:.3g} s"
    return f"{value * 1e3:.3g} ms"


def moment(at_s: float) -> str:
    """A time of a long run: 6:05:10 after 6 hours, 5 minutes and 10 seconds."""
    whole = round(at_s)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"


def share(value: float | None, digits: int = 2) -> str:
    return NONE if value is None else f"{100 * value:.{digits}f}%"


def count(value: float | None) -> str:
    """A number of things; part of a thing only where there is one (averages)."""
    if value is None:
        return NONE
    return f"{value:,.0f}" if value == int(value) or abs(value) >= 1000 else f"{value:,.4g}"


def amount(value: float) -> str:
    """A quantity that is no count: hours, averages; to three digits or a tenth."""
    return f"{value:,.1f}" if abs(value) >= 100 else f"{value:.3g}"


def per_second(value: float | None) -> str:
    return NONE if value is None else f"{value:,.0f}/s" if value >= 100 else f"{value:.3g}/s"
