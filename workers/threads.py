"""How a worker's compute threads behave, as environment variables: OpenMP reads them once, before torch is imported.

A thread that waits for the next operation spins for a moment and then sleeps. Spinning for as long as OpenMP does by default takes the
cores from gateway and standby; sleeping at once costs a wake-up at every operation, a third of the throughput on two cores.
"""

from __future__ import annotations

SPIN_COUNT = 5000


def worker_environment(*, threads: int) -> dict[str, str]:
    """threads: compute threads of the worker. Ray sets OMP_NUM_THREADS itself for actors, so it is always given."""
    return {"OMP_NUM_THREADS": str(threads), "GOMP_SPINCOUNT": str(SPIN_COUNT), "TOKENIZERS_PARALLELISM": "false"}
