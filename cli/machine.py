"""What this machine has for a cluster: cores, free memory, GPUs. Looks at files only and imports no torch, so it answers at once."""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path

from flexpert.cli.errors import CommandError
from flexpert.cli.options import show_bytes

HOST_MEMORY_SHARE = 0.6  # of what is free: the pool is only taken where it is used, the rest is for the processes
_CGROUP = Path("/sys/fs/cgroup")


def cores() -> int:
    """Cores this process may use, by affinity and cgroup quota."""
    allowed = len(os.sched_getaffinity(0))
    try:
        quota, period = (_CGROUP / "cpu.max").read_text().split()
    except (OSError, ValueError):
        return allowed
    return allowed if quota == "max" else max(1, min(allowed, -(-int(quota) // int(period))))


def available_memory_bytes() -> int:
    """Memory that can be taken without swapping, also inside a container."""
    meminfo = dict(re.findall(r"(\w+):\s+(\d+) kB", Path("/proc/meminfo").read_text()))
    available = int(meminfo["MemAvailable"]) * 1024
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        used = int((_CGROUP / "memory.current").read_text())
    except (OSError, ValueError):
        return available
    return available if limit == "max" else min(available, max(0, int(limit) - used))


def default_memory_bytes() -> int:
    """The budget of the HBM manager where none was given."""
    return int(available_memory_bytes() * HOST_MEMORY_SHARE)


def check_memory(wanted_bytes: int) -> None:
    """Refuse a budget that the machine cannot back. Raises CommandError."""
    available = available_memory_bytes()
    if wanted_bytes > available:
        raise CommandError(
            "memory",
            f"--memory: found {show_bytes(available)} of free memory on this machine, {show_bytes(wanted_bytes)} were asked for; "
            "give less, or end what holds it",
        )


def resolve_device(wanted: str) -> str:
    """ "cpu" or "cuda" for "auto", "cpu" or "cuda". Raises CommandError where a GPU was asked for and cannot be used."""
    if wanted == "cpu":
        return "cpu"
    missing = _why_no_cuda()
    if wanted == "auto":
        return "cuda" if missing is None else "cpu"
    if missing is not None:
        raise CommandError("device", f"--device cuda: {missing}; use --device cpu")
    return "cuda"


def _why_no_cuda() -> str | None:
    if not Path("/dev/nvidiactl").exists():
        return "found no NVIDIA GPU on this machine (no /dev/nvidiactl)"
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        return "PyTorch is not installed"
    version = Path(found.origin).with_name("version.py").read_text()
    if not re.search(r"^cuda[^=\n]*= *['\"]", version, re.MULTILINE):
        return "the installed PyTorch was built without CUDA; install one built with it"
    return None
