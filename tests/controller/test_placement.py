"""Where devices are, from where Ray put their bundles."""

from __future__ import annotations

from flexpert.controller.placement import Node, bundle, places, reachable

OWN, NEXT, FAR = Node("aaaaaaaaaaaa", "10.0.0.1"), Node("bbbbbbbbbbbb", "10.0.0.1"), Node("cccccccccccc", "10.0.0.2")
WORKERS = ("worker-0", "worker-1", "worker-2", "worker-3")


def test_devices_are_counted_on_each_node_and_belong_to_its_agent() -> None:
    found = places(WORKERS, [NEXT, OWN, FAR, NEXT], own=OWN)
    assert [(place.agent, place.index, place.local) for place in found.values()] == [
        ("agent-bbbbbbbb", 0, True),
        ("agent", 0, True),
        ("agent-cccccccc", 0, False),
        ("agent-bbbbbbbb", 1, True),
    ]


def test_managers_can_be_read_on_the_same_machine_only() -> None:
    found = places(WORKERS, [NEXT, OWN, FAR, NEXT], own=OWN)
    assert reachable("worker-1", ["worker-0", "worker-2"], found) == ["worker-0"]
    assert reachable("worker-2", ["worker-0", "worker-1"], found) == []


def test_device_of_the_host_asks_for_no_core_and_a_gpu_for_its_share() -> None:
    assert bundle("cpu", gpus_each=1)["CPU"] < 1
    assert bundle("cuda", gpus_each=0.5)["GPU"] == 0.5
