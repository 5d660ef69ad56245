"""Builds the objects that protect an attempt from other pods: its Secret and its NetworkPolicy. The Job owns the Secret and the NetworkPolicy, so they are
deleted with the Job."""

from __future__ import annotations

import base64
import ipaddress
from typing import Any

from finetune_api.names import ATTEMPT_SECRET_KEY, CHECKPOINT_KEY, PROGRESS_PORT

from finetune_operator.builders.job import build_labels_of_job, build_owner_reference_to_job
from finetune_operator.objects import NETWORK_POLICY, SECRET, Object
from finetune_operator.settings import IsolationSettings
from finetune_operator.views import JOB_NAME_LABEL, JobView


def build_attempt_secret(job: JobView, secret: str, checkpoint_key: str) -> Object:
    """Return the Secret that the pods of the Job mount."""
    secret_values = {ATTEMPT_SECRET_KEY: secret, CHECKPOINT_KEY: checkpoint_key}
    return {
        "apiVersion": SECRET.api_version,
        "kind": SECRET.kind,
        "metadata": _build_metadata(job, job.attempt_secret_name),
        "type": "Opaque",
        "immutable": True,
        "data": {name: base64.b64encode(value.encode()).decode() for name, value in secret_values.items()},
    }


def build_network_policy(job: JobView, settings: IsolationSettings) -> Object:
    """Return the NetworkPolicy of the Job's pods.

    All ports are open between the pods of a gang, because Gloo and NCCL choose ports at random. The kubelet's probes need no rule, because a
    NetworkPolicy does not block traffic from the pod's own node. Outgoing traffic is limited only if the configuration names addresses to block.
    """
    job_pod_selector = {"matchLabels": {JOB_NAME_LABEL: job.name}}
    operator_pod_selector = {
        "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": settings.operator_namespace}},
        "podSelector": {"matchLabels": dict(settings.operator_labels)},
    }
    spec: dict[str, Any] = {
        "podSelector": job_pod_selector,
        "policyTypes": ["Ingress"],
        "ingress": [
            {"from": [{"podSelector": job_pod_selector}]},
            {"from": [operator_pod_selector, *settings.metrics_from], "ports": [{"protocol": "TCP", "port": PROGRESS_PORT}]},
        ],
    }
    if settings.all_blocked_cidrs:
        spec["policyTypes"] = ["Ingress", "Egress"]
        spec["egress"] = [{"to": _build_allowed_destinations(settings.all_blocked_cidrs)}]
    return {
        "apiVersion": NETWORK_POLICY.api_version,
        "kind": NETWORK_POLICY.kind,
        "metadata": _build_metadata(job, job.network_policy_name),
        "spec": spec,
    }


def _build_allowed_destinations(blocked_cidrs: tuple[str, ...]) -> list[Object]:
    """Return the destinations of allowed traffic: all addresses except the blocked ones, and all pods.

    Pods are listed separately, because some network plugins do not compare the addresses of pods with `ipBlock`.
    """
    destinations: list[Object] = [{"namespaceSelector": {}}]
    for version, every_address in ((4, "0.0.0.0/0"), (6, "::/0")):
        blocked_cidrs_of_version = [cidr for cidr in blocked_cidrs if ipaddress.ip_network(cidr).version == version]
        destinations.append({"ipBlock": {"cidr": every_address} | ({"except": blocked_cidrs_of_version} if blocked_cidrs_of_version else {})})
    return destinations


def _build_metadata(job: JobView, name: str) -> Object:
    return {"name": name, "namespace": job.namespace, "labels": build_labels_of_job(job), "ownerReferences": [build_owner_reference_to_job(job)]}
