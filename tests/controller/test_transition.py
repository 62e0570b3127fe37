"""Stories of transitions, one behaviour each; what may happen in any order is in test_transition_chaos."""

from __future__ import annotations

import json

import pytest

from flexpert.controller.planner import groups_held
from flexpert.controller.transition import Transitions
from flexpert.controller.transition_types import (
    Abort,
    Answer,
    Commit,
    Committed,
    Deadline,
    Expired,
    Failed,
    GiveProcess,
    Instruction,
    KillProcess,
    LoadMeasured,
    ManagerDied,
    MemberDied,
    Moved,
    Note,
    Prepare,
    Prepared,
    ProcessReady,
    Publish,
    Release,
    Request,
    Retire,
    StartWorker,
    Trouble,
    Withdraw,
    WorkerStarted,
)

from .transition_world import Dies, World, config


def serving(workers: int, **options: object) -> World:
    """A cluster of so many workers, at rest."""
    world = World(config(**options))
    assert world.request("boot", workers).code == ""
    world.settle()
    assert world.machine.healthy and len(world.machine.state.members) == workers
    return world


def process_of(world: World, worker: str) -> str:
    return world.machine.state.live[worker].process


def orders(world: World, kind: type) -> dict[str, Instruction]:
    """What is to be done now, by worker."""
    return {worker: order for (worker, name), order in world.orders.items() if name == kind.__name__}


def answer_all(world: World, kind: type) -> None:
    for order in list(orders(world, kind).values()):
        world.answer(order)


def draining(world: World) -> tuple[str, ...]:
    assert world.told is not None
    return world.told.draining


def serve(world: World) -> list[str]:
    assert world.told is not None
    return [found.worker_id for found in world.told.serving]


def start_joiners(world: World) -> None:
    answer_all(world, GiveProcess)
    answer_all(world, StartWorker)


def test_boot_starts_all_then_prepares_then_commits() -> None:
    world = World()
    assert world.request("boot", 2) == Answer("r0", "t-1")
    assert set(orders(world, GiveProcess)) == {"worker-0", "worker-1"}
    answer_all(world, GiveProcess)
    starts = orders(world, StartWorker)
    assert [order.draft.number for order in starts.values()] == [1, 1]
    answer_all(world, StartWorker)
    assert world.told is None, "nobody serves before the commit"
    answer_all(world, Prepare)
    answer_all(world, Commit)
    assert serve(world) == ["worker-0", "worker-1"]
    assert world.finished["t-1"].state == "done"
    assert world.machine.current.number == 1


def test_survivors_serve_on_while_a_joiner_starts_and_get_its_address() -> None:
    world = serving(1)
    world.request("scale", 2)
    answer_all(world, GiveProcess)
    assert not orders(world, Prepare)
    answer_all(world, StartWorker)
    prepares = orders(world, Prepare)
    assert set(prepares) == {"worker-0", "worker-1"}
    epoch = prepares["worker-0"].epoch
    assert [member.worker_id for member in epoch.members] == ["worker-0", "worker-1"]
    assert epoch.members[1].exchange_address == f"x:{prepares['worker-1'].process}"
    assert prepares["worker-0"].epoch == prepares["worker-1"].epoch
    [source] = prepares["worker-1"].sources
    assert source.manager_socket == "m:worker-0" and len(source.groups) == 8
    assert prepares["worker-0"].sources == (), "a survivor that grows smaller fetches nothing"
    assert serve(world) == ["worker-0"]
    answer_all(world, Prepare)
    answer_all(world, Commit)
    assert serve(world) == ["worker-0", "worker-1"]
    assert set(orders(world, Retire)) == {"worker-0"}


def test_a_drained_middle_rank_gets_no_new_requests_and_leaves_last() -> None:
    world = serving(3)
    world.request("drain", "worker-1")
    prepares = orders(world, Prepare)
    assert prepares["worker-1"].epoch.rank_of("worker-1") is None, "the leaver knows that it leaves"
    assert draining(world) == ("worker-1",)
    answer_all(world, Prepare)
    assert serve(world) == ["worker-0", "worker-1", "worker-2"]
    answer_all(world, Commit)
    assert serve(world) == ["worker-0", "worker-2"] and draining(world) == ()
    assert set(orders(world, Release)) == {"worker-1"}
    world.settle()
    assert world.machine.healthy
    assert "worker-1" not in world.machine.state.live


def test_a_drained_workers_name_comes_back_with_the_next_incarnation() -> None:
    world = serving(3)
    world.request("drain", "worker-1")
    world.settle()
    world.request("scale", 3)
    world.settle()
    assert world.machine.state.members == ("worker-0", "worker-1", "worker-2")
    assert world.machine.current.members[1].incarnation == 2


def test_shrinks_below_the_size_it_was_started_with() -> None:
    world = serving(3)
    world.request("scale", 1)
    world.settle()
    assert world.machine.state.members == ("worker-0",)
    assert all(ranks == (0,) for layer in world.machine.current.holders for ranks in layer)


def test_scale_to_the_present_size_is_done_at_once() -> None:
    world = serving(2)
    answer = world.request("scale", 2)
    assert answer.code == "" and world.finished[answer.transition_id].state == "done"
    assert world.machine.current.number == 1


def test_a_request_id_names_one_transition_for_ever() -> None:
    world = serving(1)
    first = world.request("scale", 2, "again")
    assert world.request("scale", 2, "again") == first
    world.settle()
    assert world.request("scale", 2, "again") == first, "also when it ended"
    assert world.machine.progress(first.transition_id).state == "done"
    other = world.request("scale", 3, "again")
    assert other.code == "conflict" and '"scale 2"' in other.message


@pytest.mark.parametrize(
    ("kind", "target", "code", "says"),
    [
        ("scale", 0, "impossible", "scale to at least 1"),
        ("scale", -2, "impossible", "scale to at least 1"),
        ("scale", 5, "impossible", "scale to 4 or fewer"),
        ("drain", "worker-9", "not_found", "worker-0, worker-1 serve"),
        ("drain", "worker-3", "not_found", "worker-0, worker-1 serve"),
        ("boot", 2, "conflict", "scale it"),
        ("dance", 2, "invalid", "boot, scale and drain"),
    ],
)
def test_what_cannot_be_is_refused_with_what_can(kind: str, target: int | str, code: str, says: str) -> None:
    world = serving(2)
    before = world.machine.snapshot()
    answer = world.request(kind, target)
    assert (answer.code, answer.transition_id) == (code, "")
    assert says in answer.message
    assert world.machine.snapshot() == before, "nothing changed"


def test_devices_bound_the_workers_where_there_are_fewer_than_allowed() -> None:
    world = serving(1, devices=2, max_workers=8)
    assert "there are 2 devices" in world.request("scale", 3).message


def test_the_last_worker_cannot_be_drained() -> None:
    world = serving(1)
    answer = world.request("drain", "worker-0")
    assert answer.code == "impossible" and "last worker" in answer.message


def test_below_what_memory_allows_says_what_is_needed_and_what_is_there() -> None:
    world = serving(3, memory_bytes=160)  # each has room for 6 of 16 slabs
    answer = world.request("scale", 2)
    assert answer.code == "impossible"
    assert "need 160 bytes and 120 bytes are there" in answer.message
    assert "3 workers can" in answer.message
    assert world.request("drain", "worker-1").code == "impossible"


def test_memory_that_no_number_of_workers_has_is_said_at_boot() -> None:
    world = World(config(memory_bytes=110))
    assert "no number of workers up to 4 can: raise --memory" in world.request("boot", 1).message


def test_during_another_transition_a_request_is_refused_with_its_phase_and_deadline() -> None:
    world = serving(2)
    world.request("scale", 3)
    answer = world.request("scale", 1)
    assert answer.code == "conflict"
    for part in ("t-2", "scale 3", "phase start", "600 s"):
        assert part in answer.message
    world.settle()
    assert world.request("scale", 1).code == ""


def test_during_a_repair_that_pauses_a_request_is_refused() -> None:
    world = serving(2)
    world.happen(Dies(process_of(world, "worker-1")))
    assert "repair" in world.request("scale", 1).message


def test_a_dead_worker_is_replaced_with_the_next_incarnation_and_the_same_placement() -> None:
    world = serving(3)
    before = world.machine.current
    world.happen(Dies(process_of(world, "worker-1")))
    assert serve(world) == ["worker-0", "worker-2"]
    world.settle()
    now = world.machine.current
    assert now.holders == before.holders
    assert [member.incarnation for member in now.members] == [1, 2, 1]
    assert world.machine.progress().kind == "repair"
    assert world.machine.progress().total_bytes == 0, "its manager has everything"


def test_where_no_process_comes_in_time_the_others_go_on_and_it_rejoins_later() -> None:
    world = serving(3)
    world.happen(Dies(process_of(world, "worker-1")))
    world.send(Expired(world.deadline))
    prepares = orders(world, Prepare)
    assert set(prepares) == {"worker-0", "worker-2"}
    pulled = {source.manager_socket for order in prepares.values() for source in order.sources}
    assert pulled == {"m:worker-1"}, "the dead worker's manager lives and is read"
    answer_all(world, Prepare)
    answer_all(world, Commit)
    answer_all(world, Retire)
    assert world.machine.state.members == ("worker-0", "worker-2")
    assert world.machine.progress().members[1].role == "left out"
    world.settle()
    assert world.machine.state.members == ("worker-0", "worker-1", "worker-2")
    assert world.machine.progress().kind == "rejoin"


def test_without_memory_for_the_rest_a_repair_waits_for_its_process() -> None:
    world = serving(3, memory_bytes=160)
    world.happen(Dies(process_of(world, "worker-1")))
    for _ in range(3):
        world.send(Expired(world.deadline))
        assert not orders(world, Prepare)
        assert set(orders(world, GiveProcess)) == {"worker-1"}, "asked again"
    world.settle()
    assert world.machine.healthy and len(world.machine.state.members) == 3


def test_a_scale_takes_the_one_that_was_left_out_first() -> None:
    world = serving(3, memory_bytes=1000)
    world.happen(Dies(process_of(world, "worker-1")))
    world.send(Expired(world.deadline))
    for kind in (Prepare, Commit, Retire):
        answer_all(world, kind)
    world.request("scale", 3)
    assert set(orders(world, GiveProcess)) == {"worker-1"}
    world.settle()
    assert world.machine.healthy and not world.machine.state.missing


def test_a_scale_without_the_one_that_was_left_out_gives_it_up() -> None:
    world = serving(3)
    world.happen(Dies(process_of(world, "worker-1")))
    world.send(Expired(world.deadline))
    for kind in (Prepare, Commit, Retire):
        answer_all(world, kind)
    world.request("scale", 1)
    assert Withdraw("worker-1") in world.sent
    world.settle()
    assert world.machine.state.members == ("worker-0",)


def left_out(world: World, worker: str) -> None:
    """It dies, no process comes in time, and the others go on."""
    world.happen(Dies(process_of(world, worker)))
    world.send(Expired(world.deadline))
    for kind in (Prepare, Commit, Retire):
        answer_all(world, kind)
    assert worker in world.machine.state.missing


def test_a_scale_to_those_that_serve_gives_up_the_one_that_was_left_out() -> None:
    world = serving(3)
    left_out(world, "worker-1")
    epoch = world.machine.current.number
    answer = world.request("scale", 2)
    assert Withdraw("worker-1") in world.sent
    assert (answer.code, world.machine.progress(answer.transition_id).epoch) == ("", epoch)
    world.settle()
    assert world.machine.state.members == ("worker-0", "worker-2")


def test_one_that_was_left_out_may_be_drained() -> None:
    world = serving(3)
    left_out(world, "worker-1")
    assert world.request("drain", "worker-1").code == ""
    assert Withdraw("worker-1") in world.sent
    world.settle()
    assert world.machine.state.members == ("worker-0", "worker-2")


def test_a_return_that_fails_is_tried_again() -> None:
    world = serving(3)
    left_out(world, "worker-1")
    world.answer(orders(world, GiveProcess)["worker-1"])
    assert world.machine.progress().kind == "rejoin"
    world.happen(Dies(orders(world, StartWorker)["worker-1"].process))
    world.settle()
    assert world.machine.state.members == ("worker-0", "worker-1", "worker-2")


def test_a_return_that_fails_for_good_is_told() -> None:
    world = serving(3)
    left_out(world, "worker-1")
    world.answer(orders(world, GiveProcess)["worker-1"])
    start = orders(world, StartWorker)["worker-1"]
    world.send(Failed("worker-1", start.process, "start", "no memory", permanent=True))
    world.settle()
    assert world.machine.state.members == ("worker-0", "worker-2") and world.machine.healthy
    assert any(note.kind == "left_out" and "scale to bring it back" in note.text for note in world.notes)


def test_no_process_for_one_that_is_left_out_is_told_while_the_repair_runs() -> None:
    world = serving(3)
    world.happen(Dies(process_of(world, "worker-1")))
    world.send(Expired(world.deadline))
    world.send(Failed("worker-1", "", "process", "the node is gone"))
    assert any("stays out: the node is gone" in note.text for note in world.notes)
    world.orders.pop(("worker-1", "GiveProcess"), None)
    world.settle()
    assert world.machine.state.members == ("worker-0", "worker-2") and not world.machine.state.missing


def test_a_lost_manager_ends_its_worker_and_the_replacement_reloads_its_share() -> None:
    world = serving(2)
    process = process_of(world, "worker-1")
    world.happen(ManagerDied("worker-1", "killed"))
    assert any(isinstance(order, KillProcess) and order.process == process for order in world.sent)
    assert world.machine.progress().kind == "reload"
    start_joiners(world)
    assert orders(world, Prepare)["worker-1"].sources == (), "nobody else has them: from disk"
    assert world.machine.progress().total_bytes == 80
    world.settle()
    assert world.machine.healthy


def test_nobody_is_sent_to_a_manager_that_died_since_the_plan_was_made() -> None:
    world = serving(3)
    for worker in ("worker-1", "worker-2"):
        world.happen(Dies(process_of(world, worker)))
    world.answer(orders(world, GiveProcess)["worker-2"])
    world.send(Expired(world.deadline))
    assert "left out" in [member.role for member in world.machine.progress().members]
    world.happen(ManagerDied("worker-1", "killed"))
    answer_all(world, StartWorker)
    sources = [source.worker_id for order in orders(world, Prepare).values() for source in order.sources]
    assert orders(world, Prepare) and "worker-1" not in sources


def test_suspects_are_killed_and_replaced() -> None:
    world = serving(3)
    suspect = process_of(world, "worker-2")
    world.send(Trouble("worker-0", process_of(world, "worker-0"), 1, ("worker-2",), "step 7 missed"))
    assert any(isinstance(order, KillProcess) and order.process == suspect for order in world.sent)
    world.settle()
    assert world.machine.current.members[2].incarnation == 2


def test_who_missed_a_step_because_of_another_is_not_killed() -> None:
    world = serving(3)
    world.happen(Dies(process_of(world, "worker-2")))
    world.send(Trouble("worker-0", process_of(world, "worker-0"), 1, ("worker-1",), "step 7 missed"))
    assert not [order for order in world.sent if isinstance(order, KillProcess)]
    world.settle()
    assert [member.incarnation for member in world.machine.current.members] == [1, 1, 2]


def test_a_broken_group_without_suspects_gets_a_new_epoch_of_the_same_members() -> None:
    world = serving(2)
    world.send(Trouble("worker-0", process_of(world, "worker-0"), 1, (), "connection lost"))
    world.settle()
    assert world.machine.current.number == 2
    assert [member.incarnation for member in world.machine.current.members] == [1, 1]


def test_trouble_of_an_epoch_that_is_over_is_no_news() -> None:
    world = serving(2)
    world.request("scale", 3)
    world.settle()
    assert world.send(Trouble("worker-0", process_of(world, "worker-0"), 1, ("worker-1",), "late")) == []


@pytest.mark.parametrize("step", [GiveProcess, StartWorker, Prepare])
@pytest.mark.parametrize("how", ["fails", "expires", "dies"])
def test_what_goes_wrong_before_commit_leaves_the_current_epoch_as_it_was(step: type, how: str) -> None:
    world = serving(2)
    before, told = world.machine.current, world.told
    held = {worker: set(groups) for worker, groups in world.contents.items() if worker in ("worker-0", "worker-1")}
    answer = world.request("scale", 3)
    for kind in (GiveProcess, StartWorker, Prepare):
        if kind is step:
            break
        answer_all(world, kind)
    order = orders(world, step)["worker-2"]
    if how == "dies" and step is not GiveProcess:
        world.happen(Dies(order.process))
    elif how == "expires":
        world.send(Expired(world.deadline))
    else:
        world.refuse(order)
    asked = set(orders(world, Abort))
    assert asked == ({"worker-0", "worker-1"} if step is Prepare else set())
    world.settle()
    assert world.finished[answer.transition_id].state == "aborted"
    assert world.finished[answer.transition_id].reason
    assert world.machine.current == before and world.told == told
    assert {worker: world.contents[worker] for worker in held} == held
    assert world.machine.healthy
    assert world.request("scale", 4).code == ""
    world.settle()
    assert len(world.machine.state.members) == 4


def test_an_aborted_drain_gives_the_worker_its_requests_back() -> None:
    world = serving(3)
    world.request("drain", "worker-1")
    world.refuse(orders(world, Prepare)["worker-0"])
    assert draining(world) == () and serve(world) == ["worker-0", "worker-1", "worker-2"]
    assert set(orders(world, Abort)) == {"worker-0", "worker-1", "worker-2"}


def test_a_survivors_death_before_commit_aborts_and_then_repairs() -> None:
    world = serving(2)
    answer = world.request("scale", 3)
    start_joiners(world)
    world.happen(Dies(process_of(world, "worker-1")))
    world.settle()
    assert world.finished[answer.transition_id].state == "aborted"
    assert world.machine.state.members == ("worker-0", "worker-1")
    assert world.machine.current.members[1].incarnation == 2


def prepared_for(world: World, kind: str, target: int | str) -> str:
    answer = world.request(kind, target)
    start_joiners(world)
    answer_all(world, Prepare)
    assert orders(world, Commit)
    return answer.transition_id


@pytest.mark.parametrize("who", ["worker-0", "worker-2"])
def test_a_death_at_commit_leads_forward(who: str) -> None:
    world = serving(2)
    transition = prepared_for(world, "scale", 3)
    world.answer(orders(world, Commit)["worker-1"])
    world.happen(Dies(orders(world, Commit)[who].process))
    assert world.finished[transition].state == "done"
    assert "a repair follows" in world.finished[transition].reason
    assert world.machine.state.members == ("worker-0", "worker-1", "worker-2")
    assert world.machine.progress().kind == "repair"
    world.settle()
    assert world.machine.healthy and len(world.machine.state.members) == 3


def test_a_leavers_death_at_commit_leads_forward_without_it() -> None:
    world = serving(3)
    prepared_for(world, "drain", "worker-1")
    world.happen(Dies(process_of(world, "worker-1")))
    world.settle()
    assert world.machine.state.members == ("worker-0", "worker-2") and world.machine.healthy


def test_a_leaver_that_died_after_all_others_flipped_needs_no_repair() -> None:
    world = serving(3)
    transition = prepared_for(world, "drain", "worker-1")
    for worker in ("worker-0", "worker-2"):
        world.answer(orders(world, Commit)[worker])
    world.happen(Dies(process_of(world, "worker-1")))
    world.settle()
    assert world.finished[transition].reason == "" and len(world.finished) == 2


def test_a_commit_that_takes_too_long_leads_forward_and_nobody_is_killed() -> None:
    world = serving(2)
    transition = prepared_for(world, "scale", 3)
    world.send(Expired(world.deadline))
    assert world.finished[transition].state == "done"
    assert not [order for order in world.sent if isinstance(order, KillProcess)]
    assert set(orders(world, Prepare)) == {"worker-0", "worker-1", "worker-2"}
    world.settle()
    assert world.machine.healthy and len(world.machine.state.members) == 3


def test_a_failed_repair_is_tried_again_after_a_growing_pause() -> None:
    world = serving(1)
    delays = []
    world.send(Trouble("worker-0", process_of(world, "worker-0"), 1, (), "connection lost"))
    for _ in range(5):
        world.refuse(orders(world, Prepare)["worker-0"])
        sent = world.sent
        answer_all(world, Abort)
        answer_all(world, Release)
        found = {order.deadline_id: order.after_s for order in (*sent, *world.sent) if isinstance(order, Deadline)}
        delays += [after_s for deadline_id, after_s in found.items() if deadline_id.startswith("pause")]
        if not world.machine.state.running:
            world.send(Expired(world.deadline))
        start_joiners(world)
    assert len(delays) == 4, "the first is tried again at once"
    assert delays == sorted(delays) and delays[0] < delays[-1]
    world.settle()
    assert world.machine.healthy


def test_a_joiner_that_never_gets_ready_is_done_without() -> None:
    world = serving(3)
    world.happen(Dies(process_of(world, "worker-2")))
    for _ in range(60):
        order = orders(world, Prepare).get("worker-2")
        if order:
            world.refuse(order)
        events = world.good_events()
        if not events:
            break
        world.happen(events[0])
    assert world.machine.healthy
    assert world.machine.state.members == ("worker-0", "worker-1")


def test_a_boot_tries_other_processes_and_then_gives_up() -> None:
    world = World(config(max_attempts=3))
    world.request("boot", 1)
    for attempt in range(3):
        assert orders(world, GiveProcess)["worker-0"].attempt == attempt
        answer_all(world, GiveProcess)
        world.refuse(orders(world, StartWorker)["worker-0"])
    assert world.finished["t-1"].state == "failed" and world.finished["t-1"].permanent
    assert not world.good_events()


def test_a_boot_that_no_second_try_can_change_is_given_up_at_once() -> None:
    world = World()
    world.request("boot", 2)
    world.send(Failed("worker-0", "", "process", "the model is not a Mixture of Experts", permanent=True))
    world.settle()
    assert world.finished["t-1"].permanent and len(world.finished) == 1


def test_a_leaver_that_does_not_let_go_is_ended() -> None:
    world = serving(2)
    prepared_for(world, "scale", 1)
    answer_all(world, Commit)
    answer_all(world, Retire)
    process = orders(world, Release)["worker-1"].process
    world.send(Expired(world.deadline))
    assert any(isinstance(order, KillProcess) and order.process == process for order in world.sent)
    assert world.machine.healthy


def test_a_member_that_dies_while_leavers_let_go_is_repaired_at_once() -> None:
    world = serving(3)
    prepared_for(world, "scale", 2)
    answer_all(world, Commit)
    world.happen(Dies(process_of(world, "worker-0")))
    assert world.machine.progress().kind == "repair"
    world.settle()
    assert world.machine.state.members == ("worker-0", "worker-1") and world.machine.healthy


def test_a_process_that_comes_too_late_is_given_back() -> None:
    world = serving(2)
    world.request("scale", 3)
    world.send(Expired(world.deadline))
    world.settle()
    assert world.send(ProcessReady("worker-2", "process-9")) == [Release("worker-2", "process-9")]


def test_late_answers_of_an_aborted_epoch_change_nothing() -> None:
    world = serving(2)
    world.request("scale", 3)
    start_joiners(world)
    number = orders(world, Prepare)["worker-0"].epoch.number
    world.refuse(orders(world, Prepare)["worker-2"])
    world.settle()
    before = world.machine.snapshot()
    process = process_of(world, "worker-0")
    for event in (
        Prepared("worker-0", process, number),
        Committed("worker-0", process, number),
        MemberDied("worker-2", "process-2", "late"),
        WorkerStarted("worker-2", "process-2", "x", "s", "m"),
        Failed("worker-0", process, "prepare", "late", number),
    ):
        world.send(event)
        assert world.machine.snapshot() == before, event


@pytest.mark.parametrize("steps", range(12))
def test_a_restarted_controller_goes_on_at_any_step(steps: int) -> None:
    world = serving(3)
    answer = world.request("scale", 2)
    for _ in range(steps):
        events = world.good_events()
        if events:
            world.happen(events[0])
    world.orders.clear()
    world.deadline = ""
    world.restart()
    world.settle()
    assert world.machine.progress(answer.transition_id).state == "done"
    assert world.machine.state.members == ("worker-0", "worker-1") and world.machine.healthy
    assert serve(world) == ["worker-0", "worker-1"]


def test_a_restarted_controller_ends_processes_it_does_not_know_and_repairs_what_died_meanwhile() -> None:
    world = serving(2)
    lost = process_of(world, "worker-1")
    world.forget(lost)
    world.processes["process-7"] = type(world.processes[process_of(world, "worker-0")])(worker="worker-3")
    world.restart()
    assert "process-7" not in world.processes
    world.settle()
    assert world.machine.current.members[1].incarnation == 2


def test_journal_of_another_version_is_refused() -> None:
    with pytest.raises(ValueError, match="format 99"):
        Transitions.restore(config(), {"format": 99})


def test_snapshot_is_json() -> None:
    world = serving(2)
    world.request("scale", 3)
    journal = json.loads(json.dumps(world.machine.snapshot()))
    again = Transitions.restore(world.config, journal)
    assert json.loads(json.dumps(again.snapshot())) == journal


def test_measured_load_decides_what_a_joiner_gets() -> None:
    world = serving(1)
    load = tuple(tuple(100 if expert < 4 else 1 for expert in range(8)) for _ in range(2))
    world.send(LoadMeasured(load))
    world.request("scale", 2)
    start_joiners(world)
    epoch = orders(world, Prepare)["worker-0"].epoch
    assert [sum(rank in ranks for ranks in layer[:4]) for layer in epoch.holders for rank in (0, 1)] == [2, 2, 2, 2]


def test_bytes_of_all_steps_of_a_worker_are_told_and_kv_apart() -> None:
    world = serving(1)
    world.request("scale", 2)
    world.answer(orders(world, GiveProcess)["worker-1"])
    start = orders(world, StartWorker)["worker-1"]
    world.send(Moved("worker-1", start.process, "start", 70))
    assert world.machine.progress().moved_bytes == 20, "the 50 of the dense weights do not count"
    started = WorkerStarted("worker-1", start.process, "e", "s", "m:worker-1", moved_bytes=50)
    world.send(started)
    number = world.machine.progress().epoch
    for step, other in (("start", 0), ("prepare", number - 1)):
        world.send(Moved("worker-1", start.process, step, 90, other))
    assert world.machine.progress().moved_bytes == 50, "what is of another step came late"
    world.send(Moved("worker-1", start.process, "prepare", 10, number))
    assert world.machine.progress().moved_bytes == 60
    world.send(Prepared("worker-1", start.process, number, moved_bytes=30))
    world.processes[start.process].prepared[number] = set()
    world.answer(orders(world, Prepare)["worker-0"])
    world.send(Committed("worker-0", process_of(world, "worker-0"), number, kv_moved_bytes=7))
    found = world.machine.progress()
    assert {member.worker_id: member.moved_bytes for member in found.members}["worker-1"] == 80
    assert found.kv_moved_bytes == 7


def test_progress_tells_phase_members_and_bytes() -> None:
    world = serving(1)
    world.request("scale", 2)
    start_joiners(world)
    joiner = orders(world, Prepare)["worker-1"].process
    world.send(Moved("worker-1", joiner, "prepare", 30))
    found = world.machine.progress()
    assert (found.phase, found.state, found.epoch) == ("prepare", "running", 2)
    assert (found.from_workers, found.to_workers) == (("worker-0",), ("worker-0", "worker-1"))
    assert (found.moved_bytes, found.total_bytes) == (30, 80)
    assert [(m.worker_id, m.role, m.step) for m in found.members] == [
        ("worker-0", "stays", "prepare"),
        ("worker-1", "joins", "prepare"),
    ]
    assert found.deadline_id == world.deadline
    assert world.machine.progress("t-99") is None


def test_everything_that_happens_is_noted() -> None:
    world = serving(2)
    world.request("scale", 0)
    world.happen(Dies(process_of(world, "worker-1")))
    world.settle()
    kinds = [note.kind for note in world.notes]
    assert kinds == ["begun", "committed", "ended", "refused", "died", "begun", "committed", "retired", "ended"]
    assert all(isinstance(note, Note) and note.text for note in world.notes)


def test_every_expert_of_a_shrunk_cluster_lies_on_its_device() -> None:
    world = serving(4)
    world.request("scale", 2)
    world.settle()
    held = groups_held(world.machine.current.holders, world.machine.state.members)
    assert {worker: set(groups) for worker, groups in held.items()} == {
        worker: world.contents[worker] for worker in ("worker-0", "worker-1")
    }


def test_gateways_are_told_only_what_changed() -> None:
    world = serving(2)
    assert not [order for order in world.send(LoadMeasured(())) if isinstance(order, Publish)]
    assert not [order for order in world.send(Request("scale", "r9", 9)) if isinstance(order, Publish)]
    process = process_of(world, "worker-0")
    world.happen(Dies(process))
    assert len([order for order in world.sent if isinstance(order, Publish)]) == 1
