"""The installed operator: its permissions suffice, an upgrade restarts no pod, and a job finishes while the operator is down."""

from __future__ import annotations

import demo
from finetune_api.names import Label, Phase

from tests.e2e.jobs.installation import LONG_RUN_STEPS, Installation, JobNamespace, make_job
from tests.support.audit_log import read_requests
from tests.support.kubeapi import condition_is_true


def test_the_operator_runs_under_pod_security_restricted_and_no_request_is_forbidden(installation: Installation) -> None:
    logs = installation.cluster.kubectl("-n", demo.RELEASE_NAME, "logs", f"deployment/{demo.RELEASE_NAME}", "--tail=-1")
    assert "forbidden" not in logs.lower()
    (pod,) = installation.api.list("pods", demo.RELEASE_NAME)
    assert pod["spec"]["containers"][0]["securityContext"]["readOnlyRootFilesystem"] is True
    requests = read_requests(installation.cluster.endpoint, demo.RELEASE_NAME, demo.RELEASE_NAME)
    assert requests, "the audit log contains no request of the operator"
    assert sorted(request for request in requests if not request.is_permitted) == []


def test_a_helm_upgrade_with_the_same_values_restarts_no_pod(installation: Installation) -> None:
    installation.install()
    installation.api.wait_list(
        "pods", demo.RELEASE_NAME, lambda pods: len(pods) == 1, timeout=60
    )  # a pod of the previous version may still be ending
    (pod_before,) = installation.api.list("pods", demo.RELEASE_NAME)
    installation.install()
    (pod_after,) = installation.api.list("pods", demo.RELEASE_NAME)
    assert pod_after["metadata"]["uid"] == pod_before["metadata"]["uid"]


def test_a_job_finishes_while_the_operator_is_down(job_namespace: JobNamespace) -> None:
    installation = job_namespace.installation
    labels = f"{Label.JOB_NAME}=alone"
    job_namespace.apply(make_job("alone", training={"maxSteps": LONG_RUN_STEPS, "batchSizePerDevice": 2, "gradientAccumulationSteps": 1}))
    installation.api.wait_list("jobs", job_namespace.namespace, lambda jobs: len(jobs) == 1, labels=labels, timeout=60)
    kubectl = installation.cluster.kubectl
    kubectl("-n", demo.RELEASE_NAME, "scale", f"deployment/{demo.RELEASE_NAME}", "--replicas=0", "--timeout=60s")
    installation.api.wait_list("pods", demo.RELEASE_NAME, lambda pods: not pods, timeout=60)
    installation.api.wait_list(
        "jobs",
        job_namespace.namespace,
        lambda jobs: all(condition_is_true(job, "Complete") for job in jobs),
        labels=labels,
        timeout=120,
    )
    assert job_namespace.status("alone").phase is not Phase.SUCCEEDED
    kubectl("-n", demo.RELEASE_NAME, "scale", f"deployment/{demo.RELEASE_NAME}", "--replicas=1")
    status = job_namespace.wait_finished("alone")
    assert status.output is not None
    assert status.output.uri is not None
    assert installation.read_file_hashes(status.output.uri)
