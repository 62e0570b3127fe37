"""Workers in the test's own process, and a gateway's side of their stream."""

from __future__ import annotations

import asyncio
from pathlib import Path

from flexpert.workers.framing import open_stream, worker_frames
from flexpert.workers.messages import Failed, Hello, SamplingParams, StepOutput, Submit
from flexpert.workers.process import WorkerConfig, WorkerProcess

TOKEN = "secret"
PROMPTS = [[7 * i % 90 + 3 for i in range(n)] for n in (5, 40, 133)]
GREEDY = SamplingParams(max_tokens=48, seed=0, temperature=0.0)
SEEDED = SamplingParams(max_tokens=48, seed=1234567, temperature=0.9, top_p=0.95)


def in_process(model_dir: Path, **changes) -> WorkerProcess:
    fields = {
        "worker_id": "alone",
        "model_dir": model_dir,
        "model_id": "tiny",
        "cluster_token": TOKEN,
        "address": "tcp:127.0.0.1:0",
        "max_running": 8,
        "max_context_tokens": 512,
    }
    return WorkerProcess(WorkerConfig(**fields | changes))


def submits(params: SamplingParams, emitted: dict[str, list[int]] | None = None) -> list[Submit]:
    found = emitted or {}
    return [
        Submit(request_id=f"r{i}", prompt_token_ids=prompt, params=params, emitted_token_ids=found.get(f"r{i}", []))
        for i, prompt in enumerate(PROMPTS)
    ]


async def read_tokens(
    address: str, requests: list[Submit], *, stop_after: int | None = None
) -> tuple[dict[str, list[int]], list]:
    """Tokens by request until all ended, or until `stop_after` were seen; and the frames of other kinds."""
    reader, writer = await open_stream(address)
    codec = worker_frames()
    writer.write(codec.encode(Hello(cluster_token=TOKEN, gateway_id="test")))
    await codec.read(reader)
    for submit in requests:
        writer.write(codec.encode(submit))
    tokens = {submit.request_id: list(submit.emitted_token_ids) for submit in requests}
    others, left, seen = [], len(requests), 0
    while left and (stop_after is None or seen < stop_after):
        frame = await asyncio.wait_for(codec.read(reader), 60)
        assert frame is not None, "the worker closed the stream"
        if not isinstance(frame, StepOutput):
            others.append(frame)
            left -= isinstance(frame, Failed)
            continue
        for token in frame.tokens:
            assert token.output_index == len(tokens[token.request_id])
            tokens[token.request_id].append(token.token_id)
            seen += 1
        left -= len(frame.finished)
        others += frame.finished
    writer.close()
    return tokens, others
