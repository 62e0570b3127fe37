"""Any transformers Mixture-of-Experts model, from a directory on disk to a tree whose weights lie where the caller put them.

servable = check_servable(model_dir)             # can it be served, and how does it attend
plan = plan_weights(servable, "float32")         # which bytes of which files go where
... the HBM manager, or load_into(), carries the plan out ...
bound = bind(servable, plan.manifest, segments)  # views, no copies; with all slab groups, or with "dense" alone and then
runner.use(EpochExperts(bound, held, memory), exchange)     # the experts of an epoch, see flexpert.workers.ep
ModelRunner(bound, kv).forward(rows)             # flexpert.workers.runner
"""

from flexpert.workers.model.binding import BoundModel, bind
from flexpert.workers.model.errors import CheckpointError, UnservableModelError
from flexpert.workers.model.layout import DENSE, WeightLayout, all_experts, expert_segments, slab_groups
from flexpert.workers.model.loading import compact, load_into, make_buffers
from flexpert.workers.model.planning import plan_weights, select
from flexpert.workers.model.servable import ServableModel, check_servable, kv_token_bytes

__all__ = [
    "DENSE",
    "BoundModel",
    "CheckpointError",
    "ServableModel",
    "UnservableModelError",
    "WeightLayout",
    "all_experts",
    "bind",
    "check_servable",
    "compact",
    "expert_segments",
    "kv_token_bytes",
    "load_into",
    "make_buffers",
    "plan_weights",
    "select",
    "slab_groups",
]
