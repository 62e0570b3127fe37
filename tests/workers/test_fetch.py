"""Weights come from the managers of peers in one load, from those that can be read, and from disk what is left."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.families import make_model

from flexpert.hbm import HbmClient, LoadError, ManagerConfig, ensure_manager, stop_manager
from flexpert.workers.fetch import ManagedWeights
from flexpert.workers.model import DENSE, all_experts, check_servable, expert_segments

KEY = "weights:test"
Device = tuple[ManagedWeights, str, HbmClient]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Experts of whole granules, so that there are several groups of them."""
    folder = tmp_path_factory.mktemp("model")
    make_model("qwen3_moe", hidden_size=64, moe_intermediate_size=128).save_pretrained(folder)
    return folder


@pytest.fixture
def device(model_dir: Path) -> Iterator[Callable[[], Device]]:
    """Each call: another device with a manager of its own."""
    folder = Path(tempfile.mkdtemp(prefix="fxf", dir="/tmp"))
    names: list[str] = []
    clients: list[HbmClient] = []

    def make() -> Device:
        names.append(f"device-{len(names)}")
        found = ensure_manager(ManagerConfig(runtime_dir=folder, name=names[-1], budget_bytes=64 << 20))
        clients.append(HbmClient.connect(found.socket_path, client_name="test"))
        servable = check_servable(model_dir)
        own = Path(found.socket_path)
        return (
            ManagedWeights(clients[-1], KEY, servable, "float32", device="cpu", own_socket=own),
            str(own),
            clients[-1],
        )

    try:
        yield make
    finally:
        for client in clients:
            client.close()
        for name in names:
            stop_manager(folder, name)
        shutil.rmtree(folder)


def halves(weights: ManagedWeights) -> tuple[list[str], list[str]]:
    layout = weights.layout()
    names = expert_segments(layout, all_experts(layout))
    assert len(names) >= 4
    return [DENSE, *names[: len(names) // 2]], list(names[len(names) // 2 :])


def count_loads(client: HbmClient, monkeypatch: pytest.MonkeyPatch, fail_first: bool = False) -> list[set[str]]:
    """The segments of each load from now on."""
    loads: list[set[str]] = []
    load_segments = client.load_segments

    def counted(key: str, plan: Any, **options: Any) -> None:
        loads.append(set(plan.segments))
        if fail_first and len(loads) == 1:
            raise LoadError("withdrawn while it was read")
        load_segments(key, plan, **options)

    monkeypatch.setattr(client, "load_segments", counted)
    return loads


def content(weights: ManagedWeights, names: list[str]) -> torch.Tensor:
    held = weights.experts(names)
    copied = held.memory.clone()
    held.close()
    return copied


def test_two_peers_are_read_in_one_load(device: Callable[[], Device], monkeypatch: pytest.MonkeyPatch) -> None:
    (a, a_socket, _), (b, b_socket, _), (joiner, _, client) = device(), device(), device()
    first, second = halves(a)
    a.fetch(first)
    b.fetch(second)
    loads = count_loads(client, monkeypatch)
    assert joiner.layout([a_socket]) == a.layout()
    fetched = joiner.fetch([*first, *second], [a_socket, b_socket])
    assert loads == [{*first, *second}]
    assert fetched.moved_bytes == sum(joiner.segments().values()) > fetched.loaded_bytes == 0
    assert not joiner.loaded_from_disk
    assert torch.equal(content(joiner, second), content(b, second))


def test_peer_that_cannot_be_read_leaves_its_part_to_the_disk(device: Callable[[], Device], tmp_path: Path) -> None:
    (a, a_socket, _), (joiner, _, _) = device(), device()
    first, second = halves(a)
    a.fetch(first)
    fetched = joiner.fetch([*first, *second], [str(tmp_path / "nobody"), a_socket])
    there = joiner.segments()
    assert fetched.moved_bytes == sum(there[name] for name in first)
    assert fetched.loaded_bytes == sum(there[name] for name in second)
    a.fetch(second)
    assert torch.equal(content(joiner, second), content(a, second))


def test_load_from_all_that_fails_is_tried_with_each(
    device: Callable[[], Device], monkeypatch: pytest.MonkeyPatch
) -> None:
    (a, a_socket, _), (b, b_socket, _), (joiner, _, client) = device(), device(), device()
    first, second = halves(a)
    a.fetch(first)
    b.fetch(second)
    loads = count_loads(client, monkeypatch, fail_first=True)
    fetched = joiner.fetch([*first, *second], [a_socket, b_socket])
    assert loads == [{*first, *second}, set(first), set(second)]
    assert fetched.loaded_bytes == 0 < fetched.moved_bytes


def test_source_gives_only_the_groups_it_is_named_for(device: Callable[[], Device]) -> None:
    (a, a_socket, _), (b, b_socket, _), (joiner, _, _) = device(), device(), device()
    first, second = halves(a)
    for weights in (a, b):
        weights.fetch([*first, *second])
    groups = [int(name.partition(":")[2]) for name in second]
    fetched = joiner.fetch([DENSE, *second], [(a_socket, groups[:1]), (b_socket, groups[1:])])
    assert fetched.loaded_bytes == 0
    assert fetched.moved_bytes == sum(joiner.segments().values())
