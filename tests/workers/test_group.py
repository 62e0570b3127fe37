"""Engines that step together: who joins, leaves, flips, dies or misses a step at whatever moment, every request has the tokens of one
engine that runs alone, once each."""

from __future__ import annotations

from random import Random

import pytest
from tests.workers.elastic import Gateway
from tests.workers.group_world import LAYERS, World, random_submit, tokens_alone

from flexpert.workers.messages import SamplingParams, Submit

NAMES = ["a", "b", "c", "d"]


@pytest.fixture
def world():
    made = World()
    yield made
    made.close()


def long_request(name: str, tokens: int = 40) -> Submit:
    params = SamplingParams(max_tokens=tokens, seed=7, temperature=0.0)
    return Submit(request_id=name, prompt_token_ids=[5, 6, 7], params=params)


def run_story(rng: Random, events: int) -> World:
    """Random requests, transitions, deaths and misses; then quiet until all is done."""
    world = World()
    submits: list[Submit] = []
    try:
        world.enter(world.make(rng.sample(NAMES, rng.randint(1, 4))))
        for _ in range(events):
            for _ in range(rng.randint(0, 3)):
                submits.append(random_submit(rng, len(submits)))
                world.submit(submits[-1], rng.choice(world.members()))
            if rng.random() < 0.7 and submits:
                wait_for_some(world, rng.randint(1, 5))
            happen(world, rng)
        assert world.gateway.wait_all() == tokens_alone(submits)
        for worker in world.workers.values():
            worker.engine.call(worker.scheduler.check_integrity).result(10)
    finally:
        world.close()
    return world


def wait_for_some(world: World, tokens: int) -> None:
    """Until so many more are there, or all."""

    def emitted(gateway: Gateway) -> int:
        return sum(len(client.emitted) for client in gateway.clients.values())

    goal = emitted(world.gateway) + tokens
    world.gateway.wait(lambda gateway: emitted(gateway) >= goal or all(c.reason for c in gateway.clients.values()))


def happen(world: World, rng: Random) -> None:
    """One transition, perhaps with a fault before or in it."""
    members = world.members()
    following = world.make(rng.sample(NAMES, rng.randint(1, 4)))
    kind = rng.random()
    if kind < 0.15:  # aborted, some of them ready already
        for name in rng.sample(list(following), rng.randint(0, len(following) - 1)):
            world.workers[name].engine.enter(following[name])
        withdrawn = [world.workers[name].engine.withdraw(world.number).result(10) for name in following]
        flipped = [name for name, step in following.items() if step.done.done()]
        for (
            name
        ) in flipped:  # a joiner or one that was alone enters at once; it is not aborted but goes on to the next epoch
            assert not withdrawn[list(following).index(name)]
        if not flipped:
            for name in world.workers.keys() - set(members):
                world.workers.pop(name).stop()
            return
        for (
            name,
            step,
        ) in (
            following.items()
        ):  # so a worker forgets what it had prepared: whoever is in that epoch already sees it gone
            if step.group is not None and name not in flipped:
                step.group.close()
        following = world.make(members)
    elif kind < 0.3 and len(members) > 1:  # a death
        dead = rng.choice(members)
        world.workers.pop(dead).die()
        following = world.make([name for name in members if name != dead])
    elif kind < 0.5 and len(members) > 1:  # a miss, in whatever phase
        world.workers[rng.choice(members)].transport.miss_after = rng.randrange(3 * (1 + 2 * LAYERS))
    order = list(following)
    rng.shuffle(order)
    world.enter(following, order)


@pytest.mark.parametrize("seed", range(16))
def test_every_output_is_that_of_one_engine_whatever_happens(seed):
    run_story(Random(seed), events=8)


@pytest.mark.slow
def test_longer_stories():
    for seed in range(1000, 1040):
        run_story(Random(seed), events=20)


def test_an_idle_rank_joins_the_steps_of_its_peers(world):
    world.enter(world.make(["a", "b", "c"]))
    world.submit(long_request("r"), "b")
    assert world.gateway.wait_all() == tokens_alone([long_request("r")])
    served = [world.workers[name].runner.served for name in "abc"]
    assert served[0] >= 39
    assert served[1] == 0
    assert abs(served[2] - served[0]) <= 1, "one of them may still be in the last step"


def test_idle_ranks_flip_with_one_empty_step_and_without_the_model(world):
    world.enter(world.make(["a", "b", "c"]))
    world.enter(world.make(["c", "a"]))
    assert world.flips[-1]["a"].step in (0, 1, 2)
    assert not any(world.workers[name].runner.served for name in "ac")


def test_nobody_flips_before_all_are_ready(world):
    world.enter(world.make(["a", "b"]))
    world.submit(long_request("r"), "a")
    following = world.make(["b", "a"])
    world.workers["a"].engine.enter(following["a"])
    world.gateway.wait_all()
    assert not following["a"].done.done()
    flipped = world.workers["b"].engine.enter(following["b"])
    assert flipped.result(10).step == following["a"].done.result(10).step


def test_a_leaver_gives_its_requests_back_after_the_flip(world):
    world.enter(world.make(["a", "b"]))
    world.submit(long_request("r"), "a")
    world.gateway.wait_tokens(5)
    following = world.make(["b"])
    for name in "ab":
        world.workers[name].engine.enter(following[name])
    assert following["a"].done.result(10).released == ("r",)
    assert world.gateway.homeless == ["r"]
    world.workers["a"].engine.submit("gateway", long_request("late"))
    world.gateway.wait(lambda gateway: gateway.homeless == ["r", "late"])


def test_a_broken_group_keeps_its_requests_for_the_next_epoch(world):
    world.enter(world.make(["a", "b"]))
    world.submit(long_request("r"), "a")
    world.gateway.wait_tokens(5)
    world.workers["b"].transport.miss_after = 2
    world.workers["b"].engine.submit("gateway", long_request("other"))
    world.gateway.add(long_request("other"), "b")
    for name in "ab":
        while not world.workers[name].troubles:
            world.workers[name].engine.call(lambda: None).result(10)
    assert world.workers["b"].troubles[0].suspects == ("a",)
    assert world.workers["a"].troubles[0].suspects == ("b",)
    assert world.workers["a"].engine.paused
    world.enter(world.make(["b", "a"]))
    assert world.gateway.wait_all() == tokens_alone([long_request("r"), long_request("other")])


def test_an_error_of_the_model_costs_its_requests_and_the_group_not_the_others(world):
    world.enter(world.make(["a", "b"]))
    world.submit(long_request("r"), "a")
    world.gateway.wait_tokens(3)
    world.workers["b"].runner.broken = True
    bad = long_request("bad")
    world.gateway.add(bad, "b")
    world.workers["b"].engine.submit("gateway", bad)
    with world.gateway.changed:
        assert world.gateway.changed.wait_for(lambda: world.gateway.errors, 20)
        (error,) = world.gateway.errors
        world.gateway.errors.clear()
        assert "planted" in error
        del world.gateway.clients["bad"]
    world.enter(world.make(["a", "b"]))
    assert world.gateway.wait_all() == tokens_alone([long_request("r")])
