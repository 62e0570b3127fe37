"""Experts that do not fit on the device: scores, prefetch, the schedule between CPU and GPU, experts on the CPU.

Holds nothing yet; every expert of a served model must fit in the memory budget. What will stand here is told in
docs/expert_cache.md.
"""

__all__: list[str] = []
