"""docs/api.md names what there is: every parameter, error code, metric and endpoint, and none that is gone."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from flexpert.controller.errors import ADMIN_CODES
from flexpert.controller.gateway import admin_policy, admin_schema, schema


@pytest.fixture(scope="module")
def page(repository: Path) -> str:
    return (repository / "docs" / "api.md").read_text()


def named(page: str) -> set[str]:
    return set(re.findall(r"`([^`]+)`", page))


@pytest.mark.parametrize("model", [schema.CompletionRequest, schema.ChatRequest])
def test_every_parameter_is_documented(page: str, model: Any) -> None:
    assert set(model.model_fields) - named(page) == set()


def test_every_field_of_the_admin_api_is_documented(page: str) -> None:
    promised = [
        *(admin_schema.ScaleRequest, admin_schema.DrainRequest, admin_schema.Transition),
        *(admin_policy.PutPolicyRequest, admin_policy.PauseRequest, admin_policy.DryRunRequest),
    ]
    assert {name for model in promised for name in model.model_fields} - named(page) - {"workers"} == set()


def test_ignored_and_refused_parameters_are_documented(page: str) -> None:
    assert (schema.IGNORED | set(schema.UNSUPPORTED)) - named(page) == set()


def test_every_error_code_is_documented(page: str, repository: Path) -> None:
    sources = "".join(path.read_text() for path in (repository / "controller" / "gateway").glob("*.py"))
    codes = set(re.findall(r'code="([a-z_]+)"', sources)) | {
        "missing_api_key",
        "invalid_api_key",
        "missing_admin_key",
        "invalid_admin_key",
        *ADMIN_CODES,
    }
    assert codes - named(page) == set()


def test_metrics_of_the_page_and_of_the_server_are_the_same(page: str, shared: Any) -> None:
    worker_only = {name for name in named(page) if name.startswith("flexpert_worker_")}
    text = httpx.get(f"{shared.gateways[0].url}/metrics").text
    served = {
        family.name + ("_total" if family.type == "counter" else "") for family in text_string_to_metric_families(text)
    }
    assert {name for name in named(page) if name.startswith("flexpert_")} == served | worker_only
    assert worker_only == {name for name in served if name.startswith("flexpert_worker_")}


def test_endpoints_of_the_page_and_of_the_server_are_the_same(page: str, shared: Any) -> None:
    document = httpx.get(f"{shared.gateways[0].url}/openapi.json").json()
    served = {f"{method.upper()} {path}" for path, methods in document["paths"].items() for method in methods}
    listed = re.findall(r"^\| `((?:GET|POST|PUT) [^`]+)`", page, re.MULTILINE)
    assert {name.replace("{id}", "{model_id}") for name in listed} == served | {"GET /openapi.json"}
