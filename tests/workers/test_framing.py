"""Frames: what is sent arrives, and what is no frame is refused by name."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexpert.workers.framing import MAX_FRAME_BYTES, FrameError, gateway_frames, open_stream, worker_frames
from flexpert.workers.messages import Cancel, Hello, SamplingParams, StepOutput, Submit, TokenOutput

tokens = st.lists(st.integers(0, 2**31), max_size=50)


def reader_of(data: bytes) -> asyncio.StreamReader:
    reader = asyncio.StreamReader()
    reader.feed_data(data)
    reader.feed_eof()
    return reader


async def read_all(data: bytes) -> list[object]:
    codec = gateway_frames()
    reader = reader_of(data)
    frames = []
    while (frame := await codec.read(reader)) is not None:
        frames.append(frame)
    return frames


@given(
    prompt=tokens,
    emitted=tokens,
    seed=st.integers(0, 2**64 - 1),
    temperature=st.floats(0, 2),
    bias=st.dictionaries(st.integers(0, 99), st.floats(-100, 100)),
)
def test_frames_arrive_as_they_were_sent(prompt, emitted, seed, temperature, bias):
    params = SamplingParams(max_tokens=9, seed=seed, temperature=temperature, logit_bias=bias)
    submit = Submit(request_id="a", prompt_token_ids=prompt, emitted_token_ids=emitted, params=params)
    codec = gateway_frames()
    sent = [Hello(cluster_token="t", gateway_id="g"), submit, Cancel(request_id="a")]
    assert asyncio.run(read_all(b"".join(codec.encode(frame) for frame in sent))) == sent


@given(cut=st.integers(1, 30))
def test_a_stream_cut_inside_a_frame_ends_quietly(cut):
    data = gateway_frames().encode(Cancel(request_id="a-request-with-a-long-name"))
    assert asyncio.run(read_all(data + data[:-cut])) == [Cancel(request_id="a-request-with-a-long-name")]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xc1",
        b"{}",
        b"\x81\xa4type\xa7unknown",
        b"\x81\xa4type\xa6cancel",
        worker_frames().encode(StepOutput(step=1))[4:],
    ],
    ids=["empty", "not msgpack", "json", "unknown tag", "missing field", "the other direction"],
)
def test_what_is_no_frame_is_refused(body):
    with pytest.raises(FrameError, match="could not be decoded"):
        asyncio.run(read_all(len(body).to_bytes(4, "big") + body))


def test_a_frame_too_large_is_refused_before_it_is_read():
    with pytest.raises(FrameError, match=str(MAX_FRAME_BYTES)):
        asyncio.run(read_all((MAX_FRAME_BYTES + 1).to_bytes(4, "big")))


def test_optional_fields_of_a_token_survive():
    frame = StepOutput(
        step=3, tokens=[TokenOutput(request_id="a", output_index=1, token_id=2, logprob=-0.5, top=((2, -0.5),))]
    )
    codec = worker_frames()
    assert codec.decode(codec.encode(frame)[4:]) == frame


@pytest.mark.parametrize("address", ["", "unix:", "tcp:", "tcp:host", "http://x", "tcp:host:port"])
def test_an_address_in_another_form_is_refused(address):
    with pytest.raises(ValueError, match="expected unix:/path or tcp:host:port"):
        asyncio.run(open_stream(address))
