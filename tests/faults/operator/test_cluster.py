"""Refusals by the cluster: missing permissions, quotas, Pod Security and terminating namespaces."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from finetune_api.names import GROUP, TRAINER_CONTAINER, Condition, Phase, Reason
from ruamel.yaml import YAML

from tests.support.apiproxy import ApiProxy
from tests.support.audit_log import read_requests
from tests.support.kubeapi import resource_path
from tests.support.kubelet import PodPlan, PodStart, failure_exit, success_exit
from tests.support.operator_process import CHECKOUT_FOLDER
from tests.support.rig import FINETUNEJOBS, MINIMAL_SPEC, Rig, attempt_reasons, condition_is_true, find_condition

pytestmark = pytest.mark.faults
CHART_FOLDER = CHECKOUT_FOLDER / "helm" / "finetune-operator"


def find_helm() -> Path:
    """Return the path of Helm: the value of $HELM, a program on the PATH, or the program that `make tools` has built."""
    helm_path = os.environ.get("HELM") or shutil.which("helm")
    tools_folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "finetune-operator" / "tools"
    built_programs = sorted(tools_folder.glob("helm-*/helm"))
    path = Path(helm_path) if helm_path and Path(helm_path).exists() else (built_programs[-1] if built_programs else None)
    if path is None:
        pytest.fail("Helm is missing: run make tools")
    return path


def render_chart(namespace: str, **values: str) -> list[dict[str, Any]]:
    """Return the objects that the chart renders with these values."""
    set_arguments = [word for key, value in values.items() for word in ("--set", f"{key.replace('__', '.')}={value}")]
    argv = [str(find_helm()), "template", "ft", str(CHART_FOLDER), "--namespace", namespace, "--set", "imageRegistry=example.org", *set_arguments]
    text = subprocess.run(argv, check=True, capture_output=True, text=True).stdout
    return [dict(document) for document in YAML(typ="safe").load_all(text) if document]


def make_plural_name(kind: str) -> str:
    return f"{kind.lower()}s"


def apply_rbac(rig: Rig, documents: list[dict[str, Any]]) -> str:
    """Apply the chart's ServiceAccount and RBAC objects, and return a token of the account."""
    for document in documents:
        kind, meta = document["kind"], document["metadata"]
        if kind in ("ServiceAccount", "Role", "RoleBinding", "ClusterRole", "ClusterRoleBinding"):
            namespace = None if kind.startswith("Cluster") else meta.get("namespace", rig.namespace)
            rig.api.patch(make_plural_name(kind), namespace, meta["name"], document, patch_type="apply")
    account = next(d["metadata"]["name"] for d in documents if d["kind"] == "ServiceAccount")
    path = f"/api/v1/namespaces/{rig.namespace}/serviceaccounts/{account}/token"
    return str(rig.api.request("POST", path, {"spec": {"expirationSeconds": 3600}}).body["status"]["token"])


def render_for_namespace(rig: Rig) -> list[dict[str, Any]]:
    return render_chart(rig.namespace, **{"watchNamespaces[0]": rig.namespace})


@pytest.mark.row(11)
def test_a_missing_permission_blocks_the_job_until_it_is_granted(rig: Rig) -> None:
    rig.allowed_log_lines.append("forbidden")
    documents = render_for_namespace(rig)
    token = apply_rbac(rig, documents)
    role = next(d for d in documents if d["kind"] == "Role" and not d["metadata"]["name"].endswith(("-lease", "-attempt-key")))
    reduced_role = json.loads(json.dumps(role))
    for rule in reduced_role["rules"]:
        if "jobs" in rule["resources"]:
            rule["verbs"] = [verb for verb in rule["verbs"] if verb != "create"]
    put_role(rig, reduced_role)
    operator = rig.start_operator(proxy=rig.start_proxy(), token=token, config=make_lease_config(rig))
    rig.submit()
    body = rig.wait(lambda b: find_condition(b, Condition.PODS_READY).get("reason") == Reason.FORBIDDEN_BY_POLICY)
    message = find_condition(body, Condition.PODS_READY)["message"]
    assert "cannot create" in message
    assert "jobs" in message
    assert body["status"]["phase"] == Phase.PENDING
    put_role(rig, role)
    rig.wait_attempt(1, timeout=60)
    assert operator.is_running


def put_role(rig: Rig, role: dict[str, Any]) -> None:
    rig.api.request("PUT", resource_path("roles", rig.namespace, role["metadata"]["name"]), role)


def make_lease_config(rig: Rig) -> dict[str, Any]:
    name = "ft-finetune-operator"
    isolation = {
        "secret": True, "keySecretName": f"{name}-attempt-key", "networkPolicy": True, "operatorNamespace": rig.namespace,
        "operatorLabels": {"app.kubernetes.io/name": "finetune-operator"},
    }  # fmt: skip
    return {"leaderElection": {"enabled": True, "leaseName": name, "leaseNamespace": rig.namespace}, "isolation": isolation}


UNUSED_BY_DESIGN = {
    ("finetunejobs/finalizers", "update"): (
        "the admission plugin OwnerReferencesPermissionEnforcement requires this permission, but the operator never updates finalizers"
    ),
}
"""Permissions that the operator never uses, with the reason why the chart grants them."""


@pytest.mark.row(39)
def test_the_chart_grants_exactly_the_permissions_that_the_operator_uses(rig: Rig) -> None:
    documents = render_for_namespace(rig)
    token = apply_rbac(rig, documents)
    proxy = rig.start_proxy()
    config = make_lease_config(rig) | {"resyncSeconds": 2}
    first_operator = rig.start_operator(proxy=proxy, token=token, config=config)
    use_all_permissions(rig, proxy)
    first_operator.stop()
    rig.start_operator(proxy=proxy, token=token, config=config)
    rig.submit("last")
    rig.wait_attempt(1, "last", timeout=40)
    requests = read_requests(rig.cluster.endpoint, rig.namespace, "ft-finetune-operator")
    assert sorted(r for r in requests if not r.is_permitted) == [], "the operator sent requests that the chart does not permit"
    unused_permissions = list_granted_permissions(documents) - {r.permission for r in requests} - set(UNUSED_BY_DESIGN)
    assert sorted(unused_permissions) == [], "the chart grants permissions that the operator never uses"
    writes = {r.permission for r in requests if r.resource.startswith("finetunejobs") and r.verb in WRITE_VERBS}
    assert writes == {("finetunejobs/status", "update")}, "GitOps tools would report a change of any field outside the status as drift"


def use_all_permissions(rig: Rig, proxy: ApiProxy) -> None:
    """Make the operator send at least one request of every kind that it can send."""
    rig.submit("two", resources={"nodes": 2})
    for pod in rig.kubelet.wait_running(rig.namespace, "two", count=2):
        rig.kubelet.end_pod(pod, success_exit())
    rig.wait_finished("two")
    rig.submit("again", policy={"retries": 1, "ttlSecondsAfterFinished": 1})
    for attempt in (1, 2):
        pod = rig.kubelet.wait_running(rig.namespace, "again", attempt=attempt)[0]
        rig.kubelet.end_pod(pod, failure_exit(70, message="broken"))
    rig.wait_finished("again")
    rig.api.wait_gone("jobs", rig.namespace, "again-2")
    rig.submit("flapping", suspend=True)
    for value in (False, True, False, True):
        rig.patch_spec("flapping", suspend=value)
        rig.wait_phase(Phase.SUSPENDED if value else Phase.STARTING, "flapping")
    rig.submit("orphaned")
    rig.kubelet.wait_running(rig.namespace, "orphaned")
    rig.wait_attempt(1, "orphaned")
    rig.api.delete("jobs", rig.namespace, "orphaned-1", propagationPolicy="Orphan")
    rig.wait_attempt(2, "orphaned")
    rig.api.create("services", rig.namespace, {"metadata": {"name": "taken-1"}, "spec": {"ports": [{"port": 1}]}})
    rig.submit("taken", resources={"nodes": 2})
    rig.wait_attempt(1, "taken")
    rig.kubelet.set_plan(rig.namespace, PodPlan(start=PodStart.CONTAINER_WAITING, reason="ContainerCreating"))
    rig.submit("held")
    rig.wait_attempt(1, "held")
    proxy.wait_for(lambda e: e.operation == "list events", timeout_seconds=60)


def list_granted_permissions(documents: list[dict[str, Any]]) -> set[tuple[str, str]]:
    """Return (resource, verb) for each permission that the chart grants."""
    return {
        (resource, verb)
        for document in documents if document["kind"] in ("Role", "ClusterRole")
        for rule in document["rules"] for resource in rule["resources"] for verb in rule["verbs"]
    }  # fmt: skip


@pytest.mark.row(39)
def test_the_rbac_rules_have_no_wildcards_and_allow_reading_only_the_operators_secret() -> None:
    for values in ({}, {"watchNamespaces[0]": "team-a"}):
        permissions = list_granted_permissions(render_chart("system", **values))
        assert permissions
        assert not [permission for permission in permissions if "*" in permission]
        # The operator has permission to read a single Secret: the one that contains the operator's own key.
        assert {permission for permission in permissions if permission[0].startswith("secrets")} == {("secrets", "create"), ("secrets", "get")}


WRITE_VERBS = ("create", "update", "patch", "delete", "deletecollection")
READ_VERBS = ("get", "list", "watch")


@pytest.mark.row(40)
def test_the_user_roles_grant_finetunejobs_but_not_their_status(rig: Rig) -> None:
    roles = [d for d in render_chart(rig.namespace) if d["kind"] == "ClusterRole"]
    user_roles = [d for d in roles if any("aggregate-to" in label for label in d["metadata"]["labels"])]
    assert len(user_roles) == 2
    for role in user_roles:
        rig.api.patch("clusterroles", None, role["metadata"]["name"], role, patch_type="apply")
    for role_name, verb in (("view", "watch"), ("edit", "patch"), ("admin", "patch")):
        rig.api.wait("clusterroles", None, role_name, lambda body, verb=verb: is_verb_granted(body, verb))
        subject = {"kind": "User", "name": f"{role_name}er", "apiGroup": "rbac.authorization.k8s.io"}
        reference = {"kind": "ClusterRole", "name": role_name, "apiGroup": "rbac.authorization.k8s.io"}
        binding = {"metadata": {"name": role_name}, "roleRef": reference, "subjects": [subject]}
        rig.api.create("rolebindings", rig.namespace, binding)
    rig.api.wait_list("nodes", None, lambda items: is_allowed(rig, "adminer", "create"), timeout=20)
    allowed_verbs = {
        user: [verb for verb in (*READ_VERBS, *WRITE_VERBS) if is_allowed(rig, user, verb)]
        for user in ("viewer", "editer", "adminer", "stranger")
    }
    all_verbs = [*READ_VERBS, *WRITE_VERBS]
    assert allowed_verbs == {"viewer": list(READ_VERBS), "editer": all_verbs, "adminer": all_verbs, "stranger": []}
    assert [user for user in allowed_verbs if is_allowed(rig, user, "update", "status")] == []
    assert [user for user in allowed_verbs if is_allowed(rig, user, "get", "status")] == ["viewer", "editer", "adminer"]
    assert not is_allowed(rig, "editer", "create", namespace="default")


def is_verb_granted(role: dict[str, Any], verb: str) -> bool:
    """Whether a role of the API server grants a verb on FineTuneJobs."""
    rules = role.get("rules") or []
    return any(FINETUNEJOBS in rule.get("resources", []) and verb in rule["verbs"] for rule in rules)


def is_allowed(rig: Rig, user: str, verb: str, subresource: str = "", namespace: str = "") -> bool:
    """Whether the API server allows a user to use a verb on FineTuneJobs."""
    attributes = {"namespace": namespace or rig.namespace, "verb": verb, "group": GROUP, "resource": FINETUNEJOBS, "subresource": subresource}
    body = {"spec": {"user": user, "resourceAttributes": attributes}}
    answer = rig.api.request("POST", "/apis/authorization.k8s.io/v1/subjectaccessreviews", body)
    return bool(answer.body["status"]["allowed"])


@pytest.mark.row(36)
def test_a_terminating_namespace_deletes_its_jobs(rig: Rig) -> None:
    proxy = rig.start_proxy()
    operator = rig.start_operator(proxy=proxy, config={"namespaces": []})
    rig.api.create("namespaces", None, {"metadata": {"name": f"{rig.namespace}-x"}})
    body = {"apiVersion": f"{GROUP}/v1alpha1", "kind": "FineTuneJob", "metadata": {"name": "job"}, "spec": MINIMAL_SPEC}
    rig.api.create(FINETUNEJOBS, f"{rig.namespace}-x", body)
    rig.kubelet.wait_running(f"{rig.namespace}-x", "job")
    rig.api.delete("namespaces", None, f"{rig.namespace}-x")
    rig.api.wait_gone("namespaces", None, f"{rig.namespace}-x", timeout=90)
    rig.submit()
    rig.wait_attempt(1)
    assert operator.is_running
    path = f"/namespaces/{rig.namespace}-x/"
    create_statuses = [e.server_status for e in proxy.exchanges if path in e.path and e.operation == "create jobs"]
    assert create_statuses.count(201) == 1
    assert set(create_statuses) <= {201, 403, 404}
    assert len(create_statuses) <= 6, "the operator retried too often in a terminating namespace"


@pytest.mark.row(37)
@pytest.mark.parametrize("limits", [{"pods": "0"}, {"count/jobs.batch": "0"}])
def test_an_exceeded_quota_is_quoted_until_it_is_raised(rig: Rig, limits: dict[str, str]) -> None:
    quota = {"metadata": {"name": "tight"}, "spec": {"hard": limits}}
    rig.api.create("resourcequotas", rig.namespace, quota)
    rig.api.wait("resourcequotas", rig.namespace, "tight", lambda b: b.get("status", {}).get("hard") == limits)
    rig.start_operator()
    rig.submit()
    body = rig.wait(lambda b: find_condition(b, Condition.PODS_READY).get("reason") == Reason.QUOTA_EXCEEDED, timeout=60)
    assert "exceeded quota: tight" in find_condition(body, Condition.PODS_READY)["message"]
    rig.wait_event(Reason.QUOTA_EXCEEDED)
    rig.api.delete("resourcequotas", rig.namespace, "tight")
    rig.kubelet.end_pod(rig.kubelet.wait_running(rig.namespace, "job", timeout=90)[0], success_exit())
    assert attempt_reasons(rig.wait_finished()) == [(1, Reason.SUCCEEDED)]


@pytest.mark.row(37)
def test_a_refusal_by_a_limit_range_is_quoted(rig: Rig) -> None:
    memory_limit = {"type": "Container", "max": {"memory": "1Gi"}}
    rig.api.create("limitranges", rig.namespace, {"metadata": {"name": "small"}, "spec": {"limits": [memory_limit]}})
    rig.start_operator()
    rig.submit(resources={"memory": "2Gi"})
    body = rig.wait(
        lambda b: find_condition(b, Condition.PODS_READY).get("reason") == Reason.FORBIDDEN_BY_POLICY, timeout=60
    )
    assert "maximum memory usage per Container is 1Gi" in find_condition(body, Condition.PODS_READY)["message"]


@pytest.mark.row(38)
def test_all_pods_comply_with_pod_security_restricted(rig: Rig) -> None:
    labels = {"pod-security.kubernetes.io/enforce": "restricted", "pod-security.kubernetes.io/warn": "restricted"}
    rig.api.patch("namespaces", None, rig.namespace, {"metadata": {"labels": labels}})
    operator = rig.start_operator()
    rig.submit(resources={"nodes": 2}, storage={"credentialsSecretRef": {"name": "s3"}})
    rig.kubelet.wait_running(rig.namespace, "job", count=2)
    assert "would violate" not in operator.log
    deployment = next(d for d in render_chart(rig.namespace) if d["kind"] == "Deployment")
    path = f"/apis/apps/v1/namespaces/{rig.namespace}/deployments"
    answer = rig.api.request("POST", path, deployment, dryRun="All")
    assert answer.warnings == ()
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "operator"}}
    pod["spec"] = deployment["spec"]["template"]["spec"] | {"serviceAccountName": "default"}
    rig.api.request("POST", f"/api/v1/namespaces/{rig.namespace}/pods", pod, dryRun="All")


@pytest.mark.row(38)
def test_a_refusal_by_pod_security_blocks_the_job(rig: Rig) -> None:
    """The namespace label makes the API server refuse a pod that violates the profile. `test_all_pods_comply_with_pod_security_restricted` relies on
    this.
    """
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    rig.api.patch("namespaces", None, rig.namespace, {"metadata": {"labels": labels}})
    rig.start_operator(config={"policy": {"annotations": ["*"]}})  # The operator's default policy would refuse the annotation.
    rig.submit(placement={"annotations": {f"container.apparmor.security.beta.kubernetes.io/{TRAINER_CONTAINER}": "unconfined"}})
    body = rig.wait(
        lambda b: find_condition(b, Condition.PODS_READY).get("reason") == Reason.FORBIDDEN_BY_POLICY, timeout=60
    )
    assert "restricted" in find_condition(body, Condition.PODS_READY)["message"]
    assert not condition_is_true(body, Condition.PODS_READY)
