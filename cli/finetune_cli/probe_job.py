"""Creates a short Job that starts the trainer image and checks from its pod that storage can be reached, then deletes the Job.

The Job has a deadline and a TTL, so that Kubernetes ends and deletes it if this program is killed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from finetune_api import names
from finetune_api.names import Env
from finetune_api.pod import StorageCheckResult, StoreTarget
from finetune_api.sources import PvcSource, parse_source
from finetune_api.spec.cluster import StorageRoot
from pydantic import ValidationError

from finetune_cli.cluster import Cluster, KubeObject
from finetune_cli.installation import TrainerImage

PULL_PROBLEMS = ("ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "ImageInspectError")
CONFIG_PROBLEMS = ("CreateContainerConfigError",)
"""Reasons that Kubernetes gives if a container waits for a missing Secret or ConfigMap. At this time, the image of the container is already pulled."""
TTL_SECONDS = 60
PROBE_LABELS = {"app.kubernetes.io/name": "finetune-doctor"}
NO_STORAGE_URI = "file:///tmp"
"""If no storage is known, the pod checks its own temporary folder, so that the image can still be checked."""


@dataclass(frozen=True)
class ProbeSettings:
    """The settings of the probe's pod: the image, the pool's node labels and tolerations, and the storage."""

    trainer: TrainerImage
    node_selector: dict[str, str]
    tolerations: list[dict[str, Any]]
    storage: StorageRoot


class ProbeEnd(StrEnum):
    """How a probe ended."""

    FINISHED = "finished"
    """The container ran to its end."""
    NOT_PULLED = "not pulled"
    """The node could not pull the image."""
    NOT_CONFIGURED = "not configured"
    """The pod names a Secret or ConfigMap that does not exist."""
    NOT_STARTED = "not started"
    """The pod was not created, not scheduled or not started in time."""


@dataclass(frozen=True)
class ProbeResult:
    """How a probe ended, and the message of the pod or of Kubernetes. `storage` is None if the pod did not run the storage check."""

    end: ProbeEnd
    message: str = ""
    storage: StorageCheckResult | None = None


def run_probe(cluster: Cluster, settings: ProbeSettings, timeout_seconds: float) -> ProbeResult:
    """Create the Job, wait until its pod has ended, and delete the Job. Raises ClusterError."""
    created_job = cluster.create_object(build_job(cluster.namespace, settings, int(timeout_seconds) + 30))
    try:
        return _wait_for_result(cluster, created_job, time.monotonic() + timeout_seconds)
    finally:
        cluster.delete_object(created_job)


def build_job(namespace: str, settings: ProbeSettings, deadline_seconds: int) -> KubeObject:
    """Build the Job. Its pod meets the Pod Security level `restricted`, uses no GPU and mounts no token."""
    trainer = settings.trainer
    user_and_group_ids = {"runAsUser": names.TRAINER_UID, "runAsGroup": names.TRAINER_UID, "fsGroup": names.TRAINER_UID} if trainer.fixed_user else {}
    volumes, mounts = _build_volumes(settings.storage)
    pod_spec: KubeObject = {
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": 1,
        "securityContext": {"runAsNonRoot": True, **user_and_group_ids, "seccompProfile": {"type": "RuntimeDefault"}},
        "containers": [_build_container(namespace, settings, mounts)],
        "volumes": volumes,
        "nodeSelector": settings.node_selector,
        "tolerations": settings.tolerations,
        "imagePullSecrets": [{"name": secret} for secret in trainer.image_pull_secrets],
    }
    if trainer.service_account_name:
        pod_spec["serviceAccountName"] = trainer.service_account_name
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"generateName": "finetune-doctor-", "namespace": namespace, "labels": PROBE_LABELS},
        "spec": {
            "backoffLimit": 0,
            "activeDeadlineSeconds": deadline_seconds,
            "ttlSecondsAfterFinished": TTL_SECONDS,
            "template": {"metadata": {"labels": PROBE_LABELS}, "spec": pod_spec},
        },
    }


def _build_container(namespace: str, settings: ProbeSettings, mounts: list[KubeObject]) -> KubeObject:
    resources = {"cpu": "100m", "memory": "512Mi", "ephemeral-storage": "256Mi"}
    return {
        "name": names.TRAINER_CONTAINER,
        "image": settings.trainer.image,
        "imagePullPolicy": settings.trainer.image_pull_policy,
        "args": [names.CHECK_STORAGE_COMMAND, make_store_target(namespace, settings.storage).model_dump_json(by_alias=True, exclude_none=True)],
        "env": _build_credential_variables(settings.storage),
        "resources": {"requests": resources, "limits": {**resources, "cpu": "1"}},
        "securityContext": {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}},
        "terminationMessagePath": names.TERMINATION_LOG,
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": mounts,
    }


def make_store_target(namespace: str, storage: StorageRoot) -> StoreTarget:
    """Return the storage location that the pod checks: the namespace's folder, in which jobs create their own folders."""
    encryption = storage.encryption
    return StoreTarget(
        uri=f"{storage.uri.rstrip('/')}/{namespace}" if storage.uri else NO_STORAGE_URI, endpoint=storage.endpoint, region=storage.region,
        addressing_style=storage.addressing_style, ca_bundle=f"{names.CA_MOUNT}/ca.crt" if storage.ca_bundle_ref else None,
        encryption=encryption.type if encryption else None, kms_key_id=encryption.kms_key_id if encryption else None,
        customer_key_variable=Env.STORAGE_CUSTOMER_KEY.value if encryption and encryption.customer_key_secret_ref else None,
    )  # fmt: skip


def _build_credential_variables(storage: StorageRoot) -> list[KubeObject]:
    """Return environment variables with the storage credentials. Kubernetes reads the values from the Secrets; this program never reads them."""
    variables: list[KubeObject] = []
    if storage.credentials_secret_ref:
        for key in (Env.STORAGE_ACCESS_KEY, Env.STORAGE_SECRET_KEY, Env.STORAGE_SESSION_TOKEN):
            reference = {"name": storage.credentials_secret_ref.name, "key": key.value, "optional": key is Env.STORAGE_SESSION_TOKEN}
            variables.append({"name": key.value, "valueFrom": {"secretKeyRef": reference}})
    if storage.encryption and (customer_key := storage.encryption.customer_key_secret_ref):
        reference = {"name": customer_key.name, "key": customer_key.key}
        variables.append({"name": Env.STORAGE_CUSTOMER_KEY.value, "valueFrom": {"secretKeyRef": reference}})
    return variables


def _build_volumes(storage: StorageRoot) -> tuple[list[KubeObject], list[KubeObject]]:
    """Return the volumes and mounts of the pod: a temporary folder, the claim of `pvc://` storage, and the CA bundle."""
    volumes: list[KubeObject] = [{"name": "tmp", "emptyDir": {"sizeLimit": "64Mi"}}]
    mounts: list[KubeObject] = [{"name": "tmp", "mountPath": "/tmp"}]  # noqa: S108 -- an emptyDir: the root file system is read-only
    source = parse_source(storage.uri, spec_path="storage.uri") if storage.uri else None
    if isinstance(source, PvcSource):
        volumes.append({"name": "claim", "persistentVolumeClaim": {"claimName": source.claim}})
        mounts.append({"name": "claim", "mountPath": f"{names.PVC_MOUNT}/{source.claim}"})
    if storage.ca_bundle_ref:
        items = [{"key": storage.ca_bundle_ref.key, "path": "ca.crt"}]
        volumes.append({"name": "ca", "configMap": {"name": storage.ca_bundle_ref.name, "items": items}})
        mounts.append({"name": "ca", "mountPath": names.CA_MOUNT, "readOnly": True})
    return volumes, mounts


def _wait_for_result(cluster: Cluster, job: KubeObject, deadline: float) -> ProbeResult:
    selector = f"batch.kubernetes.io/job-name={job['metadata']['name']}"
    last_pod: KubeObject = {}
    for last_pod in cluster.watch_pods(selector, deadline):
        result = read_result(last_pod)
        if result is not None:
            return result
    return ProbeResult(ProbeEnd.NOT_STARTED, _make_waiting_message(last_pod) or _find_newest_warning(cluster, job) or "the pod did not end in time")


def read_result(pod: KubeObject) -> ProbeResult | None:
    """Return the probe's result from its pod, or None while the pod waits or runs."""
    statuses = (pod.get("status") or {}).get("containerStatuses") or []
    state = (statuses[0].get("state") or {}) if statuses else {}
    waiting, terminated = state.get("waiting") or {}, state.get("terminated")
    if terminated is not None:
        message = str(terminated.get("message") or "").strip()
        return ProbeResult(ProbeEnd.FINISHED, message or f"exit code {terminated.get('exitCode')}", _parse_storage_result(message))
    ends_of_waiting_pods: tuple[tuple[tuple[str, ...], ProbeEnd], ...] = ((PULL_PROBLEMS, ProbeEnd.NOT_PULLED), (CONFIG_PROBLEMS, ProbeEnd.NOT_CONFIGURED))
    for reasons, end in ends_of_waiting_pods:
        if waiting.get("reason") in reasons:
            return ProbeResult(end, f"{waiting['reason']}: {waiting.get('message') or 'no details'}")
    return None


def _parse_storage_result(message: str) -> StorageCheckResult | None:
    try:
        return StorageCheckResult.model_validate_json(message.splitlines()[-1] if message else "")
    except ValidationError:
        return None


def _make_waiting_message(pod: KubeObject) -> str:
    """Return the reason why a pod waits: the message of the scheduler, or a text that the image is being pulled."""
    status = pod.get("status") or {}
    is_unscheduled: Callable[[KubeObject], bool] = lambda condition: condition["type"] == "PodScheduled" and condition["status"] == "False"  # noqa: E731
    message = next((str(condition.get("message") or "") for condition in filter(is_unscheduled, status.get("conditions") or [])), "")
    if message:
        return f"the pod fits on no node: {message}"
    return "the image is still being pulled" if (pod.get("spec") or {}).get("nodeName") else ""


def _find_newest_warning(cluster: Cluster, job: KubeObject) -> str:
    """Return the text of the newest warning event about the Job, or an empty string without a warning. An example is a quota that refuses the pod."""
    warnings = [event for event in cluster.list_events({job["metadata"]["uid"]}) if event.get("type") == "Warning"]
    return str(warnings[-1].get("note") or "") if warnings else ""
