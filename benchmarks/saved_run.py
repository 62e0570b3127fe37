"""A saved run: what was measured, with what, and which goals it met. Shared by all benchmarks."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "triton", "transformers", "vllm", "ray", "numpy", "safetensors")


def goal(name: str, value: float, bound: str) -> dict[str, Any]:
    """One line that must be shown. bound: ">= 4" or "<= 5"; met is decided here and nowhere else."""
    relation, _, limit = bound.partition(" ")
    met = value >= float(limit) if relation == ">=" else value <= float(limit)
    return {"name": name, "value": round(value, 4), "bound": bound, "met": bool(met)}


def device_name(device: str) -> str:
    """The device as the file name has it: "cpu-2core", "h100"."""
    if device == "cpu":
        return f"cpu-{_cores()}core"
    import torch

    return torch.cuda.get_device_name().lower().replace("nvidia ", "").split()[0]


def commit() -> str:
    """The checked-out commit, marked where the tree differs from it; outside a checkout what FLEXPERT_COMMIT says, or "unknown"."""
    here = Path(__file__).parent
    found = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"], cwd=here, capture_output=True, text=True
    )
    return found.stdout.strip() or os.environ.get("FLEXPERT_COMMIT", "unknown")


def versions() -> dict[str, str]:
    """Python and the packages whose speed shows in the figures."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def save(
    benchmark: str,
    *,
    device: str,
    rows: Iterable[Mapping[str, Any]],
    goals: Iterable[Mapping[str, Any]],
    started: datetime.datetime,
    folder: Path = RESULTS,
) -> Path:
    """Write <folder>/<benchmark>-<device>.json and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{benchmark}-{device_name(device)}.json"
    run = {
        "benchmark": benchmark,
        "command": "python " + " ".join([f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "commit": commit(),
        "device": machine(device),
        "versions": versions(),
        "started": started.isoformat(timespec="seconds"),
        "rows": list(rows),
        "goals": list(goals),
    }
    path.write_text(json.dumps(run, indent=1) + "\n")
    return path


def _cores() -> int:
    """Those this process may use."""
    return len(os.sched_getaffinity(0))


def machine(device: str) -> str:
    """The device in words."""
    if device == "cpu":
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "CPU")
        return f"{model}, {_cores()} cores"
    import torch

    return f"{torch.cuda.get_device_name()}, {_cores()} cores"


def print_table(rows: list[dict[str, Any]]) -> None:
    """Rows of equal keys as aligned columns."""
    if not rows:
        return
    columns = list(rows[0])
    texts = [[_text(row.get(column)) for column in columns] for row in rows]
    widths = [max(len(column), *(len(line[i]) for line in texts)) for i, column in enumerate(columns)]
    for line in [columns, *texts]:
        print("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip(), flush=True)


def _text(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
