"""What this machine has for a cluster: cores, free memory, GPUs, a free port. Imports no torch, so it answers at once."""

from __future__ import annotations

import importlib.util
import os
import re
import socket
from pathlib import Path

from flexpert.cli.errors import CommandError
from flexpert.cli.options import show_bytes

HOST_MEMORY_SHARE = 0.6  # of what is free: the pool is only taken where it is used, the rest is for the processes
CPU_WORKERS = 4  # how far a cluster on the CPU can be scaled where nothing was said
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


def default_memory_bytes(workers: int) -> int:
    """The budget of each device where none was given: the workers at the start share it. Those that join later share what they use."""
    return int(available_memory_bytes() * HOST_MEMORY_SHARE) // workers


def check_memory(wanted_bytes: int) -> None:
    """Refuse a budget that the machine cannot back. Raises CommandError."""
    available = available_memory_bytes()
    if wanted_bytes > available:
        raise CommandError(
            "memory",
            f"--memory: found {show_bytes(available)} of free memory on this machine, {show_bytes(wanted_bytes)} were asked for; "
            "give less, or end what holds it",
        )


def gpus() -> int:
    """How many GPUs this machine shows us."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([name for name in visible.split(",") if name.strip() not in ("", "-1")])
    return len([path for path in Path("/dev").glob("nvidia*") if re.fullmatch(r"nvidia\d+", path.name)])


def most_workers(device: str, *, workers: int, asked: int | None, share_gpus: bool = False) -> int:
    """How many devices the cluster may use: the GPUs there are, or as many on the CPU as were asked for. Raises CommandError."""
    most = asked if asked is not None else gpus() if device == "cuda" else max(CPU_WORKERS, workers)
    if device == "cuda" and max(most, workers) > gpus() and not share_gpus:
        option = f"--workers {workers}" if workers >= most else f"--max-workers {most}"
        raise CommandError(
            "device", f"{option}: found {gpus()} GPUs on this machine, each worker needs one; give at most that many"
        )
    if workers > most:
        raise CommandError("usage", f"--workers {workers}: expected at most the {most} of --max-workers")
    return most


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


def check_port(host: str, port: int) -> None:
    """The port is bound by the gateway much later; most mistakes can be told now. Raises CommandError."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except socket.gaierror as error:
        raise CommandError(
            "port", f"--host {host}: {error.strerror}; expected an address of this machine, like 127.0.0.1"
        ) from error
    except OSError as error:
        raise CommandError(
            "port",
            f"{host}:{port} cannot be listened on: {error.strerror}; end what holds it, or give another --port (0: any free one)",
        ) from error


def url_of(host: str, port: int) -> str:
    """How this machine reaches what listens there."""
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, host)
    return f"http://{f'[{host}]' if ':' in host and not host.startswith('[') else host}:{port}"
