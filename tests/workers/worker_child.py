"""A worker in a process of its own, for tests that kill it: reads its configuration as JSON, prints what it became, waits for its end."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from flexpert.workers.process import WorkerConfig, WorkerProcess, prepare


def anonymous_bytes() -> int:
    """Private memory of this process that no file or memfd backs: what a copy of the weights would show up in."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Anonymous:")) << 10


def main() -> None:
    fields = json.loads(sys.stdin.readline())
    for name in ("model_dir", "manager_socket"):
        fields[name] = Path(fields[name])
    config = WorkerConfig(**fields)
    prepare(config.model_dir, config.device)
    torch.ones(256, 256) @ torch.ones(256, 256)
    before = anonymous_bytes()
    worker = WorkerProcess(config)
    worker.start()
    print(json.dumps(worker.status()), flush=True)
    for line in sys.stdin:
        if line.strip() == "anonymous":
            print(json.dumps({"before": before, "now": anonymous_bytes()}), flush=True)
    worker.stop()


if __name__ == "__main__":
    main()
