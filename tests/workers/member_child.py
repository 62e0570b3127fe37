"""A worker in a process of its own that obeys: one JSON line in, {"method": ..., "arguments": [...]}, one out. Epochs travel as base64."""

from __future__ import annotations

import base64
import json
import sys
from dataclasses import asdict
from pathlib import Path

from flexpert.workers.process import WorkerConfig, WorkerProcess


def main() -> None:
    fields = json.loads(sys.stdin.readline())
    for name in ("model_dir", "manager_socket"):
        fields[name] = Path(fields[name])
    fields["epoch"] = base64.b64decode(fields["epoch"])
    worker = WorkerProcess(WorkerConfig(**fields))
    worker.start()
    answer(worker.status())
    for line in sys.stdin:
        order = json.loads(line)
        method, arguments = order["method"], order["arguments"]
        if method == "prepare":
            arguments[0] = base64.b64decode(arguments[0])
        if method == "wait_trouble":
            answer(asdict(worker.wait_trouble().result(60)))
        else:
            answer(getattr(worker, method)(*arguments))
    worker.stop()


def answer(value: object) -> None:
    print(json.dumps(value), flush=True)


if __name__ == "__main__":
    main()
