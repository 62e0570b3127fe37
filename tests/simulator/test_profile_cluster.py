"""`flexpert profile --url`: what it writes of a cluster, and a clear line for each mistake. The cluster is a modelled one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from flexpert.cli import profile_cluster
from flexpert.cli.app import app
from flexpert.cli.errors import CommandError
from flexpert.loadtest.measure import Outcome
from flexpert.loadtest.schedule import Arrival
from flexpert.simulator.profile import load_profile

from .small import play_at


class Modelled:
    """Stands for the cluster that is measured."""

    def __init__(self, api: object, key: str | None) -> None:
        self.workers = 0

    def status(self) -> dict:
        return {"workers": [{"stats": {"kv_capacity_tokens": 4711}}]}

    def resize(self, workers: int) -> None:
        self.workers = workers

    def play(self, arrivals: Sequence[Arrival]) -> list[Outcome]:
        return play_at(load_profile("builtin-cpu"), self.workers)(arrivals)


def options(out: Path, **changes):
    fields = {
        "api": SimpleNamespace(), "key": None, "base": "builtin-cpu", "sizes": (2,), "name": "mine", "max_running": 8,
        "max_batch_tokens": 512, "repeats": 1, "out": out,
    }  # fmt: skip
    return profile_cluster.ClusterOptions(**fields | changes)


def test_what_was_seen_of_a_cluster_becomes_a_profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile_cluster, "_Cluster", Modelled)
    lines: list[str] = []
    profile_cluster.profile_cluster(options(tmp_path / "mine.json"), say=lines.append)
    found = load_profile(str(tmp_path / "mine.json"))

    assert (found.name, found.kv_tokens, found.max_running) == ("mine", 4711, 8)
    assert [each.workers for each in found.served] == [2]
    assert found.served[0].decode[-1][1] == pytest.approx(load_profile("builtin-cpu").decode[4][1], rel=0.05)
    assert any("ms a step" in line for line in lines)
    assert lines[-1].startswith("noise: ")
    assert "2 workers" in found.source


def test_a_folder_that_is_not_there_is_told_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(profile_cluster, "_Cluster", None)
    with pytest.raises(CommandError, match="there is no folder"):
        profile_cluster.profile_cluster(options(tmp_path / "nowhere" / "mine.json"), say=print)


def test_a_base_that_is_no_profile_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile_cluster, "_Cluster", Modelled)
    with pytest.raises(CommandError, match="nobody's"):
        profile_cluster.profile_cluster(options(tmp_path / "mine.json", base="nobody's"), say=print)


@pytest.mark.parametrize("sizes", ["", "0,1", "2,1", "1,1", "one"])
def test_sizes_that_do_not_rise_are_refused(tmp_path: Path, sizes: str) -> None:
    done = CliRunner().invoke(
        app,
        [
            "profile", "--url", "http://127.0.0.1:1", "--admin-key", "a", "--sizes", sizes,
            "--out", str(tmp_path / "mine.json"),
        ],
    )  # fmt: skip

    assert isinstance(done.exception, CommandError)
    assert "expected numbers of workers that rise" in str(done.exception)
