"""A cluster that grows and shrinks while it serves: the short form of the elasticity benchmark, run as a user runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path


def test_random_transitions_under_load_change_no_answer(repository: Path, tmp_path: Path) -> None:
    """Goals of the program: nothing failed, nothing answered twice or differently, every transition done."""
    command = [sys.executable, "benchmarks/elasticity.py", "--requests", "40", "--transitions", "5", "--jobs", "20"]
    ended = subprocess.run(
        [*command, "--clients", "8", "--max-workers", "3", "--no-restart", "--out", str(tmp_path)],
        cwd=repository,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
    (saved,) = tmp_path.glob("elasticity-*.json")
    run = json.loads(saved.read_text())
    exact = [
        goal
        for goal in run["goals"]
        if "pause" not in goal["name"] and "join" not in goal["name"] and "stream" not in goal["name"]
    ]
    assert len(exact) == 4
    assert all(goal["met"] for goal in exact)
