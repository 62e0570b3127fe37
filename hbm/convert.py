"""Conversions between the floating dtypes of checkpoints, in numpy. Only the loader helper imports this.

bfloat16 is the upper half of a float32 (numpy has no such dtype): widening shifts left; narrowing rounds to nearest,
ties to even, and keeps NaN a NaN. float64 goes to bfloat16 by way of float32, as torch does.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from flexpert.hbm.errors import LoadError

_NUMPY: dict[str, np.dtype[Any]] = {"F64": np.dtype("<f8"), "F32": np.dtype("<f4"), "F16": np.dtype("<f2")}


def convert(source: memoryview, source_dtype: str, target: memoryview, dtype: str) -> None:
    """Fill `target` with the elements of `source`; both are bytes, as many as their dtypes need for one number of
    elements.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        if source_dtype == "BF16":
            values: NDArray[Any] = _widen(np.frombuffer(source, np.uint16))
        else:
            values = np.frombuffer(source, _NUMPY[source_dtype])
        if dtype == "BF16":
            np.frombuffer(target, np.uint16)[:] = _narrow(values.astype(np.float32, copy=False))
        elif dtype in _NUMPY:
            np.frombuffer(target, _NUMPY[dtype])[:] = values.astype(_NUMPY[dtype], copy=False)
        else:
            raise LoadError(f"{source_dtype} cannot be converted to {dtype}")


def _widen(halves: NDArray[np.uint16]) -> NDArray[np.float32]:
    bits = halves.astype(np.uint32)
    bits <<= 16
    return bits.view(np.float32)


def _narrow(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    bits = values.view(np.uint32)
    upper = ((bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16).astype(np.uint16)
    is_nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    if is_nan.any():
        upper[is_nan] = (bits[is_nan] >> 16).astype(np.uint16) | np.uint16(0x40)
    return upper
