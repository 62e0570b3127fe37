"""What `flexpert status`, `events` and `logs` print, as text from values."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flexpert.cli.errors import CommandError
from flexpert.cli.options import show_bytes
from flexpert.cli.scale import describe_transition
from flexpert.cli.screen import describe_memory
from flexpert.controller.runtime_dir import RuntimeDir

FOLLOW_S = 0.2


def describe_status(status: dict[str, Any]) -> str:
    """The cluster in some lines: what it is, who serves with what, what is changing."""
    gateway = status.get("gateway") or {}
    phase = "ready" if status["ready"] else status["phase"]
    up_pid = (status.get("up") or {}).get("pid")
    rows = [
        (
            "cluster",
            f"{status['name']}: {phase}, up for {status['uptime_s']:.0f} s" + (f" (pid {up_pid})" if up_pid else ""),
        ),
        ("model", status["model"]),
        ("url", f"{status['url']}/v1 (gateway pid {gateway.get('pid', '-')})"),
        ("epoch", str(status["epoch"])),
    ]
    for worker in status["workers"]:
        if worker and worker.get("worker_id"):
            rows.append((worker["worker_id"], describe_worker(worker)))
    if (transition := status.get("transition")) and (transition["state"] == "running"):
        rows.append(("transition", describe_transition(transition)))
    if policy := status.get("policy"):
        rows.append(("policy", describe_policy(policy)))
    rows += describe_devices(status)
    rows.append(("processes", ", ".join(f"{name} {p['phase']}" for name, p in status["processes"].items())))
    return "\n".join(f"{name:<10} {text}" for name, text in rows)


def describe_worker(worker: dict[str, Any]) -> str:
    """One worker in a line: where it is, what it holds, what it does."""
    parts = [
        f"{worker.get('device', '-')} {worker.get('dtype', '')}, incarnation {worker.get('incarnation', '-')}, pid {worker.get('pid', '-')}"
    ]
    if worker.get("experts_held") is not None:
        parts.append(f"{worker['experts_held']} experts")
    for name in ("weights_bytes", "kv_bytes"):
        if worker.get(name) is not None:
            parts.append(f"{name.removesuffix('_bytes')} {show_bytes(worker[name])}")
    if stats := worker.get("stats"):
        parts.append(f"KV: {stats['kv_used_tokens']} of {stats['kv_capacity_tokens']} tokens")
        parts.append(f"requests: {stats['running']} running, {stats['waiting']} waiting")
    return "; ".join(parts)


def describe_policy(policy: dict[str, Any]) -> str:
    """Who decides about the size, and what was decided last."""
    text = f"{policy['name']}, {policy['min']} to {policy['max']} workers, mode {policy['mode']}"
    if policy.get("text"):
        text += f"; {policy['reason']}: {policy['text']}"
    return text + ("; its file has errors: flexpert policy show" if policy.get("problem") else "")


def describe_devices(status: dict[str, Any]) -> list[tuple[str, str]]:
    """A row for the manager of each device that is in use."""
    managers = status.get("managers") or {"memory": status.get("manager") or {}}
    rows = [(name, describe_memory({"manager": books})) for name, books in managers.items()]
    return [(name, text) for name, text in rows if text] or [("memory", "no HBM manager answers")]


def check_books(runtime: RuntimeDir) -> list[str]:
    """Have the managers of all devices prove their books. Raises CommandError where none runs, or where one is wrong."""
    from flexpert.hbm import check_manager

    reports = {device: check_manager(runtime.path, device) for device in runtime.manager_names()}
    running = {device: report for device, report in reports.items() if report.running}
    if not running:
        raise CommandError("stopped", f"no HBM manager of a cluster named {runtime.name!r} runs")
    wrong = [f"  {device}: {line}" for device, report in running.items() for line in report.problems]
    if wrong:
        raise CommandError("internal", "the books of an HBM manager are wrong:\n" + "\n".join(wrong))
    lines = []
    for device, report in running.items():
        assert report.info is not None
        info = report.info
        books = {"budget_bytes": info.budget_bytes, "free_bytes": info.free_bytes, "pid": info.pid}
        lines.append(f"{device}: all is well: {describe_memory({'manager': books})}")
    return lines


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
