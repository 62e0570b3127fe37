"""Where a launch goes, and what its size depends on besides its tensors."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
Result = TypeVar("Result")


def on_its_device(function: Callable[Concatenate[Tensor, P], Result]) -> Callable[Concatenate[Tensor, P], Result]:
    """Triton launches on the current device, whatever its arguments lie on: make that the device of the first one."""

    @wraps(function)
    def call(first: Tensor, /, *args: P.args, **kwargs: P.kwargs) -> Result:
        if not first.is_cuda or first.device.index == torch.cuda.current_device():
            return function(first, *args, **kwargs)
        with torch.cuda.device(first.device):
            return function(first, *args, **kwargs)

    return call


@lru_cache(maxsize=64)
def multiprocessors(device: torch.device) -> int:
    """Of a CUDA device."""
    return torch.cuda.get_device_properties(device).multi_processor_count
