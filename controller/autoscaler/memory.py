"""The fewest workers whose devices hold the model and the KV that is in use. Pure."""

from __future__ import annotations

from flexpert.controller.transition_requests import lacking_memory
from flexpert.controller.transition_types import TransitionConfig


def memory_floor(
    config: TransitionConfig, *, kv_used_tokens: int, kv_token_bytes: int, kv_bytes_max: int | None
) -> int:
    """kv_bytes_max: what a worker may take for KV at most, None: all that the weights leave. Where no number of workers is enough for that
    much KV: the number that holds the model with the most room."""
    model, names = config.model, [device.worker_id for device in config.devices]
    groups = -(-model.slabs // model.slabs_per_group)
    group_bytes = model.slabs_per_group * model.slab_bytes
    most = min(config.max_workers, len(names))
    smallest_bytes = min((device.memory_bytes for device in config.devices), default=0)
    for workers in range(1, most + 1):
        if lacking_memory(config, names[:workers]):
            continue
        free_bytes = smallest_bytes - model.dense_bytes - -(-groups // workers) * group_bytes
        kv_bytes = max(0, free_bytes if kv_bytes_max is None else min(free_bytes, kv_bytes_max))
        if workers * kv_bytes >= kv_used_tokens * kv_token_bytes:
            return workers
    return most
