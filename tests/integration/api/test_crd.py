"""The CRD on a real API server: its schema is structural and causes no warnings, and the server enforces bounds, CEL rules and immutable fields."""

from __future__ import annotations

from typing import Any

import pytest
from finetune_api import names
from finetune_api.base import CelRule
from finetune_api.rules import RULES

from localcluster.api import Endpoint
from tests.integration.api.conftest import CRD_PATH, JOBS_PATH, MINIMAL_SPEC, Response, call, dry_run, manifest
from tests.support.cel_cases import SPEC_RULE_BREAKERS, iterate_group_rules

pytestmark = pytest.mark.integration

def test_the_server_accepts_the_crd_without_a_warning_and_calls_it_structural(control_plane: Endpoint, crd_installed: Response) -> None:
    assert crd_installed.headers.get_all("Warning") is None
    installed_crd = call(control_plane, "GET", f"{CRD_PATH}/{names.PLURAL}.{names.GROUP}").body
    conditions = {condition["type"]: condition["status"] for condition in installed_crd["status"]["conditions"]}
    assert conditions == {"NamesAccepted": "True", "Established": "True"}


def test_the_server_adds_only_suspend_cancel_empty_groups_and_an_initial_status_to_the_smallest_job(api: Endpoint) -> None:
    response = dry_run(api, MINIMAL_SPEC)
    assert response.status == 201, response.message
    assert response.body["spec"] == MINIMAL_SPEC | {"suspend": False, "cancel": False, "policy": {}, "placement": {}}
    assert response.body["status"] == {"observedGeneration": -1}


@pytest.mark.parametrize(
    ("change", "expected_words"),
    [
        ({"training": {"learningRate": "2e-4"}}, ["spec.training.learningRate", "number"]),
        ({"training": {"learningRate": 0}}, ["spec.training.learningRate", "greater than 0"]),
        ({"training": {"epochs": -1}}, ["spec.training.epochs"]),
        ({"method": {"lora": {"rank": 1.5}}}, ["spec.method.lora.rank", "integer"]),
        ({"method": {"type": "qlorra"}}, ["spec.method.type", '"qlora"']),
        ({"training": {"learnRate": 1}}, ['unknown field "spec.training.learnRate"']),
    ],
)
def test_the_error_about_an_invalid_value_names_the_field(api: Endpoint, change: dict[str, Any], expected_words: list[str]) -> None:
    response = dry_run(api, MINIMAL_SPEC | change)
    assert response.status in (400, 422)
    assert [word for word in expected_words if word not in response.message] == []


@pytest.mark.parametrize(
    ("name", "value"),
    [("memory", "32GB"), ("memory", "-4Gi"), ("memory", 4), ("sharedMemory", "10%"), ("ephemeralStorage", "4"), ("cpu", "4 cores"), ("cpu", 0)],
)
def test_server_refuses_an_invalid_quantity(api: Endpoint, name: str, value: str | int) -> None:
    response = dry_run(api, MINIMAL_SPEC | {"resources": {name: value}})
    assert (response.status, f"spec.resources.{name}" in response.message) == (422, True), response.message


@pytest.mark.parametrize("resources", [{"memory": "1.5Gi", "cpu": "500m"}, {"memory": 8_000_000_000, "cpu": 4}, {"sharedMemory": "1e9"}])
def test_server_accepts_a_valid_quantity(api: Endpoint, resources: dict[str, str | int]) -> None:
    response = dry_run(api, MINIMAL_SPEC | {"resources": resources})
    assert response.status == 201, response.message


GROUP_CASES = list(iterate_group_rules())


@pytest.mark.parametrize(("rule", "spec"), GROUP_CASES, ids=[f"{rule.code}-{rule.message[:20]}" for rule, _ in GROUP_CASES])
def test_api_server_refuses_specs_that_break_a_rule_inside_a_group(api: Endpoint, rule: CelRule, spec: dict[str, Any]) -> None:
    response = dry_run(api, spec)
    assert response.status == 422
    assert rule.message in response.message


@pytest.mark.parametrize("code", sorted(SPEC_RULE_BREAKERS))
def test_api_server_refuses_specs_that_break_a_rule_across_groups(api: Endpoint, code: str) -> None:
    response = dry_run(api, MINIMAL_SPEC | SPEC_RULE_BREAKERS[code])
    assert response.status == 422
    assert next(rule.message for rule in RULES if rule.code == code) in response.message


@pytest.mark.parametrize("name", ["a.b", "1job", "a" * 41, "job-"])
def test_job_name_that_is_not_a_valid_host_name_is_refused(api: Endpoint, name: str) -> None:
    response = dry_run(api, MINIMAL_SPEC, name)
    assert response.status == 422
    assert "metadata.name" in response.message


REFUSED_CHANGES: list[tuple[dict[str, Any], str]] = [
    ({"model": {"source": "other/name"}}, "spec.model cannot change after creation: create a new FineTuneJob"),
    ({"training": {"epochs": 5}}, "spec.training cannot change after creation"),
    ({"checkpoint": None}, "spec.checkpoint cannot change after creation"),
    ({"policy": {"retries": 7}}, "spec.policy.retries cannot change after creation"),
    ({"policy": None}, "spec.policy.retries cannot change after creation"),
    ({"placement": {"priorityClassName": "high"}}, "spec.placement.priorityClassName cannot change after creation"),
    ({"placement": {"queueName": "other"}}, "set spec.suspend to true first"),
]


@pytest.fixture(scope="module")
def existing_job_name(api: Endpoint) -> str:
    spec = MINIMAL_SPEC | {
        "checkpoint": {"steps": 5},
        "policy": {"retries": 2, "activeDeadlineSeconds": 60},
        "placement": {"queueName": "q"},
    }
    response = call(api, "POST", JOBS_PATH, manifest("immutable", spec))
    assert response.status == 201, response.message
    return "immutable"


def patch(api: Endpoint, name: str, spec: dict[str, Any], *, is_dry_run: bool = True) -> Response:
    query = {"dryRun": "All"} if is_dry_run else {}
    return call(api, "PATCH", f"{JOBS_PATH}/{name}", {"spec": spec}, content_type="application/merge-patch+json", **query)


@pytest.mark.parametrize(("change", "refusal"), REFUSED_CHANGES, ids=[refusal[:40] for _, refusal in REFUSED_CHANGES])
def test_fields_of_a_created_job_cannot_change(api: Endpoint, existing_job_name: str, change: dict[str, Any], refusal: str) -> None:
    response = patch(api, existing_job_name, change)
    assert response.status == 422, response.body
    assert refusal in response.message


@pytest.mark.parametrize(
    "change",
    [
        {"suspend": True},
        {"cancel": True},
        {"policy": {"activeDeadlineSeconds": 90}},
        {"policy": {"ttlSecondsAfterFinished": 9}},
    ],
)
def test_suspend_cancel_and_time_limits_can_change(api: Endpoint, existing_job_name: str, change: dict[str, Any]) -> None:
    response = patch(api, existing_job_name, change)
    assert response.status == 200, response.message


def test_queue_can_change_while_suspended_and_cancel_is_final(api: Endpoint) -> None:
    name = "changeable"
    assert call(api, "POST", JOBS_PATH, manifest(name, MINIMAL_SPEC | {"suspend": True})).status == 201
    assert patch(api, name, {"placement": {"queueName": "other"}}, is_dry_run=False).status == 200
    assert patch(api, name, {"cancel": True}, is_dry_run=False).status == 200
    response = patch(api, name, {"cancel": False})
    assert response.status == 422
    assert "spec.cancel cannot change from true to false" in response.message
