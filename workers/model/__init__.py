"""Any transformers Mixture-of-Experts model, from a directory on disk to a tree whose weights lie where the caller put them.

servable = check_servable(model_dir)             # can it be served, and how does it attend
plan = plan_weights(servable, "float32")         # which bytes of which files go where
... the HBM manager, or load_into(), carries the plan out ...
bound = bind(servable, plan.manifest, segments)  # views, no copies
ModelRunner(bound, kv).forward(rows)             # flexpert.workers.runner
"""

from flexpert.workers.model.binding import BoundModel, bind
from flexpert.workers.model.errors import CheckpointError, UnservableModelError
from flexpert.workers.model.loading import load_into
from flexpert.workers.model.planning import plan_weights
from flexpert.workers.model.servable import ServableModel, check_servable, kv_token_bytes

__all__ = [
    "BoundModel",
    "CheckpointError",
    "ServableModel",
    "UnservableModelError",
    "bind",
    "check_servable",
    "kv_token_bytes",
    "load_into",
    "plan_weights",
]
