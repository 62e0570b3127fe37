"""Times of cron: which are valid, and whether a window between two of them is open at a given moment. Only this module knows croniter."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

from croniter import croniter  # type: ignore[import-untyped]

LOOKED_AT = datetime(2024, 1, 1, tzinfo=UTC)  # a Monday; windows are compared from here on
LOOKED_AT_STARTS = 60
SEASONS = (LOOKED_AT, *(datetime(2024, *day, tzinfo=UTC) for day in ((3, 15), (7, 1), (10, 27))))


def is_valid(text: str) -> bool:
    """Five fields: minute, hour, day of the month, month, day of the week; and a moment that comes."""
    if len(text.split()) != 5 or not croniter.is_valid(text):
        return False
    try:
        croniter(text, LOOKED_AT).get_next(datetime)
    except ValueError:  # the 30th of February
        return False
    return True


def is_open(start: str, end: str, moment: datetime) -> bool:
    """moment: in the time zone of the window. Open when the last start is later than the last end; a start counts from its own second."""
    after = moment + timedelta(seconds=1)
    return bool(croniter(start, after).get_prev(datetime) > croniter(end, after).get_prev(datetime))


def meet(one: tuple[str, str, str], other: tuple[str, str, str]) -> bool:
    """Are two windows (start, end, time zone) open at the same time? Looks at 60 starts of each; of two time zones at 15 in each of
    winter, summer and the weeks in which only one of them has changed its clocks."""
    seasons = (LOOKED_AT,) if one[2] == other[2] else SEASONS
    return any(
        _open_at_a_start_of(opens, stays, since, starts=LOOKED_AT_STARTS // len(seasons))
        for opens, stays in ((one, other), (other, one))
        for since in seasons
    )


def _open_at_a_start_of(
    opens: tuple[str, str, str], stays: tuple[str, str, str], since: datetime, *, starts: int
) -> bool:
    zone = ZoneInfo(stays[2])
    found = croniter(opens[0], since.astimezone(ZoneInfo(opens[2])))
    for _ in range(starts):
        moment = found.get_next(datetime)
        if is_open(*opens[:2], moment) and is_open(*stays[:2], moment.astimezone(zone)):
            return True
    return False
