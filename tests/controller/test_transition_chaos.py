"""Transitions under any interleaving of answers, failures, deaths, expiries, late repeats and restarts of the controller."""

from __future__ import annotations

import random
from typing import Any

from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

from flexpert.controller.transition_types import Event, MemberDied, ProcessReady

from .transition_world import Answered, Stops, World, config

STEPS = 60


def pick(rng: random.Random, things: list[Any]) -> Any:
    return things[rng.randrange(len(things))]


def repeatable(world: World, past: list[Event]) -> list[Event]:
    """Answers may come late or twice, but no dead process is offered as a fresh one."""
    return [event for event in past if not isinstance(event, ProcessReady) or event.process in world.processes]


def run(rng: random.Random, world: World, *, steps: int) -> None:
    world.request("boot", rng.randint(1, 4))
    past: list[Event] = []
    for _ in range(rng.randint(1, steps)):
        choice = rng.randint(0, 99)
        if choice < 60:
            events = world.good_events()
            if events:
                event = pick(rng, events)
                if isinstance(event, Answered):
                    past.append(world.do(event.order))
                    world.orders.pop((event.order.worker_id, type(event.order).__name__), None)
                    world.send(past[-1])
                else:
                    world.happen(event)
        elif choice < 78:
            world.happen(pick(rng, world.bad_events()))
        elif choice < 84 and repeatable(world, past):
            world.send(pick(rng, repeatable(world, past)))
        elif choice < 90:
            world.restart()
        elif choice < 96:
            world.request("scale", rng.randint(0, 5))
        else:
            world.request("drain", f"worker-{rng.randint(0, 4)}")


def recover(world: World) -> None:
    """What stands still is found and ended; everything else goes well from here on."""
    for name, process in list(world.processes.items()):
        if process.stopped:
            world.forget(name)
            world.send(MemberDied(process.worker, name, "does not answer"))
    world.settle()
    if world.machine.current is None:
        assert world.request("boot", 2).code == ""
        world.settle()


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.randoms(use_true_random=False))
def test_whatever_happens_a_later_scale_works(rng: random.Random) -> None:
    world = World(config(memory_bytes=rng.choice([1000, 260, 180])))
    try:
        check_a_run(rng, world)
    except Exception:
        note("\n".join(world.story))
        raise


def check_a_run(rng: random.Random, world: World) -> None:
    run(rng, world, steps=STEPS)
    recover(world)
    assert world.machine.healthy
    target = rng.randint(3, 4)
    answer = world.request("scale", target)
    assert answer.code == "", answer
    world.settle()
    assert world.finished[answer.transition_id].state == "done"
    assert len(world.machine.state.members) == target
    assert [found.worker_id for found in world.told.serving] == list(world.machine.state.members)
    assert {p.current for p in world.processes.values() if p.started} == {world.machine.current.number}
    assert not any(isinstance(event, Stops) for event in world.good_events())
