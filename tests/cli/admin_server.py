"""The real admin API on a loopback port, with the controller behind it played, and a runtime directory that points to it."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI

from flexpert.controller.errors import AdminError
from flexpert.controller.gateway import ControllerAway
from flexpert.controller.gateway.admin import ControllerDesk, admin_router
from flexpert.controller.gateway.app import _add_error_handlers
from flexpert.controller.gateway.front import Front
from flexpert.controller.gateway.keys import AdminKeys, ApiKeys
from flexpert.controller.gateway.metrics import GatewayMetrics
from flexpert.controller.processes import ProcessId
from flexpert.controller.runtime_dir import RuntimeDir, write_json

API_KEY, ADMIN_KEY = "fx-api", "fxa-admin"
DEVICES = 4


class PlayedController:
    """Keeps the rules of the real one: one transition at a time, ids that stay with their wish, bounds. Each look at a transition takes it
    a phase further, unless `hold`; `ends_as` is how it ends."""

    PHASES = ("start", "prepare", "commit", "retire", "ended")

    def __init__(self) -> None:
        self.workers = ["worker-0", "worker-1"]
        self.calls: list[tuple[Any, ...]] = []
        self.transitions: dict[str, dict[str, Any]] = {}
        self.asked: dict[str, tuple[Any, str]] = {}
        self.hold, self.away, self.ends_as = False, 0, ("done", "")
        self.looked = threading.Event()

    async def __call__(self, method: str, *arguments: Any) -> Any:
        if self.away:
            self.away -= 1
            raise ControllerAway("killed")
        self.calls.append((method, *arguments))
        return getattr(self, method)(*arguments)

    def scale(self, workers: int, request_id: str, *hold: Any) -> dict[str, Any]:
        def begin() -> dict[str, Any]:
            if workers < 1:
                raise AdminError(
                    "impossible", "0 workers cannot serve: scale to at least 1; 'flexpert down' ends the cluster"
                )
            if workers > DEVICES:
                raise AdminError(
                    "impossible", f"{workers} workers are too many: there are 4 devices; scale to 4 or fewer"
                )
            if workers == 1 and len(self.workers) > 2:
                raise AdminError("impossible", "1 worker cannot hold the model: 2 workers can, or raise --memory")
            return self._begin(
                f"scale to {workers} workers", [f"worker-{number}" for number in range(workers)], request_id
            )

        return self._once(("scale", workers), request_id, begin)

    def drain(self, worker_id: str, request_id: str, *hold: Any) -> dict[str, Any]:
        def begin() -> dict[str, Any]:
            if worker_id not in self.workers:
                raise AdminError("not_found", f"there is no worker {worker_id!r}: {', '.join(self.workers)} serve")
            return self._begin(f"drain {worker_id}", [name for name in self.workers if name != worker_id], request_id)

        return self._once(("drain", worker_id), request_id, begin)

    def _once(self, wish: Any, request_id: str, begin: Any) -> dict[str, Any]:
        if request_id in self.asked:
            earlier, transition_id = self.asked[request_id]
            if earlier != wish:
                raise AdminError("conflict", f"request id {request_id!r} was used for {earlier}; draw another id")
            return self.transitions[transition_id]
        if any(found["state"] == "running" for found in self.transitions.values()):
            raise AdminError("conflict", "transition t-1 is running: phase prepare; ask again after it")
        found = begin()
        self.asked[request_id] = (wish, found["transition_id"])
        return found

    def _begin(self, asked: str, to_workers: list[str], request_id: str) -> dict[str, Any]:
        name = f"t-{len(self.transitions) + 1}"
        found = {
            "transition_id": name, "request_id": request_id, "kind": asked.split()[0], "asked": asked, "state": "running",
            "phase": "start", "from_workers": self.workers, "to_workers": to_workers, "epoch": 7, "moved_bytes": 0,
            "total_bytes": 4 << 20, "deadline_s": 30.0, "reason": "",
        }  # fmt: skip
        if to_workers == self.workers:
            found |= {"state": "done", "phase": "ended", "deadline_s": None}
        self.transitions[name] = found
        return found

    def transition(self, transition_id: str | None) -> dict[str, Any] | None:
        if transition_id is None:
            return next(reversed(self.transitions.values()), None)
        if transition_id not in self.transitions:
            raise AdminError("not_found", f"there is no transition {transition_id!r}")
        found = self.transitions[transition_id]
        if found["state"] == "running" and not self.hold:
            phase = self.PHASES[self.PHASES.index(found["phase"]) + 1]
            found |= {"phase": phase, "moved_bytes": found["moved_bytes"] + (1 << 20)}
            if phase == "ended":
                state, reason = self.ends_as
                found |= {"state": state, "reason": reason, "seconds": 0.5, "deadline_s": None}
                self.workers = found["to_workers"] if state == "done" else self.workers
        self.looked.set()
        return found

    def status(self) -> dict[str, Any]:
        workers = [
            {"worker_id": name, "device": "cpu", "dtype": "float32", "incarnation": 1, "pid": 7, "experts_held": 12, "kv_bytes": 1 << 20,
             "address": "unix:/x"} for name in self.workers
        ]  # fmt: skip
        books = {"budget_bytes": 2 << 30, "free_bytes": 1 << 30, "pid": 8}
        return {
            "name": "default", "phase": "running", "ready": True, "epoch": 6, "model": "m", "uptime_s": 3.0, "workers": workers,
            "gateway": {"pid": 9}, "manager": books, "managers": {"device-0": books, "device-1": books},
            "processes": {"process-0": {"phase": "serving", "worker_id": "worker-0"}},
            "transition": next(reversed(self.transitions.values()), None),
        }  # fmt: skip

    def events(self, after: int) -> dict[str, Any]:
        told = [{"sequence": n, "time_s": 1.7e9 + n, "kind": "epoch", "text": f"epoch {n} serves"} for n in range(1, 4)]
        return {"events": [event for event in told if event["sequence"] > after], "last": 3}


class AdminServer:
    """Serves from `start` to `stop`; `runtime` gets the state.json that `flexpert up` would write."""

    def __init__(self, runtime: Path) -> None:
        self.controller = PlayedController()
        keys = ApiKeys((API_KEY,))
        metrics = GatewayMetrics(live=lambda: 0, waiting=lambda: 0, links=list, connections={})
        app = FastAPI()
        _add_error_handlers(app)
        app.include_router(admin_router(ControllerDesk(self.controller)))
        front = Front(
            app, keys=keys, admin_keys=AdminKeys((ADMIN_KEY,), api_keys=keys), max_body_bytes=1 << 20,
            draining=lambda: False, metrics=metrics,
        )  # fmt: skip
        self._server = uvicorn.Server(uvicorn.Config(front, port=0, log_level="error", lifespan="off"))
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._runtime = RuntimeDir(runtime / "default")
        self.url = ""

    def start(self) -> AdminServer:
        from tests.cli.harness import wait_until

        self._thread.start()
        wait_until(lambda: self._server.started, what="the admin server")
        self.url = f"http://127.0.0.1:{self._server.servers[0].sockets[0].getsockname()[1]}"
        self._runtime.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        state = {
            "up": ProcessId.own("up").to_json(),
            "processes": [],
            "url": self.url,
            "admin_key": ADMIN_KEY,
            "ready": True,
        }
        write_json(self._runtime.state, state)
        return self

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(20)
        self._runtime.state.unlink(missing_ok=True)  # it names this very process as `up`
