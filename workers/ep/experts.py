"""The experts that one rank holds in one epoch, as views of the memory in which their segments lie back to back."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from flexpert.workers.model.binding import BoundModel, held_slabs


class EpochExperts:
    """held[layer]: the experts, as `Epoch.held_by(rank)` says. memory: uint8 on the model's device, the segments
    `expert_segments(bound.layout, held)` back to back; viewed, not copied, so it must stay mapped while this is in use.

    Made beside the experts of the running epoch, on any thread. Raises ValueError where memory and placement do not fit the model.
    """

    def __init__(self, bound: BoundModel, held: Sequence[Sequence[int]], memory: Tensor) -> None:
        self.held = tuple(tuple(sorted(layer)) for layer in held)
        self.layers = held_slabs(bound, self.held, memory)
        self.nbytes = memory.numel()
        self.dtype, self.device = bound.dtype, bound.device
        self.width = bound.servable.routing.width
        self.num_experts = tuple(layer.num_experts for layer in bound.layout.experts)
        if self.device.type == "cpu":
            for slabs in self.layers:
                if slabs is not None:
                    _ = slabs.row_group  # measured now, not in the first step

    @property
    def complete(self) -> bool:
        """Whether these are all experts of the model."""
        return tuple(len(layer) for layer in self.held) == self.num_experts
