"""Times of cron: which are valid, and whether a window between two of them is open at a given moment. Only this module knows croniter."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

from croniter import croniter  # type: ignore[import-untyped]

LOOKED_AT = datetime(2024, 1, 1, tzinfo=UTC)  # a Monday; windows are compared from here on
LOOKED_AT_STARTS = 60


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


def meet(one: tuple[str, str], other: tuple[str, str], *, timezone: str) -> bool:
    """Are two windows (start, end) open at the same time? Looks at 60 starts of each."""
    zone = ZoneInfo(timezone)
    for opens, stays in ((one, other), (other, one)):
        starts = croniter(opens[0], LOOKED_AT.astimezone(zone))
        for _ in range(LOOKED_AT_STARTS):
            moment = starts.get_next(datetime)
            if is_open(*opens, moment) and is_open(*stays, moment):
                return True
    return False
