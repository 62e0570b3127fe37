"""Recorded traffic, replayed: from a shipped excerpt, or from a file of Azure, BurstGPT, Mooncake, Bailian or ServeGen, to Arrivals.

    trace = open_trace("azure-conv", time_factor=0.5, rate=2, seed=7)
    for arrival in trace.arrivals(): ...

In this order: requests of a coarse clock are spread (see records.spread_buckets), the rate is scaled, the part [start_s, end_s) of the
recording is cut out, times and token counts are scaled. Equal arguments give equal arrivals. Reading is strict: a file that is wrong
anywhere raises TraceError from open_trace(), before anything is sent. Called by shapes, by the simulator and by the CLI.
"""

from __future__ import annotations

import difflib
import gzip
import importlib.resources
import io
import itertools
import lzma
import math
import tarfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from flexpert.loadtest.records import Records, TraceError, spread_buckets, with_rate
from flexpert.loadtest.schedule import Arrival
from flexpert.loadtest.servegen import Clients, read_clients, windows_between
from flexpert.loadtest.trace_formats import FORMATS, read_records

__all__ = ["SHIPPED", "Trace", "TraceError", "open_trace"]

# Name -> file below excerpts/; what part of which recording each is, and its licence, stand in excerpts/README.md.
SHIPPED = {
    "azure-conv": "azure-conv.csv.xz",
    "mooncake-conversation": "mooncake-conversation.jsonl.xz",
    "mooncake-synthetic": "mooncake-synthetic.jsonl.xz",
    "servegen-deepseek-r1": "servegen-deepseek-r1.tar.xz",
    "servegen-m-small": "servegen-m-small.tar.xz",
}
LENGTHS_FROM = "azure-conv"  # for clients of ServeGen that come without token counts
ALL_FORMATS = (*FORMATS, "servegen")
_SPREAD, _RATE = 1, 2  # which random numbers: of one seed, but independent


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """A recording and how it is to be replayed.

    recorded_s: length of the whole recording, before cut and time_factor. span_s: length of the schedule. requests: how many it holds (of
    ServeGen, with a rate, what is expected).
    """

    name: str
    format: str
    recorded_s: float
    start_s: float
    end_s: float
    time_factor: float
    rate: float
    tokens: float
    seed: int
    requests: float
    source: Records | Clients = field(repr=False, compare=False)

    @property
    def span_s(self) -> float:
        return (self.end_s - self.start_s) * self.time_factor

    @property
    def words(self) -> str:
        """One line for people."""
        per_s = self.requests / self.span_s
        return (
            f"{self.name}: {self.requests:,.0f} requests in {_duration(self.span_s)}, {per_s:.3g} requests/s on average"
        )

    def blocks(self) -> Iterator[Records]:
        """The arrivals as columns, in order of time: one block, or one for each window of ServeGen; for those who want millions quickly."""
        if isinstance(self.source, Records):
            yield self._scaled(self.source)
            return
        lengths = _shipped_lengths()
        for window in windows_between(self.source, self.start_s, self.end_s):
            block = self.source.generate(window, rate=self.rate, seed=self.seed, others=lengths)
            yield self._scaled(_cut(block, self.start_s, self.end_s))

    def _scaled(self, block: Records) -> Records:
        if self.tokens != 1.0:
            block = replace(
                block,
                prompt_tokens=_times(block.prompt_tokens, self.tokens),
                output_tokens=_times(block.output_tokens, self.tokens),
                prefix_block_tokens=max(round(block.prefix_block_tokens * self.tokens), 1),
            )
        return replace(block, at_s=(block.at_s - self.start_s) * self.time_factor)

    def arrivals(self) -> Iterator[Arrival]:
        """The schedule, from 0 to span_s. Each call gives the same one."""
        for block in self.blocks():
            columns = (block.at_s.tolist(), block.prompt_tokens.tolist(), block.output_tokens.tolist())
            if block.sessions is None and block.prefixes is None:
                yield from map(Arrival, *columns)
                continue
            sessions = block.sessions or itertools.repeat("")
            prefixes = block.prefixes or itertools.repeat(())
            yield from map(Arrival, *columns, sessions, prefixes, itertools.repeat(block.prefix_block_tokens))


def open_trace(
    source: str | Path,
    *,
    format_name: str = "",
    start_s: float = 0.0,
    end_s: float | None = None,
    time_factor: float = 1.0,
    rate: float = 1.0,
    tokens: float = 1.0,
    seed: int = 0,
) -> Trace:
    """source: a name of SHIPPED, a file (also .gz, .xz), or ServeGen's folder or tar archive.

    format_name: one of ALL_FORMATS; empty: found out. [start_s, end_s): the part of the recording to replay, in its own time.
    time_factor: 2 takes twice as long at half the rate. rate: 2 sends twice as many requests in the same time. tokens: factor of all token
    counts. Raises TraceError (a ScheduleError) for a source or a number that cannot be.
    """
    name = str(source)
    if format_name and format_name not in ALL_FORMATS:
        raise TraceError(f"trace format {format_name!r}: expected one of {', '.join(ALL_FORMATS)}")
    for what, number in (("time factor", time_factor), ("rate", rate), ("tokens factor", tokens)):
        if not 0 < number < math.inf:
            raise TraceError(f"{what} {number:g}: expected a number above 0")
    path = _path(name)
    read: Records | Clients
    if format_name == "servegen" or (not format_name and (path.is_dir() or _is_tar(path))):
        read = read_clients(_archive(path, name), name)
        recorded_s, found = read.windows * read.window_s, "servegen"
    else:
        read, found = _read_file(path, name, format_name)
        recorded_s = read.span_s
        read = spread_buckets(read, np.random.default_rng([seed, _SPREAD]))
        read = with_rate(read, rate, np.random.default_rng([seed, _RATE]))
    end_s = recorded_s if end_s is None else min(end_s, recorded_s)
    if not 0 <= start_s < end_s:
        raise TraceError(f"{name}: no part from {start_s:g} s to {end_s:g} s; the recording lasts {recorded_s:.0f} s")
    if isinstance(read, Records):
        read = _cut(read, start_s, end_s)
        requests = float(len(read))
    else:
        requests = _expected(read, start_s, end_s) * rate
    if not requests:
        raise TraceError(f"{name}: no request between {start_s:g} s and {end_s:g} s at rate {rate:g}")
    return Trace(
        name=name, format=found, recorded_s=recorded_s, start_s=start_s, end_s=end_s, time_factor=time_factor, rate=rate,
        tokens=tokens, seed=seed, requests=requests, source=read,
    )  # fmt: skip


def _cut(records: Records, start_s: float, end_s: float) -> Records:
    first, last = np.searchsorted(records.at_s, [start_s, end_s])
    return records if (first, last) == (0, len(records)) else records.take(np.arange(first, last))


def _times(counts: NDArray[np.int64], factor: float) -> NDArray[np.int64]:
    scaled: NDArray[np.int64] = np.maximum(np.rint(counts * factor), 1).astype(np.int64)
    return scaled


def _expected(clients: Clients, start_s: float, end_s: float) -> float:
    """Requests in [start_s, end_s), by the rates."""
    return sum(
        float(clients.requests[:, window].sum())
        * (min(end_s, (window + 1) * clients.window_s) - max(start_s, window * clients.window_s))
        / clients.window_s
        for window in windows_between(clients, start_s, end_s)
    )


def _shipped_lengths() -> Callable[[int, np.random.Generator], tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Pairs of lengths of requests of LENGTHS_FROM, each as likely; read when first asked for."""
    pairs: list[Records] = []

    def draw(n: int, random: np.random.Generator) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        if not pairs:
            pairs.append(_read_file(_path(LENGTHS_FROM), LENGTHS_FROM, "")[0])
        rows = random.integers(len(pairs[0]), size=n)
        return pairs[0].prompt_tokens[rows], pairs[0].output_tokens[rows]

    return draw


def _path(name: str) -> Path:
    if name in SHIPPED:
        return Path(str(importlib.resources.files("flexpert.loadtest") / "excerpts" / SHIPPED[name]))
    path = Path(name)
    if not path.exists():
        near = difflib.get_close_matches(name, SHIPPED, n=1)
        hint = f"; did you mean {near[0]}?" if near else ";"
        raise TraceError(f"trace {name!r}: no such file, and no shipped trace{hint} shipped: {', '.join(SHIPPED)}")
    return path


def _is_tar(path: Path) -> bool:
    return ".tar" in path.suffixes or path.suffix in (".tgz", ".txz")


def _opened(path: Path) -> IO[str]:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8")
    if path.suffix == ".xz":
        return lzma.open(path, "rt", encoding="utf-8")
    return path.open(encoding="utf-8")


def _read_file(path: Path, name: str, format_name: str) -> tuple[Records, str]:
    try:
        with _opened(path) as lines:
            return read_records(lines, name=name, format_name=format_name)
    except (OSError, EOFError, UnicodeDecodeError, lzma.LZMAError, zlib.error) as error:
        raise TraceError(f"{name}: cannot be read as text, .gz or .xz: {error}") from error


def _archive(path: Path, name: str) -> Mapping[str, Callable[[], str]]:
    """ServeGen's files, of a folder or a tar archive; nothing is unpacked to disk."""
    if path.is_dir():
        return {file.relative_to(path).as_posix(): partial(file.read_text, "utf-8") for file in path.rglob("chunk-*")}
    try:
        with tarfile.open(path) as archive:
            members = [member for member in archive if member.isfile()]
            texts = {member.name: _text(archive.extractfile(member)) for member in members}
    except (OSError, EOFError, tarfile.TarError, UnicodeDecodeError, lzma.LZMAError, zlib.error) as error:
        raise TraceError(f"{name}: no folder and no tar archive of ServeGen's files: {error}") from error
    return {file: partial(str, text) for file, text in texts.items()}


def _text(file: IO[bytes] | None) -> str:
    return "" if file is None else io.TextIOWrapper(file, encoding="utf-8").read()


def _duration(seconds: float) -> str:
    for unit, name in ((86400.0, "days"), (3600.0, "h"), (60.0, "min")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.3g} {name}"
    return f"{seconds:.3g} s"
