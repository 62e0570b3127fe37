"""On a GPU in bf16: logits near transformers', greedy tokens mostly its own, and a replayed graph equal to the step it was captured from.

bf16 rounds to 3 digits and the summation order differs, so closeness is measured against what bf16 costs transformers itself.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.families import FAMILIES, VOCAB, Request, greedy, load_runner, make_model
from transformers import AutoModelForCausalLM

from flexpert.workers.model.gpu_compute import BATCH_SIZES, GpuCompute
from flexpert.workers.model.packing import pack
from flexpert.workers.runner import ModelRunner
from flexpert.workers.step import Row

pytestmark = pytest.mark.gpu

# grouped products and flash attention want rows of 16 bytes and heads of a multiple of 8
ALIGNED = {
    "deepseek_v2": dict(v_head_dim=16),
    "deepseek_v3": dict(v_head_dim=16),
}
PROMPTS = [[n * k % VOCAB for n in range(length)] for k, length in ((3, 5), (5, 37), (7, 150), (11, 70))]


def make_runner(family: str, model_dir: Path) -> ModelRunner:
    model = make_model(family, **ALIGNED.get(family, {}))
    model.to(torch.bfloat16).save_pretrained(model_dir)
    return load_runner(model_dir, dtype="bfloat16", device="cuda", slots=80)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_near_those_of_transformers(family: str, tmp_path: Path) -> None:
    runner = make_runner(family, tmp_path)
    exact = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager").cuda()
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, attn_implementation="eager").cuda()
    requests = [Request(f"r{i}", i, list(prompt)) for i, prompt in enumerate(PROMPTS)]
    rows: dict[str, list[torch.Tensor]] = {request.name: [] for request in requests}
    while live := [request for request in requests if request.computed < len(request.tokens)]:
        step = [request.row(23, all_logits=True) for request in live]
        parts = runner.forward(step).split([len(row.token_ids) for row in step])
        for request, part in zip(live, parts, strict=True):
            rows[request.name].append(part)
    for request in requests:
        tokens = torch.tensor([request.tokens], device="cuda")
        with torch.inference_mode():
            expected, rounded = exact(tokens).logits[0], half(tokens).logits[0].float()
        actual = torch.cat(rows[request.name])
        # A near tie of experts may flip in bf16, in either implementation: compare the bulk, not the worst.
        ours, theirs = ((one - expected).abs().mean(-1) for one in (actual, rounded))
        assert ours.median() <= 2 * theirs.median() + 1e-3
        assert ours.quantile(0.9) <= 2 * theirs.quantile(0.9) + 1e-2
        assert (actual.argmax(-1) == expected.argmax(-1)).float().mean() >= (
            rounded.argmax(-1) == expected.argmax(-1)
        ).float().mean() - 0.1


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_mostly_those_of_transformers(family: str, tmp_path: Path) -> None:
    """Each token is compared given our own past, so that one flipped token counts once."""
    runner = make_runner(family, tmp_path)
    exact = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager").cuda()
    requests = [Request(f"r{i}", i, list(prompt)) for i, prompt in enumerate(PROMPTS)]
    greedy(runner, requests, 32, chunk=40)
    equal = 0
    for request, prompt in zip(requests, PROMPTS, strict=True):
        with torch.inference_mode():
            expected = exact(torch.tensor([request.tokens[:-1]], device="cuda")).logits[0, len(prompt) - 1 :].argmax(-1)
        equal += int((expected.cpu() == torch.tensor(request.tokens[len(prompt) :])).sum())
    assert equal >= 0.85 * 32 * len(PROMPTS)


def gqa(family: str) -> bool:
    return not family.startswith("deepseek")


@pytest.mark.parametrize("family", [family for family in FAMILIES if gqa(family)])
def test_a_replayed_graph_equals_the_eager_step(family: str, tmp_path: Path) -> None:
    """All batch sizes, each replayed with other rows than it was captured with; written keys and values are compared as well."""
    runner = make_runner(family, tmp_path)
    eager = GpuCompute(runner.bound, runner.views, runner.kv, use_graphs=False)
    graphs = GpuCompute(runner.bound, runner.views, runner.kv)
    assert graphs.captures
    with torch.inference_mode():
        prompts = [Request(f"p{slot}", slot, [(slot + n) % VOCAB for n in range(5 + slot)]) for slot in range(70)]
        for request in prompts:
            runner.forward([request.row()])
        for size in (1, 2, 3, 8, 13, 32, 70):
            for shift in (0, 5):
                chosen = [prompts[(shift + i) % 70] for i in range(size)]
                rows = [
                    Row(one.name, one.slot, len(one.tokens), ((one.slot * 7 + shift) % VOCAB,), True) for one in chosen
                ]
                packed = pack(rows, multiple=1, capacity_tokens=512, slots=80)
                expected, written = eager.logits(packed), runner.kv.clone()
                actual = graphs.logits(packed)
                padded = next(bucket for bucket in BATCH_SIZES if bucket >= size)
                if padded == size:
                    assert torch.equal(actual, expected)
                    assert torch.equal(runner.kv, written)
                else:  # another batch size may take another kernel for the products
                    torch.testing.assert_close(actual, expected, rtol=0.05, atol=0.15)


def test_a_step_does_not_wait_for_the_device(tmp_path: Path) -> None:
    """Nothing between the copy of the rows and the logits may synchronise, or no step could be captured."""
    runner = make_runner("qwen3_moe", tmp_path)
    runner.forward([Request("a", 0, list(range(20))).row()])
    runner.forward([Row("a", 0, 20, (1,), True)])
    compute = GpuCompute(runner.bound, runner.views, runner.kv)
    with torch.inference_mode():
        compute.warm_up((1, 4, 64))
        static = torch.zeros(3, 4, dtype=torch.long, device="cuda")
        from flexpert.workers.model.gpu_step import StepTensors

        tensors = StepTensors.decode(static, max_keys=512)
        torch.cuda.set_sync_debug_mode("error")
        try:
            compute.run(tensors, 0)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_the_same_step_gives_the_same_bits(tmp_path: Path) -> None:
    runner = make_runner("gpt_oss", tmp_path)
    request = Request("a", 0, PROMPTS[2])
    first = runner.forward([request.row(all_logits=True)])
    for _ in range(5):
        again = runner.forward([Request("a", 0, PROMPTS[2]).row(all_logits=True)])
        assert torch.equal(again, first)


def test_slots_of_broken_tokens_still_serve(tmp_path: Path) -> None:
    """Where slots are no whole number of tokens apart, attention takes the slow path and says so."""
    runner = make_runner("qwen3_moe", tmp_path)
    odd = torch.zeros(4, 65536, dtype=torch.uint8, device="cuda")[:, : 65536 - 16]
    compute = ModelRunner(runner.bound, odd.contiguous())
    rows = [Request("a", 2, PROMPTS[1]).row()]
    torch.testing.assert_close(compute.forward(rows), runner.forward(rows), rtol=0.05, atol=0.15)
