"""Says what was wrong with a tensor that a kernel was given."""

from __future__ import annotations

from torch import Tensor


def require(fits: bool, name: str, found: Tensor, expected: str) -> None:
    """Raises ValueError with the argument, what was found and what was expected."""
    if not fits:
        raise ValueError(f"{name} is {found.dtype} {list(found.shape)} on {found.device}, expected {expected}")
