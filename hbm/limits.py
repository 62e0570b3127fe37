"""The machine's limits that the manager and its clients run into: descriptors, mappings, memory. Checked before, with
clear errors.

The manager checks descriptors and memory when it starts; a client counts its mappings when it opens a KV arena and
while it maps.
"""

from __future__ import annotations

import resource
from collections.abc import Iterator
from pathlib import Path

from flexpert.hbm.errors import LimitError

MIN_DESCRIPTORS = 256  # of the manager: its own few, and 3 for each client
DESCRIPTORS_PER_CLIENT = 3
RESERVED_DESCRIPTORS = 64
RESERVED_MAPPINGS = 1024  # of a client, for libraries and allocators that map later

_UNLIMITED_BYTES = 1 << 60


def ensure_descriptors() -> int:
    """Raises the soft RLIMIT_NOFILE to the hard one and returns it. LimitError below MIN_DESCRIPTORS."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY:
        hard = 1 << 20
    if soft == resource.RLIM_INFINITY or soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    if hard < MIN_DESCRIPTORS:
        raise LimitError(
            f"the limit of open files (RLIMIT_NOFILE) is {soft}, at most {hard}; the HBM manager needs {MIN_DESCRIPTORS}. "
            f"Raise it: `ulimit -Hn {MIN_DESCRIPTORS}` as root, LimitNOFILE= of the systemd unit, or the container's nofile ulimit"
        )
    return hard


def max_mappings() -> int:
    """vm.max_map_count: how many mappings one process may have."""
    try:
        return int(Path("/proc/sys/vm/max_map_count").read_text())
    except (OSError, ValueError):
        return 65530  # the kernel's default


def count_mappings() -> int:
    """How many mappings this process has now."""
    return Path("/proc/self/maps").read_bytes().count(b"\n")


def require_mappings(*, needed: int, found: int, limit: int, for_what: str) -> None:
    """LimitError where `needed` more mappings beside the `found` ones would pass the limit, a reserve left for
    others.
    """
    if found + needed > limit - RESERVED_MAPPINGS:
        raise LimitError(
            f"{for_what} needs {needed} memory mappings, this process has {found} of at most {limit} (vm.max_map_count), of which "
            f"{RESERVED_MAPPINGS} stay free for others. Raise it: `sysctl -w vm.max_map_count={max(262144, 2 * limit)}`, "
            "or use a smaller KV arena or fewer slots"
        )


def require_memory(budget_bytes: int) -> None:
    """LimitError where the budget is more than the machine, or this control group, can give now."""
    for source, available in available_memory():
        if budget_bytes > available:
            raise LimitError(
                f"the memory budget is {budget_bytes} bytes ({_gib(budget_bytes)}), but only {available} bytes "
                f"({_gib(available)}) are available ({source}). Ask for a smaller budget, free memory, or raise the limit"
            )


def available_memory() -> list[tuple[str, int]]:
    """(where the number comes from, bytes that can still be taken): the machine, and each control group with a
    limit.
    """
    found = []
    meminfo = Path("/proc/meminfo").read_text()
    for line in meminfo.splitlines():
        if line.startswith("MemAvailable:"):
            found.append(("MemAvailable in /proc/meminfo", int(line.split()[1]) * 1024))
    found.extend(_cgroup_memory(Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")))
    return found


def _cgroup_memory(root: Path, membership: Path) -> Iterator[tuple[str, int]]:
    """Free memory of this process's control groups and their ancestors, version 2 and version 1."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _number, controllers, path = line.split(":", 2)
        if controllers == "":
            base, limit_name, usage_name, cache_key = root, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            base, limit_name, usage_name = root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            cache_key = "total_inactive_file"
        else:
            continue
        group = base / path.lstrip("/")
        while True:
            limit = _number_in(group / limit_name)
            if limit is not None and limit < _UNLIMITED_BYTES:
                used = (_number_in(group / usage_name) or 0) - _stat(group / "memory.stat", cache_key)
                yield str(group / limit_name), max(0, limit - used)
            if group == base or base not in group.parents:
                break
            group = group.parent


def _number_in(path: Path) -> int | None:
    """None where there is no such file, or it says "max"."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _stat(path: Path, key: str) -> int:
    """Page cache that the kernel gives back when memory is wanted."""
    try:
        for line in path.read_text().splitlines():
            name, _, value = line.partition(" ")
            if name == key:
                return int(value)
    except (OSError, ValueError):
        return 0
    return 0


def _gib(nbytes: int) -> str:
    return f"{nbytes / (1 << 30):.2f} GiB"
