"""The live loop on a played cluster: what it orders, when it only looks on, what it survives. Virtual time; no socket, no Ray."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from flexpert.controller.autoscaler.lease import Lease
from flexpert.controller.autoscaler.loop import OUTCOME_AFTER_S
from flexpert.controller.errors import AdminError
from flexpert.controller.policy import record
from flexpert.controller.policy.types import Reason

from .played import POLICY, World


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


async def overload(world: World) -> None:
    world.cluster.used_tokens = 2400  # three workers at 80%
    await world.run_for(15)


async def test_load_grows_the_cluster_and_its_end_shrinks_it(world: World) -> None:
    await world.run_for(30)
    assert world.cluster.orders == []
    await overload(world)
    assert [workers for workers, _ in world.cluster.orders] == [3]
    await world.run_for(30)
    assert world.cluster.workers >= 3
    world.cluster.used_tokens = 0
    await world.run_for(600)
    assert world.cluster.workers == 1


async def test_an_order_carries_the_id_of_its_decision(world: World) -> None:
    await overload(world)
    ((_, request_id),) = world.cluster.orders
    ordered = [entry for entry in world.autoscaler.log.entries if entry.decision.action is not None]
    assert [f"policy-{entry.decision.decision_id}" for entry in ordered] == [request_id]
    assert ordered[0].transition_id == "t-1"


async def test_an_order_whose_answer_is_lost_is_the_same_one_when_it_is_repeated(world: World) -> None:
    taken = world.cluster.scale

    async def lost(workers: int, request_id: str) -> dict[str, Any]:
        await taken(workers, request_id)
        world.cluster.progress = None  # and nobody sees it begin
        raise TimeoutError

    world.cluster.scale = lost  # type: ignore[method-assign]
    world.cluster.used_tokens = 2400
    await world.run_for(30)
    orders = world.cluster.orders
    assert len(orders) > 2
    assert len(set(orders)) == 1


async def test_a_transition_of_somebody_else_is_waited_for(world: World) -> None:
    world.cluster.join_s = None
    world.cluster.begin("t-9", 2, kind="repair")
    world.cluster.used_tokens = 2400
    assert {decision.reason for decision in await world.run_for(60)} == {Reason.IN_FLIGHT}
    assert world.cluster.orders == []


async def test_growth_that_never_comes_is_given_up(tmp_path: Path) -> None:
    world = World(tmp_path, text=POLICY + "  growTimeout: 30s\n", join_s=None)
    await overload(world)
    await world.run_for(40)
    assert world.cluster.given_up == ["t-1"]
    assert any("gives up t-1" in text for text in world.cluster.told("scaling"))


async def test_growth_that_has_gone_too_far_to_be_given_up_is_left_alone(tmp_path: Path) -> None:
    world = World(tmp_path, text=POLICY + "  growTimeout: 30s\n", join_s=None)
    world.cluster.give_up = lambda transition_id: False  # type: ignore[method-assign]
    await overload(world)
    await world.run_for(40)
    given_up = next(
        one for one in world.autoscaler.log.entries if one.decision.action and one.decision.action.kind == "abort"
    )
    assert "too far" in given_up.refused
    assert not any("gives up" in text for text in world.cluster.told("scaling"))


async def test_a_refused_order_is_told_and_not_hammered(world: World) -> None:
    world.cluster.refusal = AdminError("impossible", "3 workers cannot hold the model")
    await overload(world)
    await world.run_for(30)
    assert len(world.cluster.orders) == 1
    assert any("refused: 3 workers cannot hold" in text for text in world.cluster.told("scaling"))
    assert world.autoscaler.last is not None and world.autoscaler.last.reason is Reason.RETRY_LATER


async def test_a_refused_order_stays_with_its_decision_through_a_restart(world: World) -> None:
    world.cluster.refusal = AdminError("impossible", "3 workers cannot hold the model")
    await overload(world)
    ((_, request_id),) = world.cluster.orders
    decision_id = request_id.removeprefix("policy-")
    world.autoscaler = world.make()
    entry = world.autoscaler.log.find(decision_id)
    assert entry is not None and entry.to_json()["refused"] == "3 workers cannot hold the model"
    await world.run_for(OUTCOME_AFTER_S + 20)
    assert entry.outcome is not None and entry.outcome.transition == "failed"
    assert "refused: 3 workers cannot hold" in entry.outcome.text


async def test_a_refusal_after_earlier_transitions_counts_as_well(world: World) -> None:
    world.autoscaler.controls.hold(2, until_s=world.clock.now_s + 30, owner="ada")
    await world.run_for(30)
    assert world.cluster.workers == 2
    world.cluster.refusal = AdminError("impossible", "no memory")
    world.cluster.used_tokens = 4000
    decisions = await world.run_for(50)
    assert len(world.cluster.orders) == 2, "one that went through, one that was refused"
    assert decisions[-1].reason is Reason.RETRY_LATER


async def test_a_conflict_is_waited_out_with_the_same_order(world: World) -> None:
    world.cluster.refusal = AdminError("conflict", "a repair comes first")
    await overload(world)
    world.cluster.refusal = None
    ordered = next(one for one in world.autoscaler.log.entries if one.decision.action is not None)
    assert ordered.refused == "a repair comes first"
    await world.run_for(20)
    assert len({request for _, request in world.cluster.orders}) == 1
    assert world.cluster.workers == 3
    assert (ordered.transition_id, ordered.refused) == ("t-1", "")


@pytest.mark.parametrize("mode", ["Advisory", "Paused"])
async def test_other_modes_never_order_anything(tmp_path: Path, mode: str) -> None:
    world = World(tmp_path, text=POLICY + f"  mode: {mode}\n")

    async def forbidden(workers: int, request_id: str) -> dict[str, Any]:
        raise AssertionError(f"{mode} ordered {workers} workers")

    world.cluster.scale = forbidden  # type: ignore[method-assign]
    world.cluster.give_up = forbidden  # type: ignore[method-assign, assignment]
    world.cluster.used_tokens = 2400
    decisions = await world.run_for(120)
    world.cluster.used_tokens = 0
    decisions += await world.run_for(300)
    assert all(decision.action is None for decision in decisions)
    assert any(decision.would is not None for decision in decisions), "it says what it would do"


async def test_a_silent_gateway_never_shrinks_the_cluster_and_is_told_once(world: World) -> None:
    await overload(world)
    await world.run_for(60)
    world.cluster.used_tokens = 0
    world.cluster.gateway = ConnectionError("gone")
    decisions = await world.run_for(600)
    assert world.cluster.workers == 3
    assert decisions[-1].reason is Reason.STALE_DATA
    assert len([text for text in world.cluster.told("scaling") if "stale" in text.lower()]) == 1


async def test_a_gateway_that_hangs_holds_no_tick_up(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flexpert.controller.autoscaler.loop.LOAD_TIMEOUT_S", 0.01)

    async def hang(**_: Any) -> dict[str, Any]:
        await asyncio.Event().wait()
        return {}

    world.cluster.load = hang  # type: ignore[method-assign]
    assert (await world.tick()).reason is Reason.MISSING_DATA


async def test_nothing_is_decided_before_the_cluster_serves(world: World) -> None:
    world.cluster.started = False
    world.clock.now_s += 5
    assert await world.autoscaler.tick() is None
    assert world.cluster.asked == []


async def test_the_gateway_judges_by_the_slo_of_the_policy_in_use(world: World) -> None:
    await world.tick()
    world.rewrite("ttft: 500ms", "ttft: 2s")
    await world.tick()
    assert [asked["slo"] for asked in world.cluster.asked] == [(0.5, None), (2.0, None)]


# Reload


async def test_a_changed_file_is_in_use_from_the_next_tick_on(world: World) -> None:
    await world.tick()
    world.rewrite("min: 1", "min: 2")
    decision = await world.tick()
    assert (decision.reason, world.cluster.orders[-1][0]) == (Reason.BELOW_MIN, 2)
    assert any("2 to 8 workers" in text for text in world.cluster.told("policy"))


async def test_a_bad_reload_keeps_the_old_policy_says_so_once_and_can_be_mended(world: World) -> None:
    await world.tick()
    world.rewrite("min: 1", "minn: 1")
    await world.run_for(15)
    told = [text for text in world.cluster.told("policy") if "minn" in text]
    assert len(told) == 1 and "line 6" in told[0] and "chat" in told[0] and "stays in use" in told[0]
    assert "minn" in world.autoscaler.source.problem
    world.rewrite("minn: 1", "min: 2")
    await world.tick()
    assert world.autoscaler.source.problem == ""
    assert world.cluster.orders[-1][0] == 2


async def test_a_file_that_is_gone_keeps_the_old_policy(world: World) -> None:
    await world.tick()
    world.file.unlink()
    await world.run_for(15)
    assert len([text for text in world.cluster.told("policy") if "cannot be read" in text]) == 1
    assert world.autoscaler.policy is not None


async def test_a_file_that_is_touched_but_the_same_changes_nothing(world: World) -> None:
    await world.tick()
    told = len(world.cluster.events)
    world.write(POLICY)
    await world.tick()
    assert len(world.cluster.events) == told


# Restart


async def test_a_restarted_controller_goes_on_and_does_not_shrink_for_want_of_history(world: World) -> None:
    await overload(world)
    await world.run_for(60)
    before = world.autoscaler.state
    world.cluster.used_tokens = 0
    await world.autoscaler.stop()
    world.clock.now_s += 20
    world.autoscaler = world.make()
    assert world.autoscaler.state == before
    decisions = await world.run_for(50)
    assert world.cluster.workers == 3, [decision.reason for decision in decisions]
    assert Reason.SCALE_DOWN_REFUSED_HISTORY in {decision.reason for decision in decisions}
    assert len({entry.decision.decision_id for entry in world.autoscaler.log.entries}) == len(
        world.autoscaler.log.entries
    )
    await world.run_for(600)
    assert world.cluster.workers == 1


async def test_a_controller_that_died_while_it_ordered_orders_nothing_twice(world: World) -> None:
    await overload(world)
    world.cluster.join_s = None
    world.autoscaler.leads = False  # killed: it releases nothing
    world.autoscaler = world.make()
    await world.run_for(30)
    assert len(set(world.cluster.orders)) == 1


async def test_a_bad_file_does_not_take_the_policy_from_a_restarted_controller(world: World) -> None:
    await world.tick()
    world.write("nonsense")
    await world.tick()
    await world.autoscaler.stop()
    world.autoscaler = world.make()
    assert world.autoscaler.policy is not None
    assert world.autoscaler.policy.metadata.name == "chat"
    assert world.autoscaler.source.problem


async def test_a_clock_that_was_put_back_stops_nothing(world: World) -> None:
    await overload(world)
    await world.autoscaler.stop()
    world.clock.now_s -= 86_400
    world.autoscaler = world.make()
    assert world.autoscaler.policy is not None
    world.cluster.progress = None
    world.cluster.used_tokens = 6000
    world.autoscaler.lease.release()
    await world.run_for(30)
    assert len(world.cluster.orders) >= 2


async def test_a_full_disk_only_stops_the_orders(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any, **settings: Any) -> None:
        raise OSError(28, "No space left on device")

    await world.tick()
    monkeypatch.setattr("flexpert.controller.autoscaler.loop.write_bytes", full)
    monkeypatch.setattr("flexpert.controller.autoscaler.lease.write_json", full)
    world.cluster.used_tokens = 2400
    assert {decision.mode for decision in await world.run_for(30)} == {"Advisory"}
    assert any("No space left" in text for text in world.cluster.told("policy"))
    monkeypatch.undo()
    await world.run_for(15)
    assert len(world.cluster.orders) == 1


async def test_another_run_begins_without_what_the_last_one_left(world: World) -> None:
    await overload(world)
    world.autoscaler.controls.pause(until_s=world.clock.now_s + 1000, owner="ada")
    world.autoscaler.keep()
    await world.autoscaler.stop()
    world.autoscaler = world.make(run="run-2")
    assert world.autoscaler.state.tick == 0
    assert world.autoscaler.log.entries == []
    assert world.autoscaler.controls.paused_until_s == 0.0


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b'{"run": "run-1"}',
        b'{"run": "run-1", "state": 7, "controls": []}',
        b'{"run": "run-1", "source": {"text": 3}}',
    ],
)
async def test_a_state_that_cannot_be_read_is_begun_anew(world: World, content: bytes) -> None:
    await world.tick()
    await world.autoscaler.stop()
    (world.directory / "autoscaler" / "state.json").write_bytes(content)
    world.autoscaler = world.make()
    await world.tick()
    assert world.autoscaler.policy is not None


# What people say


async def test_a_pause_ends_by_itself_and_survives_a_restart(world: World) -> None:
    world.autoscaler.controls.pause(until_s=world.clock.now_s + 60, owner="ada")
    await overload(world)
    await world.autoscaler.stop()
    world.autoscaler = world.make()
    assert {decision.reason for decision in await world.run_for(40)} == {Reason.PAUSED}
    assert world.cluster.orders == []
    await world.run_for(20)
    assert [workers for workers, _ in world.cluster.orders] == [3]
    assert any("the pause by ada is over" in text for text in world.cluster.told("policy"))


async def test_a_size_by_hand_holds_against_the_signals_until_it_ends(world: World) -> None:
    world.autoscaler.controls.hold(2, until_s=world.clock.now_s + 400, owner="ada")
    decisions = await world.run_for(350)
    assert world.cluster.workers == 2
    assert any(decision.reason is Reason.OVERRIDE and "ada" in decision.text for decision in decisions)
    assert {workers for workers, _ in world.cluster.orders} == {2}
    await world.run_for(400)
    assert world.cluster.workers == 1


# Lease


async def test_without_the_lease_it_only_looks_on(world: World) -> None:
    other = Lease(world.directory / "autoscaler" / "lease.json", owner="other", period_s=60)
    assert other.renew(world.clock.now_s)
    world.cluster.used_tokens = 2400
    decisions = await world.run_for(50)
    assert world.cluster.orders == []
    assert {decision.mode for decision in decisions} == {"Advisory"}
    await world.run_for(30)
    assert [workers for workers, _ in world.cluster.orders] == [3], "the lease ran out"
    assert not other.renew(world.clock.now_s)


async def test_a_lease_that_was_taken_away_is_told(world: World) -> None:
    await world.tick()
    world.autoscaler.lease.release()
    other = Lease(world.directory / "autoscaler" / "lease.json", owner="other", period_s=60)
    assert other.renew(world.clock.now_s)
    assert (await world.tick()).mode == "Advisory"
    assert any("other has the lease" in text for text in world.cluster.told("policy"))


# The record


async def test_what_was_recorded_is_decided_again_to_the_byte(world: World) -> None:
    await overload(world)
    await world.run_for(60)
    world.rewrite("target: 0.8", "target: 0.5")
    await world.run_for(60)
    await world.autoscaler.stop()
    world.autoscaler = world.make()
    world.autoscaler.controls.set_mode("Advisory", owner="ada")
    await world.run_for(OUTCOME_AFTER_S + 60)
    lines = world.autoscaler.log.lines()
    assert len(lines) > 50
    assert list(record.differences(lines)) == []


async def test_every_decision_gets_its_outcome_five_minutes_later(world: World) -> None:
    first = await world.tick()
    await overload(world)
    await world.run_for(OUTCOME_AFTER_S - 20)
    entry = world.autoscaler.log.find(first.decision_id)
    assert entry is not None and entry.outcome is None
    await world.run_for(40)
    assert entry.outcome is not None
    assert (entry.outcome.workers, entry.outcome.met, entry.outcome.missed) == (3, 100, 0)
    ordered = next(one for one in world.autoscaler.log.entries if one.decision.action is not None)
    assert ordered.outcome is not None and ordered.outcome.transition == "done"
    world.autoscaler = world.make()
    again = world.autoscaler.log.find(first.decision_id)
    assert again is not None and again.outcome == entry.outcome


# By itself


async def test_the_loop_survives_a_tick_that_fails_and_tells_it_once(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = 0

    async def fail() -> None:
        nonlocal ticks
        ticks += 1
        raise ValueError("broken")

    async def no_sleep(seconds: float) -> None:
        await asyncio.sleep(0)

    monkeypatch.setattr(world.autoscaler, "tick", fail)
    world.autoscaler._sleep = no_sleep
    del world.autoscaler.begin  # type: ignore[method-assign]
    world.autoscaler.begin()
    async with asyncio.timeout(10):
        while ticks < 3:
            await asyncio.sleep(0)
    await world.autoscaler.stop()
    assert len([text for text in world.cluster.told("policy") if "ValueError: broken" in text]) == 1


async def test_without_a_policy_no_loop_runs(tmp_path: Path, world: World) -> None:
    from flexpert.controller.autoscaler.loop import Autoscaler

    idle = Autoscaler(world.cluster, directory=tmp_path / "idle", policy_path=None, run="r", clock=world.clock)
    idle.start()
    assert idle._task is None
    assert not (tmp_path / "idle").exists()
    await idle.stop()
