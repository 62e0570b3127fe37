"""Faults in a running cluster at chosen steps of a transition, under load: shared by faults.py and the tests.

A `Cell` is a fault and the step at which it strikes. `Trial` has one cluster and runs cells in it one after another: begin a transition
that the drill facility holds at the step, do the harm, let go, time the first fresh answer, wait until all is calm, scale once more. All
the while `Load` streams requests whose answers were recorded from the undisturbed cluster.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from local_cluster import ADMIN_KEY, API_KEY, LocalCluster

BASE = 2  # workers, between cells
SERVE_LIMIT_S, CALM_LIMIT_S = 20.0, 60.0
LOOK_S = 0.02
FAULTS = {
    "kill worker": ("stays", signal.SIGKILL),
    "stop worker": ("stays", signal.SIGSTOP),
    "kill joiner": ("joins", signal.SIGKILL),
    "stop joiner": ("joins", signal.SIGSTOP),
    "kill leaver": ("leaves", signal.SIGKILL),
    "stop leaver": ("leaves", signal.SIGSTOP),
    "kill manager": ("manager", signal.SIGKILL),
    "kill joiner's manager": ("joiner's manager", signal.SIGKILL),
    "kill controller": ("controller", signal.SIGKILL),
    "stop controller": ("controller", signal.SIGSTOP),
    "kill gateway": ("gateway", signal.SIGKILL),
    "kill agent": ("agent", signal.SIGKILL),
}
STEPS = ("none", "start", "prepare", "commit", "flip", "retire")  # commit: nobody was told; flip: all but one were
FLIP_S = 0.1  # for those that were told


@dataclass(frozen=True)
class Cell:
    fault: str
    step: str

    @property
    def name(self) -> str:
        return f"{self.fault} / {self.step}"


def all_cells() -> list[Cell]:
    """Those that can be: a joiner is there from start on, a leaver has nothing to do in it. Each fault waits its turn, for what dies again
    and again within a minute is started with growing pauses."""
    cells = []
    for step in STEPS:
        for fault, (victim, _) in FAULTS.items():
            if step == "none" and victim in ("joins", "leaves", "joiner's manager"):
                continue
            if (step, victim) in (("start", "leaves"), ("flip", "gateway"), ("flip", "agent")):
                continue
            cells.append(Cell(fault, step))
    return cells


@dataclass
class Outcome:
    """seconds from the fault until a fresh request was answered, until nothing was in transition, until the next scale was done."""

    cell: Cell
    ended: str = ""  # how the transition ended that was struck
    served_s: float = 0.0
    calm_s: float = 0.0
    scaled_s: float = 0.0
    finished: int = 0
    failed: list[str] = field(default_factory=list)
    lost: int = 0  # streams that ended with the gateway

    def row(self) -> dict[str, Any]:
        return {
            "what": self.cell.name, "transition": self.ended, "served_s": round(self.served_s, 3), "calm_s": round(self.calm_s, 3),
            "scaled_s": round(self.scaled_s, 3), "finished": self.finished, "failed": len(self.failed), "lost": self.lost,
        }  # fmt: skip


def jobs(model: str, tokens: int) -> list[dict[str, Any]]:
    """Greedy and seeded, in turn."""
    prompts = ("Once upon a time there was", "The quick brown fox", "A table of contents names", "In the beginning")
    return [
        {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": temperature, "seed": 11 + number,
         "stream": True, "ignore_eos": True, "stream_options": {"include_usage": True}}
        for number, prompt in enumerate(prompts) for temperature in (0.0, 0.9)
    ]  # fmt: skip


def stream(http: httpx.Client, body: dict[str, Any]) -> tuple[str, str, int]:
    """(text, finish reason, completion tokens). Raises what went wrong."""
    text, reason, tokens = "", "", -1
    with http.stream("POST", "/v1/completions", json=body) as response:
        response.raise_for_status()
        for line in response.iter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                raise RuntimeError(f"error in the stream: {event['error']}")
            if event.get("usage"):
                tokens = event["usage"]["completion_tokens"]
            for choice in event["choices"]:
                text += choice["text"]
                reason = choice["finish_reason"] or reason
    return text, reason, tokens


class Load:
    """Clients that repeat the jobs. gateway_dies: failures are told apart as lost, since open connections end with the gateway."""

    def __init__(self, url: str, model: str, *, clients: int, tokens: int) -> None:
        self._url, self._clients, self._bodies = url, clients, jobs(model, tokens)
        self._stop = threading.Event()
        self._turn = itertools.count()
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self.running = 0
        self.finished = 0
        self.failed: list[str] = []
        self.lost = 0
        self.gateway_dies = False
        self.expected: list[tuple[str, str, int]] = []

    def http(self, timeout_s: float = 120) -> httpx.Client:
        return httpx.Client(base_url=self._url, headers={"authorization": f"Bearer {API_KEY}"}, timeout=timeout_s)

    def start(self) -> None:
        with self.http() as http:
            self.expected = [stream(http, body) for body in self._bodies]
        self._threads = [threading.Thread(target=self._client, daemon=True) for _ in range(self._clients)]
        for thread in self._threads:
            thread.start()

    def _client(self) -> None:
        with self.http() as http:
            while not self._stop.is_set():
                i = next(self._turn) % len(self._bodies)
                try:
                    found = stream(http, self._bodies[i])
                except Exception as error:
                    with self._lock:
                        if self.gateway_dies:
                            self.lost += 1
                        else:
                            self.failed.append(f"job {i}: {type(error).__name__}: {error}")
                    self._stop.wait(0.1)
                    continue
                with self._lock:
                    self.finished += 1
                    if found != self.expected[i]:
                        self.failed.append(f"job {i}: {found} expected {self.expected[i]}")

    def round(self) -> None:
        """Until as many requests have ended as run at once: those that ran at the call among them."""
        goal = self.finished + self.lost + len(self.failed) + 2 * self._clients
        wait_until(lambda: self.finished + self.lost + len(self.failed) >= goal, "requests end", CALM_LIMIT_S)

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(60)


def wait_until(condition: Callable[[], Any], what: str, timeout_s: float) -> Any:
    """The first true value of condition()."""
    ends_s = time.monotonic() + timeout_s
    while not (found := condition()):
        if time.monotonic() > ends_s:
            raise TimeoutError(f"not within {timeout_s:g} s: {what}")
        time.sleep(LOOK_S)
    return found


class Trial:
    """One cluster with load; `run` strikes it once. drills: the directory that the cluster was started with."""

    def __init__(self, cluster: LocalCluster, drills: Path, *, clients: int = 3, tokens: int = 60) -> None:
        self.cluster, self.drills = cluster, drills
        self._admin = httpx.Client(
            base_url=f"{cluster.url}/admin/v1", headers={"authorization": f"Bearer {ADMIN_KEY}"}, timeout=10
        )
        self._requests = itertools.count()
        with httpx.Client(base_url=cluster.url, headers={"authorization": f"Bearer {API_KEY}"}, timeout=60) as http:
            self.model = http.get("/v1/models").raise_for_status().json()["data"][0]["id"]
        self.load = Load(cluster.url, self.model, clients=clients, tokens=tokens)
        self.load.start()

    def close(self) -> None:
        self.load.stop()
        self._admin.close()

    # Asking the cluster; an answer that cannot be had just now is None

    def get(self, path: str, **parameters: Any) -> Any:
        try:
            answer = self._admin.get(path, params=parameters)
        except httpx.HTTPError:
            return None
        return answer.json() if answer.status_code == 200 else None

    def status(self) -> dict[str, Any]:
        return dict(wait_until(lambda: self.get("/status"), "status", CALM_LIMIT_S))

    def begin(self, path: str, **body: Any) -> dict[str, Any] | None:
        """The transition; None where it is refused as a conflict or nobody answers. Raises what is refused otherwise."""
        request_id = f"cell-{os.getpid()}-{next(self._requests)}"
        try:
            answer = self._admin.post(path, json={**body, "request_id": request_id})
        except httpx.HTTPError:
            return None
        if answer.status_code in (409, 503):
            return None
        if answer.status_code >= 400:
            raise RuntimeError(f"{path} {body}: {answer.status_code} {answer.text}")
        return dict(answer.json())

    def transition(self, transition_id: str) -> dict[str, Any] | None:
        return self.get(f"/transitions/{transition_id}")

    def ended(self, transition_id: str) -> dict[str, Any]:
        def found() -> dict[str, Any] | None:
            seen = self.transition(transition_id)
            return seen if seen is not None and seen["state"] != "running" else None

        try:
            return dict(wait_until(found, f"end of {transition_id}", CALM_LIMIT_S))
        except TimeoutError as error:
            raise TimeoutError(f"{error}: {self.transition(transition_id)}") from None

    def calm(self) -> dict[str, Any]:
        """The status once nothing is in transition and a standby is warm, twice in a row: a repair may follow a transition."""

        def settled() -> dict[str, Any] | None:
            found = self.get("/status")
            if not found or not found["ready"] or not found["standbys"]:
                return None
            if (found["transition"] or {}).get("state") == "running" or not all(w["serving"] for w in found["workers"]):
                return None
            return dict(found)

        last: list[Any] = [None]

        def twice() -> dict[str, Any] | None:
            before, last[0] = last[0], settled()
            same = before and last[0] and before["transition"] == last[0]["transition"]
            return last[0] if same else None

        try:
            return dict(wait_until(twice, "calm", CALM_LIMIT_S))
        except TimeoutError as error:
            found = self.status()
            shown = {key: found.get(key) for key in ("phase", "ready", "standbys", "transition", "processes")}
            raise TimeoutError(f"{error}: {shown}") from None

    def scale(self, workers: int) -> dict[str, Any]:
        """Done, however often it is to be asked for."""
        ends_s = time.monotonic() + CALM_LIMIT_S
        while True:
            begun = wait_until(lambda: self.begin("/scale", workers=workers), f"scale {workers} begins", CALM_LIMIT_S)
            ended = self.ended(begun["transition_id"])
            if ended["state"] == "done":
                return ended
            if time.monotonic() > ends_s:
                raise TimeoutError(f"scale {workers}: {ended}")

    def settle(self) -> dict[str, Any]:
        """At the base size, nothing going on."""
        found = self.calm()
        if len(found["workers"]) != BASE:
            self.scale(BASE)
            found = self.calm()
        return found

    # Cells

    def run(self, cell: Cell) -> Outcome:
        before = self.settle()
        outcome = Outcome(cell)
        finished, failed, lost = self.load.finished, len(self.load.failed), self.load.lost
        victim, number = FAULTS[cell.fault]
        begun = self._begin(cell, victim, before) if cell.step != "none" else None
        self.load.gateway_dies = victim == "gateway"
        try:
            pid = self._pid(victim, before, begun)
            os.kill(pid, number)
            struck_s = time.monotonic()
        finally:
            self.let_go()
        self.fresh(SERVE_LIMIT_S)
        outcome.served_s = time.monotonic() - struck_s
        if begun is not None:
            outcome.ended = self.ended(begun["transition_id"])["state"]
        found = self.calm()
        outcome.calm_s = time.monotonic() - struck_s
        self.load.gateway_dies = False
        self.scale(BASE if len(found["workers"]) != BASE else BASE + 1)
        outcome.scaled_s = time.monotonic() - struck_s
        self.load.round()
        outcome.finished = self.load.finished - finished
        outcome.failed, outcome.lost = self.load.failed[failed:], self.load.lost - lost
        return outcome

    def _begin(self, cell: Cell, victim: str, before: dict[str, Any]) -> dict[str, Any]:
        """A transition that is held at the step: to more workers, or for a leaver to fewer."""
        joins = victim in ("joins", "joiner's manager")
        there = sorted(worker["worker_id"] for worker in before["workers"])
        last = next(f"worker-{i}" for i in range(BASE + 1) if f"worker-{i}" not in there) if joins else there[-1]
        step = {"flip": f"commit-{last}"}.get(cell.step, cell.step)
        if (victim, step) == ("leaves", "retire"):
            step = "release"
        (self.drills / f"hold-{step}").touch()
        body = {"workers": BASE - 1 if victim == "leaves" else BASE + 1}
        begun = wait_until(lambda: self.begin("/scale", **body), "a transition to strike", CALM_LIMIT_S)
        found = dict(self.held(begun["transition_id"], "commit" if cell.step == "flip" else cell.step))
        if cell.step == "flip":
            time.sleep(FLIP_S)
        return found

    def held(self, transition_id: str, phase: str) -> dict[str, Any]:
        def there() -> dict[str, Any] | None:
            found = self.transition(transition_id)
            if not found or found["phase"] != phase:
                return None
            return found if phase != "start" or all(part["process"] for part in found["members"]) else None

        return dict(wait_until(there, f"{transition_id} at {phase}", CALM_LIMIT_S))

    def let_go(self) -> None:
        for file in self.drills.glob("hold-*"):
            file.unlink()

    def _pid(self, victim: str, before: dict[str, Any], begun: dict[str, Any] | None) -> int:
        workers = {worker["worker_id"]: worker for worker in before["workers"]}
        if victim in ("controller", "gateway"):
            return int(before[victim]["pid"])
        if victim == "agent":
            return int(before["manager"]["agent_pid"])
        role = {"manager": "stays", "joiner's manager": "joins"}.get(victim, victim)
        worker_id = max(workers) if begun is None else max(self.members(begun, role))
        if victim.endswith("manager"):
            devices = {device["device"]: device for device in self.status()["devices"]}
            return int(devices[f"device-{worker_id.rpartition('-')[2]}"]["pid"])
        if worker_id in workers:
            return int(workers[worker_id]["pid"])
        assert begun is not None
        process = self.members(begun, role)[worker_id]["process"]
        warm = [event for event in self.events() if event["kind"] == "warm" and event.get("process") == process]
        return int(warm[-1]["text"].rpartition("pid ")[2].rstrip(")"))

    def members(self, transition: dict[str, Any], role: str) -> dict[str, Any]:
        return {member["worker_id"]: member for member in transition["members"] if member["role"] == role}

    def events(self, after: int = 0) -> list[dict[str, Any]]:
        return list(wait_until(lambda: self.get("/events", after=after), "events", CALM_LIMIT_S)["events"])

    def fresh(self, timeout_s: float) -> None:
        """A request that begins now is answered; where the connection is refused it is asked again."""
        body = {"model": self.model, "prompt": "Hello", "max_tokens": 4, "temperature": 0}

        def answered() -> bool:
            with self.load.http(timeout_s) as http:
                try:
                    return http.post("/v1/completions", json=body).status_code == 200
                except httpx.TransportError:
                    return False

        wait_until(answered, "a fresh request is answered", timeout_s)
