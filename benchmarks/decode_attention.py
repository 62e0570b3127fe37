"""Decode attention on a GPU: flexpert's split kernel over the KV arena beside torch's flash attention, against the copy rate.

    python benchmarks/decode_attention.py

Heads as in Qwen3-30B-A3B: 32 query heads, 4 KV heads, 128 columns, bfloat16. Each call is of another layer, in one captured graph, so
that the L2 cache flatters no one; the median of the replays. Three places for the same keys and values: "arena", as flexpert keeps
them, a request's tokens one after the other and each with all layers; "layers", layer by layer; "plain", a tensor of its own for each
layer. share: bytes of keys and values over the time, over the copy rate measured at the start (read and written). torch's flash
attention reads the arena.
"""

from __future__ import annotations

import argparse
import datetime
from pathlib import Path
from typing import Any

import saved_run
import torch
from moe_layer import rates, said
from torch import Tensor

from flexpert.kernels.attention_gpu import flash
from flexpert.kernels.decode_attention import Scratch, Tile, choose_tile, decode_attention, decode_attention_reference
from flexpert.kernels.moe.timing import graph_time

HEADS, KV_HEADS, DIM = 32, 4, 128
LAYERS, TIMED = 48, 8
SCALING = DIM**-0.5
SHAPES = ((64, 640), (256, 640), (64, 4096), (8, 16384))
GOALS = {(64, 640): 0.75, (256, 640): 0.88, (64, 4096): 0.88, (8, 16384): 0.85}
TILES = [
    Tile(16, keys, warps, stages, programs)
    for keys, warps, stages, programs in (
        (64, 4, 3, 3), (64, 4, 2, 4), (64, 4, 3, 2), (64, 4, 4, 2), (64, 8, 3, 2), (64, 2, 3, 3),
        (128, 4, 2, 2), (128, 4, 3, 1), (128, 8, 3, 1), (32, 4, 4, 4), (32, 4, 3, 6), (32, 2, 4, 6),
    )
]  # fmt: skip


class Case:
    """One number of requests and one length, in each of the three places in turn."""

    def __init__(self, requests: int, length: int) -> None:
        self.requests, self.length = requests, length
        self.tokens = requests * length
        self.query = torch.randn(TIMED, requests, HEADS, DIM, device="cuda").bfloat16()
        self.first_rows = torch.arange(requests, device="cuda") * length
        self.lengths = torch.full((requests,), length, dtype=torch.int32, device="cuda")
        self.scratch = Scratch(requests=requests, tokens=self.tokens, heads=HEADS, value_dim=DIM, device="cuda")
        self.layer_bytes = 2 * self.tokens * KV_HEADS * DIM * 2

    def places(self, name: str) -> list[tuple[Tensor, Tensor]]:
        """(keys, values) of the timed layers."""
        half = {"dtype": torch.bfloat16, "device": "cuda"}
        if name == "plain":
            return [_filled(torch.empty(2, self.tokens, KV_HEADS, DIM, **half)) for _ in range(TIMED)]
        if name == "arena":
            memory = torch.empty(self.tokens, LAYERS, 2, KV_HEADS, DIM, **half)
            return [_filled(memory[:, layer * (LAYERS // TIMED)].transpose(0, 1)) for layer in range(TIMED)]
        memory = torch.empty(LAYERS // 2, 2, self.tokens, KV_HEADS, DIM, **half)
        return [_filled(memory[layer * (LAYERS // 2 // TIMED)]) for layer in range(TIMED)]

    def own(self, number: int, place: tuple[Tensor, Tensor], tile: Tile) -> Tensor:
        return decode_attention(
            self.query[number], *place, first_rows=self.first_rows, lengths=self.lengths, scaling=SCALING, scratch=self.scratch, tile=tile,
        )  # fmt: skip

    def flash(self, number: int, place: tuple[Tensor, Tensor]) -> Tensor:
        begins = torch.cat([self.first_rows, self.first_rows[-1:] + self.length]).int()
        one_each = torch.arange(self.requests + 1, dtype=torch.int32, device="cuda")
        return flash(
            self.query[number], *place, query_begins=one_each, key_begins=begins, keys_used=self.lengths, max_query=1,
            max_keys=self.length, scaling=SCALING, window=None, sinks=None,
        )  # fmt: skip

    def row(self, copy: float, tune: bool) -> dict[str, Any]:
        row: dict[str, Any] = {"requests": self.requests, "tokens": self.length, "seconds": {}, "share": {}, "tile": {}}
        for name in ("arena", "layers", "plain"):
            places = self.places(name)
            tile = choose_tile(HEADS // KV_HEADS, DIM)
            if tune:
                tile = min(TILES, key=lambda tile, places=places: self._time(places, tile, 3))
            seconds = self._time(places, tile, 20)
            row["seconds"][name], row["share"][name] = seconds, self.layer_bytes / seconds / copy
            row["tile"][name] = str(tile)
            if name == "arena":
                row["seconds"]["flash"] = self._flash_time(places, row)
                row["differs"] = self._differs(places[0], tile)
            del places
            torch.cuda.empty_cache()
        return row

    def _time(self, places: list[tuple[Tensor, Tensor]], tile: Tile, replays: int) -> float:
        try:
            return graph_time([lambda i=i: self.own(i, places[i], tile) for i in range(TIMED)], replays=replays).median
        except Exception as error:  # a tile that does not fit the device
            print(tile, said(error), flush=True)
            torch.cuda.synchronize()
            return float("inf")

    def _flash_time(self, places: list[tuple[Tensor, Tensor]], row: dict[str, Any]) -> float | None:
        try:
            return graph_time([lambda i=i: self.flash(i, places[i]) for i in range(TIMED)], replays=10).median
        except Exception as error:
            torch.cuda.synchronize()
            row["not_run"] = said(error)
            return None

    def _differs(self, place: tuple[Tensor, Tensor], tile: Tile) -> float:
        """Largest difference of the first four requests to float32, over the largest value."""
        few = slice(0, 4)
        expected = decode_attention_reference(
            self.query[0, few], *place, first_rows=self.first_rows[few], lengths=self.lengths[few], scaling=SCALING
        )
        found = self.own(0, place, tile)[few].float()
        return float((found - expected).abs().max() / expected.abs().max())


def _filled(pair: Tensor) -> tuple[Tensor, Tensor]:
    pair.normal_()
    return pair[0], pair[1]


def goals(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    found = []
    for row in rows:
        name = f"{row['requests']} x {row['tokens']}"
        found.append(
            saved_run.goal(
                f"{name}: share of copy rate", row["share"]["arena"], f">= {GOALS[row['requests'], row['tokens']]}"
            )
        )
        for place, bound in (("plain", "<= 1.02"), ("layers", "<= 1.05")):
            found.append(
                saved_run.goal(f"{name}: arena over {place}", row["seconds"]["arena"] / row["seconds"][place], bound)
            )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tune", action="store_true", help="try other tiles too")
    parser.add_argument("--out", type=Path, default=saved_run.RESULTS)
    options = parser.parse_args()
    started = datetime.datetime.now(datetime.UTC)
    copy, _ = rates()
    rows = []
    with torch.inference_mode():
        for requests, length in SHAPES:
            rows.append(Case(requests, length).row(copy, options.tune))
            print(rows[-1], flush=True)
            torch.cuda.empty_cache()
    first = {"shape": "rates", "copy_bytes_per_s": copy}
    saved_run.save(
        "decode_attention", device="cuda", rows=[first, *rows], goals=goals(rows), started=started, folder=options.out
    )


if __name__ == "__main__":
    main()
