"""Signals from outside: Prometheus in every state, schedules by their time zone, forecasts in a thread; none of them holds a tick up."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import AsyncIterator
from datetime import datetime
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from aiohttp import web

from flexpert.controller.autoscaler import forecast, prometheus
from flexpert.controller.autoscaler.schedule import read_schedule
from flexpert.controller.autoscaler.signals import Signals
from flexpert.controller.autoscaler.source import UnusablePolicy, read_policy
from flexpert.controller.policy.spec import ForecastSignal, ScheduleSignal
from flexpert.controller.policy.types import Reading

HEAD = "apiVersion: flexpert.dev/v1alpha1\nkind: ScalingPolicy\nspec:\n  workers: {max: 8}\n  signals:\n    - {type: kv_utilization}\n"


def vector(*values: str, at_s: float = 995.0) -> dict[str, Any]:
    result = [{"metric": {}, "value": [at_s, value]} for value in values]
    return {"status": "success", "data": {"resultType": "vector", "result": result}}


class Prometheus:
    """A server on loopback that answers as it is told."""

    def __init__(self) -> None:
        self.answer: Any = vector("7.5")
        self.status = 200
        self.hold: asyncio.Event | None = None
        self.queries: list[str] = []

    async def handle(self, request: web.Request) -> web.Response:
        self.queries.append(request.query["query"])
        if self.hold is not None:
            await self.hold.wait()
        if isinstance(self.answer, bytes):
            return web.Response(body=self.answer, status=self.status)
        return web.json_response(self.answer, status=self.status)


@pytest.fixture
async def server() -> AsyncIterator[Prometheus]:
    made = Prometheus()
    app = web.Application()
    app.router.add_get("/api/v1/query", made.handle)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    made.url = f"http://127.0.0.1:{runner.addresses[0][1]}"  # type: ignore[attr-defined]
    yield made
    if made.hold is not None:
        made.hold.set()
    await runner.cleanup()


async def ask(server: Any, **settings: Any) -> Reading:
    return await prometheus.query(server.url, "sum(x)", **{"timeout_s": 5.0, "now_s": 1000.0, **settings})


async def test_one_number_is_read_with_the_age_of_its_sample(server: Any) -> None:
    assert await ask(server) == Reading(value=7.5, age_s=5.0)
    server.answer = {"status": "success", "data": {"resultType": "scalar", "result": [1000.0, "0"]}}
    assert await ask(server) == Reading(value=0.0, age_s=0.0)
    assert server.queries == ["sum(x)", "sum(x)"]


@pytest.mark.parametrize(
    ("answer", "status", "said"),
    [
        (vector(), 200, "empty result"),
        (vector("1", "2"), 200, "2 series; make it one number"),
        (vector("NaN"), 200, "no number"),
        (vector("+Inf"), 200, "no number"),
        (vector("seven"), 200, "cannot be read"),
        ({"status": "success", "data": {"resultType": "matrix", "result": []}}, 200, "gives a matrix"),
        ({"status": "success"}, 200, "cannot be read"),
        ({"status": "error", "errorType": "bad_data", "error": "parse error: unexpected )"}, 400, "400: parse error"),
        (b"oops", 500, "answered 500, and not as Prometheus does"),
        (b"<html>a login page</html>", 200, "not as Prometheus does"),
        (b"[1, 2]", 200, "not as Prometheus does"),
        (b"x" * (prometheus.MAX_BODY_BYTES + 10), 200, "more than"),
    ],
)
async def test_what_is_no_number_is_missing_with_its_reason(server: Any, answer: Any, status: int, said: str) -> None:
    server.answer, server.status = answer, status
    reading = await ask(server)
    assert reading.value is None and reading.age_s is None
    assert said in reading.error


async def test_a_server_that_is_down_or_too_slow_is_missing(server: Any, unused_port: int) -> None:
    reading = await prometheus.query(f"http://127.0.0.1:{unused_port}", "x", timeout_s=5.0, now_s=0.0)
    assert reading.value is None and "cannot be asked" in reading.error
    server.hold = asyncio.Event()
    reading = await ask(server, timeout_s=0.05)
    assert reading.value is None and "did not answer within 0.05 s" in reading.error


@pytest.fixture
def unused_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def test_a_slow_server_holds_no_tick_up_and_its_last_number_ages(server: Any) -> None:
    text = HEAD + f"    - {{type: prometheus, name: jobs, url: '{server.url}', query: x, target: 5, timeout: 30s}}\n"
    now_s = 1000.0
    signals = Signals(read_policy(text), clock=lambda: now_s)
    assert (await signals.read(join_s=None, brief_s=5.0))["jobs"] == Reading(value=7.5, age_s=5.0)
    server.hold = asyncio.Event()
    now_s = 1020.0
    async with asyncio.timeout(10):
        reading = (await signals.read(join_s=None, brief_s=0.01))["jobs"]
        assert reading == Reading(value=7.5, age_s=25.0)
        await signals.read(join_s=None, brief_s=0.01)
    assert len(server.queries) <= 2, "one question at a time"
    await signals.close()


async def test_before_the_first_answer_there_is_none_and_a_failure_takes_the_number_away(server: Any) -> None:
    text = HEAD + f"    - {{type: prometheus, name: jobs, url: '{server.url}', query: x, target: 5}}\n"
    signals = Signals(read_policy(text), clock=lambda: 1000.0)
    first = (await signals.read(join_s=None, brief_s=0.0))["jobs"]
    assert first.value is None and first.error
    assert (await signals.read(join_s=None, brief_s=5.0))["jobs"].value == 7.5
    server.status = 500
    assert (await signals.read(join_s=None, brief_s=5.0))["jobs"].value is None
    await signals.close()


# Schedules


def schedule(timezone: str, *windows: dict[str, Any]) -> ScheduleSignal:
    return ScheduleSignal.model_validate({"type": "schedule", "timezone": timezone, "windows": list(windows)})


def at(text: str, timezone: str = "Europe/Berlin") -> float:
    return datetime.fromisoformat(text).replace(tzinfo=ZoneInfo(timezone)).timestamp()


def test_a_window_is_open_by_the_clock_of_its_time_zone() -> None:
    office = schedule("Europe/Berlin", {"start": "0 8 * * mon-fri", "end": "0 18 * * mon-fri", "min": 3})
    for moment, low in [
        ("2024-06-03 07:59:59", None), ("2024-06-03 08:00:00", 3), ("2024-06-03 17:59:59", 3), ("2024-06-03 18:00:00", None),
        ("2024-06-08 12:00:00", None), ("2024-01-15 08:30:00", 3),
    ]:  # fmt: skip
        assert read_schedule(office, now_s=at(moment)).low == low, moment
    assert read_schedule(office, now_s=at("2024-01-15 08:30:00", "America/New_York")).low == 3  # 14:30 in Berlin
    assert read_schedule(office, now_s=at("2024-01-15 13:30:00", "America/New_York")).low is None


def test_a_window_keeps_its_hours_when_the_clocks_change() -> None:
    office = schedule("Europe/Berlin", {"start": "0 8 * * *", "end": "0 18 * * *", "min": 3})
    for day in ("2024-03-30", "2024-03-31", "2024-10-27", "2024-10-28"):
        assert read_schedule(office, now_s=at(f"{day} 07:59:00")).low is None, day
        assert read_schedule(office, now_s=at(f"{day} 08:01:00")).low == 3, day


def test_of_several_windows_the_tighter_bounds_count() -> None:
    both = schedule(
        "UTC",
        {"start": "0 8 * * *", "end": "0 20 * * *", "min": 2, "max": 6},
        {"start": "0 10 * * *", "end": "0 12 * * *", "min": 4},
        {"start": "0 11 * * *", "end": "0 13 * * *", "max": 5},
    )
    assert read_schedule(both, now_s=at("2024-06-03 11:30", "UTC")) == Reading(age_s=0.0, low=4, high=5)
    assert read_schedule(both, now_s=at("2024-06-03 21:00", "UTC")) == Reading(age_s=0.0)


# Forecasts


def forecasting(**settings: Any) -> ForecastSignal:
    written = {"type": "forecast", "season": "1h", "step": "5m", "history": "6h", "horizon": "10m", **settings}
    return ForecastSignal.model_validate(written)


def daily(steps: int) -> list[float | None]:
    """A season of 12 steps with a peak in the middle."""
    return [100.0 + 80.0 * math.sin(2 * math.pi * step / 12) for step in range(steps)]


def test_the_season_is_expected_to_come_again() -> None:
    series = daily(12 * 4)  # ends where the rise begins
    reading = forecast.expect(series, [value and value / 2 for value in series], signal=forecasting(), horizon_s=600.0)
    assert reading.error == ""
    assert reading.prompt_tokens_per_s == pytest.approx(100 + 80 * math.sin(2 * math.pi / 12), rel=0.15)
    assert reading.output_tokens_per_s == pytest.approx(reading.prompt_tokens_per_s / 2, rel=0.01)


def test_gaps_and_constant_load_are_no_obstacle() -> None:
    series = daily(12 * 4)
    series[14:20] = [None] * 6
    found = forecast.expect(series, series, signal=forecasting(), horizon_s=600.0).prompt_tokens_per_s
    assert found is not None and 60 < found < 300
    flat: list[float | None] = [5.0] * 36
    assert forecast.expect(flat, flat, signal=forecasting(), horizon_s=600.0).prompt_tokens_per_s == 5.0
    nothing: list[float | None] = [0.0] * 36
    assert forecast.expect(nothing, nothing, signal=forecasting(), horizon_s=600.0).prompt_tokens_per_s == 0.0


def test_less_than_two_seasons_forecast_nothing() -> None:
    reading = forecast.expect(daily(20), daily(20), signal=forecasting(), horizon_s=600.0)
    assert reading.prompt_tokens_per_s is None and "two seasons" in reading.error


def test_history_averages_over_steps_keeps_what_was_asked_and_survives() -> None:
    signal = forecasting()
    history = forecast.History.of(signal, None)
    for second in range(0, 3 * 300, 100):
        history.add(1200.0 + second, prompt_tokens_per_s=float(second), output_tokens_per_s=1.0)
    assert history.series(1200.0 + 900) == ([100.0, 400.0, 700.0], [1.0, 1.0, 1.0])
    again = forecast.History.of(signal, history.to_json())
    assert again.series(1200.0 + 900) == history.series(1200.0 + 900)
    again.add(1200.0 + 6 * 3600 + 300, prompt_tokens_per_s=0.0, output_tokens_per_s=0.0)
    assert again.series(1200.0 + 6 * 3600 + 600)[0][0] == 700.0, "what is older is forgotten"
    assert forecast.History.of(forecasting(step="1m"), history.to_json()).series(1e6) == ([], [])


async def test_a_forecast_is_made_in_a_thread_once_a_step() -> None:
    release, threads = threading.Event(), []

    def slow(prompt: Any, output: Any, **settings: Any) -> Reading:
        threads.append(threading.current_thread())
        assert release.wait(20)
        return Reading(age_s=0.0, prompt_tokens_per_s=settings["horizon_s"], output_tokens_per_s=1.0)

    now_s = 3000.0
    text = HEAD + "    - {type: forecast, season: 1h, step: 5m, history: 6h}\n"
    signals = Signals(read_policy(text), clock=lambda: now_s, expect=slow)
    began_s = time.monotonic()
    assert "not answered yet" in (await signals.read(join_s=42.0, brief_s=0.0))["forecast"].error
    assert time.monotonic() - began_s < 10
    release.set()
    assert (await signals.read(join_s=42.0, brief_s=20.0))["forecast"].prompt_tokens_per_s == 42.0
    now_s = 3250.0
    assert (await signals.read(join_s=42.0, brief_s=20.0))["forecast"].age_s == 0.0, "it holds for its step"
    assert len(threads) == 1 and threads[0] is not threading.main_thread()
    now_s = 3301.0
    await signals.read(join_s=42.0, brief_s=20.0)
    assert len(threads) == 2
    await signals.close()


async def test_a_forecast_that_fails_is_missing_with_its_reason() -> None:
    def broken(*arguments: Any, **settings: Any) -> Reading:
        raise ZeroDivisionError("no seasons")

    text = HEAD + "    - {type: forecast, season: 1h, step: 5m, history: 6h}\n"
    signals = Signals(read_policy(text), clock=lambda: 3000.0, expect=broken)
    assert "ZeroDivisionError: no seasons" in (await signals.read(join_s=None, brief_s=20.0))["forecast"].error
    await signals.close()


def test_without_its_library_a_forecast_is_refused_when_the_policy_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forecast, "library_is_there", lambda: False)
    read_policy(HEAD)
    with pytest.raises(UnusablePolicy, match=r"flexpert\[forecast\]"):
        read_policy(HEAD + "    - {type: forecast}\n")
