"""What `flexpert up` prints: steps with the seconds since the start, loading as a bar, and how to use the cluster once it is ready.

On a terminal the bar moves; elsewhere there are plain lines only, one for each thing that happened.
"""

from __future__ import annotations

import json
import time
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TransferSpeedColumn

from flexpert.cli.model_source import ModelSource
from flexpert.cli.options import show_bytes

_HIDDEN_EVENTS = {"stopped"}


class Screen:
    def __init__(self, out: TextIO) -> None:
        self._console = Console(file=out, highlight=False, soft_wrap=True)
        self._began_s = time.monotonic()
        self._bar: Progress | None = None
        self._bar_task: TaskID | None = None

    def step(self, text: str) -> None:
        """One line with the time since the start."""
        self._console.print(f"[{time.monotonic() - self._began_s:6.1f} s] {text}", markup=False)

    def event(self, event: dict[str, Any]) -> None:
        if event["kind"] in _HIDDEN_EVENTS:
            return
        if event["kind"] in ("worker", "died", "gave_up"):
            self.end_progress()
        took = (
            f" in {event['seconds']:.1f} s" if event.get("seconds") is not None and event["kind"] != "replaced" else ""
        )
        self.step(event["text"] + took)

    def progress(self, done_bytes: int, total_bytes: int) -> None:
        """Weights loaded so far; draws on a terminal only."""
        if not self._console.is_terminal or total_bytes <= 0:
            return
        if self._bar is None:
            self._bar = Progress(
                TextColumn("loading weights"), BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn(),
                console=self._console, transient=True,
            )  # fmt: skip
            self._bar_task = self._bar.add_task("load", total=total_bytes)
            self._bar.start()
        assert self._bar_task is not None
        self._bar.update(self._bar_task, completed=done_bytes, total=total_bytes)

    def end_progress(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def ready(
        self,
        source: ModelSource,
        *,
        url: str,
        key: str | None,
        admin_key: str,
        status: dict[str, Any],
        max_workers: int,
    ) -> None:
        """All that a first user needs, ending with a line to paste."""
        self.end_progress()
        self.step("ready")
        lines = [
            "",
            f"  Model    {source.model_id}",
            f"  URL      {url}/v1",
            f"  API key  {key or '(none: everyone who reaches the port is let in)'}",
            f"  Admin    {admin_key} (key of the admin API)",
        ]
        if held := describe_memory(status):
            lines.append(f"  Memory   {held}")
        if source.built_in:
            lines.append(
                "  The built-in model is a demonstration: small, locally fluent, knows nothing. Serve a real one with --model."
            )
        lines += [
            "",
            "Try it:",
            "",
            f"  {curl_line(source, url=url, key=key)}",
            "",
            *(["Scale it while it serves: flexpert scale 2", ""] if max_workers > 1 else []),
            "Ctrl-C (or `flexpert down`) ends it.",
            "",
        ]
        self._console.print("\n".join(lines), markup=False)


def curl_line(source: ModelSource, *, url: str, key: str | None) -> str:
    """A request that works as pasted."""
    body: dict[str, Any]
    if source.has_chat_template:
        path, body = "chat/completions", {"messages": [{"role": "user", "content": "What is a list in Python?"}]}
    else:
        path, body = "completions", {"prompt": "The following"}
    body = {"model": source.model_id, **body, "max_tokens": 64}
    authorization = f' -H "Authorization: Bearer {key}"' if key else ""
    return f"curl -s {url}/v1/{path}{authorization} -H \"Content-Type: application/json\" -d '{json.dumps(body)}'"


def describe_memory(status: dict[str, Any]) -> str:
    """The manager's books in a few words; empty where it did not tell."""
    manager: dict[str, Any] = status.get("manager") or next(iter((status.get("managers") or {}).values()), {})
    if "budget_bytes" not in manager:
        return ""
    used = manager["budget_bytes"] - manager["free_bytes"]
    return f"{show_bytes(used)} of {show_bytes(manager['budget_bytes'])} held by the HBM manager (pid {manager['pid']})"
