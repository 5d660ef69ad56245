"""Create thousands of finished jobs as copies of one that has run.

The FineTuneJob has its final status, the Job is complete, the pods are there (never bound: nothing reads how they ended any more).
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from typing import Any

from finetune_api import names

from .load import Client, Object

FTJ = f"/apis/{names.API_VERSION}"
MERGE = "application/merge-patch+json"
OWN = ("uid", "resourceVersion", "creationTimestamp", "generation", "managedFields", "finalizers", "ownerReferences")


@dataclass(frozen=True)
class Model:
    """The objects of one finished job."""

    job: Object
    attempt: Object
    pod: Object


async def model(client: Client, namespace: str) -> Model:
    """The first finished job of a namespace, with its Job and one of its pods."""
    job = (await client.list(f"{FTJ}/namespaces/{namespace}/{names.PLURAL}"))[0]
    name = job["metadata"]["name"]
    attempt = await client.send("GET", f"/apis/batch/v1/namespaces/{namespace}/jobs/{names.attempt_job_name(name, 1)}")
    pods = await client.list(f"/api/v1/namespaces/{namespace}/pods")
    return Model(job, attempt, next(pod for pod in pods if pod["metadata"]["labels"][names.Label.NAME] == name))


async def write(client: Client, namespace: str, found: Model, count: int, pods: int, clients: int) -> None:
    """Write `count` copies into `namespace`, each with `pods` pods, with `clients` concurrent clients."""
    left = iter(range(count))

    async def work() -> None:
        for number in left:
            await _one(client, namespace, found, f"left{number}", pods)

    async with asyncio.TaskGroup() as group:
        for _ in range(clients):
            group.create_task(work())


async def _one(client: Client, namespace: str, found: Model, name: str, pods: int) -> None:
    things, jobs = f"{FTJ}/namespaces/{namespace}/{names.PLURAL}", f"/apis/batch/v1/namespaces/{namespace}/jobs"
    made = await client.send("POST", things, copied(found.job, name))
    await client.send("PUT", f"{things}/{name}/status", made | {"status": found.job["status"]})
    job_name = names.attempt_job_name(name, 1)
    labels = {names.Label.NAME.value: name, names.Label.UID.value: made["metadata"]["uid"]}
    attempt = copied_job(found.attempt, job_name, labels)
    attempt["spec"]["suspend"] = True
    attempt["metadata"]["ownerReferences"] = [_owner(made, names.API_VERSION, names.KIND)]
    job = await client.send("POST", jobs, attempt)
    # A patch, because the Job controller writes its own condition (Suspended) at the same time.
    await client.send("PATCH", f"{jobs}/{job_name}/status", {"status": found.attempt["status"]}, MERGE)
    for index in range(pods):
        pod = copied(found.pod, f"{job_name}-{index}-left", labels | {"batch.kubernetes.io/job-name": job_name})
        pod["spec"] = {key: value for key, value in pod["spec"].items() if key != "nodeName"}
        pod["metadata"]["ownerReferences"] = [_owner(job, "batch/v1", "Job")]
        pod.pop("status", None)
        await client.send("POST", f"/api/v1/namespaces/{namespace}/pods", pod)


def copied_job(body: Object, name: str, labels: dict[str, str]) -> Object:
    """A copy of a Job under another name, with these labels on it and on its pods, without the fields that the server sets."""
    copy = copied(body, name, labels)
    copy.pop("status", None)
    copy["spec"] = {key: value for key, value in copy["spec"].items() if key not in ("selector", "manualSelector")}
    template = copy["spec"]["template"]["metadata"]
    template["labels"] = {k: v for k, v in template["labels"].items() if "job-name" not in k and "controller-uid" not in k} | labels
    return copy


def copied(body: Object, name: str, labels: dict[str, str] | None = None) -> Object:
    """A deep copy with another name, without the fields that the server sets."""
    copy: Object = json.loads(json.dumps(body))
    meta = {key: value for key, value in copy["metadata"].items() if key not in (*OWN, "namespace", "generateName")}
    copy["metadata"] = meta | {"name": name} | ({"labels": meta.get("labels", {}) | labels} if labels else {})
    return copy


def _owner(body: Object, version: str, kind: str) -> dict[str, Any]:
    meta = body["metadata"]
    return {"apiVersion": version, "kind": kind, "name": meta["name"], "uid": meta["uid"], "controller": True}
