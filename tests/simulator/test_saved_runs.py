"""What benchmarks make of a load test's events, and the page's tables of saved runs: without a cluster, without a run."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from flexpert.loadtest.aligned import changes
from flexpert.loadtest.measure import ServerEvent

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import autoscale_rows as rows
import tables


def events(name: str, *steps: tuple[float, str], sizes: tuple[int, int]) -> list[ServerEvent]:
    before, after = ([f"worker-{number}" for number in range(size)] for size in sizes)
    fields = {"transition_id": name, "from_workers": before, "to_workers": after}
    return [ServerEvent(at_s, kind, kind, fields) for at_s, kind in steps]


def test_worker_seconds_are_those_of_the_sizes_in_the_events() -> None:
    grows = events("a", (10.0, "begun"), (12.0, "committed"), (13.0, "ended"), sizes=(1, 2))
    aborted = events("b", (20.0, "begun"), (21.0, "aborting"), (25.0, "ended"), sizes=(2, 4))
    shrinks = events("c", (30.0, "begun"), (31.0, "committed"), (34.0, "ended"), sizes=(2, 1))
    serving_s, held_s = rows.worker_seconds(1, changes([*grows, *aborted, *shrinks]), 40.0)

    assert serving_s == 40.0 + (31.0 - 12.0)
    assert held_s == 40.0 + (34.0 - 10.0) + 2 * (25.0 - 20.0)


def test_a_change_whose_begin_was_not_seen_is_no_figure() -> None:
    late = [ServerEvent(12.0, "ended", "ended", {"transition_id": "a"})]

    with pytest.raises(ValueError, match="told only in part"):
        rows.worker_seconds(1, changes(late), 40.0)


def test_tables_of_the_page_are_those_of_the_saved_runs() -> None:
    """After a run was saved: python benchmarks/tables.py."""
    page = tables.PAGE.read_text()

    assert tables.filled(page) == page


def test_a_table_is_filled_and_filled_anew(tmp_path: Path) -> None:
    page = "a\n<!-- table run goals -->\n<!-- end -->\n<!-- table run rows who n -->\n<!-- end -->\nz\n"
    assert tables.filled(page, tmp_path) == page
    goal = {"name": "it works", "value": 1234.5, "bound": ">= 1", "met": True}
    run = {"goals": [goal], "rows": [{"who": "x", "n": 0.01234}, {"other": 1}]}
    (tmp_path / "run.json").write_text(json.dumps(run))
    found = tables.filled(page, tmp_path)

    assert "| it works | 1,234 | >= 1 | yes |\n<!-- end -->" in found
    assert "| who | n |\n| --- | --- |\n| x | 0.0123 |\n<!-- end -->" in found
    assert tables.filled(found, tmp_path) == found
