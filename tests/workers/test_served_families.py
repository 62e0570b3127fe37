"""Every family through a whole worker: engine, scheduler, sampler and stream, against transformers alone."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from tests.families import FAMILIES, VOCAB, make_model, reference_greedy
from tests.workers.serving import in_process, read_tokens

from flexpert.workers.messages import SamplingParams, Submit


@pytest.mark.parametrize("family", FAMILIES)
def test_a_served_family_answers_as_transformers_does(family: str, tmp_path: Path) -> None:
    """64 greedy tokens of prompts of different lengths at once, prompts cut into chunks of a few tokens."""
    model = make_model(family)
    model.save_pretrained(tmp_path)
    prompts = [[n * k % VOCAB for n in range(1, length)] for k, length in ((3, 6), (5, 38), (7, 71))]
    params = SamplingParams(max_tokens=64, seed=0, temperature=0.0)
    worker = in_process(tmp_path, max_running=4, max_batch_tokens=13)
    try:
        requests = [
            Submit(request_id=f"r{i}", prompt_token_ids=prompt, params=params) for i, prompt in enumerate(prompts)
        ]
        tokens, _ = asyncio.run(read_tokens(worker.start(), requests))
    finally:
        worker.stop()
    for i, prompt in enumerate(prompts):
        assert tokens[f"r{i}"] == reference_greedy(model, prompt, 64)[0]
