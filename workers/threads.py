"""How a worker's compute threads and its allocator behave, as environment variables: read once, when the process starts.

A thread that waits for the next operation spins for a moment and then sleeps. Spinning for as long as OpenMP does by default takes the
cores from gateway and standby; sleeping at once costs a wake-up at every operation, a third of the throughput on two cores.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")

SPIN_COUNT = 10000

# Results of a step, megabytes each, are allocated and freed all the time. glibc would give their pages back to the system and fault them in
# again, 0.6 ms for each 2 MiB on a virtual machine; so a worker keeps what it once had. The first is the largest value that glibc takes.
MMAP_THRESHOLD_BYTES = 32 << 20
TRIM_THRESHOLD_BYTES = 1 << 30


def worker_environment(*, threads: int) -> dict[str, str]:
    """threads: compute threads of the worker. Ray sets OMP_NUM_THREADS itself for actors, so it is always given."""
    return {
        "OMP_NUM_THREADS": str(threads),
        "GOMP_SPINCOUNT": str(SPIN_COUNT),
        "TOKENIZERS_PARALLELISM": "false",
        "MALLOC_MMAP_THRESHOLD_": str(MMAP_THRESHOLD_BYTES),
        "MALLOC_TRIM_THRESHOLD_": str(TRIM_THRESHOLD_BYTES),
    }


def run_apart(function: Callable[[], T]) -> T:
    """Call `function` in a thread that ends with it.

    Every thread that computes has a team of OpenMP threads for as long as it lives, and while there are more of them than cores
    none of them spins: the engine's steps took 20 ms in place of 14 where the main thread had loaded the weights.
    """
    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(function).result()
