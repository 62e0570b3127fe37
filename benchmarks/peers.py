"""transformers as a peer: each way of generating in a process of its own, so that idle threads of one slow down nobody else.

A peer's process holds the model, waits on a pipe while others are measured, and times its own rounds.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from multiprocessing.connection import Connection
from pathlib import Path

from flexpert.workers.threads import worker_environment

Prompts = list[list[int]]
PEERS = ("transformers generate", "transformers generate_batch")


class Peer:
    """generate(prompts, output_tokens) -> (tokens generated, seconds)"""

    def __init__(self, name: str, model_dir: Path, device: str) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, name, model_dir, device), daemon=True)
        kept = {name: os.environ.pop(name, None) for name in worker_environment(threads=1)}
        self._process.start()
        os.environ.update({name: value for name, value in kept.items() if value is not None})
        self._pipe.recv()

    def __call__(self, prompts: Prompts, output_tokens: int) -> tuple[int, float]:
        self._pipe.send((prompts, output_tokens))
        return self._pipe.recv()

    def close(self) -> None:
        self._pipe.send(None)
        self._process.join(30)
        if self._process.is_alive():
            self._process.kill()


def _serve(pipe: Connection, name: str, model_dir: Path, device: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    extra = {} if device == "cpu" else {"experts_implementation": "grouped_mm"}
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype, attn_implementation="sdpa", **extra)
    model = model.to(device).eval()

    def static(prompts: Prompts, output_tokens: int) -> int:
        ids = torch.tensor(prompts, device=device)
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=output_tokens,
            min_new_tokens=output_tokens,
            do_sample=False,
            pad_token_id=0,
        )
        return (out.shape[1] - ids.shape[1]) * out.shape[0]

    def continuous(prompts: Prompts, output_tokens: int) -> int:
        config = GenerationConfig(max_new_tokens=output_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)
        outputs = model.generate_batch(inputs=prompts, generation_config=config, progress_bar=False)
        return sum(len(output.generated_tokens) for output in outputs.values())

    generate = {"transformers generate": static, "transformers generate_batch": continuous}[name]
    pipe.send("ready")
    while (task := pipe.recv()) is not None:
        began_s = time.perf_counter()
        tokens = generate(*task)
        pipe.send((tokens, time.perf_counter() - began_s))
