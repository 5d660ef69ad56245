"""More than forty bad GPU jobs end in their preparation. The API server's audit log shows that no pod that requests a GPU was ever created."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from finetune_api.names import Condition, FailureClass, Phase, Reason
from finetune_api.status import FineTuneJobStatus

from tests.e2e.jobs.installation import MODEL, Installation, JobNamespace, demo, make_job
from tests.e2e.jobs.test_bad_input import S3_STORAGE_FIELDS, make_messages_row
from tests.support.audit_log import read_created_pods
from tests.support.bad_jobs import BAD_JOBS, BadJob
from tests.support.tiny import make_tiny_model

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]  # each bad job starts a pod, so the test takes several minutes

MISSING_CONFIG_MAP = ("ConfigMap that does not exist", "prompts that do not exist")
"""The cases whose ConfigMap is missing. In a cluster, a pod does not start while its ConfigMap is missing. So these jobs are not refused, but wait for the
ConfigMap.
"""
REFUSED_BY_RULE = ("push without a token", "unknown file type")
"""The operator refuses these jobs by a rule, before a preparation starts. If the operator had no rule for these jobs, the preparation would refuse them."""
PREPARE = {"strategy": "always", "resources": {"cpu": "100m", "memory": "1Gi"}}
"""The pods request few resources, because the pods of two jobs wait on the nodes for their ConfigMap until the test ends."""
GPU_RESOURCE = "nvidia.com/gpu"


def make_object_name(case: str) -> str:
    """Return the name of the case in a form that is valid for a Kubernetes object."""
    return re.sub(r"[^a-z0-9]+", "-", case.lower()).strip("-")


def upload_inputs(installation: Installation, bad_job: BadJob, name: str) -> dict[str, Any]:
    """Upload the local files of a bad job to S3. Returns its spec with the S3 addresses, and with storage that the cluster can reach."""
    text = json.dumps(bad_job.spec)
    for local_path in sorted(set(re.findall(r'file://([^"]+)', text)), key=len, reverse=True):
        path = Path(local_path)
        key = f"{name}/{path.name}"
        for file in [path] if path.is_file() else sorted(path.rglob("*")):
            if file.is_file():
                target = key if file == path else f"{key}/{file.relative_to(path)}"
                installation.store.upload_file(str(file), demo.DATASETS_BUCKET, target)
        text = text.replace(f'file://{local_path}"', f's3://{demo.DATASETS_BUCKET}/{key}"')
    spec: dict[str, Any] = json.loads(text)
    storage = {"uri": "s3://finetune/jobs", "endpoint": installation.cluster.s3.cluster_url, **S3_STORAGE_FIELDS}
    if bad_job.env.keys() & {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"}:
        storage["credentialsSecretRef"] = {"name": name}
    # The operator refuses loopback addresses, so the address of an unreachable store is replaced by a name that does not exist in the cluster.
    changed_storage = bad_job.storage | ({"endpoint": "http://absent.s3.svc:8333"} if "endpoint" in bad_job.storage else {})
    return {**spec, "storage": storage | changed_storage}


def apply_bad_job(jobs: JobNamespace, folder: Path, model: Path, case: str) -> None:
    """Apply one case as a job that requests a GPU on each of two nodes."""
    name = make_object_name(case)
    folder = folder / name
    folder.mkdir()
    (folder / "rows.jsonl").write_bytes(b"".join(make_messages_row(f"Is {number} a number?") for number in range(30)))
    good_spec: dict[str, Any] = {
        "model": {"source": f"file://{model}"}, "dataset": {"train": f"file://{folder}/rows.jsonl", "format": "messages"}, "training": {"maxSteps": 4},
    }  # fmt: skip
    bad_job = BadJob(folder, model, demo.DATASETS_BUCKET, good_spec)
    BAD_JOBS[case][0](bad_job)
    spec = upload_inputs(jobs.installation, bad_job, name)
    if "credentialsSecretRef" in spec["storage"] and spec["storage"]["credentialsSecretRef"]["name"] == name:
        s3 = jobs.installation.cluster.s3
        jobs.create_secret(name, {"AWS_ACCESS_KEY_ID": s3.access_key, "AWS_SECRET_ACCESS_KEY": s3.secret_key} | bad_job.env)
    resources = {"gpusPerNode": 1, "nodes": 2}
    jobs.apply(make_job(name, **spec, resources=resources, prepare=PREPARE, policy={"retries": 0}))


def requests_gpu(pod: dict[str, Any]) -> bool:
    """Whether a container of the pod requests a GPU."""
    spec = pod["spec"]
    return any(GPU_RESOURCE in (container.get("resources", {}).get("limits") or {}) for container in [*spec["containers"], *spec.get("initContainers", [])])


def find_wrong_refusals(jobs: JobNamespace, case: str) -> list[str]:
    """Wait until the job of a case is refused. Returns a description of each difference from the expected failure."""
    _, code, failure_class, location = BAD_JOBS[case]
    if case in MISSING_CONFIG_MAP:
        jobs.wait(make_object_name(case), lambda s: read_reconciling_reason(s) == Reason.CONFIG_MISSING, "waiting for its ConfigMap")
        return []
    status = jobs.wait(make_object_name(case), lambda s: s.phase in (Phase.FAILED, Phase.SUCCEEDED), "refused", timeout=1200)
    failure = status.failure
    if failure is None:
        return [f"{case}: {status.phase} without a failure"]
    if case in REFUSED_BY_RULE:
        code, failure_class = Reason.REJECTED, FailureClass.USER
    outcome = (failure.code, FailureClass(failure.class_), status.attempts, location in f"{failure.message} {failure.hint}")
    return [] if outcome == (code, failure_class, [], True) else [f"{case}: {outcome}: {failure.message} | {failure.hint}"]


def read_reconciling_reason(status: FineTuneJobStatus) -> str:
    """Return the reason of the job's condition `Reconciling`, or an empty string if the job has no such condition."""
    return next((condition.reason for condition in status.conditions if condition.type == Condition.RECONCILING), "")


def test_bad_jobs_are_refused_and_no_pod_requests_a_gpu(job_namespace: JobNamespace, tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "model", hidden=128, layers=4)
    for case in BAD_JOBS:
        apply_bad_job(job_namespace, tmp_path, model, case)
    problems = [line for case in BAD_JOBS for line in find_wrong_refusals(job_namespace, case)]
    assert not problems, "\n".join(problems)
    pods = read_created_pods(job_namespace.installation.cluster.endpoint, job_namespace.namespace)
    assert len(pods) >= len(BAD_JOBS) - len(REFUSED_BY_RULE) > 40
    assert [pod["metadata"] for pod in pods if requests_gpu(pod)] == []


def test_the_audit_log_shows_the_gpu_pod_of_a_good_job(job_namespace: JobNamespace) -> None:
    job_namespace.apply(make_job("good", model={"source": MODEL}, resources={"gpusPerNode": 1}, prepare=PREPARE, training={"maxSteps": 2}))
    job_namespace.wait("good", lambda s: s.attempt == 1, "starting its first attempt")
    job_namespace.wait("good", lambda _: len(job_namespace.pods("good")) > 1, "two pods")
    pods = read_created_pods(job_namespace.installation.cluster.endpoint, job_namespace.namespace)
    assert [requests_gpu(pod) for pod in pods] == [False, True]
