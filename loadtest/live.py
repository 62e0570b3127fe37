"""What is seen while a load test runs: a table on a terminal, elsewhere a line every ten seconds.

Drawing takes time from the loop that sends, so it is done rarely, and ever more rarely where it is slow.
"""

from __future__ import annotations

import time

from rich.console import Console
from rich.live import Live
from rich.table import Table

from flexpert.loadtest.run import Recorder
from flexpert.loadtest.summary import Gaps

__all__ = ["LiveView"]

LINE_EVERY_S = 10.0
DRAW_EVERY_S, RAREST_S = 0.5, 2.0
SHARE = 1 / 200  # of the time that may go into drawing, unless that would be rarer than RAREST_S


class LiveView:
    """update() as often as liked. The clocks are those of the run."""

    def __init__(self, console: Console, *, duration_s: float) -> None:
        self._console, self._duration_s = console, duration_s
        self._live: Live | None = None
        self._next_s = 0.0 if console.is_terminal else LINE_EVERY_S
        self._before: tuple[float, int, int, int] = (0.0, 0, 0, 0)

    def open(self) -> None:
        """Before the load: the first drawing takes longest, and shows that the server is being asked."""
        if self._console.is_terminal:
            self._live = Live("looking at the server", console=self._console, auto_refresh=False, transient=True)
            self._live.start(refresh=True)

    def update(self, recorder: Recorder, now_s: float, *, in_flight: int) -> None:
        """Draws where it is time to."""
        if now_s < self._next_s or now_s < 0:
            return
        began_s = time.perf_counter()
        if self._console.is_terminal:
            table = self._table(recorder, now_s, in_flight)
            if self._live is None:
                self.open()
            assert self._live is not None
            self._live.update(table, refresh=True)
            self._next_s = now_s + min(max(DRAW_EVERY_S, (time.perf_counter() - began_s) / SHARE), RAREST_S)
        else:
            self._console.print(self._line(recorder, now_s, in_flight), markup=False, highlight=False, soft_wrap=True)
            self._next_s = now_s + LINE_EVERY_S

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _line(self, recorder: Recorder, now_s: float, in_flight: int) -> str:
        sent_per_s, _, tokens_per_s = self._rates(recorder, now_s)
        parts = [
            f"{now_s:.0f} of {self._duration_s:.0f} s",
            f"sent {len(recorder.outcomes)} ({sent_per_s:.4g}/s)",
            f"in flight {in_flight}",
            f"ok {recorder.ok}",
            f"not ok {recorder.ended - recorder.ok}",
            f"{tokens_per_s:.4g} tokens/s",
            f"ttft p50 {_ms(recorder.ttft, 'p50')} p99 {_ms(recorder.ttft, 'p99')}",
            f"tpot p50 {_ms(recorder.tpot, 'p50')} p99 {_ms(recorder.tpot, 'p99')}",
        ]
        return ", ".join(parts) + (f"; last error: {recorder.last_error}" if recorder.last_error else "")

    def _table(self, recorder: Recorder, now_s: float, in_flight: int) -> Table:
        sent_per_s, ended_per_s, tokens_per_s = self._rates(recorder, now_s)
        share = f"{recorder.met / recorder.ended:.2%}" if recorder.ended else "-"
        title = f"{min(now_s, self._duration_s):.0f} of {self._duration_s:.0f} s"
        table = Table(title=title, title_justify="left", box=None, pad_edge=False)
        for name in ("", "now", "in all", "", "p50", "p95", "p99", "max"):
            table.add_column(name, justify="left" if not name else "right")
        rows = [
            ("sent", f"{sent_per_s:.4g}/s", f"{len(recorder.outcomes)}", "ttft", recorder.ttft),
            ("ended", f"{ended_per_s:.4g}/s", f"{recorder.ended}", "tpot", recorder.tpot),
            ("output tokens", f"{tokens_per_s:.4g}/s", f"{recorder.tokens}", "itl", recorder.gaps),
        ]
        for name, now, total, measure, histogram in rows:
            table.add_row(name, now, total, measure, *(_ms(histogram, each) for each in ("p50", "p95", "p99", "max")))
        table.add_row("in flight", f"{in_flight}", "", "met", share, "", "", "")
        table.add_row("not ok", "", f"{recorder.ended - recorder.ok}", *_error_cells(recorder.last_error))
        return table

    def _rates(self, recorder: Recorder, now_s: float) -> tuple[float, float, float]:
        """Sent, ended and tokens a second since the last drawing."""
        counts = (len(recorder.outcomes), recorder.ended, recorder.tokens)
        then_s, *then = self._before
        self._before = (now_s, *counts)
        span_s = max(now_s - then_s, 1e-3)
        return tuple((now - before) / span_s for now, before in zip(counts, then, strict=True))  # type: ignore[return-value]


def _error_cells(error: str) -> list[str]:
    return [error[:60].replace("[", "\\[")] if error else [""]


def _ms(histogram: Gaps, statistic: str) -> str:
    value = histogram.statistic(statistic)
    if value is None:
        return "-"
    return f"{value * 1e3:.3g} ms" if value < 1 else f"{value:.3g} s"
