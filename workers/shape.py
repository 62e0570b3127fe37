"""What the controller's planner must know of a model: how many experts lie where, and how many bytes things have.

Asked of a warm worker process once, because the controller imports neither torch nor transformers.
"""

from __future__ import annotations

from pathlib import Path

from flexpert.workers.model import WeightLayout, check_servable, kv_token_bytes, plan_weights


def model_shape(model_dir: Path, dtype: str) -> dict[str, int]:
    """layers and experts of each, slab_bytes (of a slot), slabs_per_group, dense_bytes, kv_token_bytes. Raises as the start of a worker."""
    servable = check_servable(model_dir)
    layout = WeightLayout.from_manifest(plan_weights(servable, dtype).manifest)
    return {
        "layers": len(layout.experts),
        "experts": max(layer.num_experts for layer in layout.experts),
        "slab_bytes": layout.slot_bytes,
        "slabs_per_group": layout.slots_per_group,
        "dense_bytes": layout.dense_bytes,
        "kv_token_bytes": kv_token_bytes(servable, dtype),
    }
