"""When a window between two times of cron is open, and whether two windows meet."""

from __future__ import annotations

from datetime import UTC, datetime
from zoneinfo import ZoneInfo

import pytest

from flexpert.controller.policy.cron import is_open, is_valid, meet

BERLIN = ZoneInfo("Europe/Berlin")
OFFICE = ("0 8 * * mon-fri", "0 18 * * mon-fri")


def at(text: str, zone: ZoneInfo = BERLIN) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=zone)


@pytest.mark.parametrize(
    ("moment", "is_it"),
    [
        ("2024-06-05 07:59:59", False), ("2024-06-05 08:00:00", True), ("2024-06-05 17:59:59", True),
        ("2024-06-05 18:00:00", False), ("2024-06-07 17:00:00", True), ("2024-06-08 12:00:00", False),
    ],
)  # fmt: skip
def test_window_is_open_from_its_start_to_before_its_end(moment: str, is_it: bool) -> None:
    assert is_open(*OFFICE, at(moment)) is is_it


def test_window_may_go_over_midnight() -> None:
    night = ("0 22 * * *", "0 6 * * *")
    assert [is_open(*night, at(f"2024-06-05 {clock}:00")) for clock in ("21:59", "22:00", "23:59", "00:00", "05:59", "06:00")] == [
        False, True, True, True, True, False,
    ]  # fmt: skip


@pytest.mark.parametrize("day", ["2024-03-30", "2024-03-31", "2024-04-01", "2024-10-26", "2024-10-27", "2024-10-28"])
def test_window_keeps_to_the_clock_where_the_clock_changes(day: str) -> None:
    early = ("0 6 * * *", "0 9 * * *")
    found = [
        is_open(*early, at(f"{day} {clock}:30").astimezone(UTC).astimezone(BERLIN))
        for clock in ("05:59", "06:00", "08:59", "09:00")
    ]
    assert found == [False, True, True, False]


def test_window_that_starts_in_the_hour_that_is_left_out_opens_all_the_same() -> None:
    assert is_open("30 2 * * *", "0 5 * * *", at("2024-03-31 04:00"))
    assert not is_open("30 2 * * *", "0 5 * * *", at("2024-03-31 05:00"))


@pytest.mark.parametrize(
    ("one", "other", "do_they"),
    [
        (OFFICE, ("0 12 * * *", "0 13 * * *"), True),
        (OFFICE, ("0 18 * * *", "0 8 * * *"), False),
        (OFFICE, ("0 9 * * sat", "0 9 * * sun"), False),
        (OFFICE, ("0 0 1 * *", "0 0 2 * *"), True),
        (("0 20 * * *", "0 6 * * *"), ("0 5 * * *", "0 7 * * *"), True),
    ],
)
def test_windows_meet_when_both_are_open_at_a_start(
    one: tuple[str, str], other: tuple[str, str], do_they: bool
) -> None:
    assert meet((*one, "Europe/Berlin"), (*other, "Europe/Berlin")) is do_they
    assert meet((*other, "Europe/Berlin"), (*one, "Europe/Berlin")) is do_they


@pytest.mark.parametrize(
    ("clock", "do_they"),
    [
        (
            ("0 13 * * *", "0 14 * * *"),
            True,
        ),  # 8 in New York is 14 in Berlin, but for some weeks in spring and autumn 13
        (("0 12 * * *", "0 13 * * *"), False),
        (("30 14 * * *", "0 15 * * *"), True),
    ],
)
def test_windows_of_two_time_zones_meet_in_any_season(clock: tuple[str, str], do_they: bool) -> None:
    there = ("0 8 * * *", "0 9 * * *", "America/New_York")
    assert meet(there, (*clock, "Europe/Berlin")) is do_they
    assert meet((*clock, "Europe/Berlin"), there) is do_they


def test_what_is_a_time_of_cron() -> None:
    assert all(is_valid(text) for text in ("0 8 * * *", "*/5 8-18 1,15 * mon-fri", "0 0 29 2 *"))
    assert not any(
        is_valid(text)
        for text in ("", "@daily", "0 8 * *", "0 8 * * * *", "60 8 * * *", "0 8 * * funday", "0 0 30 2 *")
    )
