"""Whole workers that join, leave and come back, each on an HBM manager of its own: tokens are those of one worker, memory follows."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from tests.families import make_model
from tests.workers.elastic import Cluster, mixed_requests, tokens_of_one

from flexpert.workers.epoch import encode
from flexpert.workers.messages import Submit

LAYERS, EXPERTS = 2, 8


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_model(
        "qwen3_moe", num_experts=EXPERTS, hidden_size=128, moe_intermediate_size=128, num_hidden_layers=LAYERS
    ).save_pretrained(folder)
    return folder


@pytest.fixture
def cluster(model_dir):
    made = Cluster(model_dir, layers=LAYERS, experts=EXPERTS, budget_bytes=64 << 20, kv_bytes=1 << 20)
    yield made
    made.close()


def requests() -> list[Submit]:
    return mixed_requests(max_tokens=300)


@pytest.fixture(scope="module")
def expected(model_dir) -> dict[str, list[int]]:
    return tokens_of_one(model_dir, requests())


def test_two_workers_boot_together_and_give_the_tokens_of_one(cluster, expected):
    cluster.scale(["worker-0", "worker-1"])
    for i, submit in enumerate(requests()):
        cluster.submit(submit, f"worker-{i % 2}")
    assert cluster.gateway.wait_all() == expected


def test_workers_join_and_leave_under_load_and_no_token_changes(cluster, expected):
    gateway, rounds = cluster.gateway, 0

    def submit_more(name: str) -> None:
        nonlocal rounds
        for submit in requests():
            again = msgspec.structs.replace(submit, request_id=f"{rounds}{submit.request_id}")
            cluster.submit(again, name)
        rounds += 1
        gateway.wait(lambda gateway: all(client.emitted for client in gateway.clients.values()))

    cluster.scale(["worker-0"])
    cluster.scale(["worker-0", "worker-1"], lambda: submit_more("worker-0"))
    cluster.scale(["worker-1", "worker-2"], lambda: submit_more("worker-0"))
    cluster.scale(["worker-1"], lambda: submit_more("worker-2"))
    moved = [client.worker for client in gateway.clients.values()]
    assert moved.count("worker-1") >= 2 * len(expected), "requests of a leaver went on elsewhere"
    assert gateway.wait_all() == {f"{i}{name}": tokens for i in range(rounds) for name, tokens in expected.items()}


def test_a_leavers_requests_go_on_without_being_computed_again(cluster, expected):
    cluster.scale(["worker-0", "worker-1"])
    cluster.plan(["worker-1"])
    cluster.prepare_at(["worker-1"])
    for submit in requests():
        cluster.submit(submit, "worker-0")
    cluster.gateway.wait(lambda gateway: all(len(client.emitted) > 30 for client in gateway.clients.values()))
    prepared = cluster.prepare_at(["worker-0"])["worker-0"]
    committed = cluster.commit()["worker-0"]
    clients = [cluster.gateway.clients[name] for name in committed["released"]]
    assert len(clients) == len(expected)
    live_tokens = sum(len(client.submit.prompt_token_ids) + len(client.emitted) - 1 for client in clients)
    live_bytes = live_tokens * cluster.workers["worker-1"]._parts.kv._token_bytes
    moved_bytes = committed["kv_moved_bytes"]
    assert 0 < prepared["kv_moved_bytes"] <= moved_bytes
    assert prepared["moved_bytes"] == 0, "experts"
    assert 0.95 * live_bytes <= moved_bytes <= 1.05 * live_bytes
    assert set(cluster.gateway.targets.values()) == {"worker-1"}
    cluster.rehome()
    cluster.retire()
    cluster.workers.pop("worker-0").release()
    assert cluster.gateway.wait_all() == expected
    stats = cluster.workers["worker-1"].status()["stats"]
    assert stats["prefill_tokens"] <= 2 * len(expected), "KV that had been moved was computed again"


def test_kv_takes_over_what_experts_give_up_and_back(cluster):
    cluster.scale(["worker-0"])
    status = cluster.workers["worker-0"].status()
    alone_kv, alone_experts = status["kv_bytes"], status["experts_bytes"]
    retired = cluster.scale(["worker-0", "worker-1"])["worker-0"]
    status = cluster.workers["worker-0"].status()
    given_up = alone_experts - status["experts_bytes"]
    assert retired["freed_bytes"] == given_up == alone_experts // 2
    assert status["kv_bytes"] - alone_kv >= 0.9 * given_up
    assert abs(cluster.workers["worker-1"].status()["kv_bytes"] - status["kv_bytes"]) < 0.02 * status["kv_bytes"]
    cluster.scale(["worker-0"])
    status = cluster.workers["worker-0"].status()
    assert (status["kv_bytes"], status["experts_bytes"]) == (alone_kv, alone_experts)


def test_an_aborted_epoch_leaves_everything_as_it_was(cluster, expected):
    cluster.scale(["worker-0", "worker-1"])
    for submit in requests():
        cluster.submit(submit, "worker-0")
    cluster.gateway.wait_tokens(50)
    before = {name: worker.status() for name, worker in cluster.workers.items()}
    cluster.prepare(["worker-1", "worker-0", "worker-2"])
    cluster.each(["worker-0", "worker-1"], lambda worker: worker.abort(cluster.next.number))
    cluster.kill("worker-2")
    for name, worker in cluster.workers.items():
        after = worker.status()
        assert [after[key] for key in ("epoch", "experts_bytes", "kv_bytes", "prepared")] == [
            before[name][key] for key in ("epoch", "experts_bytes", "kv_bytes", "prepared")
        ]
    cluster.scale(["worker-0"])
    assert cluster.gateway.wait_all() == expected


def test_a_death_pauses_the_group_and_the_next_epoch_goes_on(cluster, expected):
    cluster.scale(["worker-0", "worker-1", "worker-2"])
    for i, submit in enumerate(requests()):
        cluster.submit(submit, f"worker-{i % 3}")
    cluster.gateway.wait_tokens(100)
    troubles = [cluster.workers[name].wait_trouble() for name in ("worker-0", "worker-2")]
    cluster.kill("worker-1")
    for trouble in troubles:
        assert trouble.result(20).suspects == ("worker-1",)
    cluster.scale(["worker-0", "worker-1", "worker-2"])
    assert cluster.gateway.wait_all() == expected


def test_steps_of_a_transition_can_be_repeated(cluster):
    cluster.scale(["worker-0", "worker-1"])
    worker, epoch = cluster.workers["worker-0"], encode(cluster.epoch)
    again = worker.prepare(epoch, [], 1.0)
    assert again["moved_bytes"] + again["loaded_bytes"] == 0  # start had fetched the share of the draft
    assert worker.commit(cluster.epoch.number, 1.0)["released"] == []
    assert worker.retire(cluster.epoch.number) == worker.retire(cluster.epoch.number)


def test_a_share_comes_from_peers_and_only_what_is_missing(cluster):
    cluster.scale(["worker-0"])
    cluster.scale(["worker-0", "worker-1"])
    assert not cluster.workers["worker-1"].status()["weights_loaded"], "a peer had all of it"
    answers = cluster.prepare(["worker-1"])
    missing = cluster.workers["worker-0"].status()["experts_bytes"]
    assert answers["worker-1"]["moved_bytes"] == missing
    assert answers["worker-0"]["moved_bytes"] == answers["worker-1"]["loaded_bytes"] == 0


def test_steps_of_an_idle_cluster_need_no_work_to_flip(cluster):
    cluster.scale(["worker-0", "worker-1"])
    cluster.scale(["worker-1", "worker-0", "worker-2"])
    assert {worker.status()["epoch"] for worker in cluster.workers.values()} == {2}
