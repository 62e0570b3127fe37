"""Scheduler and books through random traffic, cancellations, lost steps, deaths and granules that come and go, in memory that is often
too small.

Each trace checks at every step: no row reads anything but its own prefix, no shared granule is written, no granule is mapped
twice, the manager's records are true at every operation, the oldest request advances, none overtakes; and at the end every
request had the tokens of an undisturbed run and all memory is free. The checks are those of tests/workers/kv_world.py.
"""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from tests.workers.kv_world import World, arrive_from_elsewhere, random_world, run_trace, submit_something

RANDOMS = st.randoms(use_true_random=False)


class Worker(RuleBasedStateMachine):
    """Hypothesis chooses what happens next, and finds the shortest story that goes wrong."""

    world: World

    @initialize(rng=RANDOMS)
    def start(self, rng: Random) -> None:
        self.world = random_world(rng)
        self.disturbances = 0

    @rule(rng=RANDOMS)
    def submit(self, rng: Random) -> None:
        submit_something(self.world, rng)

    @rule()
    def step(self) -> None:
        self.world.step()
        self.world.check_bounded_wait(self.disturbances)

    @precondition(lambda self: self.world.live)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        self.world.cancel(data.draw(st.sampled_from(list(self.world.live))))

    @precondition(lambda self: self.world.live)
    @rule(data=st.data())
    def cancel_during_a_step(self, data: st.DataObject) -> None:
        self.world.step(cancel_between=data.draw(st.sampled_from(list(self.world.live))))

    @precondition(lambda self: self.world.live)
    @rule()
    def lose_a_step(self) -> None:
        self.disturbances += 1
        self.world.step(abandon=True)

    @rule(rng=RANDOMS)
    def a_request_comes_from_elsewhere_with_its_kv(self, rng: Random) -> None:
        arrive_from_elsewhere(self.world, rng)

    @rule(count=st.integers(1, 6))
    def grow_the_arena(self, count: int) -> None:
        self.world.grow(count)

    @rule(count=st.integers(1, 8))
    def shrink_the_arena(self, count: int) -> None:
        self.disturbances += 1
        self.world.shrink(count)

    @rule(rng=RANDOMS)
    def die(self, rng: Random) -> None:
        self.disturbances += 1
        self.world.crash(rng)

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.drain()


TestWorker = Worker.TestCase
TestWorker.settings = settings(
    max_examples=25, stateful_step_count=25, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)


@given(RANDOMS)
@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
def test_any_trace_ends_with_the_tokens_of_an_undisturbed_run(rng: Random) -> None:
    run_trace(rng, events=20)


def run_many(seeds: range) -> None:
    preemptions = cached_tokens = crashes = 0
    for seed in seeds:
        try:
            world = run_trace(Random(seed), events=25)
        except AssertionError as error:
            raise AssertionError(f"trace of seed {seed}: {error}") from error
        stats = world.scheduler.stats()
        preemptions += stats.preemptions
        cached_tokens += stats.cached_prompt_tokens
        crashes += world.crashes
    # The traces are worth their time only if what they are about takes place in them.
    assert preemptions > len(seeds) // 50
    assert cached_tokens > len(seeds)
    assert crashes > len(seeds) // 10


def test_a_thousand_random_traces() -> None:
    run_many(range(1000))


@pytest.mark.slow
def test_ten_thousand_random_traces() -> None:
    run_many(range(1_000_000, 1_010_000))  # about half a minute


def test_everything_aborted_at_once_frees_all() -> None:
    for seed in range(50):
        rng = Random(seed)
        world = random_world(rng)
        for _ in range(6):
            submit_something(world, rng)
        for _ in range(rng.randint(0, 5)):
            world.step()
        for request_id in list(world.live):
            world.cancel(request_id)
        assert not world.scheduler.has_work
        assert world.books.available_granules == world.books.total_granules
        world.scheduler.check_integrity()
        world.drain()


def test_queue_behind_a_long_request_is_served_in_bounded_steps() -> None:
    """With newcomers at every step, each request is done before the work of those before it and its own could take longer."""
    for seed in range(30):
        rng = Random(seed)
        world = random_world(rng)
        bound: dict[str, int] = {}
        for steps in range(60):
            name = submit_something(world, rng)
            ahead = sum(len(c.frame.prompt_token_ids) + c.frame.params.max_tokens for c in world.live.values())
            bound[name] = steps + ahead
            world.step()
            assert all(bound[name] > steps for name in world.live), "a request waits longer than all before it can take"
        world.drain()
