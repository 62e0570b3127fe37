"""What changes of size took, read off a cluster's events and the answers of a load."""

from __future__ import annotations

import pytest

from flexpert.simulator.changes import Answer, read_changes, with_changes
from flexpert.simulator.fit import MeasureError
from flexpert.simulator.profile import Duration

from .small import profile

GROWS = [
    {"kind": "begun", "time_s": 110.0, "transition_id": "t-1"},
    {"kind": "joined", "time_s": 111.9, "transition_id": "t-1"},
    {"kind": "committed", "time_s": 112.0, "transition_id": "t-1", "to_workers": ["a", "b"], "pause_s": {"a": 0.01}},
    {"kind": "retired", "time_s": 112.1, "transition_id": "t-1", "pause_s": 0.03},
    {"kind": "warm", "time_s": 118.0, "process": "p-3"},
]
SHRINKS = [
    {"kind": "begun", "time_s": 130.0, "transition_id": "t-2"},
    {"kind": "committed", "time_s": 131.0, "transition_id": "t-2", "to_workers": ["a"]},
    {"kind": "warm", "time_s": 131.5, "process": "p-2"},
]
ABORTS = [
    {"kind": "begun", "time_s": 140.0, "transition_id": "t-3"},
    {"kind": "ended", "time_s": 141.0, "transition_id": "t-3"},
]


def test_changes_are_those_that_were_committed() -> None:
    first, second = read_changes([*GROWS, *SHRINKS, *ABORTS], workers=1)

    assert (first.before, first.after, first.began_s, first.committed_s) == (1, 2, 110.0, 112.0)
    assert (first.stall_s, first.calm_s) == (0.03, 118.0)
    assert (second.before, second.after, second.calm_s) == (2, 1, 131.0)


def answers(tpot_s: float, *at_s: float) -> list[Answer]:
    """Each takes half a second."""
    return [(first_s, first_s + 0.5, tpot_s) for first_s in at_s]


def test_a_profile_takes_their_times_and_what_a_start_costs_the_streams() -> None:
    seen = answers(0.02, 100.0, 105.0, 135.0)  # one worker, calm
    seen += answers(0.025, 120.0, 125.0)  # two, calm
    seen += answers(0.035, 113.0, 116.0, 117.0)  # two, while a standby starts
    seen += answers(0.032, 111.0)  # one, while another one joins
    seen += answers(1.0, 109.7, 111.7, 117.8, 129.9)  # of the time before and after a change
    found = with_changes(profile(), read_changes([*GROWS, *SHRINKS], workers=1), seen)

    assert found.join_warm == Duration(mean_s=2.0, p95_s=2.0)
    assert found.leave == Duration(mean_s=1.0, p95_s=1.0)
    assert found.standby_s == 6.0
    assert found.stall == Duration(mean_s=0.015, p95_s=0.03)
    # 1.4 by three answers of two workers, 1.6 by one of one.
    assert found.starting == pytest.approx(1.45)


def test_where_nothing_was_seen_during_a_start_it_costs_nothing() -> None:
    found = with_changes(profile(), read_changes([*GROWS, *SHRINKS], workers=1), answers(0.02, 100.0))

    assert found.starting == 1.0


def test_joins_without_a_leave_are_too_little() -> None:
    with pytest.raises(MeasureError, match="1 joins and 0 leaves"):
        with_changes(profile(), read_changes(GROWS, workers=1), [])
