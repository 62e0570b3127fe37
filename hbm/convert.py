"""Conversions between the floating dtypes of checkpoints, in numpy. Only the loader helper imports this.

bfloat16 is the upper half of a float32 (numpy has no such dtype): widening shifts left; narrowing rounds to nearest,
ties to even, and keeps NaN a NaN. float64 goes to bfloat16 by way of float32, as torch does. Eight-bit numbers are looked
up in a table of their 256 values.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flexpert.hbm.errors import LoadError
from flexpert.hbm.loading import BlockScale

_SMALL = ("F8_E4M3", "F8_E5M2", "F8_E8M0")
_NUMPY: dict[str, np.dtype[Any]] = {"F64": np.dtype("<f8"), "F32": np.dtype("<f4"), "F16": np.dtype("<f2")}


def convert(source: memoryview, source_dtype: str, target: memoryview, dtype: str) -> None:
    """Fill `target` with the elements of `source`; both are bytes, as many as their dtypes need for one number of
    elements.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        _store(_values(source, source_dtype), target, dtype)


def scale_blocks(
    source: memoryview, source_dtype: str, factors: memoryview, scale: BlockScale, target: memoryview, dtype: str
) -> None:
    """Fill `target` with the rows of `source`, each block multiplied by its factor in float32 and rounded once."""
    with np.errstate(over="ignore", invalid="ignore"):
        matrix = _values(source, source_dtype).reshape(-1, scale.columns)
        blocks = _values(factors, scale.dtype).reshape(-1, scale.blocks_per_row)
        by_column = np.repeat(blocks.astype(np.float32), scale.block_columns, axis=1)[:, : scale.columns]
        for number, row_of_blocks in enumerate(by_column):
            matrix[number * scale.block_rows : (number + 1) * scale.block_rows] *= row_of_blocks
        _store(matrix.reshape(-1), target, dtype)


def _values(source: memoryview, dtype: str) -> NDArray[Any]:
    if dtype == "BF16":
        return _widen(np.frombuffer(source, np.uint16))
    if dtype in _SMALL:
        return _table(dtype)[np.frombuffer(source, np.uint8)]
    return np.frombuffer(source, _NUMPY[dtype])


def _store(values: NDArray[Any], target: memoryview, dtype: str) -> None:
    if dtype == "BF16":
        np.frombuffer(target, np.uint16)[:] = _narrow(values.astype(np.float32, copy=False))
    elif dtype in _NUMPY:
        np.frombuffer(target, _NUMPY[dtype])[:] = values.astype(_NUMPY[dtype], copy=False)
    else:
        raise LoadError(f"{values.dtype} cannot be converted to {dtype}")


@cache
def _table(dtype: str) -> NDArray[np.float32]:
    """The 256 values of an eight-bit dtype: OCP 8-bit floating point (E4M3, E5M2) and microscaling formats (E8M0), v1.0."""
    bits = np.arange(256)
    if dtype == "F8_E8M0":
        return np.where(bits == 255, np.nan, 2.0 ** (bits - 127.0)).astype(np.float32)
    mantissa_bits, bias = (3, 7) if dtype == "F8_E4M3" else (2, 15)
    exponent, mantissa = (bits & 127) >> mantissa_bits, bits & ((1 << mantissa_bits) - 1)
    normal = 2.0 ** (exponent - bias) * (1 + mantissa / (1 << mantissa_bits))
    subnormal = 2.0 ** (1 - bias) * mantissa / (1 << mantissa_bits)
    values = np.where(exponent == 0, subnormal, normal) * np.where(bits < 128, 1, -1)
    if dtype == "F8_E4M3":
        values[(bits & 127) == 127] = np.nan
    else:
        values[exponent == 31] = np.where(mantissa[exponent == 31] == 0, np.inf, np.nan) * np.where(
            bits[exponent == 31] < 128, 1, -1
        )
    return values.astype(np.float32)


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
