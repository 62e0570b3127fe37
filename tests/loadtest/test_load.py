"""Load against the scripted stub: what is measured, how failures end, that a stall is seen, how users and sessions wait."""

from __future__ import annotations

import asyncio
import io
import itertools
import time
from typing import Any

import pytest
from rich.console import Console
from tests.loadtest.stub_thread import always, every, load, mix

from flexpert.loadtest.conduct import LoadTest, conduct
from flexpert.loadtest.live import LiveView
from flexpert.loadtest.preflight import Unusable
from flexpert.loadtest.run import Recorder, Users
from flexpert.loadtest.schedule import Arrival
from flexpert.loadtest.stub import Reply, StubServer
from flexpert.loadtest.target import parse_url

LOOKS = 2  # requests by which the generator looks at a server that takes token ids


def failing(fault: Any, **more: Any) -> StubServer:
    """Well until the load begins."""
    return StubServer(behaviour=always(Reply(fault=fault, **more), after=LOOKS))


async def test_well_answered_load_is_measured_whole() -> None:
    stub = StubServer(behaviour=always(Reply(ttft_s=0.02, tpot_s=0.005)))
    result = await load(stub, every(0.01, 30), slo=("ttft_p99<5s", "attainment>0.99"))
    whole = result.whole

    assert (whole.sent, whole.ends["ok"], whole.attainment, result.passed) == (30, 30, 1.0, True)
    assert whole.ttft_s.min is not None and whole.ttft_s.min >= 0.019
    assert whole.tpot_s.mean is not None and whole.tpot_s.mean >= 0.004
    assert whole.itl_s.count == 30 * 7 and whole.e2e_s.count == 30
    assert (whole.prompt_mismatch, whole.output_mismatch, whole.without_usage) == (0, 0, 0)
    assert {outcome.tokens for outcome in result.outcomes} == {8}
    assert [outcome.index for outcome in result.outcomes] == list(range(30))


@pytest.mark.parametrize("endpoint", ["chat", "completions"])
async def test_prompts_of_words_are_exact_by_the_servers_own_count(endpoint: str) -> None:
    stub = StubServer(base_tokens=11, accepts_ids=False)
    result = await load(stub, every(0.001, 10, prompt=50), chat=endpoint == "chat")

    assert {outcome.prompt_tokens for outcome in result.outcomes} == {50}
    assert result.whole.prompt_mismatch == 0


async def test_prompts_of_ids_stay_inside_the_vocabulary() -> None:
    stub = StubServer(vocab_size=500, bodies=[])
    await load(stub, every(0.001, 10, prompt=50))

    sent = [body["prompt"] for body in stub.bodies or [] if body.get("stream")]
    assert {len(prompt) for prompt in sent} == {50}
    assert max(map(max, sent)) < 400 and min(map(min, sent)) >= 50


@pytest.mark.parametrize(
    ("fault", "end", "said"),
    [
        ("error", "failed", "HTTP 500: made to fail"),
        ("refuse", "refused", "HTTP 429: the queue is full"),
        ("hang", "timeout", "no answer within 0.3 s"),
        ("hang_mid_stream", "timeout", "4 chunks had come"),
        ("close", "failed", "closed without an answer"),
        ("close_mid_stream", "failed", "closed mid-stream, after 4 chunks"),
        ("error_mid_stream", "failed", "the worker was lost"),
        ("no_done", "failed", "ended after 4 chunks without a finish_reason"),
        ("not_sse", "failed", "text/html instead of an event stream"),
        ("not_http", "failed", "no HTTP answer: 'SSH-2.0"),
        ("bad_event", "failed", "no chunk of a completion"),
    ],
)
async def test_every_way_to_fail_is_told_and_counts_against_attainment(fault: Any, end: str, said: str) -> None:
    result = await load(failing(fault), every(0.001, 3), slo=("attainment>0.5", "ttft_p50<9s"), timeout_s=0.3)

    assert result.whole.ends[end] == 3, result.whole.errors
    assert all(said in text for text in result.whole.errors)
    assert (result.whole.attainment, result.passed, [v.passed for v in result.verdicts]) == (0.0, False, [False, False])


async def test_refusals_carry_when_to_come_again() -> None:
    result = await load(failing("refuse"), every(0.001, 2))

    assert [(o.http_status, o.retry_after_s) for o in result.outcomes] == [(429, 3.0)] * 2


async def test_server_that_goes_away_under_load_fails_the_rest() -> None:
    stub = StubServer()

    def behaviour(number: int, fields: dict[str, Any]) -> Reply:
        if number < LOOKS + 5:
            return Reply()
        asyncio.get_running_loop().create_task(stub.stop())
        return Reply(fault="hang")

    stub.behaviour = behaviour
    result = await load(stub, every(0.01, 20))

    assert result.whole.ends["ok"] == 5 and result.whole.ends["failed"] == 15
    assert any("connection refused" in text for text in result.whole.errors)


async def test_stall_of_the_server_shows_in_full_although_it_happens_once() -> None:
    """Closed loops do not see it: they send one request less for each that waits."""
    loop, stall_s, began_s = asyncio.get_running_loop(), 0.4, float("nan")

    def behaviour(number: int, fields: dict[str, Any]) -> Reply:
        nonlocal began_s
        if number == LOOKS:
            began_s = loop.time()
        if number < LOOKS:
            return Reply()
        return Reply(ttft_s=max(0.0, began_s + stall_s - loop.time()))

    result = await load(StubServer(behaviour=behaviour), every(0.01, 80))
    late = [outcome for outcome in result.outcomes if outcome.ttft_s is not None and outcome.ttft_s > 0.1]

    assert result.whole.sent == 80, "it goes on sending"
    assert len(late) >= 25, "all that were due in the first 0.3 s"
    assert result.whole.ttft_s.p99 is not None and result.whole.ttft_s.p99 > 0.9 * stall_s


async def test_lag_of_the_generator_counts_and_makes_it_degraded() -> None:
    result = await load(StubServer(), every(0.001, 50), lag_limit_s=1e-9)

    assert result.lag.degraded and "did not keep up" in result.lag.why
    assert all(
        o.ttft_s is not None and o.lag_s is not None and o.lag_s >= 0 and o.ttft_s >= o.lag_s for o in result.outcomes
    )


async def test_window_leaves_out_what_was_due_in_warm_up_and_cool_down() -> None:
    stub = StubServer(behaviour=lambda number, fields: Reply(fault="error" if LOOKS <= number < LOOKS + 5 else ""))
    result = await load(stub, every(0.02, 20), slo=("attainment>0.99",), warmup_s=0.09, cooldown_s=0.05)

    assert (result.whole.sent, result.whole.attainment) == (20, 0.75)
    assert (result.window.attainment, result.passed) == (1.0, True)
    assert result.window.sent == len([o for o in result.outcomes if 0.09 <= o.intended_s < 0.33])
    assert result.window.itl_s.count == result.window.sent * 7


async def test_chunks_of_several_tokens_are_counted_by_usage() -> None:
    stub = StubServer(behaviour=always(Reply(tpot_s=0.02, tokens_per_chunk=4)))
    result = await load(stub, every(0.001, 4, output=16))

    assert {(o.chunks, o.tokens) for o in result.outcomes} == {(4, 16)}
    assert result.whole.itl_s.count == 4 * 15
    assert result.whole.itl_s.mean == pytest.approx(result.whole.tpot_s.mean, rel=1e-6)


async def test_answers_without_usage_or_of_other_lengths_are_noted() -> None:
    stub = StubServer(behaviour=always(Reply(usage=False, max_tokens=1), after=LOOKS))
    result = await load(stub, every(0.001, 3))

    assert (result.whole.without_usage, result.whole.output_mismatch, result.whole.one_token) == (3, 3, 3)
    assert "3 answers came without usage" in " ".join(result.notes)
    assert result.whole.tpot_s.count == 0


async def test_request_on_a_kept_connection_that_the_server_just_closed_is_sent_again() -> None:
    stub = StubServer(behaviour=lambda number, fields: Reply(fault="close" if number == LOOKS + 3 else ""))
    result = await load(stub, every(0.03, 8))

    assert result.whole.ends["ok"] == 8, result.whole.errors
    assert stub.requests == LOOKS + 9


async def test_turns_of_a_session_wait_for_the_turn_before() -> None:
    stub = StubServer(behaviour=always(Reply(ttft_s=0.1)))
    arrivals = [Arrival(0.0, 20, 4, session="a"), Arrival(0.01, 30, 4, session="a"), Arrival(0.02, 30, 4)]
    first, second, alone = sorted((await load(stub, arrivals)).outcomes, key=lambda outcome: outcome.index)

    assert first.end_s is not None and second.intended_s == pytest.approx(first.end_s)
    assert alone.intended_s == 0.02
    assert second.ttft_s is not None and second.ttft_s > 0.09


async def test_users_wait_for_their_answers() -> None:
    live, most = 0, 0
    stub = StubServer(behaviour=always(Reply(ttft_s=0.02)))
    result = await load(stub, users=Users(3), mix=mix(), duration_s=0.3)
    moments = sorted([(o.sent_s, 1) for o in result.outcomes] + [(o.end_s, -1) for o in result.outcomes], key=str)
    for _, change in sorted(moments, key=lambda moment: (moment[0] or 0.0, moment[1])):
        live += change
        most = max(most, live)

    assert most == 3 and result.mode == "closed" and result.whole.ends["ok"] == result.whole.sent > 6


async def test_conversation_carries_the_answers_of_its_turns() -> None:
    stub = StubServer(bodies=[])
    result = await load(stub, users=Users(1, turns=3), mix=mix(), chat=True, duration_s=5.0, most=6)
    talks = [body["messages"] for body in stub.bodies or [] if body.get("stream")]

    assert [len(messages) for messages in talks] == [1, 3, 5, 1, 3, 5]
    assert talks[2][:3] == talks[1] and talks[3][0] != talks[0][0]
    assert talks[1][1] == {"role": "assistant", "content": " word" * 8}
    assert [outcome.turn for outcome in result.outcomes] == [0, 1, 2, 0, 1, 2]


async def test_stopped_run_reports_what_it_has() -> None:
    stub, stop, stop_now = (
        StubServer(behaviour=always(Reply(fault="hang"), after=LOOKS + 5)),
        asyncio.Event(),
        asyncio.Event(),
    )
    target = parse_url(await stub.start())
    test = LoadTest(target=target, words="", duration_s=100, schedule=lambda: iter(every(0.01, 10_000)), drain_s=0.05)

    def tick(recorder: Any, now_s: float, in_flight: int) -> None:
        if now_s > 0.2:
            stop.set()

    result = await conduct(test, tick=tick, stop=stop, stop_now=stop_now)
    await stub.stop()

    assert result.whole.ends["ok"] == 5 and result.whole.ends["unfinished"] == result.whole.sent - 5 > 5
    assert result.notes[0].startswith("stopped after")
    assert result.whole.requests_per_s > 5, "per second of what was run, not of what was planned"


@pytest.mark.parametrize("terminal", [True, False])
async def test_live_view_shows_running_percentiles_and_the_last_error(
    terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = io.StringIO()
    view = LiveView(Console(file=out, force_terminal=terminal, width=120), duration_s=0.4)
    stub = StubServer(behaviour=lambda number, fields: Reply(fault="error" if number == LOOKS else ""))
    seen: list[Recorder] = []
    test = LoadTest(
        target=parse_url(await stub.start()), words="", duration_s=0.4, schedule=lambda: iter(every(0.01, 40))
    )

    def tick(recorder: Recorder, now_s: float, in_flight: int) -> None:
        seen.append(recorder)
        view.update(recorder, now_s, in_flight=in_flight)

    await conduct(test, tick=tick)
    view.update(seen[-1], 1000.0, in_flight=0)
    view.close()
    await stub.stop()

    for text in ("ttft", "tpot", "p99", "in flight", "HTTP 500: made to fail"):
        assert text in out.getvalue(), out.getvalue()


def test_live_view_is_drawn_on_where_drawing_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count()
    monkeypatch.setattr(
        "flexpert.loadtest.live.time.perf_counter", lambda: float(next(clock))
    )  # a second for each drawing
    out = io.StringIO()
    view = LiveView(Console(file=out, force_terminal=True, width=120), duration_s=60)
    view.open()
    assert "looking at the server" in out.getvalue()
    drawn = []
    for now_s in (0.0, 1.9, 2.0, 3.9, 4.1):
        before = out.tell()
        view.update(Recorder(limits={}), now_s, in_flight=0)
        drawn.append(out.tell() > before)
    view.close()

    assert drawn == [True, False, True, False, True]


@pytest.mark.parametrize(
    ("stub", "more", "kind", "said"),
    [
        (StubServer(key="secret"), {}, "unauthorised", "it wants an API key: give --api-key"),
        (StubServer(key="secret"), {"key": "guess"}, "unauthorised", "the API key is wrong"),
        (StubServer(), {"model": "gpt"}, "not_found", "no model 'gpt' at .*; it has stub"),
        (StubServer(behaviour=always(Reply(fault="error"))), {}, "unreachable", "HTTP 500: made to fail; its own log should say why"),
        (StubServer(behaviour=always(Reply(fault="refuse"))), {}, "unreachable", "HTTP 429: .*; it is busy or still starting"),
        (StubServer(behaviour=always(Reply(fault="close_mid_stream"))), {}, "unreachable", "closed mid-answer"),
        (StubServer(behaviour=always(Reply(fault="not_http"))), {}, "unreachable", "no HTTP answer"),
        (StubServer(behaviour=always(Reply(fault="close"))), {}, "unreachable", "closed without an answer"),
        (StubServer(accepts_ids=False), {"prompts": "ids"}, "usage", "takes no token ids"),
        (StubServer(admin_key="a"), {"admin_key": "b"}, "unauthorised", "--admin-key: GET /admin/v1/events: HTTP 401"),
    ],
)  # fmt: skip
async def test_endpoint_of_no_use_is_told_before_any_load(
    stub: StubServer, more: dict[str, Any], kind: str, said: str
) -> None:
    with pytest.raises(Unusable, match=said) as caught:
        await load(stub, every(0.001, 3), **more)

    assert caught.value.kind == kind


async def test_server_that_hangs_is_given_up_before_any_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flexpert.loadtest.conduct.PREFLIGHT_TIMEOUT_S", 0.2)

    with pytest.raises(Unusable, match=r"no answer within 0\.2 s; is it still starting, or stuck\?"):
        await load(StubServer(behaviour=always(Reply(fault="hang"))), every(0.001, 3))


async def test_events_of_the_server_stand_on_the_clock_of_the_run() -> None:
    stub = StubServer(admin_key="a", events=[{"sequence": 4, "time_s": 1.0, "kind": "scale", "text": "long ago"}])

    def behaviour(number: int, fields: dict[str, Any]) -> Reply:
        if number == LOOKS + 2:
            stub.events.append({"sequence": 5, "time_s": time.time(), "kind": "scale", "text": "1 -> 2 workers"})
        return Reply()

    stub.behaviour = behaviour
    result = await load(stub, every(0.05, 5), admin_key="a")

    assert [(event.kind, event.text) for event in result.events] == [("scale", "1 -> 2 workers")]
    assert result.outcomes[2].first_s is not None
    assert 0.09 < result.events[0].at_s < result.outcomes[2].first_s + 0.01
