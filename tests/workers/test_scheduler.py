"""The scheduling policy in particular cases; tests/workers/test_scheduler_properties.py runs it through random ones."""

from __future__ import annotations

import pytest

from flexpert.workers.kv_books import KvBooks, KvGeometry
from flexpert.workers.messages import Finished, SamplingParams, Submit
from flexpert.workers.scheduler import RequestRejected, Scheduler, SchedulerConfig
from flexpert.workers.step import StepPlan


def make(
    *, slots: int = 4, context: int = 100, granules: int = 400, batch: int = 16, running: int | None = None, **more: int
) -> Scheduler:
    geometry = KvGeometry(slots=slots, max_context_tokens=context, kv_token_bytes=1, granule_bytes=1)
    config = SchedulerConfig(max_running=running or slots, max_batch_tokens=batch, **more)
    return Scheduler(config, KvBooks(geometry, range(granules), ahead_granules=0))


def request(name: str, prompt: int | list[int], *, emitted: list[int] | None = None, **params: object) -> Submit:
    tokens = [ord(name[0]) * 1000 + i for i in range(prompt)] if isinstance(prompt, int) else prompt
    return Submit(
        request_id=name,
        prompt_token_ids=tokens,
        params=SamplingParams(**{"max_tokens": 8, "seed": 0, **params}),
        emitted_token_ids=emitted or [],
    )


def step(scheduler: Scheduler, token: int = 5) -> tuple[StepPlan, list[Finished]]:
    plan = scheduler.schedule()
    assert plan is not None
    finished = scheduler.complete(plan, {row.request_id: token for row in plan.rows if row.sample})
    scheduler.check_integrity()
    return plan, finished


def lengths(plan: StepPlan) -> dict[str, int]:
    return {row.request_id: len(row.token_ids) for row in plan.rows}


def test_nothing_to_do_is_no_plan() -> None:
    scheduler = make()
    assert scheduler.schedule() is None
    assert not scheduler.has_work


def test_decode_rows_come_first_and_prompts_fill_the_step_oldest_first() -> None:
    scheduler = make(batch=16)
    scheduler.submit(request("a", 3))
    step(scheduler)
    for name, size in (("b", 10), ("c", 20)):
        scheduler.submit(request(name, size))
    assert lengths(step(scheduler)[0]) == {"a": 1, "b": 10, "c": 5}
    assert lengths(step(scheduler)[0]) == {"a": 1, "b": 1, "c": 14}
    assert lengths(step(scheduler)[0]) == {"a": 1, "b": 1, "c": 1}


def test_only_the_row_that_ends_the_prompt_is_sampled() -> None:
    scheduler = make(batch=4)
    scheduler.submit(request("a", 10))
    assert [step(scheduler)[0].rows[0].sample for _ in range(4)] == [False, False, True, True]


@pytest.mark.parametrize(
    ("params", "tokens", "reason"),
    [
        ({"max_tokens": 3}, [5, 5, 5], "length"),
        ({"stop_token_ids": (9,)}, [5, 9], "stop"),
        ({"stop_token_ids": (9,), "min_tokens": 2}, [9, 9, 9], "stop"),
        ({"stop_token_ids": (9,), "max_tokens": 2}, [5, 9], "stop"),
    ],
)
def test_reasons_to_finish(params: dict[str, object], tokens: list[int], reason: str) -> None:
    scheduler = make()
    scheduler.submit(request("a", 3, **params))
    ends = [step(scheduler, token)[1] for token in tokens]
    assert ends[:-1] == [[]] * (len(tokens) - 1)
    assert ends[-1] == [Finished(request_id="a", reason=reason)]
    assert not scheduler.is_live("a")
    assert scheduler.schedule() is None


def test_second_request_with_the_same_prompt_computes_one_token() -> None:
    scheduler = make()
    scheduler.submit(request("a", 10))
    step(scheduler)
    scheduler.submit(request("b", [ord("a") * 1000 + i for i in range(10)], max_tokens=1))
    plan, finished = step(scheduler)
    assert lengths(plan) == {"a": 1, "b": 1}
    assert finished == [Finished(request_id="b", reason="length", cached_tokens=9)]
    assert scheduler.stats().cached_prompt_tokens == 9


def test_replayed_request_computes_prompt_and_emitted_tokens_and_goes_on() -> None:
    scheduler = make()
    scheduler.submit(request("a", 4, emitted=[5, 5], max_tokens=3))
    plan, finished = step(scheduler)
    assert lengths(plan) == {"a": 6}
    assert finished == [Finished(request_id="a", reason="length")]


@pytest.mark.parametrize(
    ("frame", "reason"),
    [
        (request("a", 4, emitted=[5, 9], stop_token_ids=(9,)), "stop"),
        (request("a", 4, emitted=[5, 5], max_tokens=2), "length"),
    ],
)
def test_replayed_request_whose_end_was_lost_ends_at_once(frame: Submit, reason: str) -> None:
    scheduler = make()
    assert scheduler.submit(frame) == Finished(request_id="a", reason=reason)
    assert scheduler.schedule() is None


def test_short_of_memory_the_latest_arrival_gives_way_and_comes_back_first() -> None:
    # Two prompts of 8 fit into 20 granules; their outputs do not.
    scheduler = make(granules=20, context=20)
    for name in "ab":
        scheduler.submit(request(name, 8, max_tokens=10))
    while scheduler.stats().preemptions == 0:
        step(scheduler)
    scheduler.submit(request("c", 2, max_tokens=1))
    while (rows := lengths(step(scheduler)[0])).keys() == {"a"}:
        assert scheduler.stats().waiting == 2
    assert list(rows) in (["b"], ["b", "c"])
    while scheduler.has_work:
        step(scheduler)
    assert scheduler.stats().preemptions == 1


def test_preempted_request_resumes_from_its_own_slot() -> None:
    scheduler = make(granules=20, context=20)
    for name in "ab":
        scheduler.submit(request(name, 8, max_tokens=10))
    while scheduler.stats().preemptions == 0:
        step(scheduler)
    while "b" not in lengths(plan := step(scheduler)[0]):
        pass
    (row,) = [row for row in plan.rows if row.request_id == "b"]
    assert row.start > 0, "nothing of it was kept"


def test_cancel_between_schedule_and_complete_ends_with_the_step() -> None:
    scheduler = make()
    for name in "ab":
        scheduler.submit(request(name, 3, max_tokens=1))
    plan = scheduler.schedule()
    assert plan is not None
    assert scheduler.cancel("a")
    assert not scheduler.is_live("a")
    assert scheduler.complete(plan, {"b": 5}) == [Finished(request_id="b", reason="length")]
    assert scheduler.schedule() is None
    assert scheduler.stats().kv_used_tokens == 0
    scheduler.check_integrity()


def test_cancelled_while_waiting_is_gone_at_once() -> None:
    scheduler = make(running=1)
    for name in "ab":
        scheduler.submit(request(name, 3))
    step(scheduler)
    assert scheduler.cancel("b")
    assert scheduler.stats().waiting == 0
    assert not scheduler.cancel("b")
    assert not scheduler.cancel("never heard of")


def test_abandoned_step_is_planned_again() -> None:
    scheduler = make()
    scheduler.submit(request("a", 6))
    plan = scheduler.schedule()
    assert plan is not None
    scheduler.abandon(plan)
    again = scheduler.schedule()
    assert again is not None
    assert again.rows == plan.rows
    assert again.step == plan.step + 1


def test_logits_of_every_prompt_token_are_asked_for_once_without_reuse() -> None:
    scheduler = make(batch=8, max_scored_tokens=4)
    scheduler.submit(request("a", 10))
    step(scheduler)
    step(scheduler)
    scheduler.submit(request("b", [ord("a") * 1000 + i for i in range(10)], prompt_logprobs=2))
    rows = []
    while not rows or not rows[-1].sample:
        rows += [row for row in step(scheduler)[0].rows if row.request_id == "b"]
    assert [(row.start, len(row.token_ids), row.all_logits, row.sample) for row in rows] == [
        (0, 4, True, False), (4, 4, True, False), (8, 2, True, True),
    ]  # fmt: skip
    plan, _ = step(scheduler)
    assert not any(row.all_logits for row in plan.rows)


def test_scoring_only_ends_with_the_prompt() -> None:
    scheduler = make(batch=4)
    scheduler.submit(request("a", 6, max_tokens=0, prompt_logprobs=0))
    assert step(scheduler)[1] == []
    plan, finished = step(scheduler)
    assert not any(row.sample for row in plan.rows)
    assert finished == [Finished(request_id="a", reason="length")]


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (request("a", 0), "the prompt is empty"),
        (
            request("a", 99, max_tokens=2),
            "101 together, but the model's context is 100 tokens; ask for at most 1 output",
        ),
        (request("a", 120), "shorten the prompt"),
        (request("a", 30, max_tokens=30), "60 together, but this worker's whole KV memory holds 50 tokens"),
        (request("a", 3, max_tokens=0), "max_tokens is 0: that is allowed only with prompt_logprobs"),
        (request("a", 3, max_tokens=1, emitted=[1, 2]), "2 tokens were emitted already"),
        (request("a", [1, 200]), "the prompt contains token id 200; the model's ids are 0 to 99"),
        (request("a", [1, -1]), "the prompt contains token id -1"),
        (request("a", [1], logit_bias={100: 1.0}), "logit_bias contains token id 100"),
        (request("a", [1], temperature=-1.0), "temperature is -1.0; it must be 0"),
        (request("a", [1], temperature=float("nan")), "temperature is nan"),
        (request("a", [1], top_p=0.0), "top_p is 0.0; it must be above 0 and at most 1"),
        (request("a", [1], top_k=-1), "top_k is -1"),
        (request("a", [1], min_p=1.5), "min_p is 1.5"),
        (request("a", [1], min_tokens=9), "min_tokens is 9; it must be between 0 and max_tokens"),
        (request("a", [1], repetition_penalty=0.0), "repetition_penalty is 0.0"),
        (request("a", [1], seed=1 << 64), "seed is"),
        (request("a", [1], logit_bias={1: float("inf")}), "logit_bias is"),
    ],
)
def test_request_that_can_never_be_served_is_refused_with_the_reason(frame: Submit, message: str) -> None:
    scheduler = make(granules=50, vocab_size=100)
    if isinstance(frame.prompt_token_ids, list) and len(frame.prompt_token_ids) > 2:
        frame = Submit(
            request_id="a",
            prompt_token_ids=[1] * len(frame.prompt_token_ids),
            params=frame.params,
            emitted_token_ids=frame.emitted_token_ids,
        )
    with pytest.raises(RequestRejected) as refused:
        scheduler.submit(frame)
    assert message in str(refused.value)
    assert not scheduler.has_work


def test_request_id_in_use_is_refused() -> None:
    scheduler = make()
    scheduler.submit(request("a", 3))
    with pytest.raises(RequestRejected, match="'a' is being served already"):
        scheduler.submit(request("a", 3))


def test_steps_out_of_order_are_errors() -> None:
    scheduler = make()
    scheduler.submit(request("a", 3))
    plan = scheduler.schedule()
    assert plan is not None
    with pytest.raises(RuntimeError, match="step 1 is still out"):
        scheduler.schedule()
    with pytest.raises(ValueError, match=r"no token for \['a'\]"):
        scheduler.complete(plan, {})
    scheduler.complete(plan, {"a": 5})
    with pytest.raises(RuntimeError, match="step 1 was returned, but none is out"):
        scheduler.complete(plan, {"a": 5})


def test_step_too_small_for_all_that_run_is_refused() -> None:
    with pytest.raises(ValueError, match="max_batch_tokens is 4, below max_running"):
        SchedulerConfig(max_running=8, max_batch_tokens=4)


def test_stats_count_prefill_and_decode() -> None:
    scheduler = make(batch=4)
    scheduler.submit(request("a", 6, max_tokens=3))
    while scheduler.has_work:
        step(scheduler)
    stats = scheduler.stats()
    assert (stats.steps, stats.prefill_tokens, stats.decode_tokens) == (4, 6, 2)
    assert (stats.running, stats.waiting, stats.kv_used_tokens, stats.kv_capacity_tokens) == (0, 0, 0, 400)
