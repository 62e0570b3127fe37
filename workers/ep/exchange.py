"""One MoE layer of a step whose experts are spread over ranks: tokens go to the ranks that hold their experts, unsummed rows come back.

A token's hidden row is sent once to each rank that computes for it, with the list of experts it needs there. The holder computes the
pairs of all ranks, its own among them, in one call and returns a row for each pair in the order they were asked for; the home rank adds
them up with the expression of a single worker (`kernels.weighted_sum`). So the results have the bits of a single worker.

Called by the experts modules (`forward`) and the runner (`serve`), on the engine's thread; `take_load` from any.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from flexpert.kernels import expert_rows, weighted_sum
from flexpert.workers.ep import wire
from flexpert.workers.ep.experts import EpochExperts
from flexpert.workers.epoch import Epoch, Member
from flexpert.workers.transport import Transport


class _Pairs(NamedTuple):
    """Pairs (token, k) of one home rank by the rank that computes them: rank r has [ends[r - 1], ends[r]) of the arrays, tokens ascending.

    picks: which of all pairs; tokens, experts: of each; first: whether it is its token's first pair at that rank; row_of: how many rows
    go to ranks before and to this one up to its token's.
    """

    ends: list[int]
    picks: np.ndarray
    tokens: np.ndarray
    experts: np.ndarray
    first: np.ndarray
    row_of: np.ndarray

    def of(self, rank: int) -> slice:
        return slice(self.ends[rank - 1] if rank else 0, self.ends[rank])


def _host(member: Member) -> str:
    kind, _, rest = member.exchange_address.partition(":")
    return "" if kind == "unix" else rest.rpartition(":")[0]


class ExpertExchange:
    """Phases of layer l: 1 + 2l dispatches, 2 + 2l combines; phase 0 is the engine's. The epoch must have been made for this model."""

    def __init__(self, transport: Transport, epoch: Epoch, rank: int, experts: EpochExperts) -> None:
        if tuple(len(layer) for layer in epoch.holders) != experts.num_experts or experts.held != epoch.held_by(rank):
            raise ValueError(
                f"epoch {epoch.number} places other experts on rank {rank} than are here, or is of another model"
            )
        self.rank, self.size = rank, epoch.size
        self.ranks_here = sum(_host(member) == _host(epoch.members[rank]) for member in epoch.members)
        self._transport = transport
        self._experts = experts
        self._targets = [np.array(layer, dtype=np.int64) for layer in epoch.targets(rank)]
        self._step: int | None = None
        self._load = self._no_load()
        self._no_rows = torch.empty(0, experts.width, dtype=experts.dtype, device=experts.device)
        self._nothing = torch.empty(0, dtype=torch.uint8, device=experts.device)

    def begin(self, step: int) -> None:
        """Before each step, after its phase 0."""
        self._step = step

    def forward(self, layer: int, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """[tokens, H], [tokens, k] expert ids, [tokens, k] weights -> [tokens, H] of hidden's dtype. Raises StepMissed."""
        ids = top_k_index.cpu().numpy()
        self._load[layer] += np.bincount(ids.reshape(-1), minlength=self._experts.num_experts[layer])
        rows = self._exchange(layer, hidden.to(self._experts.dtype).contiguous(), ids)
        return weighted_sum(rows.view(*ids.shape, self._experts.width), top_k_weights, hidden.dtype)

    def serve(self, layer: int) -> None:
        """The same for a rank that has no tokens in this step."""
        self._exchange(layer, self._no_rows, np.empty((0, 1), dtype=np.int64))

    def take_load(self) -> list[np.ndarray]:
        """[layer] -> int64 [experts]: how many of this rank's own tokens picked each expert since the last call."""
        taken, self._load = self._load, self._no_load()
        return taken

    def _no_load(self) -> list[np.ndarray]:
        return [np.zeros(count, dtype=np.int64) for count in self._experts.num_experts]

    def _exchange(self, layer: int, hidden: Tensor, ids: np.ndarray) -> Tensor:
        """The unsummed rows [tokens * k, width] of hidden [tokens, width], ids [tokens, k]."""
        if self._step is None:
            raise RuntimeError("call begin(step) before the step's first layer")
        pairs = self._split(layer, ids)
        received = self._transport.exchange(self._step, 1 + 2 * layer, self._dispatches(hidden, pairs))
        width, dtype = self._experts.width, self._experts.dtype
        asked = {
            rank: wire.decode(message, width, dtype)
            for rank, message in enumerate(received)
            if rank != self.rank and len(message)
        }
        own, answers = self._compute(layer, hidden, pairs, asked)
        returned = self._transport.exchange(self._step, 2 + 2 * layer, answers)
        if len(own) == ids.size:
            return own
        parts = [own]
        for rank in range(self.size):
            if rank != self.rank and (num_pairs := len(pairs.picks[pairs.of(rank)])):
                parts.append(wire.decode_rows(returned[rank], num_pairs, width, dtype))
        here = pairs.of(self.rank)
        picks = np.concatenate([pairs.picks[here], pairs.picks[: here.start], pairs.picks[here.stop :]])
        rows = own.new_empty(ids.size, width)
        return rows.index_copy_(0, torch.from_numpy(picks).to(rows.device), torch.cat(parts))

    def _split(self, layer: int, ids: np.ndarray) -> _Pairs:
        experts = ids.reshape(-1)
        target = self._targets[layer][experts]
        picks = np.argsort(target, kind="stable")
        ends = np.cumsum(np.bincount(target, minlength=self.size))
        tokens = picks // ids.shape[1]
        first = np.ones(len(picks) + 1, dtype=bool)  # one more: an end may be the last
        np.not_equal(tokens[1:], tokens[:-1], out=first[1:-1])
        first[ends] = True
        first = first[:-1]
        return _Pairs(ends.tolist(), picks, tokens, experts[picks], first, np.cumsum(first))

    def _dispatches(self, hidden: Tensor, pairs: _Pairs) -> list[Tensor]:
        messages = [self._nothing] * self.size
        for rank in range(self.size):
            part = pairs.of(rank)
            if rank != self.rank and part.start < part.stop:
                row_of = pairs.row_of[part]
                tokens = pairs.tokens[part][pairs.first[part]]
                messages[rank] = wire.encode(hidden, tokens, row_of - row_of[0], pairs.experts[part])
        return messages

    def _compute(
        self, layer: int, hidden: Tensor, pairs: _Pairs, asked: dict[int, wire.Asked]
    ) -> tuple[Tensor, list[Tensor]]:
        """The rows of one's own pairs, and the answer for each rank."""
        answers = [self._nothing] * self.size
        here = pairs.of(self.rank)
        sources, experts, rows = [pairs.tokens[here]], [pairs.experts[here]], [hidden]
        num_rows = len(hidden)
        for one in asked.values():
            sources.append(num_rows + one.row_of)
            experts.append(one.experts)
            rows.append(one.rows)
            num_rows += len(one.rows)
        computed = self._rows(
            layer, torch.cat(rows) if asked else hidden, np.concatenate(sources), np.concatenate(experts)
        )
        parts = computed.split([len(part) for part in experts])
        for rank, part in zip(asked, parts[1:], strict=True):
            answers[rank] = wire.encode_rows(part)
        return parts[0], answers

    def _rows(self, layer: int, rows: Tensor, source: np.ndarray, experts: np.ndarray) -> Tensor:
        slabs = self._experts.layers[layer]
        if not len(experts):
            return self._no_rows
        place = np.full(len(experts), -1) if slabs is None else slabs.row_of[experts]
        if slabs is None or place.min() < 0:
            raise ValueError(
                f"rank {self.rank} was asked for expert {int(experts[place < 0][0])} of layer {layer}, which it does not hold; "
                "the ranks are not in the same epoch"
            )
        device = rows.device
        return expert_rows(rows, torch.from_numpy(source).to(device), torch.from_numpy(place).to(device), slabs)
