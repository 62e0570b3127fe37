"""`flexpert up`: brings a cluster up, stays with it, and ends everything it started.

The order: lock and clean up the runtime directory, check what can be checked at once, start Ray, hand the spec to the controller, then
follow what it tells until a signal or a failure. Whatever happens, `_end` runs: the manager is stopped, Ray is shut down, and any
descendant that is still there is ended by its pid. Runs in the main thread, since Ray's processes end with the thread that started them.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import signal
import time
from collections import deque
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flexpert.cli import machine, policy_files
from flexpert.cli.admin import serve_admin
from flexpert.cli.contact import Contact
from flexpert.cli.errors import CommandError
from flexpert.cli.leftovers import clean_up
from flexpert.cli.model_source import ModelSource, resolve_model
from flexpert.cli.options import show_bytes
from flexpert.cli.output import own_output
from flexpert.cli.screen import Screen
from flexpert.controller.journal import read_events
from flexpert.controller.processes import ProcessId, children, end_all
from flexpert.controller.runtime_dir import AlreadyRunning, RuntimeDir, RuntimeDirError, hold_lock, make, write_json
from flexpert.controller.spec import ClusterSpec

log = logging.getLogger(__name__)

WATCH_S = 0.25
ANSWER_S, LOOK_S = 2.0, 0.5  # then it is asked again; meanwhile it is looked how the controller is
CONTROLLER_RESTART_S = 30.0
END_GRACE_S, LEAVE_RAY_S = 3.0, 30.0  # asking a dead Ray takes its time
MAX_RAY_LOSSES, RAY_LOSSES_S = 3, 600.0  # a private Ray that dies more often in that time is not started again
FINISH_GRACE_S = 12.0  # beyond the drain timeout, within which the gateway itself ends what is left
SAME_SIGNAL_S = 0.5
GPU_STEP_TIMEOUT_S = 10.0  # a rank's first steps there load kernels
ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True, kw_only=True)
class UpOptions:
    """What was typed, with sizes already in bytes."""

    model: str | None = None
    name: str = "default"
    host: str = "127.0.0.1"
    port: int = 8000
    device: str = "auto"
    dtype: str | None = None
    memory_bytes: int | None = None
    kv_bytes: int | None = None
    max_context_tokens: int | None = None
    max_running: int = 64
    max_batch_tokens: int = 512
    api_key: str | None = None
    no_auth: bool = False
    admin_key: str | None = None
    workers: int = 1
    standbys: int = 1
    max_workers: int | None = None
    policy: Path | None = None
    policy_most: int | None = None  # workers that it may want
    share_gpus: bool = False
    threads: int | None = None
    log_level: str = "info"
    drain_timeout_s: float = 30.0


def run_up(options: UpOptions) -> None:
    """Returns when the cluster was ended in order. Raises CommandError, with nothing left running."""
    try:
        runtime = make(options.name)
        lock = hold_lock(runtime)
    except RuntimeDirError as error:
        raise CommandError("directory", str(error)) from error
    except AlreadyRunning:
        raise CommandError(
            "running",
            f"a cluster named {options.name!r} runs already; end it with `flexpert down`, or give another --name",
        ) from None
    try:
        with own_output(runtime, options.log_level) as out:
            _Up(options, runtime, Screen(out)).run()
    finally:
        os.close(lock)


class _Up:
    def __init__(self, options: UpOptions, runtime: RuntimeDir, screen: Screen) -> None:
        self._options, self._runtime, self._screen = options, runtime, screen
        self._stop_asked, self._hurry = asyncio.Event(), asyncio.Event()
        self._stop_asked_at_s = 0.0
        self._contact = Contact(runtime.controller_pid)
        self._ray: Any = None
        self._ray_lost_s: deque[float] = deque(maxlen=MAX_RAY_LOSSES)
        self._port: int | None = None
        self._ready = False
        self._controller: Any = None
        self._api_key: str | None = None
        self._admin_key = options.admin_key or "fxa-" + secrets.token_urlsafe(24)
        self._source: ModelSource
        self._spec: ClusterSpec

    def run(self) -> None:
        for number in ENDING_SIGNALS:
            signal.signal(number, _interrupt)
        try:
            for line in clean_up(self._runtime, stop_manager=False):
                self._screen.step(line)
            self._write_state()
            self._spec = self._make_spec()
            self._start_ray()
            asyncio.run(self._serve())
        except KeyboardInterrupt:
            self._screen.step("interrupted")
        finally:
            self._end()

    # Before anything runs

    def _make_spec(self) -> ClusterSpec:
        options = self._options
        device = machine.resolve_device(options.device)
        max_workers = policy_files.most_workers(options, device, tell=self._screen.step)
        if options.share_gpus and options.kv_bytes is None:
            raise CommandError(
                "usage",
                "--share-gpus: a worker takes for KV what is free of its GPU; say with --kv-memory how much each may",
            )
        machine.check_port(options.host, options.port)
        if options.memory_bytes is not None:
            machine.check_memory(options.memory_bytes * options.workers)
        memory_bytes = options.memory_bytes or machine.default_memory_bytes(options.workers)
        if options.kv_bytes is not None and options.kv_bytes >= memory_bytes:
            raise CommandError(
                "memory",
                f"--kv-memory: found {show_bytes(options.kv_bytes)}, expected less than the {show_bytes(memory_bytes)} of --memory",
            )
        self._source = resolve_model(options.model)
        self._api_key = None if options.no_auth else options.api_key or "fx-" + secrets.token_urlsafe(24)
        if self._api_key == self._admin_key:
            raise CommandError(
                "usage",
                "the API key and the admin key are the same; whoever may ask the model could end it: give another",
            )
        self._screen.step(f"model {self._source.model_id} ({self._source.directory}) on {device}")
        return ClusterSpec(
            name=options.name,
            runtime_path=self._runtime.path,
            model_dir=self._source.directory,
            model_id=self._source.model_id,
            device=device,
            dtype=options.dtype,
            memory_bytes=memory_bytes,
            memory_exact=options.memory_bytes is not None,
            kv_bytes=options.kv_bytes,
            max_context_tokens=options.max_context_tokens,
            max_running=options.max_running,
            max_batch_tokens=options.max_batch_tokens,
            host=options.host,
            port=options.port,
            api_keys=() if self._api_key is None else (self._api_key,),
            admin_keys=(self._admin_key,),
            cluster_token=secrets.token_hex(24),
            log_level=options.log_level,
            standbys=options.standbys,
            workers=options.workers,
            max_workers=max_workers,
            policy_path=options.policy,
            drill_dir=Path(drills) if (drills := os.environ.get("FLEXPERT_DRILL_DIR")) else None,
            threads=options.threads or machine.cores(),
            drain_timeout_s=options.drain_timeout_s,
            num_gpus=min(max_workers, machine.gpus()) if device == "cuda" else 0,
            step_timeout_s=GPU_STEP_TIMEOUT_S if device == "cuda" else ClusterSpec.step_timeout_s,
        )

    def _start_ray(self) -> None:
        from flexpert.controller import ray_cluster
        from flexpert.controller.controller import Controller

        address = os.environ.get("RAY_ADDRESS") or None
        try:
            self._ray = ray_cluster.RayCluster.start(address=address, num_cpus=machine.cores())
        except ray_cluster.RayUnavailable as error:
            raise CommandError("ray", str(error)) from error
        self._screen.step(f"joined Ray at {address}" if address else "Ray started")
        arguments = {"spec": self._spec, "log_path": str(self._runtime.logs / "controller.log")}
        self._controller = ray_cluster.create_actor(
            Controller, f"{self._options.name}:controller", arguments, restarts=-1, detached=False
        )
        self._write_state()

    # While it runs

    async def _serve(self) -> None:
        self._heed_signals()
        admin = await serve_admin(self._runtime, self._answer)
        try:
            await self._follow()
        finally:
            admin.close()

    def _heed_signals(self) -> None:
        """Again after each start of Ray, which takes SIGTERM for itself."""
        for number in ENDING_SIGNALS:
            asyncio.get_running_loop().add_signal_handler(number, self._on_signal)

    def _on_signal(self) -> None:
        """The first asks for an orderly end, a later one for an end at once; some tools send the same signal twice in a row."""
        now_s = time.monotonic()
        if self._stop_asked.is_set():
            if now_s - self._stop_asked_at_s > SAME_SIGNAL_S:
                self._hurry.set()
            return
        self._stop_asked_at_s = now_s
        self._stop_asked.set()

    async def _follow(self) -> None:
        """Print what the controller tells until the cluster has ended."""
        past = read_events(self._runtime)
        after, stopping, shown = past[-1]["sequence"] if past else 0, False, False
        while not self._hurry.is_set():
            state = await self._ask("watch", after, WATCH_S)
            if self._ray.lost:
                if not await self._go_on_without_ray():
                    return
                continue
            if state is None:
                continue
            if not state["begun"]:
                self._contact.heard()
                continue
            if (replaced := self._contact.answered(state["pid"])) is not None:
                await self._ask("replaced", *replaced)
            after = state["last"]
            for event in state["events"]:
                self._screen.event(event)
            if state["events"]:
                self._port = state["port"]
                self._write_state()
            for done_bytes, total_bytes in state["progress"].values():
                self._screen.progress(done_bytes, total_bytes)
            if state["given_up"]:
                raise CommandError(state["given_up"]["kind"], state["given_up"]["reason"])
            if state["stopped"]:
                return
            if state["ready"] and not self._ready:
                self._ready = True
                self._write_state()
                if shown:
                    self._screen.step("ready again")
                    continue
                shown = True
                self._screen.ready(
                    self._source,
                    url=machine.url_of(self._spec.host, state["port"]),
                    key=self._api_key,
                    admin_key=self._admin_key,
                    status=await self._answer("status"),
                    max_workers=self._spec.max_workers,
                )
            if self._stop_asked.is_set():
                if not stopping:
                    stopping = True
                    self._screen.step("ending (once more Ctrl-C: at once)")
                await self._ask("stop")  # in each round: a controller that was restarted meanwhile does not know
        self._screen.step("ending at once")

    async def _go_on_without_ray(self) -> bool:
        """Processes of the private Ray died. A fresh Ray takes its place, unless the end was asked for: a signal to all
        processes, as from a service manager, ends Ray too. Raises CommandError where it dies too often."""
        await asyncio.sleep(WATCH_S)  # one signal reaches several processes one after another
        await self._finish_requests()
        if self._stop_asked.is_set():
            self._screen.step("Ray has ended too; ending at once")
            return False
        what, now_s = " and ".join(sorted(self._ray.lost)), time.monotonic()
        often = len(self._ray_lost_s) == MAX_RAY_LOSSES and now_s - self._ray_lost_s[0] < RAY_LOSSES_S
        if not self._ready or often:
            when = "too often" if often else "before the cluster was ready"
            raise CommandError("ray", f"Ray's {what} ended unexpectedly, {when}; see `flexpert logs up`; start again")
        self._ray_lost_s.append(now_s)
        self._screen.step(f"Ray's {what} ended unexpectedly; starting a fresh Ray")
        self._contact.lost(f"Ray's {what} ended unexpectedly")
        await self._begin_anew()
        return True

    async def _finish_requests(self) -> None:
        """Where Ray's GCS alone is gone, gateway and workers go on: requests that run are let finish."""
        from flexpert.controller import ray_cluster

        if self._ray.lost != {ray_cluster.GCS}:
            return
        self._ray.stop_listening()
        self._screen.step("Ray's gcs_server ended; requests that run finish first")
        finishing = asyncio.create_task(ray_cluster.call(self._controller, "finish"))
        deadline_s = time.monotonic() + self._options.drain_timeout_s + FINISH_GRACE_S
        while self._ray.lost == {ray_cluster.GCS} and time.monotonic() < deadline_s and not self._hurry.is_set():
            if (await asyncio.wait({finishing}, timeout=WATCH_S))[0]:
                break
        if not finishing.cancel() and (error := finishing.exception()) is not None:
            log.warning("requests could not be let finish: %r", error)

    async def _begin_anew(self) -> None:
        """A fresh Ray and a controller that goes on where the last one was: same port, same keys; the HBM managers are adopted."""
        self._ready, self._controller = False, None
        self._write_state()
        if "gcs_server" in self._ray.lost:  # one that still answers lets Ray be left in order, which is quicker
            await asyncio.to_thread(end_all, children(ProcessId.own()), grace_s=END_GRACE_S)
        left = await asyncio.to_thread(self._ray.shutdown, f"{self._options.name}:", wait_s=LEAVE_RAY_S)
        await asyncio.to_thread(end_all, children(ProcessId.own()), grace_s=END_GRACE_S)
        if not left:
            raise CommandError("ray", "Ray ended unexpectedly and cannot be left; start again")
        self._spec = replace(self._spec, port=self._port or self._spec.port)
        self._start_ray()
        self._heed_signals()

    async def _ask(self, method: str, *arguments: Any) -> dict[str, Any] | None:
        """The controller's answer; None where there is none in time, or a signal came first. A controller that hangs is ended."""
        waits = {asyncio.create_task(self._call(method, *arguments)), asyncio.create_task(self._hurry.wait())}
        done: set[asyncio.Task[Any]] = set()
        ends_s = time.monotonic() + ANSWER_S
        while not done and not self._ray.lost and time.monotonic() < ends_s:
            done, _ = await asyncio.wait(waits, timeout=LOOK_S, return_when=asyncio.FIRST_COMPLETED)
            if not done and (told := self._contact.unanswered(LOOK_S)) is not None:
                self._screen.step(told)
        for task in waits - done:
            task.cancel()
        return next((task.result() for task in done if isinstance(task.result(), dict)), None)

    async def _call(self, method: str, *arguments: Any) -> Any:
        """Ask the controller; while Ray restarts it, ask again."""
        from flexpert.controller import ray_cluster

        deadline_s = asyncio.get_running_loop().time() + CONTROLLER_RESTART_S
        while True:
            try:
                if self._controller is None:  # a call would have Ray start one of its own
                    raise ray_cluster.ActorGone("Ray is being started again")
                return await ray_cluster.call(self._controller, method, *arguments)
            except ray_cluster.ActorGone as error:
                log.warning("the controller does not answer: %s", error)
                if asyncio.get_running_loop().time() > deadline_s:
                    raise CommandError("internal", f"the controller ended and was not restarted: {error}") from error
                await asyncio.sleep(WATCH_S)

    async def _answer(self, word: str) -> dict[str, Any]:
        """For the admin socket."""
        if word != "status":
            raise ValueError(f"{word!r}: expected 'status'")
        status: dict[str, Any] = await self._call("status")
        port = status.get("gateway", {}).get("port", self._spec.port)
        return {**status, "up": {"pid": os.getpid()}, "url": machine.url_of(self._spec.host, port)}

    def _write_state(self) -> None:
        """Who runs, for the other commands and for cleaning up after us."""
        own, temp_dir = ProcessId.own("up"), None if self._ray is None else self._ray.temp_dir
        state = {
            "up": own.to_json(),
            "processes": [process.to_json() for process in children(own)],
            "ray_address": os.environ.get("RAY_ADDRESS") or None,
            "ray_temp_dir": None if temp_dir is None else str(temp_dir),
            "url": None if self._port is None else machine.url_of(self._spec.host, self._port),
            "api_key": self._api_key,
            "admin_key": self._admin_key,
            "ready": self._ready,
        }
        try:
            write_json(self._runtime.state, state)
        except OSError as error:
            if self._ray is None:
                raise CommandError("directory", f"{self._runtime.state} cannot be written: {error.strerror}") from error
            log.warning("%s cannot be written: %s; it is as it was", self._runtime.state, error)

    # The end

    def _end(self) -> None:
        """End all that was started, whatever state it is in."""
        for number in ENDING_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        self._screen.end_progress()
        if started := self._ray is not None:
            self._ray.shutdown(f"{self._options.name}:")
        end_all(children(ProcessId.own()), grace_s=END_GRACE_S)
        for line in clean_up(self._runtime, stop_manager=True):
            log.info("%s", line)
        if started:
            self._screen.step("ended")


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt
