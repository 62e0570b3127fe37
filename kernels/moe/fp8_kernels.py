"""Rows in fp8: 128 neighbouring columns of a row share a float32 scale, the largest magnitude among them over that of float8_e4m3fn.

The weights' own scales, one for each 128 x 128 block as DeepSeek-V3's checkpoints have them (technical report, section 3.3), come with
the weights.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flexpert.kernels.moe import weights

SCALE_BLOCK = tl.constexpr(weights.SCALE_BLOCK)
FP8_MAX = tl.constexpr(weights.FP8_MAX)
SMALLEST = tl.constexpr(weights.SMALLEST)


@triton.jit
def quantize(values):
    """float32 [M, SCALE_BLOCK] -> the same divided by its scales, within fp8's range, and the scales [M]. NaN stays NaN."""
    scale = tl.maximum(tl.max(tl.abs(values), 1), SMALLEST) / FP8_MAX
    return tl.clamp(values / scale[:, None], -FP8_MAX, FP8_MAX, propagate_nan=tl.PropagateNan.ALL), scale


@triton.jit
def quantize_rows(rows, quantized, scales, stride, COLUMNS: tl.constexpr, GROUPS: tl.constexpr):
    """Grid (rows,). rows [rows, COLUMNS], `stride` apart -> quantized, of the same shape, and scales [rows, COLUMNS / SCALE_BLOCK]."""
    row = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, GROUPS)
    known = group < COLUMNS // SCALE_BLOCK
    column = group[:, None] * SCALE_BLOCK + tl.arange(0, SCALE_BLOCK)[None, :]
    values, scale = quantize(tl.load(rows + row * stride + column, mask=known[:, None], other=0.0).to(tl.float32))
    tl.store(quantized + row * COLUMNS + column, values.to(quantized.dtype.element_ty), mask=known[:, None])
    tl.store(scales + row * (COLUMNS // SCALE_BLOCK) + group, scale, mask=known)
