"""The experts kernels against one expert after the other, in every layout, and their independence of the batch."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn.functional import linear, silu

from flexpert.kernels import ExpertSlabs, SlabPart, experts_forward
from flexpert.kernels.experts import grouped_rows

HIDDEN, INNER, EXPERTS = 24, 20, 6


def gate(inner: torch.Tensor) -> torch.Tensor:
    first, second = inner.chunk(2, dim=-1)
    return silu(first) * second


class Layer:
    """Random experts, laid out in an arena with gaps and in any order of slots."""

    def __init__(self, *, transposed: bool = False, bias: bool = False, slots: list[int] | None = None) -> None:
        generator = torch.Generator().manual_seed(0)
        self.up = torch.randn(EXPERTS, 2 * INNER, HIDDEN, generator=generator) * HIDDEN**-0.5
        self.down = torch.randn(EXPERTS, HIDDEN, INNER, generator=generator) * INNER**-0.5
        self.up_bias = torch.randn(EXPERTS, 2 * INNER, generator=generator) if bias else None
        self.down_bias = torch.randn(EXPERTS, HIDDEN, generator=generator) if bias else None
        self.slots = slots or list(range(2, 2 + EXPERTS))
        stored = [tensor.transpose(1, 2) if transposed else tensor for tensor in (self.up, self.down)]
        down_begins = stored[0][0].numel() + 16
        stride = down_begins + stored[1][0].numel() + 32
        self.arena = torch.full((stride * (max(self.slots) + 1),), float("nan"))
        for expert, slot in enumerate(self.slots):
            for tensor, begin in zip(stored, (0, down_begins), strict=True):
                place = slot * stride + begin
                self.arena[place : place + tensor[expert].numel()] = tensor[expert].reshape(-1)
        self.slabs = ExpertSlabs(
            arena=self.arena,
            slot_stride=stride,
            slots=self.slots,
            parts={
                "gate_up_proj": SlabPart(0, tuple(stored[0].shape[1:])),
                "down_proj": SlabPart(down_begins, tuple(stored[1].shape[1:])),
            },
            transposed=transposed,
            activate=gate,
            up_bias=self.up_bias,
            down_bias=self.down_bias,
        )

    def reference(self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        result = torch.zeros_like(hidden)
        for token, k in itertools.product(range(len(hidden)), range(index.shape[1])):
            e = int(index[token, k])
            inner = linear(hidden[token], self.up[e], None if self.up_bias is None else self.up_bias[e])
            result[token] += weights[token, k] * linear(
                gate(inner), self.down[e], None if self.down_bias is None else self.down_bias[e]
            )
        return result


def routing(tokens: int, top_k: int, *, experts: int = EXPERTS) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    index = torch.rand(tokens, experts, generator=generator).topk(top_k).indices
    return torch.randn(tokens, HIDDEN, generator=generator), index, torch.rand(tokens, top_k, generator=generator)


LAYOUTS = [{}, {"transposed": True, "bias": True}, {"bias": True, "slots": [5, 3, 4, 8, 7, 6]}]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("tokens", [1, 16, 48, 200])
@pytest.mark.parametrize("top_k", [1, 3])
def test_experts_compute_what_each_expert_computes(layout: dict, tokens: int, top_k: int) -> None:
    layer = Layer(**layout)
    step = routing(tokens, top_k)
    torch.testing.assert_close(experts_forward(*step, layer.slabs), layer.reference(*step))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_the_gpu_kernel_computes_the_same(layout: dict) -> None:
    layer = Layer(**layout)
    hidden, index, weights = routing(33, 3)
    position = index if layer.slabs.position is None else layer.slabs.position[index]
    for source in (None, torch.arange(33).repeat_interleave(3)):
        rows = grouped_rows(hidden, source, position.reshape(-1), layer.slabs).view(33, 3, -1)
        torch.testing.assert_close((rows * weights.unsqueeze(-1)).sum(1), layer.reference(hidden, index, weights))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_token_keeps_its_bits_whatever_stands_beside_it(layout: dict) -> None:
    """Even loads (one batched product), uneven loads (expert after expert), alone and permuted."""
    layer = Layer(**layout)
    hidden, index, weights = routing(200, 3)
    whole = experts_forward(hidden, index, weights, layer.slabs)
    for chosen in (torch.arange(16), torch.arange(7, 8), torch.randperm(200), torch.arange(0, 200, 3)):
        assert torch.equal(experts_forward(hidden[chosen], index[chosen], weights[chosen], layer.slabs), whole[chosen])
    crowd = torch.zeros(64, 3, dtype=torch.long) + torch.tensor([0, 1, 2])
    skewed = experts_forward(
        torch.cat([hidden[:9], hidden[:64]]),
        torch.cat([index[:9], crowd]),
        torch.cat([weights[:9], weights[:64]]),
        layer.slabs,
    )
    assert torch.equal(skewed[:9], whole[:9])


def test_slots_change_no_bit() -> None:
    step = routing(40, 2)
    assert torch.equal(
        experts_forward(*step, Layer().slabs), experts_forward(*step, Layer(slots=[7, 2, 6, 3, 5, 4]).slabs)
    )


@pytest.mark.parametrize("tokens", [16, 200])
def test_an_expert_that_no_token_picks_does_not_matter(tokens: int) -> None:
    layer = Layer()
    step = routing(tokens, 2, experts=EXPERTS - 1)
    before = experts_forward(*step, layer.slabs)
    layer.slabs.up[EXPERTS - 1] = float("nan")
    layer.slabs.down[EXPERTS - 1] = float("nan")
    assert torch.equal(experts_forward(*step, layer.slabs), before)


def test_slots_that_are_not_neighbours_are_refused() -> None:
    with pytest.raises(ValueError, match="neighbours"):
        Layer(slots=[0, 1, 2, 3, 4, 9])
