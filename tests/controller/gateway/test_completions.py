"""POST /v1/completions with the real client, against a scripted worker."""

from __future__ import annotations

import openai
import pytest

MODEL = "tiny-moe"


def test_text_of_the_tokens_is_returned(client, worker, vocabulary):
    ids = vocabulary.encode("The quick brown fox").ids
    worker.reply = lambda submit: ids
    answer = client.completions.create(model=MODEL, prompt="Hello", max_tokens=len(ids))
    assert answer.choices[0].text == "The quick brown fox"
    assert answer.choices[0].finish_reason == "length"
    assert answer.object == "text_completion"
    assert answer.usage.completion_tokens == len(ids)
    assert answer.usage.prompt_tokens == len(vocabulary.encode("Hello").ids)


def test_stream_concatenates_to_the_whole_text(client, worker, vocabulary):
    text = "Größe 世界 🎉🚀👩‍💻 ∑∞ café"
    ids = vocabulary.encode(text).ids
    worker.reply = lambda submit: ids
    chunks = list(client.completions.create(model=MODEL, prompt="Hello", max_tokens=200, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == text
    assert all("\ufffd" not in chunk.choices[0].text for chunk in chunks)
    assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == "length"
    assert len({(chunk.id, chunk.created, chunk.model) for chunk in chunks}) == 1
