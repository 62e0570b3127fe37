"""The two messages of an exchange, as bytes: rows with what is asked of them, and the rows that answer.

Dispatch, empty where nothing is asked: int32 [number of rows, number of pairs, row of each pair, expert of each pair], zeros up to a
multiple of 64 bytes, then the rows. Combine: one row a pair, in the order of the pairs. All rows are of the weights' dtype.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from flexpert.workers.model.layout import aligned
from flexpert.workers.model.servable import ServableModel, torch_dtype

_COUNTS = 2
_INT_BYTES = 4


class Asked(NamedTuple):
    """What one rank asks of another: rows [n, width], and pairs (row, expert), both int32 [pairs]."""

    rows: Tensor
    row_of: np.ndarray
    experts: np.ndarray


def capacity_bytes(
    servable: ServableModel, dtype: str | torch.dtype, *, max_batch_tokens: int, num_peers: int = 1
) -> int:
    """What a rank sends in one exchange to so many peers together is never more, where each rank's step has at most that many tokens.
    With one peer: the bound of a single message."""
    row_bytes = servable.routing.width * torch_dtype(dtype).itemsize
    top_k = servable.routing.top_k
    pairs = max_batch_tokens * top_k
    heads = _head_bytes(pairs) + (num_peers - 1) * _head_bytes(0)  # the pairs of one batch, shared out
    dispatch = heads + max_batch_tokens * min(num_peers, top_k) * row_bytes
    combine = num_peers * pairs * row_bytes  # all that every peer has may be asked of one rank
    return max(dispatch, combine)


def encode(hidden: Tensor, rows: np.ndarray, row_of: np.ndarray, experts: np.ndarray) -> Tensor:
    """The dispatch message for rows hidden[rows], on hidden's device; row_of counts within `rows`."""
    pairs = len(experts)
    head_bytes = _head_bytes(pairs)
    on_host = hidden.device.type == "cpu"
    row_bytes = hidden.shape[1] * hidden.dtype.itemsize
    message = np.empty(head_bytes + (len(rows) * row_bytes if on_host else 0), dtype=np.uint8)
    head = message[:head_bytes].view(np.int32)
    head[0], head[1] = len(rows), pairs
    head[_COUNTS : _COUNTS + pairs] = row_of
    head[_COUNTS + pairs : _COUNTS + 2 * pairs] = experts
    head[_COUNTS + 2 * pairs :] = 0
    if on_host:
        chosen = message[head_bytes:].reshape(len(rows), row_bytes)
        hidden.view(torch.uint8).numpy().take(rows, axis=0, out=chosen, mode="clip")  # mode: no copy in between
        return torch.from_numpy(message)
    sent = hidden.index_select(0, torch.from_numpy(rows).to(hidden.device))
    return torch.cat([torch.from_numpy(message).to(hidden.device), sent.view(torch.uint8).flatten()])


def decode(message: Tensor, width: int, dtype: torch.dtype) -> Asked:
    """Raises ValueError for bytes that are no such message. On a GPU the head is copied to the host, which waits for it."""
    message, nbytes = _aligned(message), message.numel()
    num_rows, pairs = message[: _COUNTS * _INT_BYTES].cpu().numpy().view(np.int32).tolist()
    head_bytes = _head_bytes(pairs)
    if min(num_rows, pairs) < 0 or nbytes != head_bytes + num_rows * width * dtype.itemsize:
        raise ValueError(f"a dispatch of {nbytes} bytes says it has {num_rows} rows of {width} and {pairs} pairs")
    head, rows = message.split([head_bytes, nbytes - head_bytes])
    lists = head.cpu().numpy().view(np.int32)[_COUNTS : _COUNTS + 2 * pairs]
    return Asked(rows.view(dtype).view(num_rows, width), lists[:pairs], lists[pairs:])


def encode_rows(rows: Tensor) -> Tensor:
    return rows.view(torch.uint8).flatten()


def decode_rows(message: Tensor, pairs: int, width: int, dtype: torch.dtype) -> Tensor:
    if message.numel() != pairs * width * dtype.itemsize:
        raise ValueError(f"a combine of {message.numel()} bytes, expected {pairs} rows of {width} {dtype}")
    return _aligned(message).view(dtype).view(pairs, width)


def _head_bytes(pairs: int) -> int:
    return aligned(_INT_BYTES * (_COUNTS + 2 * pairs))


def _aligned(message: Tensor) -> Tensor:
    """Transports hand out views of their own memory: where one begins at an odd place, it is copied."""
    return message if message.data_ptr() % 16 == 0 and message.storage_offset() % 16 == 0 else message.clone()
