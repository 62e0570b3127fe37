"""Models, keys, ids, probes, metrics, the OpenAPI document, and how a gateway starts."""

from __future__ import annotations

import re
import socket
from typing import Any

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from flexpert.controller.gateway import Gateway, GatewayConfig, GatewayError, WorkerAddress
from flexpert.workers.messages import Stats

MODEL = "tiny-moe"


def test_models_are_listed_and_found(client: openai.OpenAI) -> None:
    models = list(client.models.list())
    assert [(model.id, model.object, model.owned_by) for model in models] == [(MODEL, "model", "flexpert")]
    assert client.models.retrieve(MODEL) == models[0]


def test_model_id_with_a_slash_is_found(harness: Any, make_client: Any) -> None:
    gateway = harness.gateway(model_id="org/name", wait=False)
    assert make_client(gateway).models.retrieve("org/name").id == "org/name"


def test_keys_guard_the_api_and_nothing_else(harness: Any, make_client: Any) -> None:
    harness.worker()
    gateway = harness.gateway(api_keys=("sk-one", "sk-zwei"))
    for key in ("sk-one", "sk-zwei"):
        assert make_client(gateway, api_key=key).completions.create(model=MODEL, prompt="x").choices
    with pytest.raises(openai.AuthenticationError) as caught:
        make_client(gateway, api_key="sk-other").models.list()
    assert caught.value.code == "invalid_api_key"
    assert caught.value.request_id
    for headers in (
        {},
        {"authorization": "Basic c2s="},
        {"authorization": "Bearer"},
        {"authorization": b"Bearer \xff\xfe"},
    ):
        response = httpx.post(f"{gateway.url}/v1/completions", headers=headers, json={"model": MODEL, "prompt": "x"})
        assert response.status_code == 401
        assert response.json()["error"]["type"] == "authentication_error"
        assert response.headers["www-authenticate"] == "Bearer"
    assert httpx.get(f"{gateway.url}/v1/nothing").status_code == 401
    for path in ("/health", "/ready", "/metrics", "/openapi.json"):
        assert httpx.get(gateway.url + path).status_code == 200


def test_request_id_is_echoed_or_made(client: openai.OpenAI, shared: Any) -> None:
    url = shared.gateways[0].url
    assert httpx.get(f"{url}/health", headers={"x-request-id": "my-id-7"}).headers["x-request-id"] == "my-id-7"
    made = {httpx.get(f"{url}/health").headers["x-request-id"] for _ in range(2)}
    assert len(made) == 2
    for bad in ("x" * 129, "caf\u00e9", "a\tb"):
        assert (
            httpx.get(f"{url}/health", headers={"x-request-id": bad.encode()})
            .headers["x-request-id"]
            .startswith("req_")
        )
    answer = client.chat.completions.with_raw_response.create(
        model=MODEL,
        messages=[{"role": "user", "content": "x"}],
        stream=True,
        extra_headers={"x-request-id": "stream-1"},
    )
    assert answer.headers["x-request-id"] == "stream-1"
    assert len(answer.headers.get_list("x-request-id")) == 1


def test_two_requests_may_carry_the_same_request_id(client: openai.OpenAI, worker: Any) -> None:
    for _ in range(2):
        client.completions.create(model=MODEL, prompt="x", extra_headers={"x-request-id": "same"})
    assert len({submit.request_id for submit in worker.submits}) == 2


def test_ready_follows_the_workers(harness: Any) -> None:
    gateway = harness.gateway(wait=False)
    response = httpx.get(f"{gateway.url}/ready")
    assert (response.status_code, response.json()["reasons"]) == (503, ["no worker is known"])
    worker = harness.worker()
    gateway.set_workers([worker.address])
    harness.ask_until(lambda: gateway._pool.ready)
    assert httpx.get(f"{gateway.url}/ready").status_code == 200
    harness.run(worker.die())
    harness.ask_until(lambda: not gateway._pool.ready)
    assert httpx.get(f"{gateway.url}/ready").status_code == 503
    assert httpx.get(f"{gateway.url}/health").json()["status"] == "ok"
    harness.run(worker.start())
    harness.ask_until(lambda: gateway._pool.ready)
    assert 'flexpert_worker_connections_total{worker="worker-0"} 2.0' in httpx.get(f"{gateway.url}/metrics").text


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"refuse_with": "wrong cluster"}, "wrong cluster"),
        ({"model_id": "other"}, "serves 'other', this gateway 'tiny-moe'"),
    ],
)
def test_unusable_worker_is_named_and_tried_again(harness: Any, make_client: Any, change: Any, reason: str) -> None:
    worker = harness.worker(started=False)
    good = {name: getattr(worker, name) for name in change}
    for name, value in change.items():
        setattr(worker, name, value)
    harness.run(worker.start())
    gateway = harness.gateway(wait=False)
    harness.ask_until(lambda: any(reason in link.problem for link in gateway._pool.links))
    harness.run(worker.hold_greetings())
    seen = worker.hellos
    worker.wait_until(lambda: worker.hellos > seen)
    assert reason in httpx.get(f"{gateway.url}/ready").json()["reasons"][0], "while it is tried again"
    for name, value in good.items():
        setattr(worker, name, value)
    harness.run(worker.greet())
    harness.ask_until(lambda: gateway._pool.ready)
    assert make_client(gateway).completions.create(model=MODEL, prompt="x").choices


def test_wrong_cluster_token_is_refused(harness: Any) -> None:
    harness.worker()
    gateway = harness.gateway(cluster_token="guess", wait=False)
    harness.ask_until(lambda: any("cluster token does not match" in link.problem for link in gateway._pool.links))
    assert not gateway._pool.ready


def test_metrics_tell_what_happened(harness: Any, make_client: Any) -> None:
    worker = harness.worker()
    worker.cached_tokens = 1
    gateway = harness.gateway()
    client = make_client(gateway)
    client.completions.create(model=MODEL, prompt=[5, 6], n=2)
    client.completions.create(model=MODEL, prompt=[5, 6, 7], max_tokens=1)
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model=MODEL, prompt=[])

    async def report() -> None:
        worker.send(
            Stats(
                waiting=1, running=2, kv_used_tokens=30, kv_capacity_tokens=400, steps=5, prefill_tokens=6, decode_tokens=7,
                cached_prompt_tokens=8, preemptions=9, step_s=0.5, host_s=0.25,
            )
        )  # fmt: skip

    harness.run(report())
    harness.ask_until(lambda: gateway._pool.links[0].stats is not None)
    text = httpx.get(f"{gateway.url}/metrics").text
    values = {
        (sample.name, *(value for key, value in sorted(sample.labels.items()) if key != "le")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if not sample.name.endswith(("_bucket", "_created"))
    }
    expected = {
        ("flexpert_requests_total", "completions", "completed"): 2,
        ("flexpert_requests_total", "completions", "invalid"): 1,
        ("flexpert_prompt_tokens_total",): 5,
        ("flexpert_cached_prompt_tokens_total",): 2,
        ("flexpert_generation_tokens_total",): 7,
        ("flexpert_request_ttft_seconds_count",): 3,
        ("flexpert_request_inter_token_latency_seconds_count",): 4,
        ("flexpert_request_tpot_seconds_count",): 2,
        ("flexpert_request_e2e_latency_seconds_count",): 2,
        ("flexpert_request_queue_time_seconds_count",): 3,
        ("flexpert_requests_live",): 0,
        ("flexpert_requests_waiting",): 0,
        ("flexpert_worker_up", "worker-0"): 1,
        ("flexpert_worker_running", "worker-0"): 2,
        ("flexpert_worker_kv_capacity_tokens", "worker-0"): 400,
        ("flexpert_worker_step_seconds", "worker-0"): 0.5,
        ("flexpert_worker_preemptions_total", "worker-0"): 9,
    }
    assert {name: values.get(name) for name in expected} == expected
    assert all(family.name.startswith("flexpert_") for family in text_string_to_metric_families(text))


def test_openapi_document_describes_the_endpoints(shared: Any) -> None:
    document = httpx.get(f"{shared.gateways[0].url}/openapi.json").json()
    paths = {
        "/v1/completions",
        "/v1/chat/completions",
        "/v1/models",
        "/v1/models/{model_id}",
        "/health",
        "/ready",
        "/metrics",
    }
    assert {path for path in document["paths"] if not path.startswith("/admin/")} == paths
    for path in ("/v1/completions", "/v1/chat/completions"):
        post = document["paths"][path]["post"]
        assert set(post["responses"]) >= {"200", "400", "401", "404", "413", "429", "500", "503"}
        assert set(post["responses"]["200"]["content"]) == {"application/json", "text/event-stream"}
        assert post["security"]
        assert "422" not in post["responses"]
    fields = document["components"]["schemas"]["ChatRequest"]["properties"]
    assert all("description" in field or "$ref" in str(field) or name == "messages" for name, field in fields.items())


def test_cors_is_off_unless_configured(harness: Any) -> None:
    headers = {"origin": "https://ui.example", "access-control-request-method": "POST"}
    plain = harness.gateway(wait=False)
    answer = httpx.options(f"{plain.url}/v1/completions", headers=headers)
    assert "access-control-allow-origin" not in answer.headers
    opened = harness.gateway(wait=False, cors_allow_origins=("https://ui.example",), api_keys=("k",))
    answer = httpx.options(f"{opened.url}/v1/completions", headers=headers)
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == "https://ui.example"


def test_port_in_use_is_a_clear_error(harness: Any) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(GatewayError, match=rf"port {port} on 127\.0\.0\.1 is in use"):
            harness.gateway(port=port, wait=False)


def test_answers_are_not_held_back_by_the_kernel(harness: Any) -> None:
    """Nagle's algorithm would hold a body for 40 ms after its header."""
    gateway = harness.gateway(wait=False)
    with socket.create_connection(("127.0.0.1", gateway.port)):
        connections = gateway._server.server_state.connections
        harness.ask_until(lambda: connections)
        (accepted,) = connections
        assert accepted.transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_host_of_another_machine_is_a_clear_error(harness: Any) -> None:
    with pytest.raises(GatewayError, match=re.escape("port 0 on 203.0.113.1 cannot be bound")):
        harness.gateway(host="203.0.113.1", wait=False)


def test_settings_that_make_no_sense_are_refused(model_dir: Any) -> None:
    for change in ({"port": 70_000}, {"max_queued": -1}, {"max_body_bytes": 0}, {"api_keys": ("",)}):
        with pytest.raises(GatewayError):
            GatewayConfig(**{"model_id": MODEL, "model_dir": model_dir, "cluster_token": "t", **change})


def test_secrets_do_not_show_in_the_configuration(model_dir: Any) -> None:
    config = GatewayConfig(model_id=MODEL, model_dir=model_dir, cluster_token="hush-1", api_keys=("hush-2",))
    assert "hush" not in repr(config)


def test_workers_may_be_named_before_the_start(harness: Any) -> None:
    worker = harness.worker()

    async def start() -> Gateway:
        config = GatewayConfig(model_id=MODEL, model_dir=harness.model_dir, cluster_token="cluster-secret", port=0)
        gateway = Gateway(config)
        gateway.set_workers([WorkerAddress("nobody", "unix:/nonexistent"), worker.address])
        await gateway.start()
        return gateway

    harness.gateways.append(harness.run(start()))
    harness.ask_until(lambda: harness.gateways[-1]._pool.ready)
    reasons = [link.problem for link in harness.gateways[-1]._pool.links]
    assert len(reasons) == 2
