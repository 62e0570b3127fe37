"""One choice's output, token by token: what may be shown when."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from flexpert.controller.gateway.metrics import GatewayMetrics
from flexpert.controller.gateway.output import ChoiceOutput
from flexpert.controller.gateway.tokenizer import ModelTokenizer
from flexpert.workers.messages import SamplingParams, TokenOutput


class Watched:
    """A ChoiceOutput with its clock and its wake-ups."""

    def __init__(
        self, tokenizer: ModelTokenizer, *, stops: tuple[str, ...] = (), stream: bool = True, **params: Any
    ) -> None:
        self.wakes = 0
        self.metrics = GatewayMetrics(live=int, waiting=int, links=list, connections={})
        self.output = ChoiceOutput(
            index=0,
            params=SamplingParams(max_tokens=99, seed=0, logprobs=0, **params),
            detokenizer=tokenizer.detokenizer(),
            stops=stops,
            metrics=self.metrics,
            arrived_s=10.0,
            wake=self.wake,
            stream=stream,
        )
        self.sent = 0

    def wake(self) -> None:
        self.wakes += 1

    def feed(self, token_id: int, *, now_s: float = 11.0) -> tuple[str, int]:
        """The text and the number of entries that a client gets right after this token."""
        self.output.on_token(
            TokenOutput(request_id="r", output_index=self.sent, token_id=token_id, logprob=-1.0), now_s
        )
        self.sent += 1
        delta = self.output.take()
        return delta.text, len(delta.entries)


@pytest.fixture(scope="module")
def tokenizer(model_dir: Path) -> ModelTokenizer:
    return ModelTokenizer.load(model_dir)


def letters(vocabulary: Tokenizer, text: str) -> list[int]:
    return [vocabulary.encode(letter).ids[0] for letter in text]


def test_scores_of_held_text_are_held_with_it(tokenizer: ModelTokenizer, vocabulary: Tokenizer) -> None:
    watched = Watched(tokenizer, stops=("ab!",))
    shown = [watched.feed(token_id) for token_id in letters(vocabulary, "xabcab")]
    assert shown == [("x", 1), ("", 0), ("", 0), ("abc", 3), ("", 0), ("", 0)]
    assert watched.feed(letters(vocabulary, "!")[0]) == ("", 0)
    assert watched.output.finish_reason == "stop"
    assert watched.output.completion_tokens == 7


def test_scores_of_part_of_a_character_come_with_the_character(
    tokenizer: ModelTokenizer, vocabulary: Tokenizer
) -> None:
    ids = vocabulary.encode("\N{FOX FACE}").ids
    watched = Watched(tokenizer)
    shown = [watched.feed(token_id) for token_id in ids]
    assert shown == [("", 0)] * (len(ids) - 1) + [("\N{FOX FACE}", len(ids))]


def test_stop_token_that_ends_nothing_is_shown_after_all(tokenizer: ModelTokenizer, vocabulary: Tokenizer) -> None:
    a, b = letters(vocabulary, "ab")
    watched = Watched(tokenizer, stop_token_ids=(b,))
    assert [watched.feed(token_id) for token_id in (a, b, a, b)] == [("a", 1), ("", 0), ("ba", 2), ("", 0)]
    watched.output.on_finished("length", 0)
    assert watched.output.take().text == "b"


def test_whole_answers_wake_nobody_before_the_end(tokenizer: ModelTokenizer, vocabulary: Tokenizer) -> None:
    streamed, whole = Watched(tokenizer), Watched(tokenizer, stream=False)
    for watched in (streamed, whole):
        for token_id in letters(vocabulary, "abc"):
            watched.feed(token_id)
    assert (streamed.wakes, whole.wakes) == (3, 0)
    whole.output.on_finished("length", 0)
    assert whole.wakes == 1


def test_time_per_output_token_leaves_out_the_first(tokenizer: ModelTokenizer, vocabulary: Tokenizer) -> None:
    watched = Watched(tokenizer)
    a, b, c = letters(vocabulary, "abc")
    watched.feed(a, now_s=11.0)
    assert watched.output.tpot_s is None
    watched.feed(b, now_s=12.0)
    watched.feed(c, now_s=14.0)
    assert watched.output.tpot_s == 1.5
    text = watched.metrics.render().decode()
    assert "flexpert_request_ttft_seconds_sum 1.0" in text
    assert "flexpert_request_inter_token_latency_seconds_sum 3.0" in text
