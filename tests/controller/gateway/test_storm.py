"""Everything at once: many streams, clients that leave, workers that keep dying. What is left at the end: right texts, and nothing."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import openai
from tokenizers import Tokenizer

MODEL = "tiny-moe"
TEXT = "The quick brown fox 世界 🎉🚀 jumps over the lazy dog. "


async def test_storm_of_deaths_and_departures_leaves_nothing_behind(harness: Any, vocabulary: Tokenizer) -> None:
    ids = vocabulary.encode(TEXT).ids
    workers = [harness.worker(max_running=5) for _ in range(2)]
    for worker in workers:
        worker.reply = lambda submit: [*ids[submit.params.seed % 7 :], 0]
        worker.repeat_tokens = 2
        worker.lives = iter([9, 4, 7, 3, 11, 5, 8, 6] * 3)
        worker.die_after_steps = next(worker.lives)
    gateway = harness.gateway()
    chance = random.Random(7)

    async def ask(client: openai.AsyncOpenAI, seed: int, leave_after: int | None) -> str | None:
        expected = vocabulary.decode(ids[seed % 7 :])
        if leave_after is None and seed % 2:
            answer = await client.completions.create(model=MODEL, prompt="x", max_tokens=99, seed=seed, n=2)
            assert [choice.text for choice in answer.choices] == [expected] * 2
            return answer.choices[0].text
        text = ""
        stream = await client.completions.create(model=MODEL, prompt="x", max_tokens=99, seed=seed, stream=True)
        async for chunk in stream:
            text += chunk.choices[0].text
            if leave_after is not None and len(text) >= leave_after:
                await stream.close()
                return None
        assert text == expected
        return text

    async with openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="x", max_retries=0, timeout=30) as client:
        departures = [chance.choice([None, None, None, 1, 5]) for _ in range(80)]
        results = await asyncio.gather(*(ask(client, seed, leave) for seed, leave in enumerate(departures)))
    assert sum(result is not None for result in results) >= 40
    assert sum(worker.incarnation for worker in workers) > 10
    harness.ask_until(lambda: len(gateway._pool.live) == 0 and gateway._admission.in_flight == 0)
    assert not gateway._pool.live.waiting
    for worker in workers:
        worker.wait_until(lambda worker=worker: not worker._running)
