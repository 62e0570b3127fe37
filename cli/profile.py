"""`flexpert profile`: measures what a worker of a model can do on this machine, as a file for `flexpert simulate`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from flexpert.cli.errors import CommandError

if TYPE_CHECKING:
    from flexpert.simulator.profile import Profile

__all__ = ["check_out", "parse_sizes", "run_profile"]


def run_profile(
    *, model: str | None, name: str, device: str, dtype: str | None, memory_bytes: int, max_running: int, max_batch_tokens: int,
    max_context_tokens: int | None, out: Path, repeats: int, say: Callable[[str], None],
) -> None:  # fmt: skip
    """Raises CommandError. Starts itself again with a worker's environment (threads), as a cluster would start it."""

    from flexpert.cli.model_source import resolve_model
    from flexpert.simulator.fit import MeasureError
    from flexpert.simulator.measure import ProfileRequest, measure
    from flexpert.workers.threads import worker_environment

    check_out(out)
    wanted = worker_environment(threads=len(os.sched_getaffinity(0)))
    if any(os.environ.get(key) != value for key, value in wanted.items()):
        os.execve(sys.executable, [sys.executable, "-m", "flexpert.cli", *sys.argv[1:]], os.environ | wanted)
    found = resolve_model(model)
    try:
        profile = measure(
            ProfileRequest(
                name=name, model_dir=found.directory, device=device, dtype=dtype, memory_bytes=memory_bytes, max_running=max_running,
                max_batch_tokens=max_batch_tokens, max_context_tokens=max_context_tokens, repeats=repeats,
            ),
            say=say,
        )  # fmt: skip
    except MeasureError as error:
        raise CommandError("model", str(error)) from error
    write_profile(profile, out)


def write_profile(profile: Profile, out: Path) -> None:
    import msgspec

    out.write_bytes(msgspec.json.format(msgspec.json.encode(profile)) + b"\n")


def check_out(out: Path) -> None:
    """Before minutes are spent on what cannot be written."""
    if not out.resolve().parent.is_dir():
        raise CommandError("directory", f"--out {out}: there is no folder {out.resolve().parent}")


def parse_sizes(text: str) -> tuple[int, ...]:
    """ "1,2,4": rising."""
    try:
        sizes = tuple(int(part) for part in text.split(","))
    except ValueError:
        sizes = ()
    if not sizes or sizes[0] < 1 or list(sizes) != sorted(set(sizes)):
        raise CommandError(
            "usage", f"--sizes {text!r}: expected numbers of workers that rise from 1 or more, like 1,2,4"
        )
    return sizes
