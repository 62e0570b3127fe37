"""Decode attention in Triton against its PyTorch reference: on a GPU where there is one, else interpreted on the CPU, small."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from flexpert.kernels import decode_attention as decode
from flexpert.kernels.attention_gpu import masked
from flexpert.kernels.decode_attention import Scratch, Tile, decode_attention, decode_attention_reference

pytestmark = pytest.mark.usefixtures("three_programs")
ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
TOLERANCE = 1e-2 if ON_GPU else 1e-5
PIECE = 64
TILE = Tile(heads=16, keys=32, warps=4, stages=2, programs=1)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests of a few hundred keys have several pieces."""
    monkeypatch.setattr(decode, "PIECE", PIECE)


class Arena:
    """Requests in slots in any order; keys and values of a token side by side with another layer's, NaN wherever no request has a token."""

    def __init__(
        self, lengths: list[int], *, heads: int, kv_heads: int, key_dim: int, value_dim: int | None = None
    ) -> None:
        generator = torch.Generator().manual_seed(len(lengths))
        slot = max([*lengths, 1]) + 3
        columns = key_dim + (value_dim or 0)
        memory = torch.full((len(lengths) * slot, 2, kv_heads, columns), float("nan"))
        order = torch.randperm(len(lengths), generator=generator)
        self.first_rows = (order * slot).to(DEVICE)
        self.lengths = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
        for first, length in zip((order * slot).tolist(), lengths, strict=True):
            memory[first : first + length, 1] = torch.randn(length, kv_heads, columns, generator=generator)
        memory = memory.to(DEVICE, DTYPE)
        self.keys = memory[:, 1, :, :key_dim]
        self.values = memory[:, 1, :, key_dim:] if value_dim else memory[:, 1, :, : 1 << (key_dim.bit_length() - 1)]
        self.query = torch.randn(len(lengths), heads, key_dim, generator=generator).to(DEVICE, DTYPE)
        self.heads = heads

    def given(self) -> dict[str, Any]:
        return {"first_rows": self.first_rows, "lengths": self.lengths, "scaling": self.keys.shape[2] ** -0.5}

    def scratch(self) -> Scratch:
        """As small as may be, full of NaN."""
        tokens = int(self.lengths.sum())
        scratch = Scratch(
            requests=len(self.lengths), tokens=tokens, heads=self.heads, value_dim=self.values.shape[2], device=DEVICE
        )
        scratch.partial.fill_(float("nan"))
        scratch.logsumexp.fill_(float("nan"))
        return scratch

    def attend(self, **options: Any) -> Tensor:
        return decode_attention(
            self.query, self.keys, self.values, **self.given(), scratch=self.scratch(), **({"tile": TILE} | options)
        )

    def reference(self, **options: Any) -> Tensor:
        return decode_attention_reference(self.query, self.keys, self.values, **self.given(), **options)


LENGTHS = [1, 64, 65, 200, 0, 31, 130]
SHAPES = {
    "gqa": {"heads": 8, "kv_heads": 2, "key_dim": 64, "value_dim": 64},
    "mha, odd sizes": {"heads": 3, "kv_heads": 3, "key_dim": 80, "value_dim": 48},
    "many heads": {"heads": 20, "kv_heads": 1, "key_dim": 32, "value_dim": 32},
    "latent": {"heads": 5, "kv_heads": 1, "key_dim": 64 + 16},
}
OPTIONS: dict[str, dict[str, Any]] = {"": {}, "window": {"window": 70}, "softcap": {"softcap": 3.0}}


def assert_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.float(), expected, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_the_reference(shape: str, option: str) -> None:
    arena = Arena(LENGTHS, **SHAPES[shape])
    assert_close(arena.attend(**OPTIONS[option]), arena.reference(**OPTIONS[option]))


def test_sinks_take_their_share() -> None:
    arena = Arena(LENGTHS, **SHAPES["gqa"])
    sinks = torch.randn(8, generator=torch.Generator().manual_seed(1)).to(DEVICE) * 3
    assert_close(arena.attend(sinks=sinks, window=40), arena.reference(sinks=sinks, window=40))


def test_the_reference_is_attention() -> None:
    """Against the masked product that serves, whose oracle are transformers' models."""
    arena = Arena([1, 90, 33], **SHAPES["gqa"])
    sinks = torch.randn(8, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    for number, length in enumerate(arena.lengths.tolist()):
        first = int(arena.first_rows[number])
        keys, values = (kv[None, first : first + length].transpose(1, 2) for kv in (arena.keys, arena.values))
        starts = torch.tensor([length - 1], device=DEVICE)
        expected = masked(
            arena.query[number, None, :, None], keys, values, starts=starts, scaling=arena.given()["scaling"], window=20, sinks=sinks,
            softcap=2.0,
        )[0, :, 0]  # fmt: skip
        assert_close(arena.reference(sinks=sinks, window=20, softcap=2.0)[number], expected.float())


@pytest.mark.parametrize("programs", [1, 2])
def test_bits_depend_on_the_request_alone(programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    tile = Tile(16, 32, 4, 2, programs)
    arena = Arena(LENGTHS, **SHAPES["gqa"])
    whole = arena.attend(tile=tile)
    for number in (0, 3, 6):
        alone = decode_attention(
            arena.query[number, None], arena.keys, arena.values, first_rows=arena.first_rows[number, None],
            lengths=arena.lengths[number, None], scaling=arena.given()["scaling"], scratch=arena.scratch(), tile=TILE,
        )  # fmt: skip
        assert torch.equal(alone[0], whole[number])


def test_no_requests_give_no_rows() -> None:
    assert Arena([], **SHAPES["gqa"]).attend().shape == (0, 8, 64)


@pytest.mark.parametrize("key_dim", [64, 96, 128, 192, 256, 576])
@pytest.mark.parametrize("group", [1, 5, 8, 128])
def test_every_geometry_has_a_tile(group: int, key_dim: int) -> None:
    tile = decode.choose_tile(group, key_dim)
    assert 16 <= tile.heads <= 64
    assert tile.heads & (tile.heads - 1) == 0
    assert tile.heads >= min(group, 64)
    assert 512 % tile.keys == 0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"lengths": torch.zeros(7, dtype=torch.int64)},
            r"lengths is torch.int64 \[7\] .*expected contiguous torch.int32 \[7\]",
        ),
        ({"first_rows": torch.zeros(3, dtype=torch.int64)}, r"first_rows is torch.int64 \[3\]"),
        ({"sinks": torch.zeros(2)}, r"sinks is .*\[2\].*expected contiguous \[8\]"),
        (
            {"scratch": Scratch(requests=1, tokens=0, heads=8, value_dim=64, device="cpu")},
            "scratch has 8 rows .* at least 56 of 64",
        ),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], said: str) -> None:
    arena = Arena(LENGTHS, **SHAPES["gqa"])
    given = arena.given() | {"scratch": arena.scratch()} | change
    with pytest.raises(ValueError, match=said):
        decode_attention(arena.query, arena.keys, arena.values, **given)
    with pytest.raises(ValueError, match=r"keys is .*a divisor of 7"):
        decode_attention(arena.query[:, :7], arena.keys, arena.values, **arena.given(), scratch=arena.scratch())
