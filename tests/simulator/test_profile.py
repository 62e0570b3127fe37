"""Profiles: what a file must say, and what is read off the steps of an engine."""

from __future__ import annotations

import msgspec
import pytest

from flexpert.simulator.fit import MeasureError, Step, fit, spread
from flexpert.simulator.profile import PROFILES, Duration, ProfileError, Served, interpolate, load_profile, read_profile

from .small import profile

SERVED = {"workers": 2, "decode": [[1, 0.1]], "prefill": [[0, 0]], "answer": [[0, 0.01]]}


def written(**changes) -> bytes:
    return msgspec.json.encode(msgspec.to_builtins(profile()) | changes)


def test_a_profile_reads_as_it_was_written() -> None:
    assert read_profile(msgspec.json.encode(profile())) == profile()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kv_tokens": 0}, "kv_tokens 0: expected 1 or more"),
        ({"decode": []}, "decode: no points"),
        ({"decode": [[1, 0.1], [1, 0.2]]}, "must rise"),
        ({"decode": [[0, 0.0], [1, 0.0]]}, "takes no time"),
        ({"prefill": [[0, -1.0]]}, "below 0"),
        ({"context_s": -1.0}, "context_s -1.0: expected 0 or more"),
        ({"stall": {"mean_s": 2.0, "p95_s": 1.0}}, "stall: mean_s 2, p95_s 1"),
        ({"move_bytes_per_s": 0}, "move_bytes_per_s"),
        ({"kv_tokens": "many"}, "kv_tokens"),
        ({"speed": 3}, "speed"),
        ({"starting": 0.5}, "starting 0.5: expected 1 or more"),
        ({"served": [SERVED, SERVED]}, r"served: sizes \[2, 2\]"),
        ({"served": [SERVED | {"overlap": 2}]}, "overlap 2"),
        ({"served": [SERVED | {"answer": []}]}, "served by 2: answer: no points"),
    ],
)
def test_a_wrong_profile_names_the_field(changes: dict, words: str) -> None:
    with pytest.raises(ProfileError, match=words):
        read_profile(written(**changes))


def test_a_missing_file_tells_what_is_shipped() -> None:
    with pytest.raises(ProfileError, match="builtin-cpu"):
        load_profile("nowhere.json")


@pytest.mark.parametrize("name", sorted(path.stem for path in PROFILES.glob("*.json")))
def test_shipped_profiles_are_whole(name: str) -> None:
    found = load_profile(name)

    assert found.name == name
    assert found.source
    assert interpolate(found.decode, found.max_running) >= interpolate(found.decode, 1) > 0


def test_durations_have_the_mean_and_the_tail_that_they_say() -> None:
    mu, sigma = Duration(mean_s=2.6, p95_s=6.4).spread
    assert pytest.approx(2.6) == pow(2.718281828459045, mu + sigma**2 / 2)
    assert pytest.approx(6.4, rel=1e-3) == pow(2.718281828459045, mu + 1.645 * sigma)
    assert Duration(mean_s=3.0, p95_s=3.0).spread[1] == 0.0


def steps_of_an_engine() -> list[Step]:
    """decode(n) = 10 ms + 1 ms n, a prompt token 0.2 ms, 4 ms of a step spent on nothing, 1 us for each token of context."""
    decode = {0: 0.004, 1: 0.011, 2: 0.012, 4: 0.014}
    steps = []
    for _ in range(3):
        for count in (1, 2, 4):
            steps += [Step(count, 24 * count, 0, 0, decode[count] + 24e-6 * count)] * 5
        steps += [Step(4, 4 * 1000, 0, 0, decode[4] + 4e-3)] * 5
        for tokens in (16, 100):
            steps.append(Step(0, 0, tokens, 0, decode[0] + 2e-4 * tokens))
            steps.append(Step(2, 48, tokens, 0, decode[2] + 48e-6 + 2e-4 * tokens))
        steps.append(Step(0, 0, 100, 500, decode[0] + 2e-2 + 100 * 500 * 1e-8))
    return steps


def test_the_steps_of_an_engine_give_its_profile() -> None:
    found = fit(steps_of_an_engine(), profile())

    assert interpolate(found.decode, 0) == pytest.approx(0.004, abs=2e-4)
    assert interpolate(found.decode, 3) == pytest.approx(0.013, abs=2e-4)
    assert interpolate(found.prefill, 58) == pytest.approx(0.0116, abs=4e-4)
    assert found.context_s == pytest.approx(1e-6, rel=0.05)
    assert found.prefill_context_s == pytest.approx(1e-8, rel=0.05)


def test_steps_that_show_nothing_are_an_error() -> None:
    with pytest.raises(MeasureError, match="only decode"):
        fit([Step(0, 0, 16, 0, 0.1)], profile())


def test_a_size_takes_what_was_seen_of_the_next_smaller_one() -> None:
    found = read_profile(written(served=[SERVED, SERVED | {"workers": 4}]))

    sizes = [found.serves(workers).workers for workers in (1, 2, 3, 4, 9)]
    assert sizes == [2, 2, 2, 4, 4]
    assert profile().serves(1) is None


def test_steps_that_lie_apart_are_noise() -> None:
    calm = [Step(1, 24, 0, 0, 0.01)] * 8
    busy = [Step(2, 48, 0, 0, seconds) for seconds in (0.01, 0.01, 0.02, 0.03, 0.04, 0.04)]

    assert spread(calm) == (0.0, 0.0)
    assert spread(calm + busy)[1] > 0.5


def test_on_a_slower_machine_steps_and_answers_take_longer_and_changes_of_size_do_not() -> None:
    served = Served(workers=2, decode=((1.0, 0.1),), prefill=((64.0, 0.2),), overlap=0.5, answer=((0.0, 0.01),))
    fast = profile(served=(served,), context_s=1e-6, prefill_context_s=1e-8, answer_s=0.02, exchange=((2.0, 0.3),))
    slow = fast.slower(1.5).check()

    assert interpolate(slow.decode, 1) == pytest.approx(1.5 * interpolate(fast.decode, 1))
    assert interpolate(slow.prefill, 50) == pytest.approx(1.5 * interpolate(fast.prefill, 50))
    assert slow.exchange[0][1] == pytest.approx(0.45)
    assert (slow.context_s, slow.prefill_context_s, slow.answer_s) == pytest.approx((1.5e-6, 1.5e-8, 0.03))
    assert [points[0][1] for points in (slow.served[0].decode, slow.served[0].prefill, slow.served[0].answer)] == (
        pytest.approx([0.15, 0.3, 0.015])
    )
    assert (slow.served[0].overlap, slow.join_warm, slow.standby_s) == (0.5, fast.join_warm, fast.standby_s)
    assert fast.slower(1.0) == fast
