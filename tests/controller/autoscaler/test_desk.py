"""What people ask and change about the policy, and sizes by hand beside it. The loop is real, its cluster is played."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flexpert.controller.autoscaler.desk import PolicyDesk
from flexpert.controller.autoscaler.loop import Autoscaler
from flexpert.controller.autoscaler.override import HOLD_S
from flexpert.controller.errors import AdminError
from flexpert.controller.policy.types import Reason

from .played import POLICY, World


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


@pytest.fixture
def desk(world: World) -> PolicyDesk:
    return PolicyDesk(world.autoscaler, tell=world.cluster.tell)


async def by_hand(desk: PolicyDesk, world: World, workers: int, **settings: Any) -> dict[str, Any]:
    request_id = f"cli-{workers}-{world.clock()}"
    settings = {"owner": "ada", "for_s": None, "again": False, **settings}
    return await desk.by_hand(workers, lambda: world.cluster.scale(workers, request_id), **settings)


async def refusal(answer: Any) -> tuple[str, str]:
    with pytest.raises(AdminError) as caught:
        await answer
    return caught.value.code, caught.value.message


async def test_show_tells_what_is_in_use_and_what_stands_against_it(world: World, desk: PolicyDesk) -> None:
    await world.tick()
    found = await desk.answer("pause", {"for_s": 60.0, "owner": "ada"})
    assert (found["name"], found["mode"], found["pause"]) == ("chat", "Paused", {"owner": "ada", "left_s": 60.0})
    found = await desk.answer("mode", {"mode": "ADVISORY", "owner": "bob"})
    assert found["mode_by_hand"] == {"mode": "Advisory", "owner": "bob"} and found["mode"] == "Paused", (
        "a pause comes first"
    )
    found = await desk.answer("resume", {"owner": "ada"})
    assert (found["mode"], found["pause"], found["mode_by_hand"], found["leads"]) == ("Active", None, None, True)
    assert found["policy"]["spec"]["workers"]["max"] == 8 and found["text"] == POLICY
    assert found["last"]["decision_id"] == world.autoscaler.log.entries[-1].decision.decision_id
    told = world.cluster.told("policy")
    assert any("paused for 60 s by ada" in text for text in told)
    assert any("the pause by ada, mode Advisory by bob ended" in text for text in told)


async def test_a_mode_by_hand_stands_until_it_is_left_to_the_policy(world: World, desk: PolicyDesk) -> None:
    await desk.answer("mode", {"mode": "advisory"})
    world.cluster.used_tokens = 2400
    assert {decision.mode for decision in await world.run_for(60)} == {"Advisory"}
    await world.autoscaler.stop()
    world.autoscaler = world.make()
    assert (await world.tick()).mode == "Advisory"
    desk = PolicyDesk(world.autoscaler, tell=world.cluster.tell)
    await desk.answer("mode", {"mode": "policy"})
    assert (await world.tick()).mode == "Active"


async def test_what_makes_no_sense_is_refused(world: World, desk: PolicyDesk) -> None:
    assert (await refusal(desk.answer("mode", {"mode": "fast"})))[0] == "invalid"
    assert (await refusal(desk.answer("pause", {"for_s": 0.0})))[0] == "invalid"
    assert (await refusal(desk.answer("delete", {})))[0] == "invalid"
    assert (await refusal(desk.answer("decision", {"decision_id": "d-0"})))[0] == "not_found"
    code, message = await refusal(desk.answer("dry_run", {"text": POLICY}))
    assert code == "conflict" and "recorded" in message
    assert (await refusal(desk.answer("dry_run", {"text": "workers: 3"})))[0] == "invalid"


async def test_without_a_policy_the_answers_say_how_to_have_one(tmp_path: Path, world: World) -> None:
    bare = Autoscaler(world.cluster, directory=tmp_path / "bare", policy_path=None, run="r", clock=world.clock)
    desk = PolicyDesk(bare, tell=world.cluster.tell)
    bare.start()
    assert await desk.answer("show", {}) == {"active": False, "file": None, "problem": None}
    for word, arguments in (("pause", {"for_s": 1.0}), ("resume", {}), ("mode", {"mode": "active"})):
        code, message = await refusal(desk.answer(word, arguments))
        assert code == "not_found" and "--policy FILE" in message
    assert (await refusal(desk.answer("put", {})))[0] == "invalid"
    assert await desk.by_hand(3, lambda: world.cluster.scale(3, "r"), owner="ada", for_s=None, again=False)
    assert bare.controls.workers == 0, "no policy, nothing to stand against"
    await desk.answer("put", {"text": POLICY, "owner": "ada"})
    assert bare._task is not None, "a policy that is put begins the loop"
    assert (await desk.answer("show", {}))["origin"] == "ada"
    await bare.stop()


async def test_a_policy_with_errors_is_refused_and_the_old_one_stays(world: World, desk: PolicyDesk) -> None:
    code, message = await refusal(desk.answer("put", {"text": POLICY.replace("max: 8", "max: 0"), "owner": "ada"}))
    assert code == "invalid" and "line 6" in message and "stays" in message
    assert world.autoscaler.policy is not None and world.autoscaler.policy.spec.workers.max == 8
    found = await desk.answer("put", {"text": POLICY.replace("max: 8", "max: 5"), "owner": "ada"})
    assert (found["workers"]["max"], found["origin"]) == (5, "ada")
    await world.tick()
    assert (await desk.answer("show", {}))["workers"]["max"] == 5, "until the file changes"
    world.rewrite("max: 8", "max: 7")
    await world.tick()
    assert (await desk.answer("show", {}))["workers"]["max"] == 7
    assert (await desk.answer("put", {}))["workers"]["max"] == 7


async def test_decisions_are_listed_newest_first(world: World, desk: PolicyDesk) -> None:
    world.cluster.used_tokens = 2400
    decisions = await world.run_for(60)
    found = (await desk.answer("decisions", {"limit": 3}))["decisions"]
    assert [one["decision_id"] for one in found] == [one.decision_id for one in reversed(decisions[-3:])]
    changes = (await desk.answer("decisions", {"changes": True}))["decisions"]
    assert len(changes) == 1
    explained = await desk.answer("decision", {"decision_id": changes[0]["decision_id"]})
    assert explained["request_id"] == world.cluster.orders[0][1] and explained["transition_id"] == "t-1"
    assert explained["proposals"] and explained["outcome"] is None


async def test_dry_run_tries_another_policy_on_the_own_record(world: World, desk: PolicyDesk) -> None:
    world.cluster.used_tokens = 2400
    await world.run_for(300)
    found = await desk.answer("dry_run", {"text": POLICY.replace("max: 8", "max: 2")})
    assert [change["to_workers"] for change in found["changes"]] == [2]
    assert found["device_hours"] < found["recorded_device_hours"]
    assert 0 < found["attainment_unknown_share"] < 1
    assert world.cluster.orders == [world.cluster.orders[0]], "nothing was ordered for it"


# Sizes by hand


async def test_a_size_by_hand_is_an_override_with_owner_and_end(world: World, desk: PolicyDesk) -> None:
    await world.tick()
    assert (await by_hand(desk, world, 3))["state"] == "running"
    override = (await desk.answer("show", {}))["override"]
    assert override == {"workers": 3, "owner": "ada", "left_s": HOLD_S}
    assert any("3 workers by ada for 900 s" in text for text in world.cluster.told("policy"))
    await world.run_for(600)
    assert world.cluster.workers == 3 and len(world.cluster.orders) == 1, "no fight"
    assert world.autoscaler.last is not None and world.autoscaler.last.reason is Reason.OVERRIDE
    await world.run_for(HOLD_S)
    assert world.cluster.workers == 1


async def test_resume_ends_an_override_at_once(world: World, desk: PolicyDesk) -> None:
    await world.tick()
    await by_hand(desk, world, 3, for_s=7200.0)
    await world.run_for(300)
    await desk.answer("resume", {"owner": "ada"})
    await world.run_for(300)
    assert world.cluster.workers == 1


async def test_a_size_that_the_policy_would_undo_is_refused_with_nothing_done(world: World, desk: PolicyDesk) -> None:
    for workers in (0, 9):
        code, message = await refusal(by_hand(desk, world, workers))
        assert code == "conflict" and "keeps 1 to 8 workers" in message and "pause" in message
    assert world.cluster.orders == []
    await desk.answer("pause", {"for_s": 60.0})
    await by_hand(desk, world, 9)
    assert world.cluster.orders[0][0] == 9 and world.autoscaler.controls.workers == 0, (
        "paused: nothing to stand against"
    )


async def test_bounds_of_the_hour_hold_for_hands_too(tmp_path: Path) -> None:
    window = "    - {type: schedule, windows: [{start: '* * * * *', end: '0 0 1 1 *', max: 2}]}\n"
    world = World(tmp_path, text=POLICY.replace("  behavior:", f"{window}  behavior:"))
    desk = PolicyDesk(world.autoscaler, tell=world.cluster.tell)
    code, message = await refusal(by_hand(desk, world, 3))
    assert code == "conflict" and "keeps 1 to 2 workers now" in message


async def test_a_refused_size_overrides_nothing(world: World, desk: PolicyDesk) -> None:
    world.cluster.refusal = AdminError("conflict", "another transition runs")
    assert (await refusal(by_hand(desk, world, 3)))[0] == "conflict"
    assert world.autoscaler.controls.workers == 0


async def test_the_same_request_again_does_not_renew_an_override(world: World, desk: PolicyDesk) -> None:
    await by_hand(desk, world, 3, again=True)
    assert world.autoscaler.controls.workers == 0


async def test_an_override_survives_a_restart(world: World, desk: PolicyDesk) -> None:
    await by_hand(desk, world, 3)
    await world.autoscaler.stop()
    world.autoscaler = world.make()
    assert world.autoscaler.controls.override(world.clock()) is not None
