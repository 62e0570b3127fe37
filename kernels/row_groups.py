"""How few rows of a matrix product keep the bits that they have among many, found out on this CPU.

A product of float32 matrices on the CPU picks its inner loops by the number of rows, so a row computed among three others may differ in its
last bits from the same row among sixty. Among multiples of 16 rows it does not; on many CPUs among multiples of 4 neither, which
spares most of the padding of a decode step. That is measured, not assumed: a smaller group is used only where a product of
exactly the wanted shape gave equal bits here, with the present number of threads.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

import torch

SAFE_ROWS = 16
_CANDIDATES = (4, 8)
_ROWS = 48  # a multiple of 16 and of every candidate
_BATCH = 3
_LARGEST_MATRIX = 1 << 21  # elements; larger products take too long to try and are slow for other reasons


def row_group(products: Iterable[tuple[int, int, bool]]) -> int:
    """The smallest tried number g such that rows have equal bits among every multiple of g, in each of `products`.

    A product is (inner size, columns, transposed): [rows, inner] x [inner, columns], the matrix stored as [columns, inner] unless
    `transposed`. 16 where no smaller number holds.
    """
    return max((_row_group(*product, torch.get_num_threads()) for product in products), default=SAFE_ROWS)


@lru_cache(maxsize=256)
def _row_group(inner: int, columns: int, transposed: bool, threads: int) -> int:
    if inner * columns > _LARGEST_MATRIX:
        return SAFE_ROWS
    generator = torch.Generator().manual_seed(inner * columns + threads)
    rows = torch.randn(_BATCH, _ROWS, inner, generator=generator)
    shape = (inner, columns) if transposed else (columns, inner)
    stored = torch.randn(_BATCH, *shape, generator=generator)
    matrices = stored if transposed else stored.transpose(1, 2)
    expected = torch.bmm(rows, matrices)
    return next((group for group in _CANDIDATES if _holds(group, rows, matrices, expected)), SAFE_ROWS)


def _holds(group: int, rows: torch.Tensor, matrices: torch.Tensor, expected: torch.Tensor) -> bool:
    """Among group, 2 * group, ... rows up to 16 and more, batched and one by one."""
    for height in range(group, _ROWS + 1, group):
        for begin in range(0, _ROWS - height + 1, height):
            piece = slice(begin, begin + height)
            part = rows[:, piece].contiguous()
            if not torch.equal(torch.bmm(part, matrices), expected[:, piece]):
                return False
            if not torch.equal(torch.mm(part[0], matrices[0]), expected[0, piece]):
                return False
    return True
