"""Where the devices are: which node of the Ray cluster has which, and which agent keeps its manager.

Decided once, when the cluster comes up, by a Ray placement group with a bundle for each device: Ray spreads the bundles over its nodes as
far as their resources go, holds them for us, and a restarted controller finds the same group by its name. Pure; `ray_cluster` asks Ray.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from flexpert.controller.supervision_types import AGENT

DEVICE_CPUS = 0.01  # a device of the host is a budget of memory; the cores are shared


@dataclass(frozen=True, slots=True)
class Node:
    """host: an address that is the same for all nodes of one machine."""

    node_id: str
    host: str


@dataclass(frozen=True, slots=True)
class Place:
    """agent: of the node. index: which of the node's devices it is. local: whether it is on the controller's own machine."""

    agent: str
    node: Node
    index: int
    local: bool


def bundle(device: str, *, gpus_each: float) -> dict[str, float]:
    """What Ray holds for each device. gpus_each: 1, or the share of one where workers share GPUs."""
    return {"CPU": DEVICE_CPUS} | ({"GPU": gpus_each} if device == "cuda" else {})


def places(workers: Sequence[str], nodes: Sequence[Node], *, own: Node) -> dict[str, Place]:
    """Worker -> where its device is. nodes: of each worker's bundle, in the order of the workers."""
    found: dict[str, Place] = {}
    for worker_id, node in zip(workers, nodes, strict=True):
        agent = AGENT if node.node_id == own.node_id else f"{AGENT}-{node.node_id[:8]}"
        index = sum(place.node.node_id == node.node_id for place in found.values())
        found[worker_id] = Place(agent, node, index, node.host == own.host)
    return found


def reachable(worker_id: str, others: Sequence[str], where: Mapping[str, Place]) -> list[str]:
    """Those of the others whose managers' sockets the worker can open: the ones on its own machine."""
    host = where[worker_id].node.host
    return [other for other in others if where[other].node.host == host]
