"""Every family against transformers itself: same logits, same tokens; and the same bits whatever shares the step.

One tiny random checkpoint a family; its requests are run once together, in odd chunks, and every other way of running them must give
those bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from tests.families import FAMILIES, VOCAB, Request, greedy, load_runner, make_model, reference_greedy
from transformers import PreTrainedModel

from flexpert.workers.runner import ModelRunner

NEW_TOKENS = 64
LENGTHS = (3, 37, 150, 70)


@dataclass
class Family:
    """A checkpoint, the runner that serves it, and what both made of the prompts."""

    model: PreTrainedModel
    runner: ModelRunner
    prompts: list[list[int]]
    tokens: list[list[int]]
    logits: list[torch.Tensor]

    def request(self, i: int, slot: int, *, emitted: int = 0) -> Request:
        return Request(f"again-{i}", slot, self.prompts[i] + self.tokens[i][:emitted])


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny shapes gain nothing from a second thread, and tests on a busy machine would wait for it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    model = make_model(request.param)
    model_dir = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(model_dir)
    runner = load_runner(model_dir)
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(0, VOCAB, (length,), generator=generator).tolist() for length in LENGTHS]
    requests = [Request(f"r{i}", i, list(prompt)) for i, prompt in enumerate(prompts)]
    logits = greedy(runner, requests, NEW_TOKENS, chunk=13)
    tokens = [request.tokens[len(prompt) :] for request, prompt in zip(requests, prompts, strict=True)]
    return Family(model, runner, prompts, tokens, [logits[f"r{i}"] for i in range(len(prompts))])


def test_logits_and_tokens_are_those_of_transformers(family: Family) -> None:
    for prompt, tokens, logits in zip(family.prompts, family.tokens, family.logits, strict=True):
        expected_tokens, expected = reference_greedy(family.model, prompt, NEW_TOKENS)
        assert tokens == expected_tokens
        assert expected.std() >= 1
        assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("i", range(len(LENGTHS)))
def test_a_request_alone_has_the_same_bits(family: Family, i: int) -> None:
    logits = greedy(family.runner, [family.request(i, 5)], NEW_TOKENS // 2)
    assert torch.equal(logits[f"again-{i}"], family.logits[i][: NEW_TOKENS // 2])


def test_requests_that_join_and_leave_keep_their_bits(family: Family) -> None:
    first, second, third = (family.request(i, slot) for i, slot in ((1, 7), (2, 4), (0, 6)))
    before = greedy(family.runner, [first], 5)[first.name]
    second_logits = greedy(family.runner, [second, first], 9, chunk=31)
    third_logits = greedy(family.runner, [third, second], 7)
    assert torch.equal(torch.cat([before, second_logits[first.name]])[:14], family.logits[1][:14])
    assert torch.equal(torch.cat([second_logits[second.name], third_logits[second.name]])[:16], family.logits[2][:16])
    assert torch.equal(third_logits[third.name], family.logits[0][:7])


def test_replayed_tokens_give_the_bits_they_were_drawn_from(family: Family) -> None:
    """After a worker's death: prompt and emitted tokens are prefilled at once, every position's logits are compared."""
    request = family.request(3, 5, emitted=NEW_TOKENS - 1)
    rows = family.runner.forward([family.request(0, 6).row(), request.row(all_logits=True)])
    assert torch.equal(rows[1:][len(family.prompts[3]) - 1 :], family.logits[3])


def test_only_wanted_logits_come_back(family: Family) -> None:
    unfinished = family.request(2, 5).row(20)
    assert family.runner.forward([unfinished]).shape == (0, VOCAB)
    rows = [family.request(1, 4).row(9, all_logits=True), unfinished, family.request(0, 6).row()]
    assert family.runner.forward(rows).shape == (10, VOCAB)


VARIANTS = {
    "top_1": ("qwen3_moe", dict(num_experts_per_tok=1)),
    "many_idle_experts": ("olmoe", dict(num_experts=40, num_experts_per_tok=1)),
    "no_query_latent": ("deepseek_v2", dict(q_lora_rank=None, topk_method="greedy")),
    "interleaved_rope": ("deepseek_v3", dict(rope_interleave=True)),
    "tied_embeddings": ("qwen3_moe", dict(tie_word_embeddings=True)),
    "dense_layers": ("qwen2_moe", dict(mlp_only_layers=[0], num_hidden_layers=3)),
    "one_kv_head": ("mixtral", dict(num_key_value_heads=1, sliding_window=None)),
    "yarn": ("gpt_oss", dict(num_hidden_layers=3, sliding_window=7)),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_of_the_families(variant: str, tmp_path: Path) -> None:
    name, changes = VARIANTS[variant]
    model = make_model(name, **changes)
    model.save_pretrained(tmp_path)
    runner = load_runner(tmp_path)
    requests = [Request("a", 1, list(range(5))), Request("b", 0, [n * 7 % VOCAB for n in range(140)])]
    prompts = [list(request.tokens) for request in requests]
    logits = greedy(runner, requests, 12, chunk=50)
    for request, prompt in zip(requests, prompts, strict=True):
        expected_tokens, expected = reference_greedy(model, prompt, 12)
        assert request.tokens[len(prompt) :] == expected_tokens
        assert (logits[request.name] - expected).abs().max() <= 1e-5 * expected.abs().max()
        alone = greedy(runner, [Request("alone", 3, prompt)], 12)["alone"]
        assert torch.equal(alone, logits[request.name])


def test_bits_hold_with_two_threads(tmp_path: Path) -> None:
    """Wide enough that element-wise operations and products are cut between threads."""
    model = make_model(
        "qwen2_moe",
        hidden_size=256,
        intermediate_size=512,
        moe_intermediate_size=256,
        shared_expert_intermediate_size=512,
    )
    model.save_pretrained(tmp_path)
    torch.set_num_threads(2)
    runner = load_runner(tmp_path)
    prompts = [[n * k % VOCAB for n in range(length)] for k, length in ((3, 300), (5, 17), (7, 130))]
    together = [Request(f"r{i}", i, list(prompt)) for i, prompt in enumerate(prompts)]
    logits = greedy(runner, together, 4)
    for i, prompt in enumerate(prompts):
        assert torch.equal(greedy(runner, [Request("alone", 4, list(prompt))], 4, chunk=29)["alone"], logits[f"r{i}"])
    torch.set_num_threads(1)
