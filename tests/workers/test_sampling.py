"""Sampling against its definitions: Random123's vectors, transformers' logits processors, OpenAI's formula; and each row alone."""

from __future__ import annotations

import math
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from flexpert.workers import sampling
from flexpert.workers.messages import SamplingParams
from flexpert.workers.random_bits import philox4x32, uniforms
from flexpert.workers.sampling import Sampler, SamplingState, prompt_logprobs

# Random123, kat_vectors, "philox4x32 10": counter, key, result.
KNOWN_ANSWERS = [
    ([0, 0, 0, 0], [0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


def state(prompt: list[int] | None = None, emitted: list[int] | None = None, **params: object) -> SamplingState:
    chosen = {"max_tokens": 1000, "seed": 1, "temperature": 1.0, **params}
    return SamplingState(SamplingParams(**chosen), 0, [1, 2] if prompt is None else prompt, emitted or [])


def logits(rows: int, vocab: int, *, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale


def drawn_shares(monkeypatch: pytest.MonkeyPatch, row: torch.Tensor, draws: int, **params: object) -> np.ndarray:
    """The share of each token when the uniform numbers are spread evenly over [0, 1): exact to 1 / draws."""
    monkeypatch.setattr(sampling, "uniforms", lambda seeds, *_: (np.arange(len(seeds)) + 0.5) / len(seeds))
    sampled = Sampler().sample(row.expand(draws, -1).contiguous(), [state(**params) for _ in range(draws)])
    return np.bincount([one.token_id for one in sampled], minlength=row.shape[0]) / draws


# Random numbers


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_philox_gives_the_known_answers(counter: list[int], key: list[int], words: list[int]) -> None:
    columns = philox4x32(np.array([counter] * 3, dtype=np.uint64).T, np.array([key] * 3, dtype=np.uint64).T)
    assert columns.T.tolist() == [words] * 3


def test_uniform_number_is_that_of_its_counter_and_key() -> None:
    seed, choice, index = 0x0123456789ABCDEF, 5, 7
    words = philox4x32(
        np.array([[index], [choice], [0], [0]], dtype=np.uint64),
        np.array([[0x89ABCDEF], [0x01234567]], dtype=np.uint64),
    )[:, 0]
    expected = ((int(words[0]) >> 5) * 2**26 + (int(words[1]) >> 6)) / 2**53
    assert uniforms([1, seed], [0, choice], [0, index])[1] == expected


def test_uniform_numbers_are_spread_and_differ_by_seed_choice_and_index() -> None:
    many = uniforms([2**64 - 1] * 20_000, [3] * 20_000, list(range(20_000)))
    assert 0 <= many.min() < 0.001
    assert 0.999 < many.max() < 1
    assert np.abs(np.histogram(many, bins=20)[0] - 1000).max() < 150
    grid = uniforms([7, 7, 7, 8, 7 << 32], [0, 0, 1, 0, 0], [0, 1, 0, 0, 0])
    assert len(set(grid.tolist())) == 5


# Against transformers

FILTERS = [
    {"temperature": 0.7},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 100_000},
    {"top_p": 0.9},
    {"top_p": 0.05},
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"top_k": 20, "top_p": 0.8},
    {"top_k": 900, "top_p": 0.6},
    {"temperature": 2.5, "top_p": 0.95, "min_p": 0.02},
    {"temperature": 0.5, "top_k": 50, "top_p": 0.99, "min_p": 0.01},
]


@pytest.mark.parametrize("params", FILTERS, ids=str)
@pytest.mark.parametrize(("vocab", "scale"), [(50, 3.0), (1003, 3.0), (4096, 1.0), (4096, 6.0)])
def test_tokens_are_drawn_from_the_distribution_that_transformers_draws_from(
    monkeypatch: pytest.MonkeyPatch, params: dict[str, float], vocab: int, scale: float
) -> None:
    row = logits(1, vocab, seed=vocab, scale=scale)
    processors = LogitsProcessorList([TemperatureLogitsWarper(float(params.get("temperature", 1.0)))])
    if "top_k" in params:
        processors.append(TopKLogitsWarper(int(params["top_k"])))
    if "top_p" in params:
        processors.append(TopPLogitsWarper(params["top_p"]))
    if "min_p" in params:
        processors.append(MinPLogitsWarper(params["min_p"]))
    expected = processors(None, row)[0].softmax(dim=-1).numpy()
    draws = 512
    shares = drawn_shares(monkeypatch, row[0], draws, **params)
    assert np.abs(shares - expected).max() <= 1.01 / draws
    assert not shares[expected == 0].any()


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=40)
def test_repetition_penalty_is_transformers(seed: int) -> None:
    rng = Random(seed)
    rows, vocab = rng.randint(1, 4), rng.randint(2, 40)
    values = logits(rows, vocab, seed=seed)
    states, expected = [], []
    for row in range(rows):
        tokens = [rng.randrange(vocab) for _ in range(rng.randint(1, 20))]
        cut = rng.randint(0, len(tokens))
        penalty = rng.choice([1.0, 1.3, 0.7])
        one = state(tokens[:cut], [], repetition_penalty=penalty)
        for token in tokens[cut:]:
            one.append(token)
        states.append(one)
        expected.append(
            RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([tokens]), values[row : row + 1].clone())
        )
    before = values.clone()
    assert torch.equal(sampling._edit(values, states), torch.cat(expected))
    assert torch.equal(values, before), "the model's logits were changed"


def test_presence_and_frequency_penalties_count_output_tokens_only() -> None:
    values = logits(1, 10)
    one = state([1, 1, 2], [3, 3, 4], presence_penalty=0.5, frequency_penalty=0.25)
    one.append(3)
    expected = values.clone()
    expected[0, 3] -= 0.5 + 3 * 0.25
    expected[0, 4] -= 0.5 + 0.25
    assert torch.equal(sampling._edit(values, [one]), expected)


def test_counts_kept_step_by_step_are_those_of_a_replay() -> None:
    rng = Random(0)
    output = [rng.randrange(300) for _ in range(500)]
    params = {"repetition_penalty": 1.2, "presence_penalty": 0.1, "frequency_penalty": 0.3}
    kept = state([5, 6], [], **params)
    for token in output:
        kept.append(token)
    replayed = state([5, 6], output, **params)
    values = logits(1, 300)
    assert kept.num_output_tokens == replayed.num_output_tokens == 500
    assert torch.equal(sampling._edit(values, [kept]), sampling._edit(values, [replayed]))


def test_bias_can_force_and_forbid_a_token() -> None:
    values = logits(2, 50)
    best = int(values[1].argmax())
    states = [state(temperature=0.0, logit_bias={7: 100.0}), state(temperature=0.0, logit_bias={best: -100.0})]
    forced, forbidden = Sampler().sample(values, states)
    assert forced.token_id == 7
    assert forbidden.token_id == int(values[1].sort(descending=True).indices[1])


def test_stop_tokens_are_impossible_until_min_tokens_are_there() -> None:
    values = torch.zeros(1, 20)
    values[0, 4] = 50.0
    one = state(min_tokens=2, stop_token_ids=(4, 5), temperature=0.0)
    tokens = []
    for _ in range(3):
        tokens.append(Sampler().sample(values, [one])[0].token_id)
        one.append(tokens[-1])
    assert tokens == [0, 0, 4]


# Ties and extremes


def test_equal_logits_are_settled_by_the_lowest_id(monkeypatch: pytest.MonkeyPatch) -> None:
    flat = torch.zeros(4096)
    assert Sampler().sample(flat[None], [state(temperature=0.0)])[0].token_id == 0
    assert np.flatnonzero(drawn_shares(monkeypatch, flat, 64, top_k=3)).tolist() == [0, 1, 2]
    assert np.flatnonzero(drawn_shares(monkeypatch, flat, 1024, top_p=0.25)).tolist() == list(range(1024))
    edge = torch.full((3000,), -5.0)
    edge[[2000, 100, 700, 1500]] = 2.0
    edge[50] = 3.0
    assert np.flatnonzero(drawn_shares(monkeypatch, edge, 64, top_k=3)).tolist() == [50, 100, 700]


@pytest.mark.parametrize("vocab", [5, 600, 5000])
def test_top_k_of_one_is_greedy(vocab: int) -> None:
    values = logits(32, vocab, scale=1e-4)
    greedy = Sampler().sample(values, [state(temperature=0.0)] * 32)
    assert Sampler().sample(values, [state(top_k=1, seed=row) for row in range(32)]) == greedy


@pytest.mark.parametrize("temperature", [1e-30, 1e-3, 1e3, 1e30])
def test_extreme_temperatures_still_draw_a_possible_token(temperature: float) -> None:
    values = logits(64, 777)
    values[:, 100:] = -torch.inf
    for params in ({}, {"top_p": 0.9}, {"top_k": 500}):
        states = [state(temperature=temperature, seed=row, **params) for row in range(64)]
        tokens = [one.token_id for one in Sampler().sample(values, states)]
        assert max(tokens) < 100
        if temperature < 1:
            assert tokens == values.argmax(dim=-1).tolist()


@pytest.mark.parametrize("chance", [0.0, 1 - 2**-53])
@pytest.mark.parametrize("params", [{}, {"top_p": 0.9999}, {"top_k": 500}], ids=str)
def test_ends_of_the_unit_interval_fall_on_possible_tokens(
    monkeypatch: pytest.MonkeyPatch, chance: float, params: dict[str, float]
) -> None:
    monkeypatch.setattr(sampling, "uniforms", lambda seeds, *_: np.full(len(seeds), chance))
    values = logits(20, 777)
    values[:, :70] = values[:, 700:] = -torch.inf
    for one in Sampler().sample(values, [state(**params) for _ in range(20)]):
        assert 70 <= one.token_id < 700


def test_logits_that_are_no_numbers_are_an_error_and_not_a_token() -> None:
    for bad in (math.nan, math.inf):
        values = logits(2, 50)
        values[1, 3] = bad
        with pytest.raises(FloatingPointError, match="finite"):
            Sampler().sample(values, [state(), state()])


def test_rows_and_requests_must_match() -> None:
    with pytest.raises(ValueError, match="2 rows of logits for 1 requests"):
        Sampler().sample(logits(2, 5), [state()])


# Each row alone


def some_state(rng: Random, vocab: int) -> SamplingState:
    def perhaps(value: object, otherwise: object) -> object:
        return value if rng.random() < 0.3 else otherwise

    return state(
        [rng.randrange(vocab) for _ in range(rng.randint(1, 8))],
        [rng.randrange(vocab) for _ in range(rng.randint(0, 8))],
        seed=rng.getrandbits(64),
        temperature=rng.choice([0.0, 0.3, 1.0, 2.0]),
        top_k=perhaps(rng.randint(1, 2 * vocab), 0),
        top_p=perhaps(rng.uniform(0.01, 1.0), 1.0),
        min_p=perhaps(rng.random(), 0.0),
        repetition_penalty=perhaps(1.3, 1.0),
        presence_penalty=perhaps(0.7, 0.0),
        frequency_penalty=perhaps(-0.4, 0.0),
        logit_bias=perhaps({rng.randrange(vocab): 3.0}, {}),
        min_tokens=perhaps(6, 0),
        stop_token_ids=(0, vocab // 2),
        logprobs=perhaps(rng.randint(0, 6), None),
    )


@given(st.integers(0, 2**32 - 1), st.sampled_from([3, 64, 97, 513, 1000, 2049, 4096]))
@settings(max_examples=40)
def test_every_row_is_the_same_alone_and_in_any_batch(seed: int, vocab: int) -> None:
    rng = Random(seed)
    rows = rng.randint(2, 24)
    values = logits(rows, vocab, seed=seed, scale=rng.choice([0.0, 0.5, 4.0]))
    if rng.random() < 0.3:
        values = values.bfloat16().float()  # many ties
    states = [some_state(rng, vocab) for _ in range(rows)]
    sampler = Sampler()
    together = sampler.sample(values, states)
    for row in range(rows):
        assert sampler.sample(values[row : row + 1].clone(), [states[row]]) == [together[row]]
    order = list(range(rows))
    rng.shuffle(order)
    assert sampler.sample(values[order], [states[row] for row in order]) == [together[row] for row in order]


def test_replayed_request_draws_the_token_it_would_have_drawn() -> None:
    values = logits(40, 500)
    going, drawn = state(seed=9), []
    for row in range(40):
        drawn.append(Sampler().sample(values[row : row + 1], [going])[0].token_id)
        going.append(drawn[-1])
    replayed = state(emitted=drawn[:25], seed=9)
    assert Sampler().sample(values[25:26], [replayed])[0].token_id == drawn[25]
    assert len(set(drawn)) > 10


def test_choices_of_one_request_draw_apart() -> None:
    values = logits(1, 500, scale=0.1).expand(8, -1).contiguous()
    params = SamplingParams(max_tokens=5, seed=3)
    tokens = [one.token_id for one in Sampler().sample(values, [SamplingState(params, n, [1], []) for n in range(8)])]
    assert len(set(tokens)) > 4


# Log-probabilities


def test_logprobs_are_the_models_before_penalties_bias_and_temperature() -> None:
    values = logits(3, 200)
    states = [
        state(temperature=0.0, logprobs=3),
        state(temperature=0.2, logprobs=0, logit_bias={5: 100.0}),
        state(temperature=1.0, top_k=2),
    ]
    plain, biased, without = Sampler().sample(values, states)
    expected = values.log_softmax(dim=-1)
    assert plain.logprob == expected[0, plain.token_id].item()
    best = expected[0].topk(3)
    assert plain.top == tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    assert (biased.token_id, biased.logprob, biased.top) == (5, expected[1, 5].item(), ())
    assert (without.logprob, without.top) == (None, ())


def test_equal_alternatives_are_listed_by_the_lowest_id() -> None:
    values = torch.zeros(1, 300)
    values[0, [250, 9]] = 1.0
    (one,) = Sampler().sample(values, [state(temperature=0.0, logprobs=5)])
    assert [token for token, _ in one.top] == [9, 250, 0, 1, 2]


def test_more_alternatives_than_tokens_are_all_of_them() -> None:
    (one,) = Sampler().sample(logits(1, 4), [state(temperature=0.0, logprobs=20)])
    assert sorted(token for token, _ in one.top) == [0, 1, 2, 3]


def test_prompt_logprobs_score_the_tokens_that_follow() -> None:
    values = logits(150, 60)
    tokens = [row % 60 for row in range(150)]
    scores, alternatives = prompt_logprobs(values, tokens, 2)
    expected = values.log_softmax(dim=-1)
    assert scores == [expected[row, token].item() for row, token in enumerate(tokens)]
    assert [[token for token, _ in top] for top in alternatives] == expected.topk(2).indices.tolist()
    assert prompt_logprobs(values[:0], [], 2) == ([], [])


@pytest.mark.gpu
def test_gpu_draws_the_same_row_alone_and_in_any_batch() -> None:
    for seed, vocab in enumerate((97, 1000, 4096, 50_304)):
        rng = Random(seed)
        values = logits(48, vocab, seed=seed).cuda()
        states = [some_state(rng, vocab) for _ in range(48)]
        together = Sampler().sample(values, states)
        for row in range(48):
            assert Sampler().sample(values[row : row + 1].clone(), [states[row]]) == [together[row]], (vocab, row)


@pytest.mark.gpu
def test_gpu_draws_what_the_cpu_draws() -> None:
    rng = Random(5)
    values = logits(64, 4096)
    states = [some_state(rng, 4096) for _ in range(64)]
    here = [one.token_id for one in Sampler().sample(values, states)]
    there = [one.token_id for one in Sampler().sample(values.cuda(), states)]
    # exp differs in the last bit: a draw at the very edge between two tokens may fall to the other side.
    assert sum(a != b for a, b in zip(here, there, strict=True)) <= 1
