"""Policy files as the commands take them: read, checked before a cluster starts with one, tried on a record.

What a policy consists of is imported with the first one: `flexpert up` without a policy starts without it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from flexpert.cli import machine
from flexpert.cli.errors import CommandError

if TYPE_CHECKING:
    from flexpert.controller.policy.spec import ScalingPolicy


@dataclass(frozen=True)
class Start:
    """What `flexpert up` begins with: a policy's file, and what it says where no option says otherwise. most None: no policy."""

    path: Path | None
    workers: int
    standbys: int
    most: int | None


def start_with(file: str | None, *, workers: int | None, standbys: int | None, max_workers: int | None) -> Start:
    """Raises CommandError for a policy that cannot be used, so that nothing is started."""
    if file is None:
        return Start(None, 1 if workers is None else workers, 1 if standbys is None else standbys, None)
    wanted = usable(file).spec.workers
    if max_workers is not None and wanted.min > max_workers:
        raise CommandError(
            "usage",
            f"--policy {file} keeps at least {wanted.min} workers, --max-workers allows {max_workers}: raise it, or lower min",
        )
    begin = min(wanted.min, wanted.max) if workers is None else workers
    return Start(Path(file).absolute(), begin, wanted.standby if standbys is None else standbys, max(wanted.max, begin))


class UpChoices(Protocol):
    """Of `UpOptions`."""

    @property
    def workers(self) -> int: ...

    @property
    def max_workers(self) -> int | None: ...

    @property
    def policy_most(self) -> int | None: ...

    @property
    def share_gpus(self) -> bool: ...


def most_workers(options: UpChoices, device: str, *, tell: Callable[[str], None]) -> int:
    """How many devices the cluster may use; on the CPU, where devices are only shares of a machine, as many as the policy may want."""
    asked = options.max_workers or (options.policy_most if device == "cpu" else None)
    most = machine.most_workers(device, workers=options.workers, asked=asked, share_gpus=options.share_gpus)
    if options.policy_most is not None and options.policy_most > most:
        tell(f"the policy allows {options.policy_most} workers, there are {most} devices: that many at most")
    return most


def usable(file: str) -> ScalingPolicy:
    """Raises CommandError with all that is wrong with it."""
    from flexpert.controller.autoscaler.source import UnusablePolicy, read_policy

    try:
        return read_policy(read_text(file))
    except UnusablePolicy as error:
        raise CommandError("settings", f"{file}: {error}") from error


def read_text(file: str) -> str:
    """- is standard input. Raises CommandError."""
    try:
        return (sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()).decode()
    except OSError as error:
        raise CommandError("usage", f"{file} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise CommandError("usage", f"{file}: byte {error.start} is not UTF-8; save the file as UTF-8 text") from error


def dry_run_recorded(policy: str, recorded: str) -> dict[str, Any]:
    """Without a cluster. Raises CommandError."""
    from flexpert.controller.autoscaler.dry_run import NothingRecorded, dry_run
    from flexpert.controller.policy.record import RecordError

    config = usable(policy).to_config()
    try:
        return dry_run(read_text(recorded).splitlines(), config)
    except (RecordError, NothingRecorded) as error:
        raise CommandError("usage", f"{recorded}: {error}") from error
