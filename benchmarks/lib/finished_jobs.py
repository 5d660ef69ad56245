"""Create thousands of finished jobs as copies of one job that has really run.

Each copy is a FineTuneJob with its final status, a completed Job, and pods. The pods are not bound to a node and have no final status,
because nothing reads the status of a finished job's pods.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from typing import Any

from finetune_api import names

from .load import Client, Object

FINETUNEJOB_API_PATH = f"/apis/{names.API_VERSION}"
MERGE_PATCH_TYPE = "application/merge-patch+json"
SERVER_SET_FIELDS = ("uid", "resourceVersion", "creationTimestamp", "generation", "managedFields", "finalizers", "ownerReferences")


@dataclass(frozen=True)
class FinishedJob:
    """A finished FineTuneJob (`job`), its batch Job (`attempt`) and one of its pods."""

    job: Object
    attempt: Object
    pod: Object


async def read_finished_job(client: Client, namespace: str) -> FinishedJob:
    """Read the first finished job of a namespace, with its Job and one of its pods."""
    job = (await client.list(f"{FINETUNEJOB_API_PATH}/namespaces/{namespace}/{names.PLURAL}"))[0]
    job_name = job["metadata"]["name"]
    attempt_job = await client.send("GET", f"/apis/batch/v1/namespaces/{namespace}/jobs/{names.attempt_job_name(job_name, 1)}")
    pods = await client.list(f"/api/v1/namespaces/{namespace}/pods")
    return FinishedJob(job, attempt_job, next(pod for pod in pods if pod["metadata"]["labels"][names.Label.JOB_NAME] == job_name))


async def write_copies(client: Client, namespace: str, template: FinishedJob, job_count: int, pod_count: int, client_count: int) -> None:
    """Write `job_count` copies of a finished job into `namespace`, each with `pod_count` pods. `client_count` clients write at the same time."""
    job_numbers = iter(range(job_count))

    async def write_remaining_copies() -> None:
        for number in job_numbers:
            await _write_copy(client, namespace, template, f"left{number}", pod_count)

    async with asyncio.TaskGroup() as group:
        for _ in range(client_count):
            group.create_task(write_remaining_copies())


async def _write_copy(client: Client, namespace: str, template: FinishedJob, name: str, pod_count: int) -> None:
    finetunejobs_path, jobs_path = f"{FINETUNEJOB_API_PATH}/namespaces/{namespace}/{names.PLURAL}", f"/apis/batch/v1/namespaces/{namespace}/jobs"
    created_job = await client.send("POST", finetunejobs_path, copy_object(template.job, name))
    await client.send("PUT", f"{finetunejobs_path}/{name}/status", created_job | {"status": template.job["status"]})
    attempt_job_name = names.attempt_job_name(name, 1)
    labels = {names.Label.JOB_NAME.value: name, names.Label.JOB_UID.value: created_job["metadata"]["uid"]}
    attempt_job = copy_job(template.attempt, attempt_job_name, labels)
    attempt_job["spec"]["suspend"] = True
    attempt_job["metadata"]["ownerReferences"] = [_make_owner_reference(created_job, names.API_VERSION, names.KIND)]
    created_attempt_job = await client.send("POST", jobs_path, attempt_job)
    # The status is patched, not replaced, because the Job controller writes the condition Suspended at the same time.
    await client.send("PATCH", f"{jobs_path}/{attempt_job_name}/status", {"status": template.attempt["status"]}, MERGE_PATCH_TYPE)
    for index in range(pod_count):
        pod = copy_object(template.pod, f"{attempt_job_name}-{index}-left", labels | {"batch.kubernetes.io/job-name": attempt_job_name})
        pod["spec"] = {key: value for key, value in pod["spec"].items() if key != "nodeName"}
        pod["metadata"]["ownerReferences"] = [_make_owner_reference(created_attempt_job, "batch/v1", "Job")]
        pod.pop("status", None)
        await client.send("POST", f"/api/v1/namespaces/{namespace}/pods", pod)


def copy_job(job: Object, name: str, labels: dict[str, str]) -> Object:
    """Copy a Job under another name, without the fields that the server sets. Set `labels` on the Job and on its pod template."""
    job_copy = copy_object(job, name, labels)
    job_copy.pop("status", None)
    job_copy["spec"] = {key: value for key, value in job_copy["spec"].items() if key not in ("selector", "manualSelector")}
    pod_template_metadata = job_copy["spec"]["template"]["metadata"]
    kept_labels = {key: value for key, value in pod_template_metadata["labels"].items() if "job-name" not in key and "controller-uid" not in key}
    pod_template_metadata["labels"] = kept_labels | labels
    return job_copy


def copy_object(source_object: Object, name: str, labels: dict[str, str] | None = None) -> Object:
    """Copy an object under another name, without the fields that the server sets."""
    object_copy: Object = json.loads(json.dumps(source_object))
    metadata = {key: value for key, value in object_copy["metadata"].items() if key not in (*SERVER_SET_FIELDS, "namespace", "generateName")}
    object_copy["metadata"] = metadata | {"name": name} | ({"labels": metadata.get("labels", {}) | labels} if labels else {})
    return object_copy


def _make_owner_reference(owner: Object, api_version: str, kind: str) -> dict[str, Any]:
    metadata = owner["metadata"]
    return {"apiVersion": api_version, "kind": kind, "name": metadata["name"], "uid": metadata["uid"], "controller": True}
