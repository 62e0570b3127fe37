"""`flexpert loadtest`: from options to a load test, its live view, files and exit code."""

from __future__ import annotations

import asyncio
import importlib.util
import itertools
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

import flexpert
from flexpert.cli.errors import CommandError
from flexpert.loadtest import event_loop
from flexpert.loadtest.conduct import LoadTest, conduct
from flexpert.loadtest.lengths import LengthsError, Mix, parse_lengths
from flexpert.loadtest.live import LiveView
from flexpert.loadtest.measure import RunResult
from flexpert.loadtest.output import summary_lines, write_csv, write_json
from flexpert.loadtest.preflight import Unusable
from flexpert.loadtest.run import Recorder, Users
from flexpert.loadtest.schedule import Arrival, ScheduleError, read_lines, to_line
from flexpert.loadtest.shapes import arrivals, duration_s, words
from flexpert.loadtest.slo import SloError, parse_slos
from flexpert.loadtest.spec import load_shape, parse_duration, parse_shape
from flexpert.loadtest.target import BadUrl, parse_url

FAILED = 1  # an objective was missed, or no request at all was answered


@dataclass(frozen=True, kw_only=True)
class LoadTestOptions:
    """As typed."""

    url: str | None
    api_key: str | None
    admin_key: str | None
    insecure: bool
    ca: Path | None
    model: str | None
    endpoint: str
    shape: str | None
    rate: str | None
    duration: str | None
    cv: str | None
    schedule: Path | None
    users: int | None
    turns: int
    think: str
    requests: int | None
    prompt_tokens: str
    output_tokens: str
    prefix_tokens: int
    prefixes: int
    prompts: str
    tokenizer: Path | None
    ignore_eos: bool
    extra_body: str | None
    seed: int
    timeout: str
    warmup: str
    cooldown: str
    lag_limit: str
    slo: list[str]
    print_schedule: bool
    json_out: Path | None
    csv_out: Path | None
    report: Path | None
    quiet: bool


def run_load_test(options: LoadTestOptions) -> int:
    """Returns the exit code. Raises CommandError for whatever is found before the load begins."""
    try:
        if options.print_schedule:
            _print_schedule(options)
            return 0
        test = load_test(options)
        for path in (options.json_out, options.csv_out, options.report):
            if path is not None and not path.absolute().parent.is_dir():
                raise CommandError("usage", f"{path}: there is no directory {path.parent}")
        if options.report is not None and importlib.util.find_spec("matplotlib") is None:
            raise CommandError(
                "usage", "--report draws with matplotlib, which is not installed: pip install flexpert[report]"
            )
        result = _conduct(test, options)
    except (ScheduleError, SloError, LengthsError, BadUrl) as error:
        raise CommandError("usage", str(error)) from error
    except Unusable as error:
        raise CommandError(error.kind, str(error)) from error
    _write(result, options)
    for line in summary_lines(result):
        sys.stdout.write(line + "\n")
    return 0 if result.passed and result.whole.ends["ok"] else FAILED


def _print_schedule(options: LoadTestOptions) -> None:
    if options.users is not None:
        raise CommandError("usage", "--print-schedule: the closed loop has none, the server sets its pace")
    try:
        for arrival in _schedule(options)[0]():
            sys.stdout.write(to_line(arrival) + "\n")
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def load_test(options: LoadTestOptions) -> LoadTest:
    """Everything checked that can be without the server."""
    if options.url is None:
        raise CommandError("usage", "no server was named: give --url, like http://127.0.0.1:8000 (or --print-schedule)")
    for option, found, choices in (
        ("--endpoint", options.endpoint, ("completions", "chat")),
        ("--prompts", options.prompts, ("auto", "ids", "words")),
    ):
        if found not in choices:
            raise CommandError("usage", f"{option} {found!r}: expected one of {', '.join(choices)}")
    objectives = tuple(parse_slos(options.slo))
    target = parse_url(options.url, key=options.api_key, verify=not options.insecure, ca=options.ca)
    common: dict[str, Any] = {
        "target": target, "model": options.model, "chat": options.endpoint == "chat", "tokenizer": options.tokenizer,
        "prompts": None if options.prompts == "auto" else options.prompts, "ignore_eos": options.ignore_eos,
        "extra": _extra(options.extra_body), "seed": options.seed, "objectives": objectives, "admin_key": options.admin_key,
        "timeout_s": _positive(options.timeout, "--timeout"), "warmup_s": parse_duration(options.warmup, key="--warmup"),
        "cooldown_s": parse_duration(options.cooldown, key="--cooldown"),
        "lag_limit_s": _positive(options.lag_limit, "--lag-limit"), "settings": _settings(options),
        "tool": f"flexpert {flexpert.__version__}",
    }  # fmt: skip
    if options.prompts == "ids" and options.endpoint == "chat":
        raise CommandError(
            "usage", "--prompts ids: only completions take token ids; leave --endpoint chat or --prompts ids out"
        )
    if options.users is not None:
        return LoadTest(**_closed(options), **common)
    if options.turns > 1:
        raise CommandError("usage", "--turns belongs to the closed loop: give --users too")
    schedule, length_s, text = _schedule(options)
    test = LoadTest(schedule=schedule, duration_s=length_s, words=text, **common)
    if test.warmup_s + test.cooldown_s >= length_s:
        raise CommandError("usage", f"--warmup and --cooldown leave nothing of the {length_s:g} s")
    return test


def _closed(options: LoadTestOptions) -> dict[str, Any]:
    assert options.users is not None
    if options.shape or options.rate or options.schedule:
        raise CommandError(
            "usage",
            "--users is the closed loop, where the server sets the pace; leave --shape, --rate and --schedule out",
        )
    if options.turns > 1 and options.prompts == "ids":
        raise CommandError("usage", "--turns: conversations are text; leave --prompts ids out")
    users = Users(options.users, options.turns, parse_duration(options.think, key="--think"))
    text = f"{users.count} users" + (f" in conversations of {users.turns} turns" if users.turns > 1 else "")
    text += f", thinking {users.think_s:g} s" if users.think_s else ""
    length_s = _positive(options.duration or "60s", "--duration")
    return {"users": users, "mix": _mix(options), "duration_s": length_s, "words": text, "most": options.requests}


def _schedule(options: LoadTestOptions) -> tuple[Callable[[], Iterator[Arrival]], float, str]:
    """(the schedule anew at each call, how long it is, in words)."""
    if options.schedule is not None:
        if options.shape or options.rate:
            raise CommandError("usage", "--schedule holds the arrivals; leave --shape and --rate out")
        try:
            read = list(read_lines(options.schedule.read_text().splitlines()))
        except (OSError, UnicodeDecodeError) as error:
            raise CommandError("usage", f"--schedule {options.schedule}: {error}") from error
        except ScheduleError as error:
            raise CommandError("usage", f"--schedule {options.schedule}: {error}") from error
        if not read:
            raise CommandError("usage", f"--schedule {options.schedule}: holds no arrival")
        return lambda: iter(read[: options.requests]), max(read[-1].at_s, 0.001), f"schedule of {options.schedule.name}"
    defaults = {"rate": options.rate, "duration": options.duration, "cv": options.cv}
    text = options.shape or "poisson"
    if text.endswith((".yaml", ".yml")):
        shape = load_shape(Path(text), defaults=defaults)
    else:
        shape = parse_shape(text, defaults=defaults)
    mix, seed = _mix(options), options.seed
    length_s, most = duration_s(shape), options.requests
    if length_s <= 0:
        raise CommandError("usage", f"--shape {text!r} lasts no time")

    def again() -> Iterator[Arrival]:
        found = arrivals(shape, seed=seed, mix=mix)
        return found if most is None else itertools.islice(found, most)

    return again, length_s, words(shape)


def _mix(options: LoadTestOptions) -> Mix:
    return Mix(
        parse_lengths(options.prompt_tokens, option="--prompt-tokens"), parse_lengths(options.output_tokens, option="--output-tokens"),
        prefix_tokens=options.prefix_tokens, prefixes=options.prefixes,
    )  # fmt: skip


def _extra(text: str | None) -> dict[str, Any]:
    try:
        found = json.loads(text or "{}")
    except ValueError as error:
        raise CommandError("usage", f"--extra-body {text!r}: no JSON: {error}") from error
    if not isinstance(found, dict):
        raise CommandError("usage", f"--extra-body {text!r}: expected a JSON object")
    for name in ("prompt", "messages", "stream", "max_tokens", "n"):
        if name in found:
            raise CommandError("usage", f"--extra-body: {name} is set by the load test itself")
    return found


def _positive(text: str, option: str) -> float:
    found = parse_duration(text, key=option)
    if not found > 0:
        raise CommandError("usage", f"{option} {text}: expected more than 0")
    return found


def _settings(options: LoadTestOptions) -> dict[str, Any]:
    """For the report: what was typed, no keys."""
    hidden = {"api_key", "admin_key", "print_schedule", "json_out", "csv_out", "report", "quiet"}
    return {name: value for name, value in vars(options).items() if name not in hidden and value not in (None, [])}


def _conduct(test: LoadTest, options: LoadTestOptions) -> RunResult:
    view = LiveView(Console(stderr=True, quiet=options.quiet), duration_s=test.duration_s)

    def tick(recorder: Recorder, now_s: float, in_flight: int) -> None:
        view.update(recorder, now_s, in_flight=in_flight)

    async def run() -> RunResult:
        stop, stop_now = asyncio.Event(), asyncio.Event()

        def interrupt() -> None:
            if stop.is_set():
                stop_now.set()
            else:
                sys.stderr.write(f"stopping: answers get {test.drain_s:g} s more; Ctrl-C again ends at once\n")
            stop.set()

        asyncio.get_running_loop().add_signal_handler(signal.SIGINT, interrupt)
        return await conduct(test, tick=tick, stop=stop, stop_now=stop_now)

    try:
        view.open()
        return event_loop.run(run())
    finally:
        view.close()


def _write(result: RunResult, options: LoadTestOptions) -> None:
    """A file that cannot be written is told only after the others are."""
    writers: list[tuple[Path | None, Callable[[RunResult, Path], None]]] = [
        (options.json_out, write_json),
        (options.csv_out, write_csv),
    ]
    if options.report is not None:
        from flexpert.loadtest.report import write_report

        writers.append((options.report, write_report))
    problems = []
    for path, write in writers:
        if path is not None:
            try:
                write(result, path)
            except OSError as error:
                problems.append(f"{path}: {error.strerror}")
    if problems:
        raise CommandError("usage", "; ".join(problems))
