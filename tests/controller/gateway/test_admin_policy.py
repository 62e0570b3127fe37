"""The admin API's routes about the scaling policy: what they pass on, what they refuse themselves, what /metrics shows of a policy."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from flexpert.controller.errors import AdminError

ADMIN = {"authorization": "Bearer fx-admin"}


class PlayedController:
    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.refusal: AdminError | None = None
        self.policy: dict[str, Any] | None = None

    async def __call__(self, method: str, *arguments: Any) -> Any:
        match method:
            case "status":
                return {"workers": [], "policy": self.policy}
            case "events":
                return {"events": [], "last": 0}
        self.calls.append((method, *arguments))
        if self.refusal is not None:
            raise self.refusal
        return {"transition_id": "t-1", "state": "running"}


@pytest.fixture(scope="module")
def served(model_dir: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from tests.controller.gateway.conftest import Harness

    made, controller = Harness(model_dir, tmp_path_factory.mktemp("policy")), PlayedController()
    gateway = made.gateway(admin_keys=("fx-admin",), call_controller=controller, wait=False)
    yield gateway, controller
    made.close()


@pytest.fixture
def controller(served: Any) -> PlayedController:
    served[1].calls, served[1].refusal = [], None
    return served[1]  # type: ignore[no-any-return]


@pytest.fixture
def api(served: Any) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=f"{served[0].url}/admin/v1", headers=ADMIN, timeout=20) as client:
        yield client


@pytest.mark.parametrize(
    ("method", "path", "body", "call"),
    [
        ("GET", "/policy", None, ("show", {})),
        ("PUT", "/policy", None, ("put", {})),
        ("PUT", "/policy", {"text": "x", "owner": "ada"}, ("put", {"text": "x", "owner": "ada"})),
        ("POST", "/policy/pause", {"for_s": 60}, ("pause", {"for_s": 60.0})),
        ("POST", "/policy/resume", None, ("resume", {})),
        ("POST", "/policy/mode", {"mode": "advisory", "owner": "ada"}, ("mode", {"mode": "advisory", "owner": "ada"})),
        ("POST", "/policy/dry-run", {"text": "x"}, ("dry_run", {"text": "x"})),
        ("GET", "/decisions", None, ("decisions", {"limit": 50, "changes": False})),
        ("GET", "/decisions?limit=3&changes=true", None, ("decisions", {"limit": 3, "changes": True})),
        ("GET", "/decisions/d-7", None, ("decision", {"decision_id": "d-7"})),
    ],
)
def test_a_route_asks_the_controller(
    api: httpx.Client, controller: PlayedController, method: str, path: str, body: Any, call: Any
) -> None:
    assert api.request(method, path, json=body).status_code == 200
    assert controller.calls == [("policy", *call)]


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", "/policy/pause", {}),
        ("POST", "/policy/pause", {"for_s": 0}),
        ("POST", "/policy/pause", {"for_s": 1e9}),
        ("POST", "/policy/pause", {"for_s": "2h"}),
        ("POST", "/policy/mode", {}),
        ("POST", "/policy/dry-run", {"text": ""}),
        ("PUT", "/policy", {"txt": "x"}),
        ("GET", "/decisions?limit=0", None),
        ("POST", "/scale", {"workers": 2, "for_s": -1}),
    ],
)
def test_what_makes_no_sense_never_reaches_the_controller(
    api: httpx.Client, controller: PlayedController, method: str, path: str, body: Any
) -> None:
    assert api.request(method, path, json=body).status_code == 400
    assert controller.calls == []


def test_refusals_keep_their_words(api: httpx.Client, controller: PlayedController) -> None:
    controller.refusal = AdminError("not_found", "this cluster has no policy")
    answer = api.post("/policy/pause", json={"for_s": 60})
    assert (answer.status_code, answer.json()["error"]["message"]) == (404, "this cluster has no policy")


def test_a_size_by_hand_says_whose_it_is_and_for_how_long(api: httpx.Client, controller: PlayedController) -> None:
    api.post("/scale", json={"workers": 3, "request_id": "r", "owner": "ada", "for_s": 60})
    api.post("/workers/worker-1/drain", json={"request_id": "q", "for_s": 60})
    assert controller.calls == [("scale", 3, "r", "ada", 60.0), ("drain", "worker-1", "q", "admin API", 60.0)]


def test_metrics_tell_of_the_policy(served: Any, controller: PlayedController) -> None:
    gateway = served[0]

    def samples() -> dict[str, float]:
        gateway._parts.cluster._asked_s = -1e9  # what is known is old
        text = httpx.get(f"{gateway.url}/metrics").text
        found = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
        wanted = ("flexpert_workers_desired", "flexpert_scaling", "flexpert_autoscaler")
        return {
            sample.name + sample.labels.get("reason", ""): sample.value
            for sample in found
            if sample.name.startswith(wanted)
        }

    assert samples() == {}
    controller.policy = {"desired": 3, "decisions": {"scale_up": 2}, "ticks": 5, "tick_sum_s": 0.25}
    assert samples() == {
        "flexpert_workers_desired": 3.0,
        "flexpert_scaling_decisions_totalscale_up": 2.0,
        "flexpert_autoscaler_tick_seconds_count": 5.0,
        "flexpert_autoscaler_tick_seconds_sum": 0.25,
    }
