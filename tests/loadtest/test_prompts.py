"""Prompts: exact lengths, what is shared and what is not; and how an answer's bytes are read, however they are cut."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexpert.loadtest.events import BadAnswer, Chunks, Events, error_text, parse_chunk, parse_head
from flexpert.loadtest.prompts import Prompts, Template, Turn
from flexpert.loadtest.schedule import Arrival

WORDS = ["the", "way", "day", "man"]


def template(kind: Any = "words", *, chat: bool = False, base_tokens: int = 0, **extra: Any) -> Template:
    prompts = Prompts(kind, WORDS if kind == "words" else ["7", "8", "900"], seed=1, base_tokens=base_tokens)
    return Template(prompts, model="m", chat=chat, ignore_eos=True, extra=extra)


def words_of(made: Template, arrival: Arrival, index: int = 0) -> list[str]:
    body = json.loads(made.body(arrival, index))
    return str(body["messages"][0]["content"] if made.chat else body["prompt"]).split(" ")


@pytest.mark.parametrize("count", [1, 3, 100, 40_000])
def test_prompt_has_exactly_the_tokens_asked_for(count: int) -> None:
    assert len(json.loads(template("ids").body(Arrival(0, count, 5), 3))["prompt"]) == count
    assert len(words_of(template(), Arrival(0, count, 5))) == count
    if count > 3:
        assert len(words_of(template(chat=True, base_tokens=3), Arrival(0, count, 5))) == count - 3


def test_body_carries_limits_and_what_was_added() -> None:
    body = json.loads(template(temperature=0.5).body(Arrival(0, 3, 17), 0))

    assert (body["max_tokens"], body["temperature"], body["stream"], body["ignore_eos"]) == (17, 0.5, True, True)
    assert body["stream_options"] == {"include_usage": True}


def test_requests_share_no_beginning_unless_they_should() -> None:
    made = template()
    alone = [words_of(made, Arrival(0, 64, 1), index) for index in range(200)]
    shared = [words_of(made, Arrival(0, 64, 1, prefix=(5,), prefix_block_tokens=32), index) for index in range(50)]

    assert len({tuple(prompt[:16]) for prompt in alone}) == 200
    assert len({tuple(prompt[:32]) for prompt in shared}) == 1
    assert len({tuple(prompt[32:48]) for prompt in shared}) == 50
    assert words_of(made, Arrival(0, 20, 1, prefix=(5,), prefix_block_tokens=32)) == shared[0][:20]


def test_blocks_are_the_same_tokens_wherever_they_appear() -> None:
    made = template("ids")
    first, second = (
        json.loads(made.body(Arrival(0, 32, 1, prefix=blocks, prefix_block_tokens=16), 0))["prompt"]
        for blocks in ((1, 2), (2, 1))
    )

    assert first[:16] == second[16:] and first[16:] == second[:16] and first != second


def test_next_turn_of_a_session_continues_its_prompt() -> None:
    made = template()
    first, second = (words_of(made, Arrival(0, count, 1, session="s"), index) for index, count in enumerate((40, 90)))

    assert second[:40] == first


def test_other_seed_other_prompts() -> None:
    one, two = (Prompts("words", WORDS, seed=seed).text(Arrival(0, 32, 1), 0) for seed in (1, 2))

    assert one != two


def test_turns_carry_what_was_said() -> None:
    said = Turn().then("one two", "three")

    chat = json.loads(template(chat=True).body_of_turn(said, 'fo"ur', 9))
    plain = json.loads(template().body_of_turn(Turn().then("one two ", "three "), "four", 9))
    assert [message["content"] for message in chat["messages"]] == ["one two", "three", 'fo"ur']
    assert plain["prompt"] == "one two three four"


@given(st.lists(st.integers(1, 40), max_size=30), st.booleans())
def test_events_are_the_same_however_the_bytes_are_cut(cuts: list[int], windows: bool) -> None:
    newline = b"\r\n" if windows else b"\n"
    texts = [b'{"a": 1}', b"[DONE]", b"", "ä\u20ac".encode()]
    stream = (
        b": comment" + newline * 2 + b"".join(b"event: x" + newline + b"data: " + text + newline * 2 for text in texts)
    )
    chunked = (
        b"".join(b"%x;x=y\r\n%s\r\n" % (len(part), part) for part in (stream[:7], stream[7:30], stream[30:]))
        + b"0\r\n\r\n"
    )
    chunks, events, found, at = Chunks(), Events(), [], 0
    for size in [*cuts, len(chunked)]:
        found += events.feed(chunks.feed(chunked[at : at + size]))
        at += size
        if at >= len(chunked):
            break

    assert chunks.ended
    assert found == [b"", *texts]


def test_content_reasoning_and_tool_calls_bear_tokens_and_roles_do_not() -> None:
    def content(delta: dict[str, Any]) -> str | None:
        return parse_chunk(json.dumps({"choices": [{"delta": delta}]}).encode()).read()[0]

    assert content({"role": "assistant", "content": ""}) is None
    assert content({"content": "hi"}) == "hi"
    assert content({"reasoning_content": "hm"}) == content({"reasoning": "hm"}) == "hm"
    assert content({"tool_calls": [{"index": 0}]}) == ""
    assert content({"tool_calls": None}) is None
    assert parse_chunk(b'{"choices": [{"text": "hi"}]}').read() == ("hi", False)
    assert parse_chunk(b'{"choices": [{"text": "", "finish_reason": "stop"}]}').read() == (None, True)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"<html>", "no chunk of a completion"),
        (b'{"choices": 7}', "no chunk of a completion"),
        (b'{"error": {"message": "lost"}}', "ended the stream with an error: lost"),
        (b'{"error": "lost"}', "lost"),
    ],
)
def test_event_that_is_no_chunk_says_what_it_is(data: bytes, said: str) -> None:
    with pytest.raises(BadAnswer, match=said):
        parse_chunk(data)


def test_answers_that_are_no_http_say_what_they_are() -> None:
    with pytest.raises(BadAnswer, match="SSH-"):
        parse_head(b"SSH-2.0-OpenSSH")
    with pytest.raises(BadAnswer, match="broken chunked encoding"):
        Chunks().feed(b"zz\r\nhello")


def test_head_is_read_whatever_its_case() -> None:
    head = parse_head(
        b"HTTP/1.1 429 Too Many\r\nRetry-After: 3\r\nContent-Length: 12\r\nconnection: Close\r\nContent-Type: A/B; c=d"
    )

    assert (head.status, head.retry_after_s, head.length, head.keep_alive, head.content_type) == (
        429,
        3.0,
        12,
        False,
        "a/b",
    )


def test_error_text_finds_the_message() -> None:
    assert error_text(b'{"error": {"message": "no"}}') == "no"
    assert error_text(b'{"detail": "no such"}') == "'\"no such\"'"
    assert error_text(b"") == "nothing"
