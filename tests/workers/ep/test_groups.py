"""Ranks that share out the experts compute the very bits of a single worker, whoever holds what and whatever each rank has to do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.families import FAMILIES, VOCAB, Request, make_model
from tests.workers.ep.world import SLOTS, Holders, World, make_epoch, random_holders, sole_holders

from flexpert.kernels import experts_forward
from flexpert.workers.ep import EpochExperts, ExpertExchange
from flexpert.workers.model import DENSE, all_experts, expert_segments
from flexpert.workers.step import Row
from flexpert.workers.transport import StepMissed
from flexpert.workers.transport.local import LocalGroup

T = TypeVar("T")

BUILTIN = Path(__file__).parents[3] / "workers" / "builtin_model"


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_world(family: str, folder: Path) -> World:
    if family == "builtin":
        return World(BUILTIN, granule_bytes=65536)
    make_model(family).save_pretrained(folder)
    return World(folder)


@pytest.fixture(scope="module", params=[*FAMILIES, "builtin"])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world("qwen3_moe", tmp_path_factory.mktemp("small"))


def prompt(length: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, VOCAB, length).tolist()


def row(name: str, slot: int, tokens: list[int], *, start: int = 0, all_logits: bool = True) -> Row:
    return Row(name, slot, start, tuple(tokens), True, all_logits)


Steps = list[list[list[Row]]]


def mixed_steps(size: int, seed: int) -> Steps:
    """Some steps: each rank in each begins prompts, goes on with others token by token, or has nothing to do."""
    chance = np.random.default_rng(seed)
    going: list[dict[int, Request]] = [{} for _ in range(size)]
    steps: Steps = []
    for number in range(4):
        step: list[list[Row]] = []
        for rank in range(size):
            rows = []
            for request in going[rank].values():
                request.tokens.append(int(chance.integers(VOCAB)))
                rows.append(request.row(all_logits=True))
            if (rank + number) % 3 != 1:
                slot = len(going[rank]) % SLOTS
                length = int(chance.choice([1, 3, 17, 40]))
                request = going[rank][slot] = Request(
                    f"r{rank}-{slot}", slot, prompt(length, int(chance.integers(1000)))
                )
                rows.append(request.row(all_logits=True))
            step.append([] if chance.random() < 0.2 and not going[rank] else rows)
        steps.append(step)
    return steps


def assert_like_a_single_worker(world: World, size: int, holders: Holders, steps: Steps) -> None:
    group = world.group(holders, size=size)
    assert_single_workers_bits(world, steps, [group.forward(step) for step in steps])


def assert_single_workers_bits(world: World, steps: Steps, found: list[list[torch.Tensor]]) -> None:
    """One rank after the other on a single worker: the ranks' requests have the same slots."""
    for rank in range(len(steps[0])):
        for i, step in enumerate(steps):
            if step[rank]:
                assert torch.equal(found[i][rank], world.single.forward(step[rank])), f"step {i} of rank {rank}"


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_ranks_of_any_placement_have_the_bits_of_a_single_worker(world: World, size: int) -> None:
    for seed in range(2):
        holders = random_holders(world.layout, size, seed=10 * size + seed)
        assert_like_a_single_worker(world, size, holders, mixed_steps(size, seed))


@pytest.mark.parametrize("holder", [0, 2])
def test_one_rank_may_hold_everything(world: World, holder: int) -> None:
    assert_like_a_single_worker(world, 3, sole_holders(world.layout, 3, holder), mixed_steps(3, seed=5))


def test_logits_differ_where_an_expert_is_wrong(small: World) -> None:
    """Guards the tests above: what a rank holds must matter."""
    group = small.group(random_holders(small.layout, 2, seed=1), size=2)
    for runner in group.runners:
        for layer in runner.bound.experts:
            if layer.slabs is not None:
                layer.slabs.down[0].zero_()
    step = [[row("a", 0, prompt(40, 1))], [row("b", 1, prompt(40, 2))]]
    assert not torch.equal(group.forward(step)[0], small.single.forward(step[0]))


@st.composite
def placements(draw: st.DrawFn):
    size = draw(st.integers(1, 4))
    ranks = st.sets(st.integers(0, size - 1), min_size=1).map(lambda found: tuple(sorted(found)))
    holders = draw(st.lists(st.lists(ranks, min_size=8, max_size=8).map(tuple), min_size=2, max_size=2).map(tuple))
    loads = draw(st.lists(st.sampled_from([0, 0, 1, 2, 16, 33]), min_size=size, max_size=size))
    return size, holders, loads


@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(placements())
def test_every_placement_and_load(small: World, placement) -> None:
    size, holders, loads = placement
    step = [[row(f"r{rank}", rank, prompt(load, rank))] if load else [] for rank, load in enumerate(loads)]
    assert_like_a_single_worker(small, size, holders, [step])


def test_all_tokens_may_go_to_one_expert(small: World) -> None:
    """The exchange alone, with ids that no router would give."""
    group = small.group((((1,),) * 8, ((0, 1),) * 8), size=2)
    hidden = torch.randn(50, 32, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[3, 5]]).repeat(50, 1)
    weights = torch.rand(50, 2, generator=torch.Generator().manual_seed(1))
    expected = experts_forward(hidden, ids, weights, small.single.bound.experts[0].slabs)
    asking, serving = group.exchanges
    for exchange in group.exchanges:
        exchange.begin(0)
    result = together(group.transports, lambda: asking.forward(0, hidden, ids, weights), lambda: serving.serve(0))[0]
    assert torch.equal(result, expected)
    assert asking.take_load()[0].tolist() == [0, 0, 0, 50, 0, 50, 0, 0]
    assert all(not layer.any() for layer in serving.take_load())
    assert all(not layer.any() for layer in asking.take_load())


def together(transports: LocalGroup, *calls: Callable[[], T]) -> list[T]:
    """One call a rank, in threads. A call that fails is the death of its rank."""

    def run(rank: int) -> T:
        try:
            return calls[rank]()
        except BaseException:
            transports.fail(rank)
            raise

    with ThreadPoolExecutor(max_workers=len(calls)) as threads:
        results = [threads.submit(run, rank) for rank in range(len(calls))]
    errors = [error for result in results if (error := result.exception()) is not None]
    for error in sorted(errors, key=lambda error: isinstance(error, StepMissed)):
        raise error
    return [result.result() for result in results]


def test_padding_rows_are_never_sent_nor_counted(small: World) -> None:
    group = small.group(random_holders(small.layout, 2, seed=3), size=2)
    sent = []
    transport = group.transports.transport(0)
    exchange = transport.exchange
    transport.exchange = lambda step, phase, parts: sent.append(parts[1].numel()) or exchange(step, phase, parts)
    group.forward([[row("a", 0, prompt(3, 1))], []])
    for layer in group.exchanges[0].take_load():
        assert layer.sum() == 3 * 2
    assert max(sent) <= 3 * 32 * 4 + 64


def test_a_token_is_sent_once_to_each_rank(small: World) -> None:
    """Both picks of every token lie on rank 1: a dispatch has as many rows as tokens, a combine twice as many."""
    group = small.group(sole_holders(small.layout, 2, 1), size=2)
    sent: dict[int, list[int]] = {0: [], 1: []}
    for rank in (0, 1):
        transport = group.transports.transport(rank)

        def exchange(step, phase, parts, rank=rank, original=transport.exchange):
            sent[rank].append(parts[1 - rank].numel())
            return original(step, phase, parts)

        transport.exchange = exchange
    group.forward([[row("a", 0, prompt(20, 1))], []])
    row_bytes = 32 * 4
    assert sent[0][1:] == [20 * row_bytes + 384, 0] * 2  # 2 + 2 * 40 int32, as multiples of 64 bytes
    assert sent[1][1:] == [0, 40 * row_bytes] * 2


def test_the_next_epoch_takes_over_between_two_steps(small: World) -> None:
    """KV stays; experts move."""
    steps = mixed_steps(3, seed=8)
    first = small.group(random_holders(small.layout, 3, seed=1), size=3, number=1)
    found = [first.forward(step) for step in steps[:2]]
    second = small.group(random_holders(small.layout, 3, seed=2), size=3, number=2)
    found += [second.forward(step) for step in steps[2:]]
    assert_single_workers_bits(small, steps, found)


def test_a_lost_peer_ends_the_step(small: World) -> None:
    group = small.group(sole_holders(small.layout, 2, 1), size=2)
    group.transports.fail(1)
    group.exchanges[0].begin(0)
    with pytest.raises(StepMissed):
        group.runners[0].forward([row("a", 0, prompt(3, 1))])


def test_a_rank_refuses_a_placement_that_it_does_not_have(small: World) -> None:
    group = small.group(sole_holders(small.layout, 2, 1), size=2)
    experts = small.experts(group.runners[0], group.epoch.held_by(0))
    other = make_epoch(sole_holders(small.layout, 2, 0), size=2)
    with pytest.raises(ValueError, match="places other experts"):
        ExpertExchange(group.transports.transport(0), other, 0, experts)
    with pytest.raises(ValueError, match="needs an exchange"):
        group.runners[0].use(experts, None)


def test_ranks_of_different_epochs_notice(small: World) -> None:
    """Each thinks that the other holds everything."""
    runner, transports = small.group(sole_holders(small.layout, 2), size=2).runners[0], LocalGroup(2)
    exchanges = []
    for rank in (0, 1):
        epoch = make_epoch(sole_holders(small.layout, 2, 1 - rank), size=2)
        experts = small.experts(runner, epoch.held_by(rank))
        exchanges.append(ExpertExchange(transports.transport(rank), epoch, rank, experts))
        exchanges[rank].begin(0)
    hidden, ids, weights = torch.randn(2, 32), torch.tensor([[0, 1], [2, 3]]), torch.rand(2, 2)
    calls = [lambda one=one: one.forward(0, hidden, ids, weights) for one in exchanges]
    with pytest.raises(ValueError, match="not in the same epoch"):
        together(transports, *calls)


def test_a_step_must_be_begun(small: World) -> None:
    group = small.group(sole_holders(small.layout, 2, 1), size=2)
    with pytest.raises(RuntimeError, match="begin"):
        group.runners[0].serve()
    with pytest.raises(RuntimeError, match="no exchange"):
        small.single.serve()


def test_a_bound_model_without_experts_says_so(small: World) -> None:
    runner = small._runner()
    with pytest.raises(RuntimeError, match="use"):
        runner.forward([row("a", 0, prompt(3, 1))])


def test_memory_that_does_not_fit_the_placement_is_refused(small: World) -> None:
    held = all_experts(small.layout)
    names = expert_segments(small.layout, held)
    assert DENSE not in names
    with pytest.raises(ValueError, match="slab groups"):
        EpochExperts(small.single.bound, held, torch.empty(small.layout.group_bytes, dtype=torch.uint8))


def test_a_group_of_one_counts_its_load(small: World) -> None:
    small.single.take_load()
    small.single.forward([row("a", 0, prompt(7, 1))])
    assert [int(layer.sum()) for layer in small.single.take_load()] == [14, 14]
    assert [int(layer.sum()) for layer in small.single.take_load()] == [0, 0]
