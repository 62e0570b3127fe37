"""`flexpert` as a subprocess: one command to its end, or an `up` that runs while a test looks at it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flexpert.cli.admin import ask
from flexpert.controller.runtime_dir import RuntimeDir

COMMAND = [sys.executable, "-m", "flexpert.cli"]
START_TIMEOUT_S = 150.0
END_TIMEOUT_S = 60.0
TOKENS = 120
GREEDY = {"temperature": 0.0}


def wait_until(condition: Callable[[], Any], *, what: str, timeout_s: float = 30.0) -> Any:
    """The first true value of condition(); fails after timeout_s."""
    tick = threading.Event()
    deadline_s = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline_s, f"not within {timeout_s} s: {what}"
        tick.wait(0.05)
    return found


def environment(runtime: Path, **more: str) -> dict[str, str]:
    """What a user's shell would have, with a runtime directory of the test's own."""
    kept = {
        key: value
        for key, value in os.environ.items()
        if key not in ("RAY_ADDRESS", "FLEXPERT_API_KEY", "FLEXPERT_ADMIN_KEY", "FLEXPERT_URL", "XDG_RUNTIME_DIR")
    }
    return {**kept, "FLEXPERT_RUNTIME_DIR": str(runtime), "HF_HUB_OFFLINE": "1", **more}


def flexpert(
    runtime: Path, *arguments: str, timeout_s: float = START_TIMEOUT_S, **more: str
) -> subprocess.CompletedProcess[str]:
    """Run one command to its end."""
    return subprocess.run(
        [*COMMAND, *arguments],
        env=environment(runtime, **more),
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


@dataclass
class Cluster:
    """A running `flexpert up`."""

    runtime: Path
    process: subprocess.Popen[str]
    output: list[str] = field(default_factory=list)
    _closed: threading.Event = field(default_factory=threading.Event)

    @classmethod
    def up(cls, runtime: Path, model: Path, *options: str) -> Cluster:
        """Start, without waiting."""
        process = subprocess.Popen(
            [*COMMAND, "up", str(model), "--port", "0", "--memory", "1GiB", "--device", "cpu", *options],
            env=environment(runtime), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )  # fmt: skip
        cluster = cls(runtime, process)
        threading.Thread(target=cluster._read, daemon=True).start()
        return cluster

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.output.append(line)
        self._closed.set()

    @property
    def text(self) -> str:
        return "".join(self.output)

    def wait_ready(self) -> Cluster:
        def ready() -> bool:
            assert self.process.poll() is None, f"up ended with {self.process.returncode}:\n{self.text}"
            return "Ctrl-C (or" in self.text

        wait_until(ready, what=f"cluster ready\n{self.text}", timeout_s=START_TIMEOUT_S)
        return self

    @property
    def url(self) -> str:
        return re.search(r"URL +(\S+)/v1", self.text)[1]  # type: ignore[index]

    @property
    def key(self) -> str:
        return re.search(r"API key +(\S+)", self.text)[1]  # type: ignore[index]

    def status(self) -> dict[str, Any]:
        return ask(RuntimeDir(self.runtime / "default"), "status")

    def worker(self) -> dict[str, Any]:
        return dict(self.status()["workers"][0])

    def worker_if_any(self) -> dict[str, Any] | None:
        """The worker that serves now, if one does."""
        return next((worker for worker in self.status()["workers"] if worker.get("address")), None)

    def client(self, **options: Any) -> Any:
        import openai

        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=self.key, timeout=120, max_retries=0, **options)

    def end(self, *, whole_group: bool = False) -> int:
        """SIGTERM to `up`, or to its whole process group; the code it ends with. Killed where it does not end."""
        if self.process.poll() is None:
            if whole_group:
                os.killpg(self.process.pid, signal.SIGTERM)
            else:
                self.process.send_signal(signal.SIGTERM)
        try:
            code = self.process.wait(END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            flexpert(self.runtime, "down")
            raise
        assert self._closed.wait(10), "the output of up stays open: a process of it still runs"
        return code


def stream_tokens(
    client: Any, *, after: int = -1, then: Callable[[], None] | None = None, **sampling: Any
) -> list[str]:
    """The tokens of one streamed completion; `then` is called once `after` tokens have come."""
    tokens: list[str] = []
    chunks = client.completions.create(
        model="tiny-qwen3-moe", prompt="Once upon a time", max_tokens=TOKENS, stream=True, logprobs=1,
        extra_body={"ignore_eos": True}, **sampling,
    )  # fmt: skip
    for chunk in chunks:
        if chunk.choices and chunk.choices[0].logprobs is not None:
            tokens += chunk.choices[0].logprobs.tokens
        if then is not None and len(tokens) >= after:
            then()
            then = None
    return tokens
