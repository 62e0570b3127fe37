"""Packs the rows of a step into arrays: one packed row of tokens, padded, with where each token's KV goes and which logits are wanted.

Host work of every step, the same for all devices; numpy only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from flexpert.workers.step import Row


@dataclass(frozen=True)
class PackedStep:
    """Per request: slots, starts (position of its first new token), counts, first_rows (its place in the packed row).
    Per token of the padded row: token_ids, positions. wanted: packed rows whose logits are asked for, in row order."""

    slots: np.ndarray
    starts: np.ndarray
    counts: np.ndarray
    first_rows: np.ndarray
    num_tokens: int
    token_ids: np.ndarray
    positions: np.ndarray
    wanted: np.ndarray


def pack(rows: Sequence[Row], *, multiple: int, capacity_tokens: int, slots: int) -> PackedStep:
    """Raises ValueError for a row that the KV tensor cannot hold; padding tokens have id 0 and position 0."""
    counts = np.array([len(row.token_ids) for row in rows], dtype=np.int64)
    starts = np.array([row.start for row in rows], dtype=np.int64)
    slot = np.array([row.slot for row in rows], dtype=np.int64)
    if not len(rows) or counts.min() < 1:
        raise ValueError("a step needs rows, and each row a token")
    if (starts + counts).max() > capacity_tokens or slot.max() >= slots or min(starts.min(), slot.min()) < 0:
        worst = max(rows, key=lambda row: row.end)
        raise ValueError(
            f"row {worst.request_id!r} ends at position {worst.end} of slot {worst.slot}; "
            f"there are {slots} slots of {capacity_tokens} tokens"
        )
    ends = counts.cumsum()
    first_rows = ends - counts
    num_tokens = int(ends[-1])
    token_ids = np.zeros(-(-num_tokens // multiple) * multiple, dtype=np.int64)
    positions = np.zeros_like(token_ids)
    if num_tokens == len(rows):
        token_ids[:num_tokens] = [row.token_ids[0] for row in rows]
        positions[:num_tokens] = starts
    else:
        token_ids[:num_tokens] = [token for row in rows for token in row.token_ids]
        positions[:num_tokens] = np.arange(num_tokens) + np.repeat(starts - first_rows, counts)
    return PackedStep(slot, starts, counts, first_rows, num_tokens, token_ids, positions, _wanted(rows, ends))


def _wanted(rows: Sequence[Row], ends: np.ndarray) -> np.ndarray:
    if all(row.sample and not row.all_logits for row in rows):
        return ends - 1
    picked = [
        np.arange(end - len(row.token_ids), end) if row.all_logits else np.arange(end - 1, end)
        for row, end in zip(rows, ends.tolist(), strict=True)
        if row.sample or row.all_logits
    ]
    return np.concatenate(picked) if picked else np.zeros(0, dtype=np.int64)
