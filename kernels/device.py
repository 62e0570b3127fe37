"""What a launch's size depends on besides its tensors."""

from __future__ import annotations

from functools import lru_cache

import torch


@lru_cache(maxsize=64)
def multiprocessors(device: torch.device) -> int:
    """Of a CUDA device."""
    return torch.cuda.get_device_properties(device).multi_processor_count
