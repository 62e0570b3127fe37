"""The admin API: who may call it, what it passes on, how refusals look, and that a restarted controller is waited for."""

from __future__ import annotations

import pickle
from typing import Any

import httpx
import pytest

from flexpert.controller.errors import AdminError
from flexpert.controller.gateway import ControllerAway, GatewayConfig, GatewayError
from flexpert.controller.gateway.admin import ControllerDesk
from flexpert.controller.gateway.errors import ApiError

API_KEY, ADMIN_KEY = "fx-api", "fx-admin"
ADMIN = {"authorization": f"Bearer {ADMIN_KEY}"}
ROUTES = [
    ("GET", "/admin/v1/status"),
    ("GET", "/admin/v1/workers"),
    ("POST", "/admin/v1/scale"),
    ("POST", "/admin/v1/workers/worker-1/drain"),
    ("GET", "/admin/v1/transition"),
    ("GET", "/admin/v1/transitions/t-1"),
    ("GET", "/admin/v1/events"),
    ("GET", "/admin/v1/policy"),
    ("PUT", "/admin/v1/policy"),
    ("POST", "/admin/v1/policy/pause"),
    ("POST", "/admin/v1/policy/resume"),
    ("POST", "/admin/v1/policy/mode"),
    ("POST", "/admin/v1/policy/dry-run"),
    ("GET", "/admin/v1/decisions"),
    ("GET", "/admin/v1/decisions/d-1"),
]


class PlayedController:
    """Answers as it was told and remembers what it was asked; `away` so many times first."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.refusal: Exception | None = None
        self.away = 0
        self.state = "running"
        self.events: list[dict[str, Any]] = []

    async def __call__(self, method: str, *arguments: Any) -> Any:
        if self.away:
            self.away -= 1
            raise ControllerAway("killed")
        self.calls.append((method, *arguments))
        if self.refusal is not None:
            raise self.refusal
        match method:
            case "status":
                workers = [{"worker_id": "worker-0", "experts_held": 12, "kv_bytes": 4096, "address": "unix:/x"}, {}]
                return {"name": "default", "phase": "running", "ready": True, "epoch": 3, "model": "m", "workers": workers,
                        "transition": self.transition("t-1")}  # fmt: skip
            case "events":
                return {"events": self.events, "last": self.events[-1]["sequence"] if self.events else 0}
            case "transition":
                return None if arguments == (None,) else self.transition(arguments[0])
        return self.transition("t-1")

    def transition(self, transition_id: str) -> dict[str, Any]:
        if transition_id == "t-forgotten":
            raise AdminError("not_found", "there is no transition 't-forgotten', or it is too long ago")
        members = [
            {"worker_id": "worker-0", "role": "stays", "seconds": {"prepare": 0.2, "commit": 0.004}},
            {
                "worker_id": "worker-1",
                "role": "joins",
                "seconds": {"start": 0.3, "prepare": 0.2, "commit": 0.0, "retire": 9.0},
            },
        ]
        return {"transition_id": transition_id, "state": self.state, "kind": "scale", "phase": "prepare", "moved_bytes": 700,
                "total_bytes": 1000, "seconds": 0.6, "members": [] if transition_id == "t-0-idle" else members}  # fmt: skip


@pytest.fixture(scope="module")
def served(model_dir: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    from tests.controller.gateway.conftest import Harness

    made, controller = Harness(model_dir, tmp_path_factory.mktemp("admin")), PlayedController()
    gateway = made.gateway(api_keys=(API_KEY,), admin_keys=(ADMIN_KEY,), call_controller=controller, wait=False)
    yield gateway.url, controller
    made.close()


@pytest.fixture
def controller(served: Any) -> PlayedController:
    served[1].reset()
    return served[1]  # type: ignore[no-any-return]


@pytest.fixture
def api(served: Any) -> Any:
    with httpx.Client(base_url=served[0], headers=ADMIN, timeout=20) as client:
        yield client


def error(response: httpx.Response) -> tuple[int, str, str]:
    found = response.json()["error"]
    assert set(found) == {"message", "type", "param", "code"}
    return response.status_code, found["type"], found["code"]


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_every_route_needs_the_admin_key(controller: PlayedController, served: Any, method: str, path: str) -> None:
    wanted = {
        "": (401, "authentication_error", "missing_admin_key"),
        "Basic eA==": (401, "authentication_error", "missing_admin_key"),
        "Bearer wrong": (401, "authentication_error", "invalid_admin_key"),
        f"Bearer {API_KEY}": (403, "permission_error", "not_an_admin_key"),
    }
    for given, answer in wanted.items():
        headers = {"authorization": given} if given else {}
        response = httpx.request(method, served[0] + path, headers=headers, json={"workers": 2})
        assert error(response) == answer
        assert ("www-authenticate" in response.headers) == (answer[0] == 401)
    assert controller.calls == []
    assert error(httpx.request(method, served[0] + "/admin/v2/x"))[0] == 401, (
        "below /admin nothing is told to strangers"
    )


def test_admin_key_is_no_api_key(served: Any) -> None:
    assert error(httpx.get(f"{served[0]}/v1/models", headers=ADMIN)) == (401, "authentication_error", "invalid_api_key")


def test_without_an_admin_key_the_api_is_off(harness: Any) -> None:
    gateway = harness.gateway(wait=False)
    assert error(httpx.get(f"{gateway.url}/admin/v1/status", headers=ADMIN)) == (
        403,
        "permission_error",
        "admin_api_off",
    )


def test_one_key_for_both_is_refused(model_dir: Any) -> None:
    with pytest.raises(GatewayError, match="both an API key and an admin key"):
        GatewayConfig(model_id="m", model_dir=model_dir, cluster_token="t", api_keys=("a", "b"), admin_keys=("b",))


def test_scale_passes_the_wish_on_and_tells_where_to_follow(api: httpx.Client, controller: PlayedController) -> None:
    response = api.post("/admin/v1/scale", json={"workers": 3, "request_id": "r-1"})
    assert (response.status_code, response.headers["location"]) == (202, "/admin/v1/transitions/t-1")
    assert response.json()["request_id"] == "r-1"
    assert controller.calls == [("scale", 3, "r-1")]
    assert api.get(response.headers["location"]).json()["transition_id"] == "t-1"
    controller.state = "done"
    response = api.post("/admin/v1/scale", json={"workers": 3, "request_id": "r-1"})
    assert (response.status_code, "location" in response.headers) == (200, False)


def test_request_id_is_drawn_where_none_is_given(api: httpx.Client, controller: PlayedController) -> None:
    drawn = {api.post("/admin/v1/scale", json={"workers": 2}).json()["request_id"] for _ in range(2)}
    drawn.add(api.post("/admin/v1/workers/worker-1/drain").json()["request_id"])
    assert len(drawn) == 3
    assert [call[-1] for call in controller.calls[:2]] != [controller.calls[2][-1]] * 2


def test_drain_takes_a_body_or_none(api: httpx.Client, controller: PlayedController) -> None:
    assert api.post("/admin/v1/workers/worker-1/drain", json={"request_id": "r-2"}).status_code == 202
    assert controller.calls == [("drain", "worker-1", "r-2")]


@pytest.mark.parametrize(
    "body",
    [{}, {"workers": "3"}, {"workers": 2.5}, {"workers": True}, {"workers": 2, "standby": 1}, {"workers": 2, "request_id": ""},
     {"workers": 2, "request_id": "a b"}, {"workers": 2, "request_id": "x" * 129}, {"workers": 10**30}, [], "3"],
)  # fmt: skip
def test_malformed_wish_never_reaches_the_controller(
    api: httpx.Client, controller: PlayedController, body: Any
) -> None:
    assert error(api.post("/admin/v1/scale", json=body))[0] == 400
    assert controller.calls == []


@pytest.mark.parametrize(
    ("code", "status"), [("invalid", 400), ("not_found", 404), ("conflict", 409), ("impossible", 422)]
)
def test_refusal_keeps_its_words(api: httpx.Client, controller: PlayedController, code: str, status: int) -> None:
    controller.refusal = AdminError(code, "5 workers are too many: there are 4 devices; scale to 4 or fewer")
    for call in (
        lambda: api.post("/admin/v1/scale", json={"workers": 5}),
        lambda: api.post("/admin/v1/workers/worker-9/drain"),
        lambda: api.get("/admin/v1/transitions/t-9"),
    ):
        response = call()
        assert error(response) == (status, "invalid_request_error", code)
        assert response.json()["error"]["message"] == "5 workers are too many: there are 4 devices; scale to 4 or fewer"


def test_zero_workers_is_the_controllers_to_refuse(api: httpx.Client, controller: PlayedController) -> None:
    """It says what is possible instead."""
    controller.refusal = AdminError("impossible", "scale to at least 1; 'flexpert down' ends the cluster")
    assert error(api.post("/admin/v1/scale", json={"workers": 0}))[0] == 422
    assert controller.calls[0][:2] == ("scale", 0)


def test_error_inside_the_controller_is_a_500(api: httpx.Client, controller: PlayedController) -> None:
    controller.refusal = RuntimeError("a fault of the test")
    assert error(api.get("/admin/v1/status"))[0] == 500


def test_controller_that_is_restarted_is_waited_for(api: httpx.Client, controller: PlayedController) -> None:
    controller.away = 3
    assert api.post("/admin/v1/scale", json={"workers": 2, "request_id": "r-3"}).status_code == 202
    assert controller.calls == [("scale", 2, "r-3")]


async def test_controller_that_stays_away_is_a_503_that_says_to_ask_again() -> None:
    controller = PlayedController()
    controller.away = 10**9
    with pytest.raises(ApiError) as caught:
        await ControllerDesk(controller, wait_s=0.01).ask("status")
    assert (caught.value.status_code, caught.value.code) == (503, "controller_unavailable")
    assert caught.value.headers == {"Retry-After": "2"}


def test_status_workers_and_transition_are_passed_on(api: httpx.Client, controller: PlayedController) -> None:
    assert api.get("/admin/v1/status").json()["epoch"] == 3
    assert [worker["worker_id"] for worker in api.get("/admin/v1/workers").json()["data"]] == ["worker-0"]
    assert api.get("/admin/v1/transition").json() == {"transition": None}


def test_events_are_paged(api: httpx.Client, controller: PlayedController) -> None:
    controller.events = [{"sequence": number, "time_s": 1.0, "kind": "k", "text": "t"} for number in range(1, 8)]
    first = api.get("/admin/v1/events", params={"limit": 3}).json()
    assert ([event["sequence"] for event in first["events"]], first["last"]) == ([1, 2, 3], 3)
    rest = api.get("/admin/v1/events", params={"after": first["last"]}).json()
    assert ([event["sequence"] for event in rest["events"]], rest["last"]) == ([4, 5, 6, 7], 7)
    assert api.get("/admin/v1/events", params={"after": 7}).json() == {"events": [], "last": 7}
    assert error(api.get("/admin/v1/events", params={"after": "x"}))[0] == 400


def test_routes_are_documented_with_their_key_and_refusals(served: Any) -> None:
    document = httpx.get(f"{served[0]}/openapi.json").json()
    admin = {path: methods for path, methods in document["paths"].items() if path.startswith("/admin/")}
    assert sum(map(len, admin.values())) == len(ROUTES)
    for operation in (operation for methods in admin.values() for operation in methods.values()):
        assert operation["security"] == [{"AdminKey": []}]
        assert set(operation["responses"]) >= {"200", "401", "403", "503"}
        assert "$ref" in operation["responses"]["200"]["content"]["application/json"]["schema"]
    for path in ("/admin/v1/scale", "/admin/v1/workers/{worker_id}/drain"):
        assert set(admin[path]["post"]["responses"]) >= {"202", "400", "409", "422"}


def test_refusal_survives_pickling() -> None:
    found = pickle.loads(pickle.dumps(AdminError("conflict", "not now")))  # noqa: S301
    assert (found.code, str(found)) == ("conflict", "not now")


def test_metrics_tell_of_the_cluster(harness: Any) -> None:
    """A transition is counted once, when it has ended, and only where it began after this gateway; not one in which nothing was to do,
    nor one that the controller has forgotten."""
    controller = PlayedController()
    gateway = harness.gateway(call_controller=controller, wait=False)
    facts = harness.run(_parts(gateway)).cluster

    def scrape() -> str:
        facts._asked_s = -10.0
        return httpx.get(f"{gateway.url}/metrics").text

    old = {"sequence": 1, "time_s": 1.0, "kind": "transition", "text": "before", "transition_id": "t-0"}
    begun = ["t-0-idle", "t-forgotten", "t-1"]
    controller.events = [old] + [
        {**old, "sequence": 2 + n, "time_s": facts._began_s + 1, "transition_id": name} for n, name in enumerate(begun)
    ]
    text = scrape()
    for line in (
        "flexpert_epoch 3.0",
        "flexpert_workers_serving 1.0",
        'flexpert_transition_running{kind="scale",phase="prepare"} 1.0',
        'flexpert_worker_experts{worker="worker-0"} 12.0',
        'flexpert_worker_kv_bytes{worker="worker-0"} 4096.0',
        "flexpert_transition_moved_bytes_total 0.0",
    ):
        assert line in text
    controller.state = "done"
    scrape()
    text = scrape()
    for line in (
        'flexpert_transitions_total{kind="scale",state="done"} 1.0',
        "flexpert_transition_moved_bytes_total 700.0",
        'flexpert_join_seconds_sum{start="warm"} 0.5',
        "flexpert_commit_pause_seconds_sum 0.004",
        'flexpert_transition_seconds_sum{kind="scale"} 0.6',
    ):
        assert line in text
    assert "flexpert_transition_running{" not in text
    controller.away = 10**9
    assert "flexpert_epoch 3.0" in scrape(), "what was known last, while the controller is away"


async def _parts(gateway: Any) -> Any:
    return gateway._parts
