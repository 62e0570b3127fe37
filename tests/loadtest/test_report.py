"""The report of a load test: it parses, stands alone, shows the figures of the result, and lines them up with what the server did."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from flexpert.loadtest import aligned, page, plots
from flexpert.loadtest.measure import Interval, Lag, Outcome, Quantiles, RunResult, ServerEvent, Summary, Verdict
from flexpert.loadtest.report import render_report, write_report
from flexpert.loadtest.summary import timeline

from .html_page import Page, assert_stands_alone

EVENTS = [
    ServerEvent(
        20.0,
        "begun",
        "scale to 3: epoch 2, w0 -> w0, w1, w2",
        {"transition_id": "t1", "from_workers": ["w0"], "to_workers": ["w0", "w1", "w2"]},
    ),
    ServerEvent(
        24.0,
        "committed",
        "epoch 2 is current: w0, w1, w2",
        {"transition_id": "t1", "to_workers": ["w0", "w1", "w2"], "pause_s": {"w0": 0.0125}},
    ),
    ServerEvent(25.0, "ended", "scale to 3: done", {"transition_id": "t1"}),
    ServerEvent(40.0, "died", "w2: killed by signal 9", {"worker": "w2"}),
]


def outcome(index: int, *, ok: bool = True) -> Outcome:
    at_s = index * 0.5
    found = Outcome(
        index,
        at_s,
        100,
        20,
        sent_s=at_s + 0.001,
        end="ok" if ok else "failed",
        error="" if ok else "500: <b>broken</b>",
    )
    if ok:
        found.first_s, found.last_s, found.end_s = at_s + 0.2, at_s + 1.2, at_s + 1.21
        found.chunks = found.output_tokens = 20
    return found


def interval(at_s: float) -> Interval:
    return Interval(
        from_s=at_s, seconds=2.0, sent=4, failed=1, finished=3, in_flight=2, met=3, attainment=0.75,
        ttft_p50_s=0.2, ttft_p95_s=0.31, ttft_p99_s=0.4,
        tpot_p50_s=0.05, tpot_p95_s=0.06, tpot_p99_s=0.07, e2e_p99_s=1.2, lag_p99_s=0.001, output_tokens_per_s=40.0,
    )  # fmt: skip


def summary(sent: int = 120) -> Summary:
    def times(p99: float) -> Quantiles:
        return Quantiles(90, p99 / 2, p99 / 10, p99 / 3, p99 / 2, p99 / 1.5, p99, p99 * 1.1, p99 * 1.2)

    return Summary(
        from_s=0.0, to_s=60.0, sent=sent, ends={"ok": sent - 30, "refused": 0, "failed": 30, "timeout": 0, "unfinished": 0},
        errors={"500: <b>broken</b>": 30}, ttft_s=times(0.456), ttft_from_send_s=times(0.455), itl_s=times(0.077),
        tpot_s=times(0.0654), e2e_s=times(1.21), lag_s=times(0.0011), one_token=4, met=87, attainment=87 / 120, goodput_per_s=1.45,
        requests_per_s=1.5, prompt_tokens_per_s=150.0,
        output_tokens_per_s=321.0, without_usage=0, prompt_mismatch=0, output_mismatch=2,
    )  # fmt: skip


def run_result() -> RunResult:
    return RunResult(
        url="http://127.0.0.1:8000", model="tiny <moe>", endpoint="completions", mode="open", shape="spike rate=2:20", seed=7,
        started_unix_s=1.75e9, duration_s=60.0, ended_s=61.2, objectives={"ttft": 0.5, "tpot": 0.06}, whole=summary(), window=summary(),
        lag=Lag(Quantiles(120, p99=0.0123), 0.01, True, "p99 of the schedule lag is 12.3 ms"),
        timeline=[interval(at_s) for at_s in range(0, 60, 2)],
        verdicts=[
            Verdict("ttft_p99<500ms", "ttft_p99", "<", 0.5, 0.456, True, "p99 of TTFT is 456 ms"),
            Verdict("tpot_p95<60ms", "tpot_p95", "<", 0.06, 0.0654, False, "p95 of TPOT is 65.4 ms, not below 60 ms"),
        ],
        outcomes=[outcome(i, ok=i % 4 != 0) for i in range(120)], events=EVENTS, notes=["Tokens are those of usage."],
        settings={"warm-up": "5 s"}, tool="flexpert 9.9",
    )  # fmt: skip


@pytest.fixture(scope="module")
def html() -> str:
    return render_report(run_result())


@pytest.fixture(scope="module")
def report(html: str) -> Page:
    return Page(html)


def test_report_parses_and_stands_alone(report: Page) -> None:
    assert_stands_alone(report)
    assert report.elements.count("svg") == 2


def test_report_shows_the_figures_of_the_result(report: Page) -> None:
    assert report.row("TTFT")[1:] == ["90", "228 ms", "152 ms", "228 ms", "304 ms", "456 ms", "502 ms", "547 ms"]
    assert report.row("TPOT")[6] == "65.4 ms"
    assert report.row("sent")[1] == "120"
    assert report.row("… failed")[1] == "30"
    assert report.row("met every objective") == ["met every objective", "87", "attainment 72.50%"]
    assert report.row("output tokens") == ["output tokens", "321/s", "2 answers longer or shorter"]
    assert report.row("answered") == ["answered", "1.5/s", "goodput 1.45/s"]
    assert report.row("ttft_p99<500ms") == ["ttft_p99<500ms", "456 ms", "kept", "p99 of TTFT is 456 ms"]
    assert report.row("seed")[1] == "7"
    assert report.row("warm-up")[1] == "5 s"


def test_report_says_what_failed_first(report: Page) -> None:
    assert "1 of 2 objectives missed: p95 of TPOT is 65.4 ms, not below 60 ms" in report.text
    assert "The generator itself was degraded" in report.text and "p99 of the schedule lag is 12.3 ms" in report.text
    assert "Tokens are those of usage." in report.text


def test_text_of_the_server_is_no_markup(report: Page) -> None:
    assert "moe" not in report.elements
    assert "tiny <moe> at http://127.0.0.1:8000" in report.text
    assert report.row("30") == ["30", "500: <b>broken</b>"]


def test_latency_is_lined_up_with_what_the_server_did(report: Page, html: str) -> None:
    assert report.row("20.0 s") == [
        "20.0 s",
        "1→3",
        "5 s",
        "12.5 ms",
        "72",
        "18",
        "18",
        "310 ms",
        "scale to 3: epoch 2, w0 -> w0, w1, w2",
    ]
    assert report.row("40.0 s") == ["40.0 s", "died", "w2: killed by signal 9"]
    assert ">1→3</text>" in html, "the change is named above the plots"
    assert ">workers</text>" in html
    assert "TTFT (s)" in report.text and "time since the start (seconds)" in report.text


def test_run_without_answers_or_events_is_reported() -> None:
    none = Quantiles()
    empty = replace(
        summary(0), sent=0, met=0, attainment=None, ttft_s=none, ttft_from_send_s=none, itl_s=none, tpot_s=none, e2e_s=none,
        lag_s=none, errors={},
    )  # fmt: skip
    result = run_result()
    result.whole = result.window = empty
    result.timeline, result.outcomes, result.events, result.verdicts, result.objectives = [], [], [], [], {}

    html = render_report(result)

    found = Page(html)
    assert html == render_report(result), "the same result gives the same page"
    assert_stands_alone(found)
    assert "Nothing was sent." in found.text and "No request was answered." in found.text
    assert "What the server did" not in found.text


def test_missing_matplotlib_is_told_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)

    with pytest.raises(plots.PlotError) as told:
        write_report(run_result(), tmp_path / "out.html")

    assert str(told.value) == "plots need matplotlib, which is not installed: pip install flexpert[report]"
    assert not (tmp_path / "out.html").exists()


def test_sparse_run_is_drawn_in_longer_steps() -> None:
    result = run_result()
    result.timeline = timeline(result.outcomes, length_s=60.0, limits=result.objectives, step_s=0.2)
    result.events = []

    found = Page(render_report(result))

    assert "Steps of 1.6 s;" in found.text, "some 3 requests, and at least 30 steps"


# --- what the server did -----------------------------------------------------------------------------------------------------------------


def test_steps_of_one_transition_are_one_change() -> None:
    (change,) = aligned.changes(EVENTS)

    assert (change.before, change.after, change.committed_s, change.ended_s, change.pause_s) == (
        1,
        3,
        24.0,
        25.0,
        0.0125,
    )
    assert [event.kind for event in aligned.others(EVENTS)] == ["died"]


def test_only_deaths_and_failures_are_drawn_as_such() -> None:
    kinds = ["warm", "joined", "worker", "scaling", "died", "gave_up", "begun", "retired"]
    events = [ServerEvent(1.0, kind, kind) for kind in kinds]

    assert [event.kind for event in aligned.troubles(events)] == ["died", "gave_up"]
    assert [event.kind for event in aligned.decisions(events)] == ["scaling"]
    assert [event.kind for event in aligned.others(events)] == kinds[:6]


def test_event_without_sizes_is_shown_without_them() -> None:
    (change,) = aligned.changes(
        [ServerEvent(1.0, "begun", "scale to 2: epoch 2, w0 -> w0, w1", {"transition_id": "t"})]
    )

    assert (change.before, change.after, change.label) == (None, None, "")


def test_aborted_change_keeps_the_size_before() -> None:
    events = [
        ServerEvent(
            5.0, "begun", "scale to 2", {"transition_id": "t", "from_workers": ["w0"], "to_workers": ["w0", "w1"]}
        ),
        ServerEvent(6.0, "aborting", "scale to 2: no room", {"transition_id": "t"}),
        ServerEvent(7.0, "ended", "scale to 2: aborted", {"transition_id": "t"}),
    ]

    found = aligned.changes(events)

    assert found[0].label == "1→2 aborted"
    assert aligned.workers_over_time(found, 10.0) == ([0.0, 10.0], [1, 1])


def test_change_that_began_before_the_run_is_shown_with_what_is_known() -> None:
    found = aligned.changes(
        [ServerEvent(0.5, "committed", "now", {"transition_id": "t", "to_workers": ["w0", "w1"], "pause_s": {}})]
    )

    assert (found[0].before, found[0].after, found[0].label) == (None, 2, "")
    assert aligned.workers_over_time(found, 10.0) == ([], [])


def test_workers_step_at_the_commit() -> None:
    assert aligned.workers_over_time(aligned.changes(EVENTS), 60.0) == ([0.0, 24.0, 60.0], [1, 3, 3])


def test_change_answers_for_requests_until_half_a_minute_after_it() -> None:
    (change,) = aligned.changes(EVENTS)

    near = aligned.touched(change, [interval(at_s) for at_s in range(0, 120, 2)])

    assert (near.from_s, near.to_s) == (20.0, 56.0)
    assert (near.sent, near.failed, near.missed, near.worst_ttft_p95_s) == (72, 18, 18, 0.31)


# --- words and plots ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "words"),
    [(None, "–"), (0.0, "0 s"), (0.0004, "0.4 ms"), (0.456, "456 ms"), (1.234, "1.23 s"), (240.0, "240 s"), (9000.0, "2.5 h"),
     (float("inf"), "∞")],
)  # fmt: skip
def test_times_are_told_in_the_unit_that_suits_them(value: float | None, words: str) -> None:
    assert page.seconds(value) == words


def test_names_with_signs_of_markup_and_formulas_are_drawn_as_they_are() -> None:
    names = ["a <b> & $x^2", "_hidden"]
    lines = [plots.Line(label=name, x=[0.0, 1.0], y=[1.0, None]) for name in names]

    def draw() -> str:
        return plots.timeline([plots.Panel(title="$", lines=lines)], span_s=1.0, name="n", alt='say "<"')

    found = Page(draw())

    assert draw() == found.html, "the same plot gives the same bytes"
    assert names[0] in found.texts
    assert any(text.endswith(names[1]) for text in found.texts)


def test_colours_can_be_told_apart() -> None:
    def luminance(colour: str) -> float:
        red, green, blue = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
        return 0.2126 * red**2.2 + 0.7152 * green**2.2 + 0.0722 * blue**2.2

    assert len(set(plots.COLOURS)) == len(plots.COLOURS)
    assert all(luminance(colour) < 0.55 for colour in plots.COLOURS), "each stands out on white"
