"""Which kernels compute a layer, and with which tiles: one pure function over a table of tuned plans.

A table is a JSON file in `plans/`, one for each device, written by the tuner (`flexpert kernels tune`) and read once. It holds for each
shape the best plan found at some token counts; `choose_plan` takes the one tuned for the nearest count. A shape or a device that was never
tuned falls to `heuristic`. Nothing is ever tuned while serving.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

BLOCK_SIZES = (16, 32, 64, 128)  # rows of a tile: what a schedule holds tiles for
TAIL_ROWS = 128  # half of fewer rows is computed by other instructions, so a row's bits would depend on its place
PLANS = Path(__file__).parent / "plans"
GEMV_PAIRS = 16  # heuristic: up to so many (token, k) pairs without a schedule
LARGEST = 4096  # tokens from which on plans no longer change much
FARTHEST = 4  # a plan serves token counts up to so many times smaller or larger than the one it was tuned for
FEW_ROWS = 48  # mean rows an expert below which weights, not arithmetic, take the time


@dataclass(frozen=True, kw_only=True)
class LayerShape:
    """What a plan depends on besides the number of tokens."""

    num_experts: int
    hidden: int
    inner: int
    top_k: int
    dtype: str = "bfloat16"  # of the weights
    transposed: bool = False
    interleaved: bool = False
    quantize_rows: bool = False  # a plan may quantise rows to fp8

    @property
    def scaled(self) -> bool:
        """Whether the weights are fp8, with scales."""
        return self.dtype == "float8_e4m3fn"

    @property
    def key(self) -> str:
        flags = ("transposed", "interleaved", "quantize_rows")
        layout = "".join(f"-{flag}" for flag in flags if getattr(self, flag))
        return f"e{self.num_experts}-h{self.hidden}-i{self.inner}-k{self.top_k}-{self.dtype}{layout}"


@dataclass(frozen=True)
class Tile:
    """Of one product. rows x columns of the result in steps of `depth`; with gate and up, `columns` of each. group: tiles that walk the
    columns together. swap: weights stand on the left. tma: weights come by the tensor-memory accelerator; packed: rows of the second
    product too. tail: last tiles at half height, from TAIL_ROWS on. programs: per multiprocessor, 0: not persistent. flat: the loops over
    a program's tiles and over their depth are one, so that a tile's first loads overlap the end of the one before; persistent, without
    half heights."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    group: int = 1
    swap: bool = False
    tma: bool = False
    packed: bool = False
    tail: bool = False
    programs: int = 0
    flat: bool = False


@dataclass(frozen=True)
class GemvTile:
    """Columns a program computes, and how many elements of each row it reads at a time."""

    columns: int
    depth: int
    warps: int


@dataclass(frozen=True)
class Plan:
    """`gemv`: both products without a schedule. `grouped`: schedule, two grouped products, weighted sum. quantize: rows of both grouped
    products are fp8, as the weights."""

    kind: str
    up: Tile | GemvTile
    down: Tile | GemvTile
    quantize: bool = False

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Plan:
        """Raises ValueError for another kind than "gemv" and "grouped", and for rows that no schedule has."""
        kind = fields["kind"]
        if kind not in ("gemv", "grouped"):
            raise ValueError(f'a plan of kind {kind!r}, expected "gemv" or "grouped"')
        tile = GemvTile if kind == "gemv" else Tile
        plan = cls(kind, tile(**fields["up"]), tile(**fields["down"]), fields.get("quantize", False))
        for part in (plan.up, plan.down):
            if isinstance(part, Tile) and part.rows not in BLOCK_SIZES:
                raise ValueError(f"a tile of {part.rows} rows, expected one of {', '.join(map(str, BLOCK_SIZES))}")
        return plan


Table = Mapping[str, Sequence[tuple[int, Plan]]]  # shape key -> (tokens, plan), tokens ascending


def choose_plan(tokens: int, shape: LayerShape, table: Table) -> Plan:
    """The plan tuned for the nearest token count (by ratio), else the heuristic's. Beyond the largest count tuned its plan is kept."""
    tuned = table.get(shape.key)
    if not tuned:
        return heuristic(tokens, shape)
    tokens = max(tokens, 1)
    nearest, plan = min(tuned, key=lambda entry: abs(math.log(tokens / entry[0])))
    near = nearest / FARTHEST <= tokens <= nearest * FARTHEST or (tokens > nearest >= LARGEST)
    return plan if near else heuristic(tokens, shape)


def heuristic(tokens: int, shape: LayerShape) -> Plan:
    """What is good for most shapes on Hopper: vector sums for a few pairs, small tiles while weights take the time, large ones beyond."""
    pairs = tokens * shape.top_k
    if pairs <= GEMV_PAIRS:
        return Plan("gemv", GemvTile(8, 512, 4), GemvTile(8, 256, 4))
    rows = pairs / shape.num_experts
    if rows <= FEW_ROWS:
        height = 16 if rows <= 12 else 32 if rows <= 24 else 64
        return Plan("grouped", Tile(height, 64, 128, 4, 4), Tile(height, 128, 128, 4, 4))
    if shape.quantize_rows:
        height = 64 if rows <= 96 else 128
        down = Tile(height, 128, 128, 8, 4, group=8, tma=True, packed=True, tail=height > 64)
        return Plan("grouped", Tile(height, 128, 128, 8, 3, group=8, tma=True, tail=height > 64), down, quantize=True)
    if shape.scaled:  # weights are widened in registers, which then are the left operand
        tile = Tile(64, 64, 128, 8, 4, group=4, swap=True, tma=True)
        return Plan("grouped", tile, replace(tile, columns=128))
    if rows <= 96:
        return Plan("grouped", Tile(64, 64, 64, 4, 4, group=4), Tile(64, 128, 64, 4, 4, group=4))
    return Plan("grouped", Tile(128, 128, 64, 8, 3, group=8), Tile(128, 256, 64, 8, 3, group=8))


def read_table(path: Path) -> Table:
    """A table as the tuner writes it; empty where there is no file. Raises ValueError where it is not one."""
    if not path.exists():
        return {}
    try:
        shapes = json.loads(path.read_text())["shapes"]
        table = {
            key: sorted(
                ((entry["tokens"], Plan.from_json(entry["plan"])) for entry in entries), key=lambda found: found[0]
            )
            for key, entries in shapes.items()
        }
        if counts := [tokens for entries in table.values() for tokens, _ in entries if tokens < 1]:
            raise ValueError(f"tokens is {counts[0]}, expected 1 or more")
        return table
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is no table of plans ({error}); write it anew with `flexpert kernels tune`"
        ) from error


def device_key(device_name: str) -> str:
    """ "NVIDIA H100 80GB HBM3" -> "h100"."""
    return device_name.lower().replace("nvidia ", "").split()[0]


@lru_cache(maxsize=8)
def table_of(device_name: str) -> Table:
    """The table of a device, by the name that CUDA gives it: that of the package, with what the folder FLEXPERT_PLANS has on top."""
    file_name = f"{device_key(device_name)}.json"
    own = os.environ.get("FLEXPERT_PLANS")
    return {**read_table(PLANS / file_name), **(read_table(Path(own) / file_name) if own else {})}
