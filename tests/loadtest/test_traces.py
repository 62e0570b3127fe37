"""Recorded traffic: what each format becomes, what scaling does to it, which arrivals ServeGen's rates make, and what is refused."""

from __future__ import annotations

import gzip
import io
import json
import math
import tarfile
from pathlib import Path

import numpy as np
import pytest

from flexpert.loadtest.records import Records
from flexpert.loadtest.schedule import Arrival, to_line
from flexpert.loadtest.servegen import read_clients
from flexpert.loadtest.traces import SHIPPED, Trace, TraceError, open_trace

AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
EXCERPTS_LIMIT_BYTES = 300 * 1024


def written(folder: Path, name: str, text: str) -> str:
    (folder / name).write_text(text)
    return str(folder / name)


def mooncake(*rows: tuple[float, int, int, list[int]]) -> str:
    keys = ("timestamp", "input_length", "output_length", "hash_ids")
    return "".join(json.dumps(dict(zip(keys, row, strict=True))) + "\n" for row in rows)


def times(trace: Trace) -> np.ndarray:
    return np.concatenate([block.at_s for block in trace.blocks()])


def cv(at_s: np.ndarray) -> float:
    gaps = np.diff(at_s)
    return float(gaps.std() / gaps.mean())


# --- formats ---------------------------------------------------------------------------------------------------------------------------


def test_azure_times_keep_their_last_digit(tmp_path: Path) -> None:
    text = AZURE + "2023-11-16 23:59:59.6805900,374,44\n2023-11-17 00:00:00.6805901,396,109"
    trace = open_trace(written(tmp_path, "t.csv", text))

    found = list(trace.arrivals())

    assert found[0] == Arrival(0.0, 374, 44)
    assert found[1].at_s == pytest.approx(1.0000001, abs=1e-9)
    assert (found[1].prompt_tokens, found[1].output_tokens) == (396, 109)


def test_azure_of_2024_with_a_time_zone_is_read(tmp_path: Path) -> None:
    text = AZURE + "2024-05-10 00:00:00.009930+00:00,1,2\n2024-05-10 00:00:01+00:00,3,4\n"

    assert [a.at_s for a in open_trace(written(tmp_path, "t.csv", text)).arrivals()] == pytest.approx([0, 0.99007])


def test_burstgpt_whole_seconds_are_spread_and_failures_ask_for_a_token(tmp_path: Path) -> None:
    rows = [f"{5 + i // 4},ChatGPT,{100 + i},{i % 3},{200},Conversation log" for i in range(400)]
    header = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    trace = open_trace(written(tmp_path, "t.csv", header + "\n".join(rows)))

    found = list(trace.arrivals())

    assert [int(arrival.at_s) for arrival in found] == [i // 4 for i in range(400)]
    assert len({arrival.at_s for arrival in found}) == 400
    assert [arrival.prompt_tokens for arrival in found] == list(range(100, 500))
    assert [arrival.output_tokens for arrival in found[:3]] == [1, 1, 2]


def test_mooncake_ids_become_prefixes_of_512_tokens(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl.gz"
    path.write_bytes(gzip.compress(mooncake((0, 600, 5, [7, 8]), (40, 513, 6, [7, 9])).encode()))

    assert list(open_trace(path).arrivals()) == [
        Arrival(0.0, 600, 5, "", (7, 8), 512),
        Arrival(0.04, 513, 6, "", (7, 9), 512),
    ]


def test_bailian_turns_are_one_session(tmp_path: Path) -> None:
    chats = [(1, -1), (2, 1), (3, -1), (4, 2)]
    lines = [
        {"chat_id": chat, "parent_chat_id": parent, "timestamp": float(i), "input_length": 20, "output_length": 3,
         "type": "text", "turn": 1, "hash_ids": [i]}
        for i, (chat, parent) in enumerate(chats)
    ]  # fmt: skip
    trace = open_trace(written(tmp_path, "t.jsonl", "\n".join(map(json.dumps, lines))))

    assert trace.format == "bailian"
    assert [arrival.session for arrival in trace.arrivals()] == ["1", "1", "3", "1"]
    assert {arrival.prefix_block_tokens for arrival in trace.arrivals()} == {16}


# --- excerpts --------------------------------------------------------------------------------------------------------------------------

SHIPPED_REQUESTS = {
    "azure-conv": (10_108, 1_800),
    "mooncake-conversation": (2_728, 903),
    "mooncake-synthetic": (2_254, 600),
    "servegen-deepseek-r1": (1_383_669, 86_400),
    "servegen-m-small": (165_742_927, 172_800),
}


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_trace_opens_by_its_name(name: str) -> None:
    trace = open_trace(name)

    assert trace.requests == SHIPPED_REQUESTS[name][0]
    assert trace.span_s == pytest.approx(SHIPPED_REQUESTS[name][1], abs=0.5)
    assert f"{trace.requests:,.0f} requests" in trace.words


def test_excerpts_are_small_and_attributed(repository: Path) -> None:
    folder = repository / "loadtest" / "excerpts"
    readme = (folder / "README.md").read_text()

    assert {file.name for file in folder.iterdir()} == {"README.md", *SHIPPED.values()}
    assert sum(file.stat().st_size for file in folder.iterdir()) <= EXCERPTS_LIMIT_BYTES
    assert all(f"| `{name}` |" in readme for name in SHIPPED)
    assert "CC-BY-4.0" in readme and "Apache-2.0" in readme


def test_conversation_trace_is_no_train_of_bursts() -> None:
    trace = open_trace("mooncake-conversation", seed=3)
    at_s = times(trace)

    assert len(np.unique(at_s)) == trace.requests
    assert (np.diff(at_s) >= 0).all()
    assert cv(at_s) == pytest.approx(1.0, abs=0.1), "about Poisson; in ticks it would be 2.9"


def test_spreading_keeps_each_request_between_its_tick_and_the_next(tmp_path: Path) -> None:
    ticks = [0, 0, 0, 3000, 3000, 12000, 12000, 15000, 15000]
    path = written(tmp_path, "t.jsonl", mooncake(*((tick, i + 1, 1, []) for i, tick in enumerate(ticks))))

    found = list(open_trace(path).arrivals())

    assert [arrival.prompt_tokens for arrival in found] == list(range(1, 10)), "in the order of the file"
    assert [math.floor(arrival.at_s / 3) * 3000 for arrival in found] == ticks


def test_a_day_of_servegen_holds_the_recorded_number_of_requests_in_each_window() -> None:
    trace = open_trace("servegen-deepseek-r1")
    recorded = trace.source.requests.sum(axis=0)

    counted = np.histogram(times(trace), bins=len(recorded), range=(0, 86_400))[0]

    assert counted.tolist() == recorded.tolist()
    assert counted.sum() == 1_383_669


def test_rates_without_lengths_get_those_of_azure() -> None:
    arrivals = list(open_trace("servegen-m-small", end_s=1_200, rate=0.002, seed=1).arrivals())

    assert 500 < len(arrivals) < 2_500
    assert np.mean([arrival.prompt_tokens for arrival in arrivals]) == pytest.approx(1_243, rel=0.15)


# --- scaling and cutting ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["azure-conv", "mooncake-conversation", "servegen-deepseek-r1"])
def test_same_seed_gives_the_same_bytes(name: str) -> None:
    def read(seed: int) -> bytes:
        trace = open_trace(name, end_s=700, rate=1.5, time_factor=0.5, tokens=0.1, seed=seed)
        return "\n".join(map(to_line, trace.arrivals())).encode()

    assert read(5) == read(5)
    assert read(5) != read(6)


@pytest.mark.parametrize("name", ["azure-conv", "mooncake-conversation", "servegen-deepseek-r1"])
def test_a_cut_is_that_part_of_the_whole(name: str) -> None:
    whole = [a for a in open_trace(name, end_s=900, rate=1.5, seed=2).arrivals() if 250 <= a.at_s < 800]

    part = list(open_trace(name, start_s=250, end_s=800, rate=1.5, seed=2).arrivals())

    assert [a.at_s + 250 for a in part] == pytest.approx([a.at_s for a in whole])
    assert [(a.prompt_tokens, a.prefix) for a in part] == [(a.prompt_tokens, a.prefix) for a in whole]


@pytest.mark.parametrize("name", ["azure-conv", "servegen-deepseek-r1"])
@pytest.mark.parametrize("rate", [0.25, 1.5, 3.0])
def test_rate_scales_requests_over_the_same_time(name: str, rate: float) -> None:
    whole = open_trace(name, end_s=1_200)
    scaled = open_trace(name, end_s=1_200, rate=rate, seed=1)
    counts = [np.histogram(times(trace), bins=4, range=(0, 1_200))[0] for trace in (whole, scaled)]

    assert scaled.span_s == whole.span_s
    assert counts[1] == pytest.approx(rate * counts[0], rel=0.1)
    assert (np.diff(times(scaled)) >= 0).all()


def test_copies_are_other_users_apart_from_their_original(tmp_path: Path) -> None:
    path = written(tmp_path, "t.jsonl", mooncake(*((i * 100_000, 1000, 1, [1, 2 + i]) for i in range(10))))
    found = list(open_trace(path, rate=2).arrivals())

    originals = [a for a in found if a.prefix[0] == 1]
    copies = [a for a in found if a.prefix[0] != 1]
    assert [len(originals), len(copies)] == [10, 10]
    assert len({a.prefix[0] for a in copies}) == 1, "copies share what their originals share"
    assert not {block for a in copies for block in a.prefix} & {block for a in originals for block in a.prefix}
    assert all(0 <= abs(a.at_s - b.at_s) <= 5 for a, b in zip(originals, copies, strict=True))


def test_thinning_leaves_sessions_whole(tmp_path: Path) -> None:
    rows = "".join(f"{i},m,10,10,20,log,s{i % 50}\n" for i in range(500))
    header = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type,Session ID\n"
    found = list(open_trace(written(tmp_path, "t.csv", header + rows), rate=0.4, seed=4).arrivals())

    turns = {session: sum(a.session == session for a in found) for session in {a.session for a in found}}
    assert 5 < len(turns) < 40
    assert set(turns.values()) == {10}


def test_time_and_token_factors() -> None:
    plain = list(open_trace("mooncake-conversation", end_s=60).arrivals())
    scaled = open_trace("mooncake-conversation", end_s=60, time_factor=2, tokens=0.01)

    assert scaled.span_s == 120
    for before, after in zip(plain, scaled.arrivals(), strict=True):
        assert after.at_s == pytest.approx(before.at_s * 2)
        assert after.prompt_tokens == max(round(before.prompt_tokens * 0.01), 1)
        assert after.prefix_block_tokens == 5


# --- ServeGen's arrivals ---------------------------------------------------------------------------------------------------------------


def client(pattern: str, gap_cv: float, requests: int = 20_000, window_s: float = 600.0) -> Records:
    lines = f"0,{requests / window_s!r},{gap_cv},{pattern},0,0\n{window_s},0,0,,0,0\n"
    clients = read_clients({"chunk-0-trace.csv": lambda: lines}, "made")
    return clients.generate(0, rate=1.0, seed=1, others=lambda n, _: (np.ones(n, np.int64), np.ones(n, np.int64)))


@pytest.mark.parametrize("pattern", ["Gamma", "Weibull"])
@pytest.mark.parametrize("gap_cv", [0.3, 1.0, 2.5])
def test_gaps_have_the_recorded_variation(pattern: str, gap_cv: float) -> None:
    at_s = client(pattern, gap_cv).at_s

    assert len(at_s) == 20_000
    assert at_s[0] >= 0 and at_s[-1] < 600
    assert cv(at_s) == pytest.approx(gap_cv, rel=0.05)


@pytest.mark.parametrize("pattern", ["Gamma", "Weibull"])
def test_gaps_of_variation_one_are_exponential_by_chi_square(pattern: str) -> None:
    gaps = np.diff(client(pattern, 1.0).at_s)
    cells = 20
    edges = -np.log(1 - np.arange(cells) / cells) * gaps.mean()  # of equal probability
    counts = np.histogram(gaps, bins=np.append(edges, np.inf))[0]

    chi_square = float(((counts - len(gaps) / cells) ** 2 / (len(gaps) / cells)).sum())

    assert chi_square < 43.8, "the 0.1% point of 19 degrees of freedom"


def test_weibull_gaps_of_another_variation_fit_their_distribution_by_chi_square() -> None:
    gaps = np.diff(client("Weibull", math.sqrt(5)).at_s)  # shape 1/2: CV sqrt(5), mean 2 x scale
    cells = 20
    edges = np.log(1 - np.arange(cells) / cells) ** 2 * gaps.mean() / 2
    counts = np.histogram(gaps, bins=np.append(edges, np.inf))[0]

    assert float(((counts - len(gaps) / cells) ** 2 / (len(gaps) / cells)).sum()) < 43.8


def test_extreme_variation_is_played_without_losing_a_request() -> None:
    at_s = client("Gamma", 700.0, requests=50).at_s

    assert len(at_s) == 50
    assert np.isfinite(at_s).all()


def test_lengths_follow_the_clients_distribution_of_the_time_of_day(tmp_path: Path) -> None:
    (tmp_path / "chunk-0-trace.csv").write_text("".join(f"{i * 600},1,1,Gamma,1,1\n" for i in range(4)))
    sides = {"0": {"input_tokens": "{10: 0.25, 20: 0.75}", "output_tokens": "{5: 1.0}"},
             "1200": {"input_tokens": "{30: 1.0}", "output_tokens": "{6: 1.0}"}}  # fmt: skip
    (tmp_path / "chunk-0-dataset.json").write_text(json.dumps(sides))
    found = list(open_trace(tmp_path).arrivals())

    early = [a for a in found if a.at_s < 1200]
    assert {a.output_tokens for a in early} == {5}
    assert np.mean([a.prompt_tokens == 20 for a in early]) == pytest.approx(0.75, abs=0.04)
    assert {(a.prompt_tokens, a.output_tokens) for a in found if a.at_s >= 1200} == {(30, 6)}


# --- what is refused -------------------------------------------------------------------------------------------------------------------

BAD_FILES = {
    "columns.csv": (
        "a,b\n1,2\n",
        "columns.csv: line 1: found the columns a, b; expected those of one format: azure: TIMESTAMP, ContextTokens, GeneratedTokens; "
        "burstgpt: Timestamp, Request tokens, Response tokens; "
        "bailian: timestamp, input_length, output_length, hash_ids, chat_id, parent_chat_id; "
        "mooncake: timestamp, input_length, output_length, hash_ids",
    ),
    "short.csv": (
        AZURE + "2023-11-16 18:15:46.68,1\n",
        "short.csv: line 2: 2 columns; expected 3: TIMESTAMP, ContextTokens, GeneratedTokens",
    ),
    "clock.csv": (
        AZURE + "yesterday,1,1\n",
        "clock.csv: line 2: TIMESTAMP 'yesterday' is no time like 2023-11-16 18:15:46.6805900",
    ),
    "month.csv": (
        AZURE + "2023-13-16 18:15:46.68,1,1\n",
        "month.csv: line 2: TIMESTAMP '2023-13-16 18:15:46.68' is no time like 2023-11-16 18:15:46.6805900",
    ),
    "tokens.csv": (
        AZURE + "2023-11-16 18:15:46.68,many,1\n",
        "tokens.csv: line 2: ContextTokens 'many' is no whole number of tokens from 0 on",
    ),
    "minus.csv": (
        AZURE + "2023-11-16 18:15:46.68,1,-3\n",
        "minus.csv: line 2: GeneratedTokens '-3' is no whole number of tokens from 0 on",
    ),
    "unsorted.csv": (
        AZURE + "2023-11-16 18:15:46.68,1,1\n2023-11-16 18:15:45.10,1,1\n",
        "unsorted.csv: line 3: TIMESTAMP 2023-11-16 18:15:45.10 is before that of the line above; sort the file by TIMESTAMP",
    ),
    "negative.csv": (
        "Timestamp,Request tokens,Response tokens\n-4,1,1\n",
        "negative.csv: line 2: Timestamp -4 is negative; expected a time from 0 on",
    ),
    "nan.csv": (
        "Timestamp,Request tokens,Response tokens\nnan,1,1\n",
        "nan.csv: line 2: Timestamp 'nan' is no number; expected a time from 0 on",
    ),
    "header.csv": (AZURE, "header.csv: no request below the header; expected one a line"),
    "empty.csv": ("", "empty.csv: line 1 is empty; expected a header, or one JSON object a line"),
    "unsorted.jsonl": (
        mooncake((3000, 1, 1, []), (0, 1, 1, [])),
        "unsorted.jsonl: line 2: timestamp 0 is before that of the line above; sort the file by timestamp",
    ),
    "negative.jsonl": (
        mooncake((0, 1, 1, []), (-5, 1, 1, [])),
        "negative.jsonl: line 2: timestamp -5 is negative; expected a time from 0 on",
    ),
    "keys.jsonl": (
        mooncake((0, 1, 1, [])) + '{"timestamp": 1, "input_length": 4}\n',
        "keys.jsonl: line 2: no key output_length, hash_ids for mooncake; found timestamp, input_length; "
        "expected timestamp, input_length, output_length, hash_ids",
    ),
    "ids.jsonl": (
        mooncake((0, 1, 1, [-1])),
        "ids.jsonl: line 1: hash_ids [-1] is no list of whole numbers from 0 on",
    ),
    "list.jsonl": (
        mooncake((0, 1, 1, [])) + "[1]\n",
        "list.jsonl: line 2: found a JSON list; expected one object a line",
    ),
    "cut.jsonl": (
        mooncake((0, 1, 1, [])) + '{"timestamp"',
        "cut.jsonl: line 2: no JSON (Expecting ':' delimiter: line 1 column 13 (char 12)); expected one object a line",
    ),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_file_is_refused_with_its_line(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, message = BAD_FILES[name]
    written(tmp_path, name, text)
    monkeypatch.chdir(tmp_path)

    with pytest.raises(TraceError) as refused:
        open_trace(name)

    assert str(refused.value) == message


GOOD_RATES = "0,1,1,Gamma,1,1\n600,1,1,Gamma,1,1\n1200,1,1,Gamma,1,1\n"
WHERE = "d: chunk-0-trace.csv: line 1:"
BAD_CLIENTS = {
    "pattern": ({"chunk-0-trace.csv": "0,1,1,Pareto,1,1\n"}, f"{WHERE} found 0,1,1,Pareto,1,1; expected window start,"),
    "negative rate": ({"chunk-0-trace.csv": "0,-1,1,Gamma,,\n"}, f"{WHERE} found 0,-1,1,Gamma,,; expected numbers from 0 on"),
    "negative time": ({"chunk-0-trace.csv": "-6,1,1,Gamma,,\n"}, f"{WHERE} found -6,1,1,Gamma,,; expected numbers from 0 on"),
    "idle": ({"chunk-0-trace.csv": "0,1,1,,1,1\n"}, f"{WHERE} rate 1 without a pattern; expected Gamma or Weibull"),
    "unsorted": (
        {"chunk-0-trace.csv": GOOD_RATES + "600,1,1,Gamma,1,1\n"},
        "d: chunk-0-trace.csv: line 4: window start 600 after 1200; expected them to rise from 0 in equal steps",
    ),
    "other windows": (
        {"chunk-0-trace.csv": GOOD_RATES, "chunk-1-trace.csv": "0,1,1,Gamma,1,1\n"},
        "d: chunk-1-trace.csv: its windows are not those of chunk-0-trace.csv; expected the same in all files",
    ),
    "none": ({"chunk-0.txt": ""}, "d: no chunk-N-trace.csv in it; expected ServeGen's files of one service"),
    "no distribution": (
        {"chunk-0-trace.csv": GOOD_RATES, "chunk-0-dataset.json": '{"0": {"input_tokens": "{1: 1}"}}'},
        "d: chunk-0-dataset.json: 0: output_tokens: 'output_tokens'; expected a dict literal of value: probability",
    ),
    "negative weight": (
        {"chunk-0-trace.csv": GOOD_RATES, "chunk-0-dataset.json": '{"0": {"input_tokens": "{1: -1}", "output_tokens": "{1: 1}"}}'},
        "d: chunk-0-dataset.json: 0: input_tokens: a negative value or probability; expected numbers from 0 on",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_CLIENTS)
def test_bad_servegen_folder_is_refused(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, message = BAD_CLIENTS[case]
    (tmp_path / "d").mkdir()
    for name, text in files.items():
        written(tmp_path / "d", name, text)
    monkeypatch.chdir(tmp_path)

    with pytest.raises(TraceError) as refused:
        open_trace("d")

    assert str(refused.value).startswith(message)


def test_code_in_a_distribution_is_not_run(tmp_path: Path) -> None:
    (tmp_path / "chunk-0-trace.csv").write_text(GOOD_RATES)
    planted = f"__import__('pathlib').Path({str(tmp_path / 'ran')!r}).touch() or {{1: 1}}"
    sides = {"input_tokens": planted, "output_tokens": "{1: 1}"}
    (tmp_path / "chunk-0-dataset.json").write_text(json.dumps({"0": sides}))

    with pytest.raises(TraceError, match="expected a dict literal"):
        open_trace(tmp_path)

    assert not (tmp_path / "ran").exists()


def test_servegen_is_read_from_a_tar_archive(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "t.tar.gz", "w:gz") as archive:
        member = tarfile.TarInfo("data/service/chunk-3-trace.csv")
        member.size = len(GOOD_RATES)
        archive.addfile(member, io.BytesIO(GOOD_RATES.encode()))

    assert open_trace(tmp_path / "t.tar.gz").requests == 1_800


@pytest.mark.parametrize("name", ["t.csv.gz", "t.csv.xz", "t.tar.gz", "t.csv"])
def test_file_that_is_not_what_its_name_says_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"\xff\xfe\x00 no archive")

    with pytest.raises(TraceError, match=r"cannot be read as text|no tar archive"):
        open_trace(tmp_path / name)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(source="azure-chat"), "trace 'azure-chat': no such file, and no shipped trace; did you mean azure-conv? shipped: "),
        (dict(source="azure-conv", rate=0), "rate 0: expected a number above 0"),
        (dict(source="azure-conv", time_factor=-1), "time factor -1: expected a number above 0"),
        (dict(source="azure-conv", tokens=math.nan), "tokens factor nan: expected a number above 0"),
        (dict(source="azure-conv", format_name="csv"), "trace format 'csv': expected one of azure, "),
        (dict(source="azure-conv", start_s=1900), "azure-conv: no part from 1900 s to 1800.08 s; the recording lasts 1800 s"),
        (dict(source="azure-conv", start_s=-1), "azure-conv: no part from -1 s to 1800.08 s; the recording lasts 1800 s"),
        (dict(source="azure-conv", rate=1e-9), "azure-conv: no request between 0 s and 1800.08 s at rate 1e-09"),
        (
            dict(source="azure-conv", format_name="burstgpt"),
            "azure-conv: line 1: no column Timestamp, Request tokens, Response tokens for burstgpt; found TIMESTAMP, ",
        ),
    ],
)  # fmt: skip
def test_argument_that_cannot_be_is_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(TraceError) as refused:
        open_trace(**arguments)  # type: ignore[arg-type]

    assert str(refused.value).startswith(message)
