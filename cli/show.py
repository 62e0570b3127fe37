"""What `flexpert status`, `events` and `logs` print, as text from values."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flexpert.cli.errors import CommandError
from flexpert.cli.options import show_bytes
from flexpert.cli.screen import describe_memory
from flexpert.controller.runtime_dir import RuntimeDir

FOLLOW_S = 0.2


def describe_status(status: dict[str, Any]) -> str:
    """The cluster in a dozen lines."""
    gateway = status.get("gateway") or {}
    phase = "ready" if status["ready"] else status["phase"]
    rows = [
        ("cluster", f"{status['name']}: {phase}, up for {status['uptime_s']:.0f} s (pid {status['up']['pid']})"),
        ("model", status["model"]),
        ("url", f"{status['url']}/v1 (gateway pid {gateway.get('pid', '-')})"),
        ("epoch", str(status["epoch"])),
    ]
    for worker in status["workers"]:
        if worker:
            rows.append((worker["worker_id"], describe_worker(worker)))
    rows.append(("memory", describe_memory(status) or "the HBM manager does not answer"))
    rows.append(("processes", ", ".join(f"{name} {p['phase']}" for name, p in status["processes"].items())))
    return "\n".join(f"{name:<10} {text}" for name, text in rows)


def describe_worker(worker: dict[str, Any]) -> str:
    """One worker in a line."""
    text = f"{worker['device']} {worker['dtype']}, incarnation {worker['incarnation']}, pid {worker['pid']}"
    if stats := worker.get("stats"):
        text += (
            f"; requests: {stats['running']} running, {stats['waiting']} waiting"
            f"; KV: {stats['kv_used_tokens']} of {stats['kv_capacity_tokens']} tokens"
        )
    for name in ("weights_bytes", "kv_bytes"):
        if worker.get(name) is not None:
            text += f"; {name.removesuffix('_bytes')} {show_bytes(worker[name])}"
    return text


def describe_event(event: dict[str, Any]) -> str:
    """One event in a line."""
    moment = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(event["time_s"]))
    took = f" in {event['seconds']:.2f} s" if event.get("seconds") is not None and event["kind"] != "replaced" else ""
    return f"{moment} {event['kind']:<8} {event['text']}{took}"


def log_file(runtime: RuntimeDir, process: str | None) -> Path:
    """The log of one process; without a name the only sensible one, `up`. Raises CommandError, naming what there is."""
    name = process or "up"
    path = runtime.logs / f"{name}.log"
    if "/" not in name and path.is_file():
        return path
    known = sorted(found.stem for found in runtime.logs.glob("*.log"))
    if not known:
        raise CommandError("stopped", f"no logs of a cluster named {runtime.name!r} in {runtime.logs}")
    raise CommandError("usage", f"no log of a process named {name!r}; there are: {', '.join(known)}")


def follow(path: Path) -> Iterator[str]:
    """Lines of a growing file, also across its rotation, until interrupted."""
    file = path.open(errors="replace")
    try:
        while True:
            if line := file.readline():
                yield line
                continue
            if path.exists() and path.stat().st_ino != _inode(file):
                file.close()
                file = path.open(errors="replace")
            time.sleep(FOLLOW_S)
    finally:
        file.close()


def _inode(file: Any) -> int:
    import os

    return os.fstat(file.fileno()).st_ino


def as_json(value: Any) -> str:
    return json.dumps(value, indent=1)
