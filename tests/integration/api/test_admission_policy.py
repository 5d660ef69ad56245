"""The chart's ValidatingAdmissionPolicy on a real API server refuses the same specs as the operator."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from finetune_api import names

from localcluster.api import Endpoint
from tests.integration.api.conftest import Response, call, manifest
from tests.support.policy_rows import CHART_VALUES, NAMESPACES, ROWS, Row

pytestmark = pytest.mark.integration
ROOT = Path(__file__).parents[3]
POLICIES_PATH = "/apis/admissionregistration.k8s.io/v1/validatingadmissionpolicies"
BINDINGS_PATH = "/apis/admissionregistration.k8s.io/v1/validatingadmissionpolicybindings"
REFUSAL = re.compile(r"denied request: ForbiddenByPolicy: spec\.(\S+): the platform's rule policy\.(\S+) ")
FORBIDDEN_SPEC = next(row for row in ROWS if row.refusal and row.namespace == "plain").spec


def jobs_path(namespace: str) -> str:
    """Return the path of a namespace's FineTuneJobs."""
    return f"/apis/{names.API_VERSION}/namespaces/{namespace}/{names.PLURAL}"


def render_policy(values: dict[str, Any]) -> list[dict[str, Any]]:
    """Render the chart's template admission-policy.yaml, and return its objects: the policy and its binding."""
    helm = subprocess.run([sys.executable, ROOT / "scripts/tools.py"], check=True, capture_output=True, text=True).stdout.strip()
    command = [helm, "template", "rel", ROOT / "helm/finetune-operator", "-f", "-", "--show-only", "templates/admission-policy.yaml"]
    completed_process = subprocess.run(command, input=json.dumps({"imageRegistry": "registry.example.com", **values}), capture_output=True, text=True)
    assert completed_process.returncode == 0, completed_process.stderr
    return list(yaml.safe_load_all(completed_process.stdout))


@pytest.fixture(scope="module")
def existing_jobs(control_plane: Endpoint, crd_installed: Response) -> dict[int | None, str]:
    """Create jobs with different values of `activeDeadlineSeconds` before the policy exists. Return the API paths of the jobs by deadline."""
    call(control_plane, "POST", "/api/v1/namespaces", {"metadata": {"name": "strict"}})
    paths: dict[int | None, str] = {}
    for deadline in (None, 9000):
        policy = {} if deadline is None else {"policy": {"activeDeadlineSeconds": deadline}}
        spec = {**FORBIDDEN_SPEC, "model": {"source": "theirs/m"}, **policy}
        response = call(control_plane, "POST", jobs_path("strict"), manifest(f"old-{deadline or 'unlimited'}", spec))
        assert response.status == 201, response.message
        paths[deadline] = f"{jobs_path('strict')}/{response.body['metadata']['name']}"
    return paths


@pytest.fixture(scope="module")
def create(control_plane: Endpoint, crd_installed: Response, existing_jobs: dict[int | None, str]) -> Iterator[Callable[..., Response]]:
    """Install the policy. Return a function that creates a FineTuneJob as a dry run."""
    for namespace in NAMESPACES:
        call(control_plane, "POST", "/api/v1/namespaces", {"metadata": {"name": namespace}})
    policy, binding = render_policy({**CHART_VALUES, "policy": {**CHART_VALUES["policy"], "validatingAdmissionPolicy": True}})
    for path, item in ((POLICIES_PATH, policy), (BINDINGS_PATH, binding)):
        response = call(control_plane, "POST", path, item)
        assert response.status == 201, response.message

    def dry_run(namespace: str, spec: dict[str, Any]) -> Response:
        return call(control_plane, "POST", jobs_path(namespace), manifest("job", spec), dryRun="All", fieldValidation="Strict")

    deadline = time.monotonic() + 60
    while dry_run("plain", FORBIDDEN_SPEC).status != 403:
        assert time.monotonic() < deadline, "the API server does not apply the policy"
    yield dry_run
    for path, item in ((BINDINGS_PATH, binding), (POLICIES_PATH, policy)):
        call(control_plane, "DELETE", f"{path}/{item['metadata']['name']}")


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.namespace}-{row.changed_groups}"[:120])
def test_the_api_server_refuses_the_same_specs_as_the_operator(row: Row, create: Callable[..., Response]) -> None:
    """`tests/unit/tenancy/test_policy.py` checks the same specs with the operator's code."""
    response = create(row.namespace, row.spec)
    assert (response.status, REFUSAL.findall(response.message)) == ((403, [row.refusal]) if row.refusal else (201, [])), response.message


@pytest.mark.parametrize(
    ("old_deadline", "change", "is_accepted"),
    [
        (None, {"suspend": True}, True), (None, {"policy": {"activeDeadlineSeconds": 3600}}, True), (None, {"policy": {"activeDeadlineSeconds": 3601}}, False),
        (9000, {"suspend": True}, True), (9000, {"policy": {"activeDeadlineSeconds": 8000}}, True), (9000, {"policy": {"activeDeadlineSeconds": 9001}}, False),
        (9000, {"policy": {"activeDeadlineSeconds": None}}, True),
    ],
)  # fmt: skip
def test_a_job_that_is_older_than_the_policy_can_change_but_cannot_extend_its_deadline(
    old_deadline: int | None, change: dict[str, Any], is_accepted: bool, existing_jobs: dict[int | None, str], control_plane: Endpoint,
    create: Callable[..., Response],
) -> None:
    """The spec of the older job breaks the rules of its namespace. If a job has no deadline of its own, the operator uses the limit that it recorded for the
    job.
    """
    path = existing_jobs[old_deadline]
    response = call(control_plane, "PATCH", path, {"spec": change}, content_type="application/merge-patch+json", dryRun="All")
    expected_refusals = [("policy.activeDeadlineSeconds", "maxDurationSeconds")]
    assert (response.status, REFUSAL.findall(response.message)) == ((200, []) if is_accepted else (403, expected_refusals)), response.message


def test_the_policy_applies_only_to_watched_namespaces() -> None:
    values = {"policy": {"validatingAdmissionPolicy": True}, "watchNamespaces": ["team-a", "team-b"]}
    _, binding = render_policy(values)
    (expression,) = binding["spec"]["matchResources"]["namespaceSelector"]["matchExpressions"]
    assert expression == {"key": "kubernetes.io/metadata.name", "operator": "In", "values": ["team-a", "team-b"]}
