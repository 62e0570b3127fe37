"""Tables of docs/benchmarks.md that are made of saved runs: writes them anew between their marks.

    python benchmarks/tables.py            # after a run was saved
    python benchmarks/tables.py --check    # exit code 1 where a table is not that of its run

A mark names a run and what of it is shown; the table follows it, up to the closing mark, and is empty as long as the run is not there:

    <!-- table autoscale-cpu-2core goals -->
    <!-- table autoscale-cpu-2core rows variant failed attainment -->
    <!-- end -->

"rows" takes those that have the first of the columns.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import saved_run

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"
MARK = re.compile(r"(<!-- table (\S+) (goals|rows)([^>]*) -->\n).*?(<!-- end -->)", re.DOTALL)


def text_of(value: object) -> str:
    """1234.5 -> "1,234.5", 0.01234 -> "0.0123": three digits that count; nothing for None."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if not isinstance(value, float):
        return str(value)
    if float(value).is_integer() or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:,.4f}".rstrip("0") if abs(value) < 10 else f"{value:,.1f}"


def table(columns: list[str], rows: list[dict[str, Any]]) -> str:
    """Markdown, a line a row."""
    lines = [columns, ["---"] * len(columns), *([text_of(row.get(column)) for column in columns] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def shown(run: dict[str, Any], what: str, columns: list[str]) -> str:
    """One table of a saved run."""
    if what == "goals":
        return table(["goal", "value", "bound", "met"], [{"goal": goal["name"]} | goal for goal in run["goals"]])
    return table(columns, [row for row in run["rows"] if columns[0] in row])


def filled(page: str, folder: Path = saved_run.RESULTS) -> str:
    """The page with all its tables as the saved runs have them."""

    def fill(found: re.Match[str]) -> str:
        mark, name, what, columns, end = found.groups()
        path = folder / f"{name}.json"
        return f"{mark}{shown(json.loads(path.read_text()), what, columns.split()) if path.exists() else ''}{end}"

    return MARK.sub(fill, page)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args()
    before = PAGE.read_text()
    after = filled(before)
    if options.check:
        raise SystemExit(0 if after == before else f"{PAGE.name} is not what the saved runs say: run {parser.prog}")
    PAGE.write_text(after)


if __name__ == "__main__":
    main()
