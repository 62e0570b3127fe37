"""Attention on the CPU whose every row is the same bits whatever shares the step with it.

A query row is reduced over fixed blocks of 128 keys at absolute positions, in key order, and computed in a tile of 64 rows, or of few where
one token is decoded: for a matrix product on the CPU the bits of a row do not depend on how many groups of rows stand beside it
(`flexpert.kernels.row_groups` says how large a group). So a token decoded alone,
in a batch, or inside a prefill chunk gets equal results, bit for bit (float32; `tests/kernels/test_attention.py`).

Two parts: `AttentionPlan` is made once a step for each head geometry and window and holds only indices and masks; `attend` runs once a
layer. Keys and values are read by `index_select` on rows of the KV arena; positions that a request does not own (yet) are never
read, they are replaced by its first new token and masked, so that garbage in the arena, also NaN, cannot leak.

Called by `flexpert.workers.model.cpu_step`. Knows nothing of models, slots or arenas: only of row numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from flexpert.kernels.row_groups import SAFE_ROWS

KEY_BLOCK = 128
LARGE_TILE = 64
MASKED = -1e30  # not -inf: a block that is masked whole must give finite numbers, which then weigh exactly 0
_VECTOR_ELEMENTS = 512  # whole vectors also when a few threads share them
_SCORES_PER_CHUNK = 1 << 22  # bounds the scratch memory of one chunk to 16 MiB of scores


@dataclass(frozen=True)
class PackedRequests:
    """The requests of a packed step, as arrays of one length.

    first_row: where the request's new tokens begin in the packed row; num_new: how many; start: the position of the first of them;
    kv_row: row number of the request's position 0 in the arena's row view; kv_row_step: rows from one position to the next.
    """

    first_row: np.ndarray
    num_new: np.ndarray
    start: np.ndarray
    kv_row: np.ndarray
    kv_row_step: int
    padded_tokens: int


@dataclass(frozen=True)
class _Chunk:
    """Tiles of one height whose scores fit the scratch memory. A pair is (tile, key block); pairs are ordered by block, then tile."""

    height: int
    num_tiles: int
    query_rows: Tensor  # [kv_heads * pairs * height] rows of the [tokens * heads, head_dim] queries
    kv_rows: Tensor  # [blocks * 128] rows of the arena, one run for each distinct (request, block)
    pair_block: Tensor | None  # [pairs] index of the pair's block, None where pairs are the blocks
    bias: Tensor  # [pairs, height or 1, 128] float32, 0 or MASKED; 1 where all rows of each tile share it
    pair_tile: Tensor  # [pairs]
    tiles_with_block: tuple[int, ...]  # for each block rank, how many tiles (the first so many) have it
    tile_heads: Tensor  # [kv_heads * tiles * height] query head of each row, for sinks


class AttentionPlan:
    """Indices and masks of one step for layers of `heads` query heads, `kv_heads` KV heads and one window (None: all earlier keys).

    row_group: a tile's rows are a multiple of this.
    """

    def __init__(
        self, requests: PackedRequests, *, heads: int, kv_heads: int, window: int | None, row_group: int = SAFE_ROWS
    ) -> None:
        self.heads, self.kv_heads = heads, kv_heads
        self.group = heads // kv_heads
        self.padded_tokens = requests.padded_tokens
        rows = requests.num_new * self.group
        self.chunks: list[_Chunk] = []
        # Where the result of (token, head) lies in the concatenated outputs of the chunks; padding tokens point at row 0.
        self._output_rows = np.zeros((requests.padded_tokens, heads), dtype=np.int64)
        self._outputs = 0
        self._small_tile = min(-(-self.group // row_group) * row_group, LARGE_TILE)  # holds one token
        small = rows <= self._small_tile
        for selected, height in ((np.flatnonzero(small), self._small_tile), (np.flatnonzero(~small), LARGE_TILE)):
            if len(selected):
                self._add_tiles(requests, selected, rows[selected], height, window)
        self.output_rows = torch.from_numpy(self._output_rows.reshape(-1))

    def _add_tiles(
        self, requests: PackedRequests, selected: np.ndarray, rows: np.ndarray, height: int, window: int | None
    ) -> None:
        tiles_each = -(-rows // height)
        request = np.repeat(selected, tiles_each)
        first = (np.arange(len(request)) - np.repeat(np.cumsum(tiles_each) - tiles_each, tiles_each)) * height
        last = np.minimum(first + height, np.repeat(rows, tiles_each)) - 1
        start = requests.start[request]
        first_block = np.zeros_like(first)
        if window is not None:
            first_block = np.maximum(start + first // self.group - window + 1, 0) // KEY_BLOCK
        blocks = (start + last // self.group) // KEY_BLOCK - first_block + 1
        order = np.argsort(-blocks, kind="stable")
        tiles = np.stack([request, first, last, first_block, blocks])[:, order]
        pairs_per_chunk = max(1, _SCORES_PER_CHUNK // (height * KEY_BLOCK * self.kv_heads))
        chunk_of = (np.cumsum(tiles[4]) - 1) // pairs_per_chunk
        for begin, end in _runs(chunk_of):
            self._add_chunk(requests, tiles[:, begin:end], height, window)

    def _add_chunk(self, requests: PackedRequests, tiles: np.ndarray, height: int, window: int | None) -> None:
        request, first, last, first_block, blocks = tiles
        num_tiles, most = len(request), int(blocks[0])
        tiles_with_block = tuple(int(n) for n in np.searchsorted(-blocks, -np.arange(most), side="left"))
        pair_tile = np.concatenate([np.arange(n) for n in tiles_with_block]) if most > 1 else np.arange(num_tiles)
        rank = np.repeat(np.arange(most), tiles_with_block)
        block = first_block[pair_tile] + rank

        # [tiles, height]: row of the tile -> token of the packed step and head within the KV group; rows past the end repeat the last.
        row = np.minimum(first[:, None] + np.arange(height), last[:, None])
        offset, head = row // self.group, row % self.group
        token = requests.first_row[request][:, None] + offset
        heads = np.arange(self.kv_heads)[:, None, None] * self.group + head
        query_rows = (token * self.heads + heads)[:, pair_tile]

        pair_request = request[pair_tile]
        if height == self._small_tile:
            block_request, block_index, pair_block = pair_request, block, None
        else:
            keys, inverse = np.unique(pair_request * (1 << 32) + block, return_inverse=True)
            block_request, block_index = keys >> 32, keys & ((1 << 32) - 1)
            pair_block = torch.from_numpy(inverse.reshape(-1))
        position = block_index[:, None] * KEY_BLOCK + np.arange(KEY_BLOCK)
        start, num_new = requests.start[block_request][:, None], requests.num_new[block_request][:, None]
        owned = position < start + num_new
        kv_rows = requests.kv_row[block_request][:, None] + np.where(owned, position, start) * requests.kv_row_step

        self.chunks.append(
            _Chunk(
                height=height,
                num_tiles=num_tiles,
                query_rows=torch.from_numpy(query_rows.reshape(-1)),
                kv_rows=torch.from_numpy(kv_rows.reshape(-1)),
                pair_block=pair_block,
                bias=_bias(requests.start[request][:, None] + offset, pair_tile, block, window),
                pair_tile=torch.from_numpy(pair_tile),
                tiles_with_block=tiles_with_block,
                tile_heads=torch.from_numpy(heads.reshape(-1)),
            )
        )
        # Each (token, head) of the tile, once: rows past the last of the tile would only repeat it.
        outputs = self._outputs + np.arange(self.kv_heads * num_tiles * height).reshape(
            self.kv_heads, num_tiles, height
        )
        real = np.broadcast_to(first[:, None] + np.arange(height) <= last[:, None], outputs.shape)
        self._output_rows[np.broadcast_to(token, outputs.shape)[real], heads[real]] = outputs[real]
        self._outputs += outputs.size


def _runs(values: np.ndarray) -> list[tuple[int, int]]:
    """[begin, end) of the runs of equal neighbours."""
    edges = [0, *(np.flatnonzero(np.diff(values)) + 1).tolist(), len(values)]
    return list(pairwise(edges))


def _bias(query_position: np.ndarray, pair_tile: np.ndarray, block: np.ndarray, window: int | None) -> Tensor:
    """[pairs, height or 1, 128]: 0 where the query may see the key, MASKED elsewhere."""
    if bool((query_position[:, :1] == query_position).all()):
        query_position = query_position[:, :1]
    query = query_position[pair_tile][:, :, None]
    key = (block[:, None] * KEY_BLOCK + np.arange(KEY_BLOCK))[:, None, :]
    visible = key <= query
    if window is not None:
        visible &= key > query - window
    return torch.from_numpy(np.where(visible, np.float32(0), np.float32(MASKED)))


KeysAndValues = Callable[[Tensor], tuple[Sequence[Tensor], Sequence[Tensor]]]


def attend(
    query: Tensor,
    read: KeysAndValues,
    plan: AttentionPlan,
    *,
    scaling: float,
    sinks: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Attention of all rows of a packed step. query [heads, tokens, head_dim] -> [tokens, heads, value_dim], of query's dtype.

    `read(kv_rows)` gives the keys and the values of so many arena rows, each as one [rows, dim] tensor for each KV head.
    sinks [heads]: a logit that takes part in the softmax and has no value (gpt-oss). softcap: scores become cap * tanh(scores / cap).
    """
    heads, tokens, _ = query.shape
    flat_query = query.transpose(0, 1).reshape(tokens * heads, -1).float() * scaling
    outputs = [_attend_chunk(flat_query, read, chunk, plan.kv_heads, sinks, softcap) for chunk in plan.chunks]
    flat = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return flat.index_select(0, plan.output_rows).view(tokens, heads, -1).to(query.dtype)


def _attend_chunk(
    flat_query: Tensor,
    read: KeysAndValues,
    chunk: _Chunk,
    kv_heads: int,
    sinks: Tensor | None,
    softcap: float | None,
) -> Tensor:
    """[kv_heads * tiles * height, value_dim] float32."""
    pairs = len(chunk.pair_tile)
    queries = flat_query.index_select(0, chunk.query_rows).view(kv_heads, pairs, chunk.height, -1)
    keys, values = read(chunk.kv_rows)
    scores = queries.new_empty(kv_heads, pairs, chunk.height, KEY_BLOCK)
    for head in range(kv_heads):
        torch.bmm(queries[head], _blocks(keys[head], chunk).transpose(1, 2), out=scores[head])
    if softcap is not None:
        scores.div_(softcap).tanh_().mul_(softcap)
    scores += chunk.bias
    probabilities = scores.softmax(-1)
    partial = probabilities.new_empty(kv_heads, pairs, chunk.height, values[0].shape[-1])
    for head in range(kv_heads):
        torch.bmm(probabilities[head], _blocks(values[head], chunk), out=partial[head])
    if len(chunk.tiles_with_block) > 1 or sinks is not None:
        partial = _combine(chunk, scores, probabilities, partial, sinks)
    return partial.view(-1, partial.shape[-1])


def _blocks(rows: Tensor, chunk: _Chunk) -> Tensor:
    """[rows, dim] -> [pairs, 128, dim]."""
    blocks = rows.unflatten(0, (-1, KEY_BLOCK))
    return blocks if chunk.pair_block is None else blocks.index_select(0, chunk.pair_block)


def _combine(chunk: _Chunk, scores: Tensor, probabilities: Tensor, partial: Tensor, sinks: Tensor | None) -> Tensor:
    """The blocks of each tile, each normalised by itself, into one: [kv_heads, tiles, height, value_dim].

    With m and l the block's maximum and sum, a block weighs l * exp(m - M) / sum over blocks. Of a row that sees one block the weight is
    l / l = 1 exactly, and a masked block weighs 0 exactly, so the rows beside it do not change its bits.
    """
    block_max = scores.amax(-1)
    block_sum = probabilities.amax(-1).reciprocal_()  # the largest probability is exp(0) / l
    total_max = _reduce_blocks(chunk, block_max, torch.maximum)
    if sinks is not None:
        sink = sinks.float().index_select(0, chunk.tile_heads).view(total_max.shape)
        total_max = torch.maximum(total_max, sink)
    weight = _exp(block_max - total_max.index_select(1, chunk.pair_tile)).mul_(block_sum)
    total = _reduce_blocks(chunk, weight, torch.add)
    if sinks is not None:
        total = total + _exp(sink - total_max)
    partial = partial * (weight / total.index_select(1, chunk.pair_tile)).unsqueeze(-1)
    return _reduce_blocks(chunk, partial, torch.add)


def _exp(values: Tensor) -> Tensor:
    """Element by element, all of them in whole vectors: scalar code for the last few would give them other bits."""
    padding = -values.numel() % _VECTOR_ELEMENTS
    if padding == 0:
        return values.exp_()
    return torch.nn.functional.pad(values.reshape(-1), (0, padding)).exp_()[: values.numel()].view(values.shape)


def _reduce_blocks(chunk: _Chunk, pairs: Tensor, reduce: Callable[..., Tensor]) -> Tensor:
    """[kv_heads, pairs, ...] -> [kv_heads, tiles, ...], block after block in key order."""
    result = pairs[:, : chunk.num_tiles]
    if len(chunk.tiles_with_block) == 1:
        return result
    result = result.clone()
    begin = chunk.num_tiles
    for count in chunk.tiles_with_block[1:]:
        part = result[:, :count]
        reduce(part, pairs[:, begin : begin + count], out=part)
        begin += count
    return result
