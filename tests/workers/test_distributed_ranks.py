"""Workers whose ranks exchange through torch.distributed, as they do on GPUs: here over gloo on the CPU, with the tokens of one worker."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.families import make_model
from tests.workers.elastic import Cluster, mixed_requests, tokens_of_one
from tests.workers.serving import in_process

from flexpert.workers.messages import Submit
from flexpert.workers.transport import DistributedTransport
from flexpert.workers.worker_config import WorkerStartError

LAYERS, EXPERTS = 2, 8


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_model(
        "qwen3_moe", num_experts=EXPERTS, hidden_size=128, moe_intermediate_size=128, num_hidden_layers=LAYERS
    ).save_pretrained(folder)
    return folder


def requests() -> list[Submit]:
    return mixed_requests(max_tokens=80)


@pytest.fixture(scope="module")
def expected(model_dir) -> dict[str, list[int]]:
    return tokens_of_one(model_dir, requests())


def test_two_ranks_give_the_tokens_of_one_worker_and_so_does_the_one_that_stays(model_dir, expected):
    cluster = Cluster(model_dir, layers=LAYERS, experts=EXPERTS, budget_bytes=64 << 20, transport="distributed")
    try:
        cluster.scale(["worker-0", "worker-1"])
        for i, submit in enumerate(requests()):
            cluster.submit(submit, f"worker-{i % 2}")
        cluster.gateway.wait_tokens(60)
        for worker in cluster.workers.values():
            assert isinstance(worker.membership._current.transport, DistributedTransport)
        cluster.scale(["worker-1"])
        assert cluster.gateway.wait_all() == expected
    finally:
        cluster.close()


def test_an_unknown_transport_is_refused_with_those_there_are(model_dir):
    with pytest.raises(WorkerStartError, match=r"transport pigeons .* auto, mapped, distributed"):
        in_process(model_dir, transport="pigeons").start()
