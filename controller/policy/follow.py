"""What became of what was ordered, and what was learned from it: the first part of every decision. Pure.

Called by `controller.policy.decide` with the state of the last tick, before anything is asked for.
"""

from __future__ import annotations

from dataclasses import replace

from flexpert.controller.policy.behavior import without
from flexpert.controller.policy.capacity import learn
from flexpert.controller.policy.horizon import with_join
from flexpert.controller.policy.types import EndedTransition, Observation, PolicyConfig, State
from flexpert.controller.policy.view import View

RETRY_S = 60.0  # after the first failed growth; doubles with each
LONGEST_RETRY_S = 900.0


def follow(observation: Observation, view: View, state: State, config: PolicyConfig) -> State:
    """The state with the last transition, the order and the measured capacity brought up to date."""
    if state.began_s is None:
        state = replace(state, began_s=observation.now_s)
    restarted = observation.restarted_at_s
    if restarted is not None and state.last_s is not None and restarted > state.last_s:
        state = replace(state, began_s=restarted, order=None)  # what was seen before has a gap
    ended = observation.last_transition
    if ended is not None and ended.id != state.seen_transition:
        state = _ended(ended, state, now_s=observation.now_s)
    return learn(observation, view, _settled(observation, view, state), config)


def _ended(ended: EndedTransition, state: State, *, now_s: float) -> State:
    grew = ended.to_workers > ended.from_workers
    if grew and ended.state == "done":
        joins, ewma = with_join(state, ended.ended_s - ended.began_s)
        state = replace(state, joins=joins, join_ewma_s=ewma, grow_failures=0, grow_again_s=None)
    order = state.order
    if order is not None and ended.ended_s >= order.at_s:
        state = replace(state, order=None)
        if ended.state != "done":
            state = replace(state, changes=without(state.changes, order), sized_workers=0)
            if order.plan.kind == "grow":
                state = grow_failed(state, now_s=now_s)
    return replace(state, seen_transition=ended.id)


def grow_failed(state: State, *, now_s: float) -> State:
    """Growth came to nothing: the next try has to wait, each time for longer. Shrinking does not."""
    pause_s = min(RETRY_S * 2.0**state.grow_failures, LONGEST_RETRY_S)
    return replace(state, grow_failures=min(state.grow_failures + 1, 10), grow_again_s=now_s + pause_s)


def _settled(observation: Observation, view: View, state: State) -> State:
    """An order whose end nobody reported, but which is where it was to go (or, a shrink or abort, has had its time)."""
    order = state.order
    if order is None or observation.transition is not None or observation.now_s <= order.at_s:
        return state
    arrived = view.now == order.plan.target
    overdue = observation.now_s > order.plan.deadline_s
    if arrived or order.plan.kind == "abort" or (order.plan.kind == "shrink" and overdue):
        state = replace(state, order=None)
        if arrived and order.plan.kind == "grow":
            state = replace(state, grow_failures=0, grow_again_s=None)
    return state
