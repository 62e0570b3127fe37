"""The tiles worth timing for a product: few, chosen by how many rows an expert gets and by what the weights and rows are stored in."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

from flexpert.kernels.moe.plan import BLOCK_SIZES, TAIL_ROWS, GemvTile, Tile

SHARED_MEMORY_BYTES = 227 * 1024
GEMV_SIZES = (
    (4, 512, 4), (8, 512, 4), (4, 1024, 4), (4, 1024, 8), (2, 512, 2), (2, 1024, 2), (2, 1024, 4), (1, 1024, 2), (1, 1024, 4),
)  # fmt: skip
GEMV = [GemvTile(columns, depth, warps) for columns, depth, warps in GEMV_SIZES]
GEMV_FP8 = [*GEMV, GemvTile(4, 2048, 4), GemvTile(2, 2048, 4), GemvTile(8, 1024, 8)]


@dataclass(frozen=True)
class Candidates:
    """Of one product. halves: its columns are gate and up, so a tile has twice the weights. scaled: fp8 weights. quantized: rows too."""

    halves: bool
    scaled: bool = False
    quantized: bool = False

    @property
    def heights(self) -> tuple[int, ...]:
        return (64, 128) if self.quantized else BLOCK_SIZES

    def of(self, rows: int) -> list[Tile]:
        """Those of one height."""
        if self.quantized:
            found = self._quantized(rows)
        elif self.scaled:
            found = self._scaled(rows)
        else:
            found = self._streaming(rows) if rows <= 64 else []
            if rows >= 64:
                found += self._dense(rows)
        return [tile for tile in dict.fromkeys(found) if self._bytes(tile) <= SHARED_MEMORY_BYTES]

    def _streaming(self, rows: int) -> list[Tile]:
        scale = 1 if self.halves else 2
        found = []
        for swap, tma in itertools.product((False, True), (False, True)):
            for columns, depth, stages in ((32, 128, 4), (32, 256, 3), (64, 64, 4), (64, 128, 3), (64, 128, 4)):
                if not swap or columns * scale >= 64:
                    found.append(Tile(rows, columns * scale, depth, 4, stages, 1, swap, tma))
            found.append(Tile(rows, 128 * scale, 64, 8, 4, 1, swap, tma))
        return found

    def _dense(self, rows: int) -> list[Tile]:
        wide = 128 if self.halves else 256
        sizes = [(wide, 64, 8, 3), (wide, 64, 8, 4), (wide // 2, 64, 8, 3), (wide // 2, 64, 4, 3)]
        if rows == 64:
            sizes = [(wide, 64, 8, 4), (wide // 2, 64, 4, 4), (wide, 64, 4, 3)]
        packings = (False,) if self.halves else (False, True)
        tails = (False, True) if rows >= TAIL_ROWS else (False,)
        found = []
        for (columns, depth, warps, stages), packed, tail in itertools.product(sizes, packings, tails):
            found.append(Tile(rows, columns, depth, warps, stages, 8, tma=True, packed=packed, tail=tail))
        best = Tile(rows, wide, 64, 8, 4, 8, tma=True, packed=not self.halves, tail=tails[-1])
        found += [
            replace(best, group=4),
            replace(best, group=16),
            replace(best, group=32),
            replace(best, tail=False, group=16),
        ]
        found += [replace(best, programs=1), replace(best, tma=False, packed=False)]
        narrow = replace(best, columns=wide // 2, warps=4, stages=3)
        for flat, group in itertools.product((best, replace(best, stages=3), narrow), (4, 8, 16)):
            found.append(replace(flat, group=group, tail=False, programs=1, flat=True))
        found.append(replace(narrow, stages=2, tail=False, programs=2, flat=True))
        return found

    def _scaled(self, rows: int) -> list[Tile]:
        """Weights are widened in registers: as the left operand (swap) they stay there."""
        scale = 1 if self.halves else 2
        found = []
        for swap, tma in itertools.product((False, True), (False, True)):
            for columns, depth, stages in (
                (32, 128, 4),
                (32, 128, 6),
                (64, 128, 3),
                (64, 128, 4),
                (64, 128, 6),
                (64, 64, 6),
            ):
                if not swap or columns * scale >= 64:
                    found.append(Tile(rows, columns * scale, depth, 4, stages, 1, swap, tma))
        if rows >= 32:
            for columns, depth, stages in ((64, 128, 3), (64, 128, 4), (128, 128, 3), (128, 64, 4)):
                found += [Tile(rows, columns, depth, 8, stages, group, True, True) for group in (1, 8)]
        if rows >= 64:
            tail = rows >= TAIL_ROWS
            found += [Tile(rows, 64 * scale, 64, 8, stages, 8, tma=True, tail=tail) for stages in (3, 4)]
        return found

    def _quantized(self, rows: int) -> list[Tile]:
        """128 columns of the first product are a group of the second's rows."""
        sizes = [(128, 8, 3), (128, 8, 4)] if self.halves else [(128, 8, 4), (128, 4, 4), (256, 8, 3), (128, 8, 5)]
        found = []
        for (columns, warps, stages), group in itertools.product(sizes, (4, 8, 16)):
            if rows < 128 or columns < 256:
                tile = Tile(rows, columns, 128, warps, stages, group, tma=True, packed=not self.halves)
                found += [tile, replace(tile, tail=True)] if rows >= TAIL_ROWS else [tile]
                found.append(replace(tile, programs=1, flat=True))
        return found

    def _bytes(self, tile: Tile) -> int:
        weights = tile.columns * (2 if self.halves else 1) * (1 if self.scaled else 2)
        return (tile.rows * (1 if self.quantized else 2) + weights) * tile.depth * tile.stages


def heights(rows: float) -> tuple[int, ...]:
    """Block heights worth a try where an expert gets so many rows on average."""
    return tuple(
        size for size in BLOCK_SIZES if size / 2.5 <= max(rows, 8) <= size * 6 or (size == 128 and rows > 64)
    ) or (16,)
