"""Worlds of ranks for the transports' tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from .worlds import World, preload, stop_fork_server

KINDS = ("local", "mapped", "gloo")


@pytest.fixture(scope="package", autouse=True)
def fork_server() -> Iterator[None]:
    preload()
    yield
    stop_fork_server()


@pytest.fixture(scope="module", params=KINDS)
def world(
    request: pytest.FixtureRequest, fork_server: None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[World]:
    """Four ranks that live through a module's tests, of each kind."""
    made = World(request.param, 4, tmp_path_factory.mktemp("exchange"))
    yield made
    made.end()


@pytest.fixture
def make_world(fork_server: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str, int], World]]:
    """Worlds whose ranks a test may kill."""
    made: list[World] = []

    def make(kind: str, size: int) -> World:
        made.append(World(kind, size, tmp_path_factory.mktemp("exchange")))
        return made[-1]

    yield make
    for each in made:
        each.end()
