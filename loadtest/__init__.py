"""Traffic shapes, trace replay, measurement and report, for any server that speaks OpenAI's API.

Stands alone: it imports nothing else of flexpert. `flexpert loadtest` and the benchmarks are its callers; the simulator takes
schedules from it.
"""

from flexpert.loadtest.measure import Outcome, RunResult
from flexpert.loadtest.schedule import Arrival, ScheduleError

__all__ = ["Arrival", "Outcome", "RunResult", "ScheduleError"]
