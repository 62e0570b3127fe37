"""Every call to Ray, in one place: start or join a cluster, make actors, call them, see them die, end it all.

Nothing else in flexpert imports ray. `flexpert up` starts a small private Ray of its own (or joins the one that RAY_ADDRESS names);
the controller makes its actors detached and named, so that they outlive a controller that dies and a restarted one finds them again.
A call to an actor whose process is gone raises ActorGone, within milliseconds also where it was already waiting for the answer.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import logging
import os
import re
import shutil
import socket
import tempfile
import threading
import traceback
from collections.abc import Awaitable, Collection, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import ray
import ray.exceptions
from ray._private import services
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from flexpert.controller.placement import Node
from flexpert.controller.processes import ProcessId, children

END_S = 15.0
DEAD_RAY_S = 3.0
REACH_S = 5.0
GCS_AWAY_S = 3600  # Ray's processes would end a minute after their GCS; `up` decides when
NAMESPACE = "flexpert"
RAYLET, GCS = "raylet", "gcs_server"
OBJECT_STORE_BYTES = 80 << 20  # control messages only; Ray's own minimum is 75 MiB
log = logging.getLogger(__name__)
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


class RayUnavailable(Exception):
    """Ray could not be started or joined."""


class ActorGone(Exception):
    """The actor's process has ended."""


# Heaps of a process: every Ray process has two dozen threads, and what each frees into a heap of its own is lost to the others.
ARENAS = "2"


class RayCluster:
    """The driver's side of Ray. Must be started from the main thread: Ray's processes end with the thread that started them."""

    def __init__(self, *, temp_dir: Path | None) -> None:
        self.temp_dir = temp_dir
        self.processes = [] if temp_dir is None else children(ProcessId.own())

    @classmethod
    def start(cls, *, address: str | None, num_cpus: int) -> RayCluster:
        """A private Ray on this machine, or with an address the driver of a job there. Raises RayUnavailable."""
        if address is not None:
            _check_reachable(address)
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        os.environ.setdefault("MALLOC_ARENA_MAX", ARENAS)
        quiet = {"log_to_driver": False, "logging_level": logging.ERROR, "namespace": NAMESPACE}
        temp_dir = None
        try:
            if address is not None:
                ray.init(address=address, **quiet)
            else:
                temp_dir = Path(
                    tempfile.mkdtemp(prefix="flexpert-ray-", dir="/tmp")
                )  # short: sockets lie deep below it
                with _in_groups_of_their_own():
                    ray.init(
                        address="local", num_cpus=num_cpus, include_dashboard=False, object_store_memory=OBJECT_STORE_BYTES,
                        _temp_dir=str(temp_dir), _system_config={"gcs_rpc_server_reconnect_timeout_s": GCS_AWAY_S}, **quiet,
                    )  # fmt: skip
        except BaseException as error:
            if temp_dir is not None:
                ray.shutdown()
                shutil.rmtree(temp_dir, ignore_errors=True)
            if not isinstance(error, Exception):
                raise
            where = f"the Ray cluster at {address} (RAY_ADDRESS) cannot be joined" if address else "Ray did not start"
            token = (
                "; it asks for a token: set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or ~/.ray/auth_token to its token"
            )
            refused = "InvalidAuthToken" in "".join(traceback.format_exception(error))
            raise RayUnavailable(f"{where}: {error}{token if refused else ''}") from error
        return cls(temp_dir=temp_dir)

    @property
    def alive(self) -> bool:
        """Whether the processes of a private Ray run; for one that was joined it is not known."""
        return not self.lost

    @property
    def lost(self) -> set[str]:
        """Which of the processes of a private Ray have ended. Without "raylet" its actors end too; without "gcs_server"
        they go on, and those that have a handle still reach each other, but none can be found, made or ended."""
        return {process.name for process in self.processes if process.name in (RAYLET, GCS) and not process.alive}

    def shutdown(self, actors: str, *, wait_s: float | None = None) -> bool:
        """Leave the cluster; a private one ends, and its files go. In one that was joined, actors named so are ended first.

        Returns within wait_s (END_S) also where Ray is dying, as when the same signal reached its processes: their pids are the caller's to
        end. False where it could not be left in order: then this process can start no other.
        """
        leaving = threading.Thread(target=self._leave, args=(actors,), daemon=True)
        leaving.start()
        leaving.join(wait_s or (END_S if self.alive else DEAD_RAY_S))
        left = not leaving.is_alive() and not ray.is_initialized()
        if leaving.is_alive():
            log.warning("Ray does not answer; leaving without its consent")
            atexit.unregister(ray.shutdown)  # it would wait for the dead at the end of this process
        if self.temp_dir is not None:
            shutil.rmtree(self.temp_dir, ignore_errors=True)
        return left

    def _leave(self, actors: str) -> None:
        if self.temp_dir is None:
            kill_actors(actors)
            remove_placement(f"{actors}devices")
        for _ in range(2):  # it may break off where Ray's processes are gone, and gets further the next time
            try:
                ray.shutdown()
            except Exception:
                log.exception("Ray could not be left in order")
            if not ray.is_initialized():
                return

    def stop_listening(self) -> None:
        """A thread of Ray's asks the GCS for errors to print, and takes a whole core for that where there is none any more."""
        try:
            ray._private.worker.global_worker.threads_stopped.set()
        except AttributeError:
            log.warning("this version of Ray may be busy without its GCS")


@contextlib.contextmanager
def _in_groups_of_their_own() -> Iterator[None]:
    """Processes that Ray starts meanwhile do not get the signals of our process group, as from a terminal: they are needed to drain, and
    end with us anyway."""
    popen = getattr(services, "ConsolePopen", None)
    if popen is None:
        log.warning("this version of Ray ends with a signal to the whole process group")
        yield
        return
    services.ConsolePopen = partial(popen, process_group=0)
    try:
        yield
    finally:
        services.ConsolePopen = popen


def _check_reachable(address: str) -> None:
    """Ray tries for minutes; whether somebody listens is known at once. Raises RayUnavailable."""
    host, _, port = address.rpartition(":")
    if "://" in address:
        raise RayUnavailable(
            f"RAY_ADDRESS {address}: expected host:port of a Ray cluster that this machine is a node of, or auto"
        )
    if not port.isdigit():
        return  # "auto", or a name that Ray may know
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=REACH_S).close()
    except OSError as error:
        raise RayUnavailable(f"the Ray cluster at {address} (RAY_ADDRESS) cannot be reached: {error}") from error


def own_node() -> Node:
    """The Ray node this process runs on."""
    return Node(str(ray.get_runtime_context().get_node_id()), str(ray.util.get_node_ip_address()))


async def place_devices(
    name: str, bundles: list[dict[str, float]], *, known: Sequence[Node] = (), timeout_s: float
) -> list[Node]:
    """The node of each bundle, from a placement group that outlives its maker: the one of this name, or a new one. known: where they were;
    for bundles of a group that was found and lost their node. Where Ray cannot have all bundles it is told why. Raises RayUnavailable."""
    try:
        group, made = await asyncio.to_thread(ray.util.get_placement_group, name), False
    except ValueError:
        group = ray.util.placement_group(bundles, strategy="SPREAD", name=name, lifetime="detached")
        made = True
    try:
        if made or not known:
            await asyncio.wait_for(asyncio.wrap_future(group.ready().future()), timeout_s)
    except TimeoutError:
        if made:  # one that was found holds what runs
            remove_placement(name)
        free = await asyncio.to_thread(ray.available_resources)
        there = ", ".join(f"{key} {free.get(key, 0):g}" for key in bundles[0])
        raise RayUnavailable(
            f"{len(bundles)} devices of {bundles[0]} each do not fit the Ray cluster; free there: {there}"
        ) from None
    table = await asyncio.to_thread(ray.util.placement_group_table, group)
    hosts = {node["NodeID"]: node["NodeManagerAddress"] for node in await asyncio.to_thread(ray.nodes)}
    found = [node_id for _, node_id in sorted(table["bundles_to_node_id"].items())]
    if len(known) == len(found):
        return [Node(node_id, hosts[node_id]) if node_id in hosts else known[i] for i, node_id in enumerate(found)]
    if missing := [i for i, node_id in enumerate(found) if node_id not in hosts]:
        raise RayUnavailable(f"device{'s' * (len(missing) > 1)} {missing} have no node in the Ray cluster any more")
    return [Node(node_id, hosts[node_id]) for node_id in found]


def remove_placement(name: str) -> None:
    """Give back what place_devices holds; does nothing where there is none."""
    try:
        ray.util.remove_placement_group(ray.util.get_placement_group(name))
    except ValueError:
        log.debug("no placement group %s", name)


def create_actor(
    cls: type,
    name: str,
    arguments: dict[str, Any],
    *,
    num_cpus: float = 0,
    restarts: int = 0,
    detached: bool = True,
    node: str | None = None,
) -> Any:
    """Make a named actor of a plain class, on a node (this one, unless another is named by its id). Returns at once; the first call
    waits for the process."""
    return (
        ray.remote(cls)
        .options(
            name=name,
            namespace=NAMESPACE,
            lifetime="detached" if detached else None,
            num_cpus=num_cpus,
            max_restarts=restarts,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node or own_node().node_id, soft=False),
        )
        .remote(**arguments)
    )


def find_actor(name: str) -> Any | None:
    """The handle of a living actor by name, or None."""
    try:
        return ray.get_actor(name, namespace=NAMESPACE)
    except ValueError:
        return None


async def call(actor: Any, method: str, *arguments: Any) -> Any:
    """Call a method and wait for its result. Raises ActorGone, or what the method raised."""
    pending: Awaitable[Any] = getattr(actor, method).remote(*arguments)
    try:
        return await pending
    except ray.exceptions.RayTaskError as error:
        raise error.as_instanceof_cause() from None
    except ray.exceptions.RayError as error:
        raise ActorGone(_short(error)) from None


def kill_actor(actor: Any) -> None:
    """End the actor's process at once."""
    ray.kill(actor, no_restart=True)


def kill_actors(*prefixes: str, keep: Collection[str] = ()) -> list[str]:
    """End all actors whose name begins so, but those to keep; returns the names of those that were ended."""
    ended = []
    for found in ray.util.list_named_actors(all_namespaces=True):
        name = found["name"]
        if found["namespace"] == NAMESPACE and name.startswith(prefixes) and name not in keep:
            actor = find_actor(name)
            if actor is not None:
                kill_actor(actor)
                ended.append(name)
    return ended


def _short(error: Exception) -> str:
    """Ray's explanations run over a dozen lines; the essential one names what happened."""
    text = _COLOURS.sub("", str(error)).strip()
    if "creation task" in text:  # the constructor raised: the last line is its error
        return text.splitlines()[-1]
    if "out of memory" in text.lower() and "OOM killer" not in text:
        return "the process was ended for want of memory"
    if "connection error code 2" in text or "unexpected system error" in text:
        return "the process ended unexpectedly (killed, or it crashed)"
    return text.splitlines()[0] if text else type(error).__name__
