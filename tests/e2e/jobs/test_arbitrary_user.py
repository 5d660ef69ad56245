"""The operator and a job run with a user id that the platform assigns, as on OpenShift.

OpenShift's security context constraint `restricted-v2` sets the user id of each pod. In these tests, a MutatingAdmissionPolicy sets the user id. The assigned
user id has no entry in /etc/passwd of the images, and the group id is 0.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from finetune_api.names import Phase

from localcluster.processes import wait_until
from tests.e2e.jobs.installation import LONG_RUN_STEPS, Installation, JobNamespace, demo, make_job

ASSIGNED_UID = 1000730000
API = "admissionregistration.k8s.io/v1"
NAME = "assigned-user"


def make_assignment_policy(namespaces: list[str]) -> list[dict[str, Any]]:
    """Return a MutatingAdmissionPolicy and its binding. The policy gives all new pods of the namespaces the user id ASSIGNED_UID and leaves the group id at 0.
    """
    security = f"Object.spec.securityContext{{runAsUser: {ASSIGNED_UID}, fsGroup: {ASSIGNED_UID}}}"
    rule = {"apiGroups": [""], "apiVersions": ["v1"], "operations": ["CREATE"], "resources": ["pods"]}
    selector = {"matchExpressions": [{"key": "kubernetes.io/metadata.name", "operator": "In", "values": namespaces}]}
    policy = {
        "failurePolicy": "Fail", "reinvocationPolicy": "Never", "matchConstraints": {"resourceRules": [rule], "namespaceSelector": selector},
        "mutations": [{
            "patchType": "ApplyConfiguration",
            "applyConfiguration": {"expression": f"Object{{spec: Object.spec{{securityContext: {security}}}}}"},
        }],
    }  # fmt: skip
    return [
        {"apiVersion": API, "kind": "MutatingAdmissionPolicy", "metadata": {"name": NAME}, "spec": policy},
        {"apiVersion": API, "kind": "MutatingAdmissionPolicyBinding", "metadata": {"name": NAME}, "spec": {"policyName": NAME}},
    ]


def read_assigned_uid(installation: Installation, namespace: str) -> int | None:
    """Return the user id that a new pod of the namespace would get. The pod is created only as a dry run."""
    arguments = ("-n", namespace, "run", "probe", "--image=none", "--dry-run=server", "-o", "json")
    pod = json.loads(installation.cluster.kubectl(*arguments, "--overrides", json.dumps({"spec": make_restricted_pod()})))
    user_id: int | None = pod["spec"]["securityContext"].get("runAsUser")
    return user_id


def make_restricted_pod() -> dict[str, Any]:
    """Return the manifest of a pod that the Pod Security level `restricted` permits."""
    security = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    return {
        "securityContext": {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}},
        "containers": [{"name": "probe", "image": "none", "securityContext": security}],
    }


@pytest.fixture
def platform_with_assigned_users(installation: Installation, job_namespace: JobNamespace) -> Iterator[None]:
    """Let the cluster assign user ids in the namespaces of the operator and of the job, and install the chart for OpenShift."""
    kubectl, manifest = installation.cluster.kubectl, yaml.safe_dump_all(make_assignment_policy([demo.RELEASE_NAME, job_namespace.namespace]))
    kubectl("apply", "-f", "-", stdin=manifest)
    wait_until("the assigned user", lambda: read_assigned_uid(installation, job_namespace.namespace) == ASSIGNED_UID, servers=[], timeout=60)
    installation.install(openshift=True)
    yield
    kubectl("delete", "-f", "-", stdin=manifest)
    installation.install()


@pytest.mark.slow
@pytest.mark.usefixtures("platform_with_assigned_users")
def test_operator_and_job_run_with_an_assigned_user(job_namespace: JobNamespace) -> None:
    installation = job_namespace.installation
    resources = {"gpusPerNode": 0, "processesPerNode": 2, "cpu": "100m", "memory": "2Gi"}
    job_namespace.apply(make_job("assigned", prepare={"strategy": "always"}, training={"maxSteps": LONG_RUN_STEPS}, resources=resources))
    job_namespace.wait("assigned", lambda s: s.phase is Phase.RUNNING, "running")
    pod = next(pod for pod in job_namespace.pods("assigned") if "prepare" not in pod["metadata"]["name"])
    assert job_namespace.exec_script(pod["metadata"]["name"], "id -u; id -g").split() == [str(ASSIGNED_UID), "0"]
    find_writable_folders = "for d in / /app /opt/venv /root /var/tmp /tmp /dev/shm /work; do [ -w $d ] && echo $d; done; true"
    assert job_namespace.exec_script(pod["metadata"]["name"], find_writable_folders).split() == ["/tmp", "/dev/shm", "/work"]
    job_namespace.wait_finished("assigned")
    pods = [*installation.api.list("pods", demo.RELEASE_NAME), *job_namespace.pods("assigned")]
    assert len(pods) == 3  # one pod each of the operator, the preparation and the training
    assert {pod["spec"]["securityContext"]["runAsUser"] for pod in pods} == {ASSIGNED_UID}
    assert {"runAsGroup" in pod["spec"]["securityContext"] for pod in pods} == {False}
