"""The small parts alone: the lease, what is observed, memory, the record on disk."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from flexpert.controller.autoscaler.lease import Lease
from flexpert.controller.autoscaler.log import FILE, OLD_FILE, DecisionLog
from flexpert.controller.autoscaler.memory import memory_floor
from flexpert.controller.autoscaler.observe import ClusterFacts, Observer
from flexpert.controller.policy import record
from flexpert.controller.policy.decide import decide
from flexpert.controller.policy.types import Observation, PolicyConfig, State, WorkersConfig
from flexpert.controller.runtime_dir import read_json, write_json
from flexpert.controller.transition_types import Device, ModelShape, TransitionConfig

# The lease


def test_one_has_the_lease_and_keeps_it_by_renewing(tmp_path: Path) -> None:
    one, other = (Lease(tmp_path / "lease.json", owner=name, period_s=30) for name in ("one", "other"))
    assert one.renew(0.0)
    assert not other.renew(29.0)
    assert one.renew(29.0)
    assert not other.renew(58.0)
    assert other.renew(59.0), "it ran out"
    assert not one.renew(60.0)
    one.release()
    assert not one.renew(60.0), "nobody gives back what is not his"
    other.release()
    assert one.renew(60.0)
    held = one.read()
    assert held is not None and (held.owner, held.since_s, held.until_s) == ("one", 60.0, 90.0)


def test_the_lease_of_a_process_that_is_gone_is_free(tmp_path: Path) -> None:
    script = (
        "import sys, pathlib; from flexpert.controller.autoscaler.lease import Lease; "
        "assert Lease(pathlib.Path(sys.argv[1]), owner='gone', period_s=3600).renew(0.0)"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "lease.json")], check=True, timeout=60)
    assert (read_json(tmp_path / "lease.json") or {})["owner"] == "gone"
    assert Lease(tmp_path / "lease.json", owner="one", period_s=30).renew(1.0)


@pytest.mark.parametrize("content", [b"", b"nonsense", b'{"owner": "x"}'])
def test_a_file_that_is_no_lease_is_taken(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "lease.json").write_bytes(content)
    assert Lease(tmp_path / "lease.json", owner="one", period_s=30).renew(0.0)


def test_a_lease_of_a_process_elsewhere_ends_by_time_alone(tmp_path: Path) -> None:
    held = {"owner": "far", "since_s": 0.0, "until_s": 30.0, "process": {"host": "elsewhere"}}
    write_json(tmp_path / "lease.json", held)
    one = Lease(tmp_path / "lease.json", owner="one", period_s=30)
    assert not one.renew(29.0)
    assert one.renew(30.0)


# What is observed


def told(*, since_s: float = 10.0, requests_per_s: float = 4.0, **worker: Any) -> dict[str, Any]:
    traffic = {
        "since_s": since_s, "requests_per_s": requests_per_s, "prompt_tokens_per_s": 1.0, "output_tokens_per_s": 1.0, "queue_s": None,
        "ttft_s": 0.2, "tpot_s": None, "met": 3, "missed": 1, "live": 2, "waiting": 1,
    }  # fmt: skip
    found = {
        "worker_id": "worker-0", "incarnation": 1, "age_s": 0.5, "running": 2, "waiting": 1,
        "kv_used_tokens": 10, "kv_capacity_tokens": 100, "prefill_tokens": 1000, "decode_tokens": 500,
        "max_running": 8, "waiting_tokens": 7, "longest_context_tokens": 9, **worker,
    }  # fmt: skip
    return {"traffic": traffic, "workers": [found]}


def look(observer: Observer, now_s: float, facts: ClusterFacts | None = None) -> Observation:
    return observer.observe(
        now_s=now_s, facts=facts or ClusterFacts(serving=("worker-0",)), readings={}, override=None, memory_floor=1
    )


def progress(**changes: Any) -> dict[str, Any]:
    return {
        "transition_id": "t-2", "kind": "scale", "state": "running", "phase": "prepare", "reason": "", "from_workers": ["worker-0"],
        "to_workers": ["worker-0", "worker-1"], "deadline_s": 30.0, "seconds": 4.0, "began_s": 96.0,
        "members": [{"worker_id": "worker-0", "role": "stays"}, {"worker_id": "worker-1", "role": "joins"}], **changes,
    }  # fmt: skip


def test_before_anybody_told_anything_numbers_are_missing() -> None:
    found = look(Observer(restarted_at_s=5.0), 10.0)
    assert found.traffic.age_s is None and found.workers[0].age_s is None
    assert found.restarted_at_s == 5.0


def test_numbers_age_while_the_gateway_is_away() -> None:
    observer = Observer(restarted_at_s=0.0)
    observer.hear(told(), now_s=100.0, window_s=10.0)
    observer.hear(None, now_s=140.0, window_s=10.0)
    observer.hear({}, now_s=140.0, window_s=10.0)
    found = look(observer, 140.0)
    assert (found.traffic.age_s, found.traffic.requests_per_s, found.traffic.since_s) == (40.0, 4.0, 90.0)
    assert (found.workers[0].age_s, found.workers[0].running) == (40.5, 2)


def test_the_zeros_of_a_gateway_that_has_just_begun_are_no_zeros() -> None:
    observer = Observer(restarted_at_s=0.0)
    observer.hear(told(), now_s=100.0, window_s=10.0)
    observer.hear(told(since_s=0.4, requests_per_s=0.0), now_s=105.0, window_s=10.0)
    found = look(observer, 105.0)
    assert (found.traffic.requests_per_s, found.traffic.age_s) == (4.0, 5.0)
    observer.hear(told(since_s=9.0, requests_per_s=0.0), now_s=114.0, window_s=10.0)
    assert look(observer, 114.0).traffic.requests_per_s == 0.0


def test_rates_are_differences_of_one_process() -> None:
    observer = Observer(restarted_at_s=0.0)
    observer.hear(told(), now_s=100.0, window_s=10.0)
    assert look(observer, 100.0).workers[0].prefill_tokens_per_s == 0.0
    observer.hear(told(prefill_tokens=1500, decode_tokens=600), now_s=105.0, window_s=10.0)
    worker = look(observer, 105.0).workers[0]
    assert (worker.prefill_tokens_per_s, worker.decode_tokens_per_s) == (100.0, 20.0)
    observer.hear(told(prefill_tokens=50, decode_tokens=10, incarnation=2), now_s=110.0, window_s=10.0)
    assert look(observer, 110.0).workers[0].prefill_tokens_per_s == 0.0


def test_a_worker_without_numbers_of_its_kv_is_like_the_others() -> None:
    observer = Observer(restarted_at_s=0.0)
    answer = told()
    fresh = {name: value for name, value in answer["workers"][0].items() if not name.startswith("kv_")}
    answer["workers"].append({**fresh, "worker_id": "worker-1", "age_s": 0.0})
    observer.hear(answer, now_s=100.0, window_s=10.0)
    found = look(observer, 100.0, ClusterFacts(serving=("worker-0", "worker-1"))).workers[1]
    assert (found.kv_used_tokens, found.kv_capacity_tokens) == (0, 100)


def test_who_joins_leaves_or_has_no_process_is_not_ready() -> None:
    observer = Observer(restarted_at_s=0.0)
    found = look(observer, 100.0, ClusterFacts(serving=("worker-0",), progress=progress()))
    assert [(worker.worker_id, worker.phase) for worker in found.workers] == [
        ("worker-0", "ready"),
        ("worker-1", "joining"),
    ]
    assert found.transition is not None
    assert (found.transition.from_workers, found.transition.to_workers, found.transition.deadline_s) == (1, 2, 130.0)
    leaving = progress(to_workers=["worker-0"], from_workers=["worker-0", "worker-1"],
                       members=[{"worker_id": "worker-1", "role": "leaves"}])  # fmt: skip
    facts = ClusterFacts(serving=("worker-0", "worker-1"), absent=frozenset({"worker-0"}), progress=leaving)
    assert [worker.phase for worker in look(observer, 100.0, facts).workers] == ["joining", "leaving"]


def test_how_long_joins_take_is_learned_once_each_and_kept() -> None:
    observer = Observer(restarted_at_s=0.0)
    timings = {
        "join_warm": {"count": 2, "sum_s": 3.0, "max_s": 2.0, "last_s": 1.0},
        "commit_pause": {"count": 1, "sum_s": 0.1, "max_s": 0.1},
    }
    found = look(observer, 100.0, ClusterFacts(timings=timings))
    assert found.join_s is not None and (found.join_s.mean_s, found.join_s.p95_s) == (1.5, 2.0)
    assert found.stall_s is not None and found.stall_s.p95_s == 0.1
    done = progress(state="done", phase="ended", ended_s=104.0)
    for now_s in (105.0, 110.0):
        found = look(observer, now_s, ClusterFacts(progress=done, timings=timings))
    assert found.join_s is not None and (found.join_s.mean_s, found.join_s.count) == (8.0, 1)
    assert found.last_transition is not None and found.last_transition.ended_s == 104.0
    again = Observer(restarted_at_s=120.0, saved=observer.to_json())
    found = look(again, 121.0, ClusterFacts(progress=done))
    assert found.join_s is not None and found.join_s.count == 1


def test_the_start_of_the_cluster_is_no_join() -> None:
    boot = progress(kind="boot", state="done", phase="ended", ended_s=130.0, from_workers=[])
    found = look(Observer(restarted_at_s=0.0), 131.0, ClusterFacts(progress=boot))
    assert found.last_transition is None and found.join_s is None


# Memory


def shape(*, memory: int, kv_bytes_max: int | None = None, tokens: int = 0) -> int:
    model = ModelShape(layers=2, experts=8, slab_bytes=100, slabs_per_group=1, dense_bytes=200, kv_min_bytes=100)
    devices = tuple(Device(worker_id=f"worker-{number}", memory_bytes=memory) for number in range(4))
    config = TransitionConfig(devices=devices, model=model, max_workers=4)
    return memory_floor(config, kv_used_tokens=tokens, kv_token_bytes=10, kv_bytes_max=kv_bytes_max)


def test_floor_holds_the_model_and_the_kv_in_use() -> None:
    assert shape(memory=2000) == 1  # 1600 of experts, 200 dense, 100 of KV
    assert shape(memory=1200) == 2
    assert shape(memory=2000, tokens=20) == 1  # 200 bytes beside 1800
    assert shape(memory=2000, tokens=21) == 2
    assert shape(memory=10_000, tokens=100, kv_bytes_max=500) == 2
    assert shape(memory=2000, tokens=10**6) == 4, "the most room there is"


# The record


def ticks(log: DecisionLog, count: int, state: State, config: PolicyConfig, *, from_s: float = 0.0) -> State:
    for number in range(count):
        observation = Observation(now_s=from_s + number)
        decision, after = decide(observation, state, config)
        log.add(state, observation, decision, config)
        state = after
    return state


CONFIG = PolicyConfig(workers=WorkersConfig(min=1, max=2))


def test_the_record_is_bounded_and_every_file_can_be_replayed(tmp_path: Path) -> None:
    log = DecisionLog(tmp_path, max_bytes=20_000)
    ticks(log, 150, State(run_id="r"), CONFIG)
    assert (tmp_path / OLD_FILE).exists()
    assert sum((tmp_path / name).stat().st_size for name in (FILE, OLD_FILE)) < 50_000
    for name in (FILE, OLD_FILE):
        lines = (tmp_path / name).read_bytes().splitlines()
        assert b'"begin"' in lines[0]
        assert list(record.differences(lines)) == []
    again = DecisionLog(tmp_path)
    again.load()
    assert again.entries[-1].decision.decision_id == "r-149"


def test_a_line_that_was_cut_short_costs_itself_alone(tmp_path: Path) -> None:
    log = DecisionLog(tmp_path)
    state = ticks(log, 3, State(run_id="r"), CONFIG)
    data = (tmp_path / FILE).read_bytes()
    (tmp_path / FILE).write_bytes(data[:-40])
    again = DecisionLog(tmp_path)
    again.load()
    assert [entry.decision.decision_id for entry in again.entries] == ["r-0", "r-1"]
    ticks(again, 1, state, CONFIG, from_s=10.0)
    third = DecisionLog(tmp_path)
    third.load()
    assert [entry.decision.decision_id for entry in third.entries] == ["r-0", "r-1", "r-3"]


def test_a_full_disk_stops_no_tick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> int:
        raise OSError(28, "No space left on device")

    log = DecisionLog(tmp_path)
    monkeypatch.setattr("flexpert.controller.autoscaler.log.os.open", full)
    ticks(log, 2, State(run_id="r"), CONFIG)
    assert len(log.entries) == 2
