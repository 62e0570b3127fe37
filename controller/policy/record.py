"""A run of the decision core as JSON lines, and its replay. Pure: lines are given and returned, files are the caller's.

A record begins with what the core began with (`begin_line`: state and policy; again after a restart or a new policy) and goes on with one
line a tick (`tick_line`: what was seen and what was decided). `replay` decides again: with the recorded policy the decisions have
the same bytes, with another one they are what it would have done with what was seen then.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import msgspec

from flexpert.controller.policy.decide import decide
from flexpert.controller.policy.types import Decision, Observation, Outcome, PolicyConfig, State


class RecordError(ValueError):
    """A line that is no part of a record; says which and why."""


class Begin(msgspec.Struct, frozen=True, kw_only=True, tag="begin", tag_field="kind"):
    state: State
    config: PolicyConfig


class Tick(msgspec.Struct, frozen=True, kw_only=True, tag="tick", tag_field="kind"):
    observation: Observation
    decision: Decision


class Measured(msgspec.Struct, frozen=True, kw_only=True, tag="outcome", tag_field="kind"):
    """What became of an earlier decision."""

    outcome: Outcome


Line = Begin | Tick | Measured

_decoder: msgspec.json.Decoder[Line] = msgspec.json.Decoder(Line)


def begin_line(state: State, config: PolicyConfig) -> bytes:
    return msgspec.json.encode(Begin(state=state, config=config))


def tick_line(observation: Observation, decision: Decision) -> bytes:
    return msgspec.json.encode(Tick(observation=observation, decision=decision))


def outcome_line(outcome: Outcome) -> bytes:
    return msgspec.json.encode(Measured(outcome=outcome))


def encode(decision: Decision) -> bytes:
    """A decision as the record and `replay` have it."""
    return msgspec.json.encode(decision)


def read(lines: Iterable[bytes | str]) -> Iterator[Line]:
    """The record's lines as values; empty lines are passed over. RecordError for any other that is none."""
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            yield _decoder.decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise RecordError(
                f"line {number} of the record: {error}; expected a line of kind begin, tick or outcome"
            ) from error


def replay(
    lines: Iterable[bytes | str], config: PolicyConfig | None = None, *, state: State | None = None
) -> Iterator[bytes]:
    """The decision of each recorded tick, decided again and encoded.

    config: None: the recorded one. state: where to begin if the lines have no beginning; None: fresh.
    """
    recorded: PolicyConfig | None = None
    state = state or State()
    for line in read(lines):
        if isinstance(line, Begin):
            recorded, state = line.config, line.state
        elif isinstance(line, Tick):
            policy = config or recorded
            if policy is None:
                raise RecordError("the record has no policy in it: give the policy to replay it with")
            decision, state = decide(line.observation, state, policy)
            yield encode(decision)


def differences(lines: Iterable[bytes | str]) -> Iterator[tuple[bytes, bytes]]:
    """Recorded and replayed decision of each tick where they are not the same bytes; none for a faithful record."""
    kept = [line for line in lines if line.strip()]
    ticks = [line for line in read(kept) if isinstance(line, Tick)]
    for tick, again in zip(ticks, replay(kept), strict=True):
        if encode(tick.decision) != again:
            yield encode(tick.decision), again
