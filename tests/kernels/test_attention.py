"""The CPU attention against a plain softmax, and its promise that a row's bits do not depend on the rows beside it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from flexpert.kernels import AttentionPlan, PackedRequests, attend

HEADS, KV_HEADS, DIM, VALUE_DIM, CAPACITY, SLOTS = 6, 2, 12, 20, 700, 4


class Arena:
    """Keys and values of a few slots; what was never written is NaN."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.truth = torch.randn(SLOTS, CAPACITY, KV_HEADS, DIM + VALUE_DIM, generator=generator)
        self.query = torch.randn(SLOTS, CAPACITY, HEADS, DIM, generator=generator)
        self.memory = torch.full_like(self.truth, float("nan"))

    def run(self, requests: list[tuple[int, int, int]], **options: object) -> list[torch.Tensor]:
        """requests: (slot, start, count); their tokens' keys and values are written first. [count, heads, value_dim] for each."""
        window = options.pop("window", None)
        slots, starts, counts = (np.array(column) for column in zip(*requests, strict=True))
        for slot, start, count in requests:
            self.memory[slot, start : start + count] = self.truth[slot, start : start + count]
        total = -(-int(counts.sum()) // 16) * 16
        query = torch.zeros(total, HEADS, DIM)
        packed = [self.query[slot, start : start + count] for slot, start, count in requests]
        query[: int(counts.sum())] = torch.cat(packed)
        rows = PackedRequests(
            first_row=counts.cumsum() - counts,
            num_new=counts,
            start=starts,
            kv_row=slots * CAPACITY,
            kv_row_step=1,
            padded_tokens=total,
        )
        plan = AttentionPlan(rows, heads=HEADS, kv_heads=KV_HEADS, window=window)
        flat = self.memory.flatten(0, 1)

        def read(index: torch.Tensor):
            both = flat.index_select(0, index)
            return both[..., :DIM].unbind(1), both[..., DIM:].unbind(1)

        result = attend(query.transpose(0, 1), read, plan, scaling=DIM**-0.5, **options)
        assert torch.isfinite(result).all()
        return list(result[: int(counts.sum())].split(counts.tolist()))

    def reference(
        self, slot: int, start: int, count: int, *, window: int | None = None, sinks=None, softcap=None
    ) -> torch.Tensor:
        end = start + count
        keys, values = self.truth[slot, :end].double().split([DIM, VALUE_DIM], dim=-1)
        keys, values = (part.repeat_interleave(HEADS // KV_HEADS, dim=1) for part in (keys, values))
        scores = torch.einsum("qhd,khd->hqk", self.query[slot, start:end].double(), keys) * DIM**-0.5
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        query, key = torch.arange(start, end)[:, None], torch.arange(end)
        visible = (key <= query) & (key > query - (window or end + 1))
        scores = scores.masked_fill(~visible, float("-inf"))
        if sinks is not None:
            scores = torch.cat([scores, sinks.double()[:, None, None].expand(-1, count, 1)], dim=-1)
        return torch.einsum("hqk,khd->qhd", scores.softmax(-1)[..., :end], values).float()


SINKS = torch.linspace(-2, 3, HEADS)
OPTIONS = [{}, {"window": 20}, {"window": 130}, {"sinks": SINKS}, {"sinks": SINKS, "window": 200}, {"softcap": 3.0}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("length", [1, 2, 16, 127, 128, 129, 640])
def test_a_prompt_attends_as_softmax_does(length: int, options: dict) -> None:
    torch.testing.assert_close(Arena().run([(1, 0, length)], **options)[0], Arena().reference(1, 0, length, **options))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_rows_keep_their_bits_alone_chunked_and_mixed(options: dict) -> None:
    arena = Arena()
    lengths = {0: 640, 1: 150, 2: 3, 3: 257}
    whole = {slot: arena.run([(slot, 0, length)], **options)[0] for slot, length in lengths.items()}
    together = arena.run([(slot, 0, length) for slot, length in lengths.items()], **options)
    for slot, rows in zip(lengths, together, strict=True):
        assert torch.equal(rows, whole[slot])
    for slot, length in lengths.items():
        chunks = [arena.run([(slot, start, min(37, length - start))], **options)[0] for start in range(0, length, 37)]
        assert torch.equal(torch.cat(chunks), whole[slot])
    decoded = arena.run([(0, 639, 1), (3, 128, 1), (1, 100, 50), (2, 2, 1)], **options)
    for rows, expected in zip(decoded, (whole[0][639:], whole[3][128:129], whole[1][100:], whole[2][2:]), strict=True):
        assert torch.equal(rows, expected)


def test_bits_do_not_depend_on_where_chunks_of_scratch_memory_end(monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [(0, 0, 640), (1, 0, 150), (2, 0, 3), (3, 0, 257)]
    whole = Arena().run(requests)
    monkeypatch.setattr("flexpert.kernels.attention._SCORES_PER_CHUNK", 1)
    for split, rows in zip(Arena().run(requests), whole, strict=True):
        assert torch.equal(split, rows)


def test_a_plan_whose_masks_are_wrong_is_noticed() -> None:
    """The reference must tell windows apart: guards the tests above."""
    assert not torch.allclose(Arena().reference(0, 0, 200, window=20), Arena().reference(0, 0, 200, window=21))
