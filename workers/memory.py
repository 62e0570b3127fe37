"""Where a worker's KV lives: one byte tensor over all slots, and the operations that back, copy and commit it.

Two forms behind one small interface. ArenaMemory is a view of the HBM manager's arena: the bytes outlive the worker. TorchMemory is
plain torch memory of this process, for devices whose manager backend is not there yet: nothing is shared between slots and nothing
survives, so a replacement replays its requests from their tokens. Called by the engine's thread, except where it says otherwise.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Protocol

import torch

from flexpert.hbm import KvArena, SlotRecord
from flexpert.hbm.ops import ArenaOp
from flexpert.workers.step import CopyTokens, MemoryOp


class KvMemory(Protocol):
    """tensor: uint8 [slots, slot_bytes], row s is slot s; a token's KV of all layers lies together."""

    tensor: torch.Tensor

    def apply(self, ops: Sequence[MemoryOp]) -> None:
        """Carry out a step's memory operations, in order, before any row of the step is computed."""

    def commit(self, ends: Sequence[tuple[int, int]]) -> None:
        """(slot, tokens): the KV of so many tokens of the slot is whole. Only after the step that wrote it."""

    def records(self) -> Sequence[SlotRecord]:
        """What the previous holder left, for `KvBooks.restore`."""


def bytes_at(address: int, nbytes: int) -> torch.Tensor:
    """uint8 [nbytes] over mapped memory; the caller keeps the mapping alive, nothing is copied."""
    return torch.frombuffer((ctypes.c_uint8 * nbytes).from_address(address), dtype=torch.uint8)


def copy_tokens(tensor: torch.Tensor, op: CopyTokens, token_bytes: int) -> None:
    """KV rows [first_token, end_token) from one slot of uint8 [slots, slot_bytes] to the same place of another."""
    span = slice(op.first_token * token_bytes + op.skip_bytes, op.end_token * token_bytes)
    tensor[op.slot, span].copy_(tensor[op.source_slot, span])


def read_tokens(tensor: torch.Tensor, slot: int, first: int, end: int, token_bytes: int) -> bytes:
    """The KV of tokens [first, end) of a slot."""
    return tensor[slot, first * token_bytes : end * token_bytes].cpu().numpy().tobytes()


def write_tokens(tensor: torch.Tensor, slot: int, first: int, data: bytes, token_bytes: int) -> None:
    """KV that `read_tokens` gave elsewhere, to the same positions of a slot that is backed there."""
    begin = first * token_bytes
    tensor[slot, begin : begin + len(data)].copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))


class ArenaMemory:
    """KV in an arena of the HBM manager."""

    def __init__(self, arena: KvArena, *, slots: int, slot_bytes: int, token_bytes: int) -> None:
        self._arena = arena
        self._token_bytes = token_bytes
        self.tensor = bytes_at(arena.address, slots * slot_bytes).view(slots, slot_bytes)

    def apply(self, ops: Sequence[MemoryOp]) -> None:
        pending: list[ArenaOp] = []
        for op in ops:
            if isinstance(op, CopyTokens):
                self._arena.apply(pending)
                pending = []
                copy_tokens(self.tensor, op, self._token_bytes)
            else:
                pending.append(op)
        if pending:
            self._arena.apply(pending)

    def commit(self, ends: Sequence[tuple[int, int]]) -> None:
        committed = self._arena.committed
        for slot, tokens in ends:
            committed[slot] = tokens

    def records(self) -> Sequence[SlotRecord]:
        return self._arena.records()

    def grow(self, count: int) -> list[int]:
        """So many granules more, by their ids. From any thread. Raises BudgetError."""
        return self._arena.grow(count)

    def shrink(self, granules: Sequence[int]) -> None:
        """Give these back, which no slot holds any more. From any thread."""
        self._arena.shrink(granules)


class TorchMemory:
    """KV in one plain tensor of this process; every slot is always backed."""

    def __init__(self, *, slots: int, slot_bytes: int, token_bytes: int, device: torch.device) -> None:
        self._token_bytes = token_bytes
        self.tensor = torch.zeros(slots, slot_bytes, dtype=torch.uint8, device=device)

    def apply(self, ops: Sequence[MemoryOp]) -> None:
        for op in ops:
            if isinstance(op, CopyTokens):
                copy_tokens(self.tensor, op, self._token_bytes)

    def commit(self, ends: Sequence[tuple[int, int]]) -> None:
        pass

    def records(self) -> Sequence[SlotRecord]:
        return ()
