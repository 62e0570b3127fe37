"""Shapes: how many requests come when, how even they are, how shapes combine, what text and YAML mean, what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from flexpert.loadtest.lengths import LengthsError, Mix, parse_lengths
from flexpert.loadtest.schedule import Arrival, ScheduleError, read_lines, to_line
from flexpert.loadtest.shapes import Shape, arrivals, duration_s, expected_requests, words
from flexpert.loadtest.spec import SHAPES, ShapeError, load_shape, parse_shape

MIX = Mix(parse_lengths("64:256", option="p"), parse_lengths("lognormal:100:1", option="o"))


def times(shape: Shape | str, *, seed: int = 1) -> np.ndarray:
    shape = parse_shape(shape) if isinstance(shape, str) else shape
    return np.array([arrival.at_s for arrival in arrivals(shape, seed=seed, mix=MIX)])


def as_bytes(text: str, *, seed: int) -> bytes:
    return "\n".join(map(to_line, arrivals(parse_shape(text), seed=seed, mix=MIX))).encode()


def test_constant_is_constant() -> None:
    assert times("constant rate=10 duration=3s") == pytest.approx(np.arange(30) / 10)


def test_poisson_counts_follow_the_distribution() -> None:
    counts, _ = np.histogram(times("poisson rate=5 duration=4000s"), bins=4000, range=(0, 4000))
    expected = 4000 * np.array([np.exp(-5) * 5**k / float(np.prod(range(1, k + 1))) for k in range(12)])
    found = np.array([(counts == k).sum() for k in range(12)])
    chi_square = float(((found - expected) ** 2 / expected).sum())

    assert chi_square < 31.3, "the 0.1% limit of 11 degrees of freedom"


@pytest.mark.parametrize("cv", [0.3, 1.0, 3.0])
def test_gaps_have_the_variation_asked_for(cv: float) -> None:
    gaps = np.diff(times(f"gamma rate=20 duration=2000s cv={cv}"))

    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.05)
    assert gaps.mean() == pytest.approx(1 / 20, rel=0.05)


def test_spike_is_as_high_and_as_long_as_asked() -> None:
    found = times("spike rate=20:200 duration=100s at=30s length=10s cv=0")

    assert len(found) == 20 * 90 + 200 * 10
    assert ((found >= 30) & (found < 40)).sum() == pytest.approx(2000, abs=1)


def test_ramp_step_sine_and_piecewise_send_what_their_areas_say() -> None:
    ramp = times("ramp rate=0:10 duration=100s cv=0")
    steps = times("step rate=1:4 duration=40s cv=0")
    sine = times("sine rate=0:10 duration=1h period=10m cv=0")

    assert len(ramp) == 500 and (ramp < 50).sum() == pytest.approx(125, abs=1)
    assert np.histogram(steps, bins=4, range=(0, 40))[0].tolist() == [10, 20, 30, 40]
    assert len(sine) == pytest.approx(5 * 3600, abs=1)
    assert ((sine % 600 > 250) & (sine % 600 < 350)).sum() > 15 * ((sine % 600 < 50) | (sine % 600 > 550)).sum()
    assert len(times("piecewise points=0:2,10s:2,10s:8,20s:8 cv=0")) == 100


@pytest.mark.parametrize(
    "text", ["poisson rate=9 duration=50", "gamma cv=2 rate=9 duration=50 then spike rate=1:9 duration=50"]
)
def test_same_seed_same_bytes(text: str) -> None:
    assert as_bytes(text, seed=7) == as_bytes(text, seed=7)
    assert as_bytes(text, seed=7) != as_bytes(text, seed=8)


def test_parts_of_a_sum_are_independent_and_sorted() -> None:
    found = times("poisson rate=5 duration=100 + poisson rate=5 duration=100")

    assert (np.diff(found) >= 0).all()
    assert len(set(found.tolist())) == len(found) == pytest.approx(1000, rel=0.15)


def test_sequence_begins_a_part_where_the_last_one_ends() -> None:
    found = times("constant rate=1 duration=10 then constant rate=10 duration=2")

    assert found.tolist() == pytest.approx([*range(10), *(10 + np.arange(20) / 10)])


def test_scales_of_rate_and_time() -> None:
    assert len(times("3 * (constant rate=2 duration=10 then constant rate=1 duration=10)")) == 90
    assert times("time 0.5 * constant rate=1 duration=10").tolist() == pytest.approx((np.arange(10) / 2).tolist())
    assert duration_s(parse_shape("time 0.5 * constant rate=1 duration=10")) == 5


def test_trace_is_scaled_and_combined_like_any_shape() -> None:
    plain, more = (parse_shape(f"{factor}trace source=azure-conv end=5m") for factor in ("", "3 * "))

    assert duration_s(parse_shape("trace source=azure-conv end=5m time=0.1")) == 30
    assert expected_requests(more) == pytest.approx(3 * expected_requests(plain), rel=0.01)
    assert len(times(more)) == pytest.approx(3 * len(times(plain)), rel=0.05)


def test_words_are_read_back_as_the_same_shape() -> None:
    for text in [
        "poisson rate=5 duration=1m",
        "2 * (sine rate=1:10 duration=1h then ramp rate=5:50 duration=2m cv=0) + time 0.5 * constant rate=1 duration=9",
        "piecewise points=0:2,30s:20,1m:2",
    ]:
        shape = parse_shape(text)
        assert parse_shape(words(shape)) == shape


def test_yaml_and_text_say_the_same(tmp_path: Path) -> None:
    file = tmp_path / "shape.yaml"
    file.write_text(
        "sum:\n"
        "  - sequence: [{shape: poisson, rate: 5, duration: 1m}, {shape: ramp, rate: '5:50', duration: 2m}]\n"
        "  - {scale: {shape: piecewise, points: [[0, 1], [9s, 2]]}, rate: 2}\n"
        "  - constant rate=1\n"
    )
    text = "poisson rate=5 duration=1m then ramp rate=5:50 duration=2m + 2 * piecewise points=0:1,9s:2 + constant rate=1 duration=9"

    assert load_shape(file, defaults={"duration": "9"}) == parse_shape(text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "expected one of constant, poisson"),
        ("spkie rate=1:2 duration=9", "did you mean spike?"),
        ("poisson rate=1", "duration is missing"),
        ("poisson rate=1 duration=9 peak=3", "unknown key 'peak'; expected rate, duration"),
        ("poisson rate=fast duration=9", "rate 'fast': expected requests a second"),
        ("poisson rate=-1 duration=9", "rate '-1'"),
        ("poisson rate=0 duration=9", "nothing would be sent"),
        ("poisson rate=1:2 duration=9", "expected one rate"),
        ("ramp rate=1 duration=9", "expected two rates"),
        ("poisson rate=1 duration=9parsecs", "expected a time like"),
        ("poisson rate=1 duration=0", "expected more than 0"),
        ("gamma rate=1 duration=9", "cv is missing"),
        ("gamma rate=1 duration=9 cv=-1", "expected 0"),
        ("spike rate=1:2 duration=9 at=8 length=2", "within the duration"),
        ("piecewise points=0:1", "two points or more"),
        ("piecewise points=5:1,2:1", "times rising"),
        ("(poisson rate=1 duration=9", "closing bracket"),
        ("poisson rate=1 duration=9 +", "expected the name of a shape at the end"),
        ("poisson rate=1 duration=9 poisson", "not expected there"),
        ("2 poisson rate=1 duration=9", "expected * after"),
        ("poisson rate=1 rate=2 duration=9", "given twice"),
        ("0 * poisson rate=1 duration=9", "a factor above 0"),
        ("trace source=nowhere.csv", "nowhere.csv"),
        ("trace source=azure-conv time=0", "a factor above 0"),
    ],
)
def test_shape_that_cannot_be_is_refused_by_name(text: str, said: str) -> None:
    with pytest.raises(ScheduleError) as caught:
        duration_s(parse_shape(text))

    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[1, 2]", "expected a mapping"),
        ("{sum: [], scale: 1}", "found sum and scale"),
        ("{sum: []}", "expected a list of shapes"),
        ("{sum: [{shape: poisson, rate: 1, duration: 2}], rate: 3}", "'rate' does not belong to sum"),
        ("{shape: poisson, raet: 1}", "did you mean rate?"),
        ("{shape: [", "no YAML"),
    ],
)
def test_shape_file_that_cannot_be_is_refused_with_its_name(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "s.yaml").write_text(content)

    with pytest.raises(ShapeError, match=r"s\.yaml") as caught:
        load_shape(tmp_path / "s.yaml")

    assert said in str(caught.value)


def test_every_shape_can_be_built_from_defaults_alone_or_says_what_it_lacks() -> None:
    for name, keys in SHAPES.items():
        for key in (key[:-1] for key in keys if key.endswith("!")):
            with pytest.raises(ShapeError, match=f"{name}: .* is missing"):
                parse_shape(name)
            assert key


@pytest.mark.parametrize(
    ("text", "low", "high", "mean"),
    [("7", 7, 7, 7), ("3:5", 3, 5, 4), ("lognormal:200:0.5", 1, 10**4, 200), ("100@0.5,300@0.5", 100, 300, 200)],
)
def test_lengths_keep_their_range_and_mean(text: str, low: int, high: int, mean: float) -> None:
    found = parse_lengths(text, option="--prompt-tokens").draw(20_000, np.random.default_rng(0))

    assert low <= found.min() and found.max() <= high
    assert found.mean() == pytest.approx(mean, rel=0.02)


@pytest.mark.parametrize("text", ["", "0", "-3", "9:3", "many", "lognormal:0:1", "5@0", "1.5"])
def test_lengths_that_cannot_be_name_their_option(text: str) -> None:
    with pytest.raises(LengthsError, match="--prompt-tokens"):
        parse_lengths(text, option="--prompt-tokens")


def test_shared_beginnings_come_before_the_tokens_of_ones_own() -> None:
    shared = Mix(parse_lengths("10", option="p"), parse_lengths("1", option="o"), prefix_tokens=64, prefixes=3)
    found = list(arrivals(parse_shape("constant rate=100 duration=1"), seed=0, mix=shared))

    assert {arrival.prefix for arrival in found} == {(0,), (1,), (2,)}
    assert {(arrival.prompt_tokens, arrival.prefix_block_tokens) for arrival in found} == {(74, 64)}


def test_schedule_is_read_as_it_was_written() -> None:
    schedule = [Arrival(0.0, 1, 2), Arrival(0.5, 3, 4, session="a", prefix=(1, 2), prefix_block_tokens=16)]

    assert list(read_lines(map(to_line, schedule))) == schedule


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([to_line(Arrival(1.0, 1, 1)), to_line(Arrival(0.5, 1, 1))], "line 2: .*before"),
        (['{"at_s": -1, "prompt_tokens": 1, "output_tokens": 1}'], "line 1: at_s -1"),
        (['{"at_s": 0, "prompt_tokens": 0, "output_tokens": 1}'], "line 1: prompt_tokens 0"),
        (['{"at_s": 0, "tokens": 0}'], "line 1: .*tokens"),
        (["at 5 send 3"], "line 1"),
        (["[1]"], "line 1: no JSON object"),
    ],
)  # fmt: skip
def test_schedule_that_cannot_be_is_refused_by_line(lines: list[str], said: str) -> None:
    with pytest.raises(ScheduleError, match=said):
        list(read_lines(lines))
