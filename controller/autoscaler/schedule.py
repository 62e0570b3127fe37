"""What the clock says about the size: the bounds of the windows that are open at a moment. Pure; the moment is given."""

from __future__ import annotations

from datetime import datetime
from zoneinfo import ZoneInfo

from flexpert.controller.policy.cron import is_open
from flexpert.controller.policy.spec import ScheduleSignal
from flexpert.controller.policy.types import Reading


def read_schedule(signal: ScheduleSignal, *, now_s: float) -> Reading:
    """Of several open windows the highest min and the lowest max; None where none says."""
    moment = datetime.fromtimestamp(now_s, ZoneInfo(signal.timezone))
    open_now = [window for window in signal.windows if is_open(window.start, window.end, moment)]
    lows = [window.min for window in open_now if window.min is not None]
    highs = [window.max for window in open_now if window.max is not None]
    return Reading(age_s=0.0, low=max(lows, default=None), high=min(highs, default=None))
