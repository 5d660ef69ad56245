"""In the rendered chart and in a training Job, checkov finds nothing except the exceptions that this file lists. Each exception states its reason."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.support.tool_programs import ensure_environment

pytestmark = pytest.mark.slow
VALUES = {
    "imageRegistry": "r.example.com", "replicas": 2, "crds": {"enabled": False}, "networkPolicy": {"enabled": True},
    "podDisruptionBudget": {"enabled": True},
    "metrics": {"serviceMonitor": {"enabled": True}, "prometheusRule": {"enabled": True}, "grafanaDashboard": {"enabled": True}},
    "openaiServer": {
        "enabled": True, "models": {"m": {"spec": {}}}, "storage": {"uri": "s3://models"}, "keysSecret": "keys", "credentialsSecret": "s3",
        "accounts": [{"namespace": "team", "serviceAccounts": ["client"]}], "networkPolicy": {"enabled": True},
    },
}  # fmt: skip
OPENAI_SERVER = "Deployment.ops.rel-finetune-operator-openai"
OPERATOR, TEST_POD, TRAINING_JOB = "Deployment.ops.rel-finetune-operator", "Pod.ops.rel-finetune-operator-test", "Job.team.run-1"
NO_CPU_LIMIT = "a CPU limit throttles a process even if the node has free CPUs; the CPU request guarantees the share"
NO_DIGEST = "the digest depends on the user's build; users can set it with image.digest and trainer.image.digest"
PULL_POLICY = "the tag of a release is never moved to another image, so nodes need not ask the registry at each start; users can set image.pullPolicy"
EXCEPTIONS = {
    ("CKV_K8S_11", OPERATOR): NO_CPU_LIMIT,
    ("CKV_K8S_43", OPERATOR): NO_DIGEST,
    ("CKV_K8S_15", OPERATOR): PULL_POLICY,
    ("CKV_K8S_38", OPERATOR): "the operator calls the API server, so it needs the token of its ServiceAccount",
    ("CKV_K8S_11", OPENAI_SERVER): NO_CPU_LIMIT,
    ("CKV_K8S_43", OPENAI_SERVER): NO_DIGEST,
    ("CKV_K8S_15", OPENAI_SERVER): PULL_POLICY,
    ("CKV_K8S_38", OPENAI_SERVER): "the server calls the API server, so it needs the token of its ServiceAccount",
    ("CKV_K8S_35", OPENAI_SERVER): "the S3 client reads its keys from environment variables; without credentialsSecret, it uses workload identity",
    ("CKV2_K8S_3", "RoleBinding.team.rel-finetune-operator-openai"): "the server acts only as the listed ServiceAccounts, so that RBAC limits each key",
    ("CKV_K8S_11", TEST_POD): NO_CPU_LIMIT,
    ("CKV_K8S_43", TEST_POD): NO_DIGEST,
    ("CKV_K8S_15", TEST_POD): PULL_POLICY,
    ("CKV_K8S_8", TEST_POD): "the pod of `helm test` ends after two requests, each with a timeout",
    ("CKV_K8S_9", TEST_POD): "no Service selects the pod of `helm test`",
    ("CKV2_K8S_6", TEST_POD): "the pod of `helm test` exists for seconds and listens on no port",
}
TRAINING_EXCEPTIONS = {
    ("CKV_K8S_11", TRAINING_JOB): NO_CPU_LIMIT,
    ("CKV_K8S_43", TRAINING_JOB): NO_DIGEST,
    ("CKV_K8S_15", TRAINING_JOB): PULL_POLICY,
    ("CKV2_K8S_6", "Pod.team.run-1"): "the operator creates the NetworkPolicy of the attempt after the Job, because the Job owns it",
}


def run_checkov(file: Path) -> set[tuple[str, str]]:
    """Run checkov on a file. Returns the pair (check, resource) of each finding."""
    program = ensure_environment("checkov").parent / "checkov"
    command = [program, "--file", file, "--framework", "kubernetes", "--skip-download", "--output", "json", "--compact", "--quiet"]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    completed_process = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=file.parent)
    report: dict[str, Any] = json.loads(completed_process.stdout)
    assert report["summary"]["parsing_errors"] == 0
    assert report["summary"]["passed"] > 50
    return {(check["check_id"], check["resource"].partition(".app.kubernetes.io")[0]) for check in report["results"]["failed_checks"]}


def test_checkov_finds_only_the_explained_exceptions(helm: Path, root: Path, tmp_path: Path) -> None:
    command = [helm, "template", "rel", root / "helm/finetune-operator", "-n", "ops", "-f", "-"]
    text = subprocess.run(command, input=json.dumps(VALUES), capture_output=True, text=True, check=True).stdout
    (tmp_path / "chart.yaml").write_text(text)
    assert run_checkov(tmp_path / "chart.yaml") == set(EXCEPTIONS)


def test_checkov_finds_only_the_explained_exceptions_in_a_training_job(root: Path, tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text((root / "tests/unit/operator/golden/job-small.yaml").read_text("utf-8"))
    assert run_checkov(tmp_path / "job.yaml") == set(TRAINING_EXCEPTIONS)


def test_checkov_finds_a_privileged_container(helm: Path, root: Path, tmp_path: Path) -> None:
    """Show that the tests above can fail."""
    values = VALUES | {"securityContext": {"privileged": True, "readOnlyRootFilesystem": False}}
    command = [helm, "template", "rel", root / "helm/finetune-operator", "-n", "ops", "-f", "-"]
    text = subprocess.run(command, input=json.dumps(values), capture_output=True, text=True, check=True).stdout
    (tmp_path / "chart.yaml").write_text(text)
    assert {("CKV_K8S_16", OPERATOR), ("CKV_K8S_22", OPERATOR)} <= run_checkov(tmp_path / "chart.yaml")
