"""The torch device of a worker, by name: "cpu", "cuda" or "cuda:1". What CUDA wants of a thread, and how memory gets there.

Called by `workers.process`, `assembly`, `fetch` and `membership`.
"""

from __future__ import annotations

import torch
from torch import Tensor

COPY_AT_A_TIME_BYTES = 64 << 20


def is_cuda(device: str | torch.device) -> bool:
    return torch.device(device).type == "cuda"


def use_device(device: str | torch.device) -> None:
    """The calling thread computes there: CUDA's current device is each thread's own. Does nothing for the CPU."""
    found = torch.device(device)
    if found.type == "cuda" and found.index is not None:
        torch.cuda.set_device(found)


def check_device(device: str | torch.device) -> str:
    """Why it cannot be used, "" where it can."""
    found = torch.device(device)
    if found.type != "cuda":
        return ""
    if not torch.cuda.is_available():
        return f"device {device}: torch finds no CUDA device; install a CUDA build of torch and the driver, or use --device cpu"
    count = torch.cuda.device_count()
    if (found.index or 0) >= count:
        return f"device {device}: torch finds {count} CUDA devices; give fewer --max-workers, or let the others be seen"
    return ""


def copy_to(memory: Tensor, device: torch.device) -> Tensor:
    """A copy of host memory on a CUDA device, made piece by piece beside the stream in which a worker computes."""
    result = torch.empty(memory.numel(), dtype=memory.dtype, device=device)
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))  # who had this memory before may still read it
    with torch.cuda.stream(stream):
        for part, source in zip(result.split(COPY_AT_A_TIME_BYTES), memory.split(COPY_AT_A_TIME_BYTES), strict=True):
            part.copy_(source)
    stream.synchronize()
    return result


def give_back_unused(device: str | torch.device) -> None:
    """Let other processes have what torch keeps of freed memory. Not while a graph is being captured."""
    if is_cuda(device):
        torch.cuda.empty_cache()
