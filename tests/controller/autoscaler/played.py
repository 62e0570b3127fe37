"""A cluster played in virtual time: a gateway's answer, transitions that take as long as they are told, and all that was ordered."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flexpert.controller.autoscaler.loop import Autoscaler
from flexpert.controller.autoscaler.observe import ClusterFacts
from flexpert.controller.errors import AdminError
from flexpert.controller.policy.types import Decision, Reading

POLICY = """
apiVersion: flexpert.dev/v1alpha1
kind: ScalingPolicy
metadata: {name: chat}
spec:
  workers: {min: 1, max: 8}
  slo: {ttft: 500ms, attainment: 0.99}
  signals:
    - {type: kv_utilization, target: 0.8}
  behavior:
    scaleDown: {stabilizationWindow: 60s}
"""
KV_TOKENS = 1000


class Clock:
    def __init__(self, now_s: float = 1_000_000.0) -> None:
        self.now_s = now_s

    def __call__(self) -> float:
        return self.now_s


class PlayedCluster:
    """workers: how many serve. used_tokens: KV in use, of all. join_s: how long a transition takes; None: for ever."""

    def __init__(self, clock: Clock, *, workers: int = 1, join_s: float | None = 5.0) -> None:
        self.clock, self.workers, self.join_s = clock, workers, join_s
        self.used_tokens = 0.0
        self.met, self.missed = 100, 0
        self.started = True
        self.gateway: Any = "answers"
        self.refusal: AdminError | None = None
        self.orders: list[tuple[int, str]] = []
        self.given_up: list[str] = []
        self.events: list[tuple[str, str, dict[str, Any]]] = []
        self.asked: list[dict[str, Any]] = []
        self.progress: dict[str, Any] | None = None
        self._requests: dict[str, str] = {}
        self.floor = 1

    # What the loop asks

    def facts(self) -> ClusterFacts | None:
        self._advance()
        if not self.started:
            return None
        names = tuple(f"worker-{number}" for number in range(self.workers))
        return ClusterFacts(serving=names, progress=self.progress, devices=8)

    def memory_floor(self, kv_used_tokens: int) -> int:
        return self.floor

    def transition_state(self, transition_id: str) -> str:
        return self.progress["state"] if self.progress and self.progress["transition_id"] == transition_id else ""

    async def load(self, *, window_s: float, slo: Any, long_s: float | None) -> dict[str, Any]:
        self.asked.append({"window_s": window_s, "slo": slo, "long_s": long_s})
        if isinstance(self.gateway, Exception):
            raise self.gateway
        if self.gateway != "answers":
            return dict(self.gateway)
        traffic = {
            "since_s": window_s, "requests_per_s": 1.0, "prompt_tokens_per_s": 10.0, "output_tokens_per_s": 10.0, "queue_s": 0.001,
            "ttft_s": 0.01, "tpot_s": 0.01, "met": self.met, "missed": self.missed, "live": 1, "waiting": 0,
        }  # fmt: skip
        workers = [self._worker(f"worker-{number}") for number in range(self.workers)]
        return {"traffic": traffic, "workers": workers, "long": None if long_s is None else traffic}

    def _worker(self, name: str) -> dict[str, Any]:
        return {
            "worker_id": name, "connected": True, "draining": False, "incarnation": 1, "in_flight": 1, "max_running": 64,
            "waiting_tokens": 0, "age_s": 0.1, "longest_context_tokens": 10, "running": 1, "waiting": 0,
            "kv_used_tokens": int(self.used_tokens / self.workers), "kv_capacity_tokens": KV_TOKENS, "prefill_tokens": 5,
            "decode_tokens": 5,
        }  # fmt: skip

    async def scale(self, workers: int, request_id: str) -> dict[str, Any]:
        self.orders.append((workers, request_id))
        if self.refusal is not None:
            raise self.refusal
        if request_id not in self._requests:
            self._requests[request_id] = f"t-{len(self._requests) + 1}"
            self.begin(self._requests[request_id], workers)
        return {"transition_id": self._requests[request_id], "state": "running"}

    def give_up(self, transition_id: str) -> bool:
        self.given_up.append(transition_id)
        assert self.progress is not None
        self.progress = {**self.progress, "state": "aborted", "ended_s": self.clock(), "reason": "given up"}
        return True

    def tell(self, kind: str, text: str, **details: Any) -> None:
        self.events.append((kind, text, details))

    # What the test does

    def begin(self, transition_id: str, workers: int, *, kind: str = "scale") -> None:
        def names(count: int) -> list[str]:
            return [f"worker-{number}" for number in range(count)]

        self.progress = {
            "transition_id": transition_id, "kind": kind, "state": "running", "phase": "start", "reason": "", "deadline_s": 100.0,
            "from_workers": names(self.workers), "to_workers": names(workers), "began_s": self.clock(), "seconds": 0.0,
            "members": [
                {"worker_id": name, "role": "joins" if name not in names(self.workers) else "stays"} for name in names(workers)
            ],
        }  # fmt: skip

    def _advance(self) -> None:
        found = self.progress
        if found is None or found["state"] != "running" or self.join_s is None:
            return
        if self.clock() >= found["began_s"] + self.join_s:
            self.workers = len(found["to_workers"])
            self.progress = {**found, "state": "done", "ended_s": found["began_s"] + self.join_s, "phase": "ended"}

    def told(self, kind: str = "") -> list[str]:
        return [text for found, text, _ in self.events if not kind or found == kind]


class World:
    """An autoscaler on a played cluster."""

    def __init__(self, directory: Path, *, text: str = POLICY, run: str = "run-1", **settings: Any) -> None:
        self.clock = Clock()
        self.cluster = PlayedCluster(self.clock, **settings)
        self.directory = directory
        self.file = directory / "policy.yaml"
        self.file.write_text(text)
        self.run = run
        self.autoscaler = self.make()

    def make(self, *, run: str | None = None) -> Autoscaler:
        """The autoscaler of a controller that begins now; its loop never runs by itself, the test ticks."""
        made = Autoscaler(
            self.cluster, directory=self.directory / "autoscaler", policy_path=self.file, run=run or self.run, clock=self.clock,
            expect=lambda *arguments, **settings: Reading(error="played"),
        )  # fmt: skip
        made.begin = lambda: None  # type: ignore[method-assign]
        made.start()
        return made

    async def tick(self, seconds: float = 5.0) -> Decision:
        self.clock.now_s += seconds
        decision = await self.autoscaler.tick()
        assert decision is not None
        return decision

    async def run_for(self, seconds: float, *, step_s: float = 5.0) -> list[Decision]:
        return [await self.tick(step_s) for _ in range(int(seconds / step_s))]

    def rewrite(self, old: str, new: str) -> None:
        assert old in self.file.read_text()
        self.write(self.file.read_text().replace(old, new))

    def write(self, text: str) -> None:
        """As editors do: another file takes its place."""
        fresh = self.file.with_suffix(".new")
        fresh.write_text(text)
        fresh.replace(self.file)
