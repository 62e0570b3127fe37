"""Why a decision is what it is: one code per tick. Values only."""

from __future__ import annotations

from enum import StrEnum


class Reason(StrEnum):
    """Why a decision is what it is; one per tick. The last rule that shaped it gives the reason."""

    # something is to be done
    SCALE_UP = "scale_up"
    SCALE_UP_PANIC = "scale_up_panic"  # the short window asks for far more than is there
    SCALE_UP_FORECAST = "scale_up_forecast"  # the forecast's floor is above what the present asks for
    SCALE_UP_STALE = "scale_up_stale"  # no fresh numbers, and the fallback says to grow then
    SCALE_DOWN = "scale_down"
    BELOW_MIN = "below_min"  # fewer than the lower bound (policy, schedule or memory)
    ABOVE_MAX = "above_max"  # more than the upper bound (policy, schedule, budget or devices)
    OVERRIDE = "override"  # a person asked for this size
    INSUFFICIENT_CAPACITY = "insufficient_capacity"  # growth ran into its deadline and is given up

    # nothing is to be done
    NO_CHANGE = "no_change"
    PAUSED = "paused"
    IN_FLIGHT = "in_flight"  # a transition runs, or was ordered and has not begun
    RETRY_LATER = "retry_later"  # the last growth failed; the pause before the next try is not over
    NO_READY_WORKERS = "no_ready_workers"  # a repair is due, not a decision
    MISSING_DATA = "missing_data"  # a number that every decision needs was never there
    STALE_DATA = "stale_data"
    CAPPED = "capped"  # more is wanted than the upper bound allows, and that many are there
    FLOOR = "floor"  # less would do, and the lower bound does not allow it
    SCALE_UP_DISABLED = "scale_up_disabled"
    SCALE_UP_STABILIZING = "scale_up_stabilizing"
    SCALE_UP_LIMITED = "scale_up_limited"  # this period's changes are used up
    SCALE_DOWN_DISABLED = "scale_down_disabled"
    SCALE_DOWN_STABILIZING = "scale_down_stabilizing"
    SCALE_DOWN_LIMITED = "scale_down_limited"
    SCALE_DOWN_REFUSED_PANIC = "scale_down_refused_panic"
    SCALE_DOWN_REFUSED_HISTORY = "scale_down_refused_history"  # (re)started: the stable window is not full yet
    SCALE_DOWN_REFUSED_CONSOLIDATION = (
        "scale_down_refused_consolidation"  # the survivors would miss the SLO or a target
    )
    SCALE_DOWN_REFUSED_MEMORY = "scale_down_refused_memory"  # model and live KV would not fit the survivors
    SCALE_DOWN_REFUSED_STREAMS = "scale_down_refused_streams"  # live requests need the slots of those who would go
    SCALE_DOWN_REFUSED_COST = "scale_down_refused_cost"  # the stall costs more than is saved
