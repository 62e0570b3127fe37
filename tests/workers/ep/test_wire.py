"""The messages of an exchange survive the way through bytes, fit the announced capacity, and wrong bytes are refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.families import make_model

from flexpert.workers.ep import capacity_bytes, wire
from flexpert.workers.model import ServableModel, check_servable

WIDTH = 32


@pytest.fixture(scope="module")
def servable(tmp_path_factory: pytest.TempPathFactory) -> ServableModel:
    folder = tmp_path_factory.mktemp("olmoe")  # four experts a token
    make_model("olmoe").config.save_pretrained(folder)
    return check_servable(folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@given(data=st.data(), tokens=st.integers(1, 40), shift=st.sampled_from([0, 1, 4]))
def test_what_is_asked_arrives(dtype: torch.dtype, data: st.DataObject, tokens: int, shift: int) -> None:
    hidden = torch.randn(tokens, WIDTH).to(dtype)
    rows = np.array(sorted(data.draw(st.sets(st.integers(0, tokens - 1), min_size=1))))
    pairs = data.draw(st.lists(st.tuples(st.integers(0, len(rows) - 1), st.integers(0, 1000)), min_size=1))
    row_of, experts = (np.array(column) for column in zip(*pairs, strict=True))
    message = wire.encode(hidden, rows, row_of, experts)
    elsewhere = torch.cat([torch.zeros(shift, dtype=torch.uint8), message])[
        shift:
    ]  # transports may hand out odd addresses
    asked = wire.decode(elsewhere, WIDTH, dtype)
    assert torch.equal(asked.rows, hidden[torch.from_numpy(rows)])
    assert asked.row_of.tolist() == row_of.tolist()
    assert asked.experts.tolist() == experts.tolist()
    assert torch.equal(wire.decode_rows(wire.encode_rows(asked.rows), len(rows), WIDTH, dtype), asked.rows)


def test_bytes_that_are_no_message_are_refused() -> None:
    message = wire.encode(torch.randn(3, WIDTH), np.array([0, 2]), np.array([0, 1, 1]), np.array([5, 6, 7]))
    for broken in (message[:-1], message[:64], torch.cat([message, message[:4]]), message.flip(0)):
        with pytest.raises(ValueError, match="dispatch"):
            wire.decode(broken, WIDTH, torch.float32)
    with pytest.raises(ValueError, match="combine"):
        wire.decode_rows(message, 3, WIDTH, torch.float32)


@given(max_batch_tokens=st.integers(1, 50), num_peers=st.integers(1, 7), seed=st.integers(0, 1000))
def test_no_exchange_sends_more_than_its_capacity(
    servable: ServableModel, max_batch_tokens: int, num_peers: int, seed: int
) -> None:
    """Whoever gets the tokens: all peers' shares of a full batch, and the answers to peers that ask for all they have."""
    capacity = capacity_bytes(servable, "float32", max_batch_tokens=max_batch_tokens, num_peers=num_peers)
    chance, top_k = np.random.default_rng(seed), servable.routing.top_k
    target = chance.integers(num_peers, size=max_batch_tokens * top_k)
    hidden, sent = torch.zeros(max_batch_tokens, servable.routing.width), 0
    for peer in np.unique(target):
        tokens, row_of = np.unique(np.flatnonzero(target == peer) // top_k, return_inverse=True)
        sent += wire.encode(hidden, tokens, row_of, np.zeros_like(row_of)).numel()
    assert sent <= capacity
    assert num_peers * hidden.numel() * top_k * 4 <= capacity
