"""`flexpert scale` and `flexpert drain`: ask for a transition, then follow it to its end, or until Ctrl-C lets it go on alone."""

from __future__ import annotations

import secrets
import sys
import time
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

from flexpert.cli.api import AdminApi
from flexpert.cli.errors import CommandError
from flexpert.cli.options import show_bytes

POLL_S = 0.2
DETACHED = 130


class TransitionView:
    """Phase, bytes and deadline of a transition: a bar on a terminal, elsewhere a line for each phase."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._phase = ""
        self._bar: Progress | None = None

    def show(self, transition: dict[str, Any]) -> None:
        phase = transition.get("phase") or "start"
        if not self._console.is_terminal:
            if phase != self._phase:
                self._console.print(describe_transition(transition), markup=False, highlight=False, soft_wrap=True)
            self._phase = phase
            return
        if self._bar is None:
            self._bar = Progress(
                TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True), TextColumn("{task.fields[limit]}"),
                console=self._console, transient=True,
            )  # fmt: skip
            self._task = self._bar.add_task(phase, total=None, limit="")
            self._bar.start()
        self._bar.update(
            self._task, description=f"{name_of(transition)}: {phase}", completed=transition.get("moved_bytes") or 0,
            total=transition.get("total_bytes") or None, limit=_limit(transition),
        )  # fmt: skip

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def begin_and_follow(
    begin: Callable[[str], dict[str, Any]],
    api: AdminApi,
    *,
    request_id: str | None,
    wait: bool,
    console: Console,
    again: Callable[[str], str],
) -> tuple[dict[str, Any], int]:
    """begin(request id) asks for the transition; again(request id) is the command line that follows it once more. Returns how it stands at
    the end, and the exit code. Raises CommandError where it was refused, or ended otherwise than asked."""
    request_id = request_id or "cli-" + secrets.token_hex(8)
    try:
        transition = begin(request_id)
    except CommandError as error:
        if error.kind != "unreachable":
            raise
        raise CommandError(
            error.kind,
            f"{error}; it may still happen: ask again with `{again(request_id)}`, which begins nothing twice",
        ) from error
    if not wait or transition["state"] != "running":
        return _checked(transition), 0
    view = TransitionView(console)
    try:
        while transition["state"] == "running":
            view.show(transition)
            time.sleep(POLL_S)
            transition = api.transition(transition["transition_id"])
    except CommandError as error:
        if error.kind != "stopped":
            raise
        raise CommandError("transition", f"{name_of(transition)} aborted: {error}") from error
    except KeyboardInterrupt:
        view.close()
        sys.stderr.write(
            f"detached: {transition['transition_id']} goes on without you. Look with `flexpert status` and `flexpert events`, or follow it "
            f"again with `{again(request_id)}`.\n"
        )
        return transition, DETACHED
    finally:
        view.close()
    return _checked(transition), 0


def _checked(transition: dict[str, Any]) -> dict[str, Any]:
    if transition["state"] in ("running", "done"):
        return transition
    serving = ", ".join(transition.get("from_workers") or ())
    stays = f"; {serving} serve as before" if serving and transition["state"] == "aborted" else ""
    raise CommandError(
        "transition",
        f"{name_of(transition)} {transition['state']}: {transition.get('reason') or 'no reason was given'}{stays}; see: flexpert events",
    )


def name_of(transition: dict[str, Any]) -> str:
    """ "t-3 (scale to 3 workers)"."""
    wish = transition.get("asked") or transition.get("kind")
    return f"{transition['transition_id']} ({wish})" if wish else str(transition["transition_id"])


def describe_transition(transition: dict[str, Any]) -> str:
    """How it stands, in a line."""
    state = transition["state"]
    if state == "done":
        workers = transition.get("to_workers") or ()
        text = f"{name_of(transition)} done: {', '.join(workers)} serve{'s' * (len(workers) == 1)}"
        epoch = transition.get("epoch")
        text += f", epoch {epoch}" if epoch is not None else ""
        if moved := transition.get("moved_bytes"):
            text += f", {show_bytes(moved)} moved"
        if transition.get("seconds") is not None:
            text += f" in {transition['seconds']:.2f} s"
        return text
    if state != "running":
        return f"{name_of(transition)} {state}: {transition.get('reason') or 'no reason was given'}"
    text = f"{name_of(transition)}: {transition.get('phase') or 'start'}"
    if total := transition.get("total_bytes"):
        text += f", {show_bytes(transition.get('moved_bytes') or 0)} of {show_bytes(total)} moved"
    limit = _limit(transition)
    return f"{text}, {limit}" if limit else text


def _limit(transition: dict[str, Any]) -> str:
    left_s = transition.get("deadline_s")
    return "" if left_s is None else f"at most {max(0.0, left_s):.0f} s more"
