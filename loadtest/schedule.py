"""What is to be sent, and when: an Arrival for each request, and a schedule, which is an iterator of them sorted by time.

Shapes and recorded traces make schedules; the load generator, the simulator and the reports read them. Nothing here
reads a clock or sends anything.
"""

from __future__ import annotations

import heapq
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any

__all__ = ["Arrival", "ScheduleError", "merged", "read_lines", "shifted", "stretched", "to_line", "until"]


class ScheduleError(ValueError):
    """A schedule that cannot be: unsorted, negative, no number; the message names the line or the arrival."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request to come.

    at_s: seconds from the start of the schedule, at least 0.
    prompt_tokens, output_tokens: exact lengths; the prompt has one token or more, the output too.
    session: arrivals with the same one are the turns of one conversation, in order; empty: none.
    prefix: ids of the prompt's leading blocks, each of prefix_block_tokens tokens: the same id stands for the same
        tokens wherever it appears. Where they are longer than the prompt, the prompt ends within them.
    """

    at_s: float
    prompt_tokens: int
    output_tokens: int
    session: str = ""
    prefix: tuple[int, ...] = ()
    prefix_block_tokens: int = 0


_at = attrgetter("at_s")


def merged(schedules: Iterable[Iterable[Arrival]]) -> Iterator[Arrival]:
    """All of them at once, by time; at equal times in the order of the schedules."""
    return heapq.merge(*schedules, key=_at)


def shifted(schedule: Iterable[Arrival], by_s: float) -> Iterator[Arrival]:
    """The same, by_s later."""
    return (replace(arrival, at_s=arrival.at_s + by_s) for arrival in schedule)


def stretched(schedule: Iterable[Arrival], factor: float) -> Iterator[Arrival]:
    """The same over factor times the time: 2 halves the rate. Raises ScheduleError where factor is not above 0."""
    if not factor > 0:
        raise ScheduleError(f"time factor {factor:g}: expected a number above 0")
    return (replace(arrival, at_s=arrival.at_s * factor) for arrival in schedule)


def until(schedule: Iterable[Arrival], end_s: float) -> Iterator[Arrival]:
    """Those before end_s."""
    for arrival in schedule:
        if arrival.at_s >= end_s:
            return
        yield arrival


def to_line(arrival: Arrival) -> str:
    """One line of JSON, without its newline. Times are written to the microsecond, so equal schedules are equal bytes."""
    fields: dict[str, Any] = {
        "at_s": round(arrival.at_s, 6),
        "prompt_tokens": arrival.prompt_tokens,
        "output_tokens": arrival.output_tokens,
    }
    if arrival.session:
        fields["session"] = arrival.session
    if arrival.prefix:
        fields["prefix"] = list(arrival.prefix)
        fields["prefix_block_tokens"] = arrival.prefix_block_tokens
    return json.dumps(fields)


def read_lines(lines: Iterable[str]) -> Iterator[Arrival]:
    """The schedule that to_line() wrote. Raises ScheduleError with the number of the line."""
    last_s = 0.0
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            arrival = _arrival(json.loads(line))
        except (ValueError, TypeError, KeyError) as error:
            raise ScheduleError(
                f"line {number}: {error or type(error).__name__}; expected what --print-schedule writes"
            ) from error
        if arrival.at_s < last_s:
            raise ScheduleError(
                f"line {number}: at_s {arrival.at_s:g} is before {last_s:g} of the line above; sort by at_s"
            )
        last_s = arrival.at_s
        yield arrival


def _arrival(fields: dict[str, Any]) -> Arrival:
    if not isinstance(fields, dict):
        raise TypeError("no JSON object")
    found = Arrival(**{**fields, "prefix": tuple(fields.get("prefix", ()))})
    if not 0 <= found.at_s < float("inf"):
        raise ValueError(f"at_s {found.at_s!r} is no time from 0 on")
    for name in ("prompt_tokens", "output_tokens"):
        count = getattr(found, name)
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise ValueError(f"{name} {count!r} is no count from 1 on")
    return found
