"""The checks of `finetune doctor`: cluster, CRD, operator, rights, node pools, image and storage. If a check finds a problem, its result says what to do."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from http import HTTPStatus
from typing import Any

from finetune_api.defaults import PlatformDefaults, resolve_defaults
from finetune_api.names import API_VERSION, GROUP, KIND, PLURAL, RELEASE
from finetune_api.spec import FineTuneJobSpec
from finetune_api.spec.cluster import StorageRoot

from finetune_cli.cluster import Cluster, ClusterError
from finetune_cli.fields import fields, iterate_fields_below
from finetune_cli.installation import (
    DEFAULT_GPU_RESOURCE,
    Installation,
    InstallationMissing,
    Pool,
    TrainerImage,
    count_gpus_of_node,
    find_installation,
    list_chart_objects,
    list_nodes,
    select_nodes_of_pool,
)
from finetune_cli.probe_job import ProbeEnd, ProbeResult, ProbeSettings, run_probe

OLDEST_KUBERNETES = (1, 32)
INSTALL_CURE = "install the chart of the operator, or choose another cluster with --context"
ROLE_CURE = "ask the platform team for the role finetune-user in this namespace; the guide for the command line describes this role"
REQUIRED_RIGHTS = (
    *((f"{PLURAL}.{GROUP}", verb) for verb in ("get", "list", "watch", "create", "patch", "delete")),
    ("pods", "list"), ("pods/log", "get"), ("pods/proxy", "get"), ("events.events.k8s.io", "list"),
)  # fmt: skip
"""Rights that the commands need, as (resource, verb). The role in the guide for the command line has the same rights."""


class CheckName(StrEnum):
    """The checks, in the order in which they run."""

    CLUSTER = "cluster"
    CRD = "crd"
    OPERATOR = "operator"
    RIGHTS = "rights"
    POOLS = "pools"
    IMAGE = "image"
    STORAGE = "storage"


class CheckState(StrEnum):
    """The outcome of a check."""

    OK = "ok"
    FAILED = "failed"
    UNKNOWN = "unknown"
    """The check could not run, for example without a permission, or because an earlier check failed."""


@dataclass(frozen=True)
class CheckResult:
    """The outcome of one check: what the check found and, after a problem, what to do (`cure`)."""

    check: CheckName
    state: CheckState
    message: str
    cure: str = ""


@dataclass
class Doctor:
    """Runs the checks. If `spec` is given, the checks use the image, the node pool and the storage of this job instead of the operator's defaults."""

    cluster: Cluster
    operator_namespace: str | None = None
    spec: FineTuneJobSpec | None = None
    timeout_seconds: float = 300
    skipped: frozenset[CheckName] = frozenset()
    installation_problem: str = field(default="", init=False)
    """The reason why the operator's configuration cannot be read. Empty if the configuration was read, or if no check has needed it yet."""

    def run(self) -> Iterator[CheckResult]:
        """Yield the result of each check that is not skipped. If the check of the cluster fails, no other check runs."""
        checks: dict[CheckName, Callable[[], CheckResult]] = {
            CheckName.CLUSTER: self._check_cluster, CheckName.CRD: self._check_crd, CheckName.OPERATOR: self._check_operator,
            CheckName.RIGHTS: self._check_rights, CheckName.POOLS: self._check_pools,
        }  # fmt: skip
        for name, check in checks.items():
            if name in self.skipped:
                continue
            result = self._run_check(name, check)
            yield result
            if name is CheckName.CLUSTER and result.state is CheckState.FAILED:
                return
        if not {CheckName.IMAGE, CheckName.STORAGE} <= self.skipped:
            yield from (result for result in self._check_pod() if result.check not in self.skipped)

    def _run_check(self, name: CheckName, check: Callable[[], CheckResult]) -> CheckResult:
        """Run a check. If the API server forbids a request, the result is UNKNOWN. After any other ClusterError, the result is FAILED."""
        try:
            return check()
        except ClusterError as error:
            if error.code == HTTPStatus.FORBIDDEN:
                return CheckResult(name, CheckState.UNKNOWN, str(error), "ask the platform team to run `finetune doctor`, or for this permission")
            return CheckResult(name, CheckState.FAILED, str(error), "check the address in the kubeconfig, the network and the proxy")

    # --- the cluster

    def _check_cluster(self) -> CheckResult:
        version, host = self.cluster.get_version(), self.cluster.client.configuration.host
        match = re.match(r"v?(\d+)\.(\d+)", version)
        if match and (int(match[1]), int(match[2])) < OLDEST_KUBERNETES:
            oldest_version = ".".join(map(str, OLDEST_KUBERNETES))
            return CheckResult(CheckName.CLUSTER, CheckState.FAILED, f"Kubernetes {version} at {host} is older than {oldest_version}", "upgrade the cluster")
        return CheckResult(CheckName.CLUSTER, CheckState.OK, f"Kubernetes {version} at {host}")

    def _check_crd(self) -> CheckResult:
        try:
            self.cluster.call_api("GET", f"/apis/{API_VERSION}")
        except ClusterError as error:
            if error.code in (0, HTTPStatus.NOT_FOUND):
                return CheckResult(CheckName.CRD, CheckState.FAILED, f"the cluster has no CRD for {KIND} {API_VERSION}", INSTALL_CURE)
            raise
        served_paths, known_paths = self._read_served_paths(), {known_field.path for known_field in fields() if known_field.path.startswith("spec.")}
        if missing_paths := sorted(known_paths - served_paths):
            return CheckResult(
                CheckName.CRD, CheckState.FAILED, f"the CRD is older than this program ({RELEASE}): it does not know {_list_first(missing_paths)}",
                f"upgrade the chart to {RELEASE} (with crds.enabled), or install this program in the release of the chart",
            )  # fmt: skip
        if extra_paths := sorted(served_paths - known_paths):
            return CheckResult(
                CheckName.CRD, CheckState.FAILED, f"the CRD is newer than this program ({RELEASE}), which does not know {_list_first(extra_paths)}",
                "upgrade this program with pip",
            )  # fmt: skip
        return CheckResult(CheckName.CRD, CheckState.OK, f"{PLURAL}.{GROUP} has all fields of {RELEASE}")

    def _read_served_paths(self) -> set[str]:
        """Return the paths of all spec fields from the API server's OpenAPI document. Every user may read this document."""
        openapi_document = self.cluster.call_api("GET", f"/openapi/v3/apis/{API_VERSION}")
        schemas = (openapi_document.get("components") or {}).get("schemas") or {}
        for schema in schemas.values():
            if any(version_kind.get("kind") == KIND for version_kind in schema.get("x-kubernetes-group-version-kind") or []):
                return {served_field.path for served_field in iterate_fields_below("spec", schema["properties"]["spec"])} - {"spec"}
        return set()

    def _check_operator(self) -> CheckResult:
        deployments = list_chart_objects(self.cluster, "deployments", "/apis/apps/v1", self.operator_namespace)
        namespace = self.installation.namespace if self.installation else None
        deployment = next((candidate for candidate in deployments if namespace in (None, candidate["metadata"]["namespace"])), None)
        if deployment is None:
            message = "there is no Deployment of the operator in the namespaces that you may read"
            return CheckResult(CheckName.OPERATOR, CheckState.FAILED, message, INSTALL_CURE)
        metadata = deployment["metadata"]
        version, name = (metadata.get("labels") or {}).get("app.kubernetes.io/version", "?"), f"{metadata['namespace']}/{metadata['name']}"
        ready_count = int((deployment.get("status") or {}).get("readyReplicas") or 0)
        replica_count = int((deployment.get("spec") or {}).get("replicas") or 0)
        if ready_count == 0:
            cure = f"read `kubectl -n {metadata['namespace']} logs deployment/{metadata['name']}`"
            return CheckResult(CheckName.OPERATOR, CheckState.FAILED, f"{name}, release {version}: none of {replica_count} pods is ready", cure)
        if _to_minor_release(version) != _to_minor_release(RELEASE):
            cure = "upgrade the chart or this program, so that both have the same release"
            return CheckResult(CheckName.OPERATOR, CheckState.FAILED, f"{name} has release {version}, this program has {RELEASE}", cure)
        if self.installation is None:
            return CheckResult(CheckName.OPERATOR, CheckState.FAILED, self.installation_problem, "correct the chart's values, or name --operator-namespace")
        return CheckResult(CheckName.OPERATOR, CheckState.OK, f"{name}, release {version}, {ready_count} of {replica_count} pods ready")

    @cached_property
    def installation(self) -> Installation | None:
        """The configuration of the operator, or None if it cannot be read. It is read from the cluster at the first use of this property."""
        try:
            return find_installation(self.cluster, self.operator_namespace)
        except (ClusterError, InstallationMissing) as error:
            self.installation_problem = str(error)
            return None

    def _check_rights(self) -> CheckResult:
        missing_rights = [f"{verb} {resource}" for resource, verb in REQUIRED_RIGHTS if not self.cluster.is_allowed_to(verb, resource)]
        if missing_rights:
            message = f"in namespace {self.cluster.namespace} you may not: {', '.join(missing_rights)}"
            return CheckResult(CheckName.RIGHTS, CheckState.FAILED, message, ROLE_CURE)
        return CheckResult(CheckName.RIGHTS, CheckState.OK, f"all rights of this program in namespace {self.cluster.namespace}")

    # --- nodes

    def _check_pools(self) -> CheckResult:
        if self.installation is None:
            return self._report_unreadable_configuration(CheckName.POOLS)
        nodes, pools = list_nodes(self.cluster), self.installation.config.node_pools
        if not pools:
            gpu_count = sum(count_gpus_of_node(node, DEFAULT_GPU_RESOURCE) for node in nodes)
            return CheckResult(CheckName.POOLS, CheckState.OK, f"no node pools are configured; the nodes have {gpu_count} {DEFAULT_GPU_RESOURCE}")
        pool_problems = [problem for pool in pools if (problem := find_pool_problem(pool, nodes))]
        if pool_problems:
            cure = "correct nodePools in the chart's values, or install the device plugin; for nodes that an autoscaler adds, use --skip pools"
            return CheckResult(CheckName.POOLS, CheckState.FAILED, "; ".join(pool_problems), cure)
        node_counts_text = ", ".join(f"{pool.name} ({len(select_nodes_of_pool(pool, nodes))} nodes)" for pool in pools)
        return CheckResult(CheckName.POOLS, CheckState.OK, node_counts_text)

    def _report_unreadable_configuration(self, check: CheckName) -> CheckResult:
        cure = "ask for the permission to read the operator's ConfigMap, or name its namespace with --operator-namespace"
        return CheckResult(check, CheckState.UNKNOWN, f"the operator's configuration cannot be read: {self.installation_problem}", cure)

    # --- the pod

    def _check_pod(self) -> Iterator[CheckResult]:
        """Start one pod for both the image check and the storage check, and yield the results of the two checks."""
        settings = self._make_probe_settings()
        if settings is None:
            yield from (self._report_unreadable_configuration(check) for check in (CheckName.IMAGE, CheckName.STORAGE))
            return
        try:
            probe_result = run_probe(self.cluster, settings, self.timeout_seconds)
        except ClusterError as error:
            state, cure = CheckState.FAILED, "correct the settings that the message names"
            if error.code == HTTPStatus.FORBIDDEN:
                state, cure = CheckState.UNKNOWN, f"ask for the rights to create and delete jobs in namespace {self.cluster.namespace}"
            yield from (CheckResult(check, state, str(error), cure) for check in (CheckName.IMAGE, CheckName.STORAGE))
            return
        yield to_image_result(settings, probe_result, self.timeout_seconds)
        yield to_storage_result(settings, probe_result)

    def _make_probe_settings(self) -> ProbeSettings | None:
        """Return the settings of the pod that checks image and storage.

        A value of the job overrides the value in the operator's configuration. Returns None if neither names a trainer image.
        """
        config = self.installation.config if self.installation else None
        placement = self.spec.placement if self.spec else None
        trainer = config.trainer if config else TrainerImage()
        values_of_job: dict[str, Any] = {"image": placement.image if placement else None}
        values_of_job |= {"image_pull_secrets": placement.image_pull_secrets, "service_account_name": placement.service_account_name} if placement else {}
        trainer = trainer.model_copy(update={name: value for name, value in values_of_job.items() if value})
        if not trainer.image:
            return None
        pool = self._select_pool(config.node_pools if config else [])
        node_selector = {**(pool.node_selector if pool else {}), **((placement.node_selector or {}) if placement else {})}
        tolerations = [*(pool.tolerations if pool else []), *(toleration.to_wire() for toleration in (placement.tolerations or [] if placement else []))]
        return ProbeSettings(trainer, node_selector, tolerations, self._resolve_storage(config.storage if config else StorageRoot()))

    def _select_pool(self, pools: list[Pool]) -> Pool | None:
        """Return the node pool in which the job runs: the pool that the job names, or the default pool. Return None if the job trains on CPUs."""
        resources = self.spec.resources if self.spec else None
        if resources is not None and resources.node_pool:
            return next((pool for pool in pools if pool.name == resources.node_pool), None)
        if resources is not None and resources.gpus_per_node == 0:
            return None
        return next((pool for pool in pools if pool.default), None)

    def _resolve_storage(self, default_storage: StorageRoot) -> StorageRoot:
        if self.spec is None:
            return default_storage
        return resolve_defaults(self.spec, platform_defaults=PlatformDefaults(storage=default_storage if default_storage.uri else None)).spec.storage


def find_pool_problem(pool: Pool, nodes: list[dict[str, Any]]) -> str:
    """Return why jobs cannot run in a pool now, or an empty string."""
    pool_nodes = select_nodes_of_pool(pool, nodes)
    labels_text = ", ".join(f"{key}={value}" for key, value in pool.node_selector.items())
    if not pool_nodes:
        return f"pool {pool.name}: no node has the labels {labels_text}" if labels_text else f"pool {pool.name}: the cluster has no nodes"
    largest_gpu_count = max(count_gpus_of_node(node, pool.gpu_resource) for node in pool_nodes)
    if largest_gpu_count < pool.gpus_per_node:
        return f"pool {pool.name}: its nodes have at most {largest_gpu_count} {pool.gpu_resource}, but gpusPerNode is {pool.gpus_per_node}"
    return ""


def to_image_result(settings: ProbeSettings, probe_result: ProbeResult, timeout_seconds: float) -> CheckResult:
    """Return the result of the image check: whether the trainer image was pulled, and its container was started."""
    image = settings.trainer.image
    if probe_result.end is ProbeEnd.NOT_PULLED:
        cure = "push the image, correct trainer.image in the chart's values, or create the Secret of trainer.imagePullSecrets in this namespace"
        return CheckResult(CheckName.IMAGE, CheckState.FAILED, f"{image}: {probe_result.message}", cure)
    if probe_result.end is ProbeEnd.NOT_STARTED:
        cure = "correct the cause; if the image is large, allow more time with --timeout 30m"
        return CheckResult(CheckName.IMAGE, CheckState.FAILED, f"{image} was not started within {timeout_seconds:g} s: {probe_result.message}", cure)
    if probe_result.end is ProbeEnd.FINISHED and probe_result.storage is None:
        cure = f"use a trainer image of release {RELEASE}"
        return CheckResult(CheckName.IMAGE, CheckState.FAILED, f"{image} cannot run the check: {probe_result.message}", cure)
    return CheckResult(CheckName.IMAGE, CheckState.OK, image)


def to_storage_result(settings: ProbeSettings, probe_result: ProbeResult) -> CheckResult:
    """Return the result of the storage check: whether the pod could write, read and list objects."""
    uri = settings.storage.uri
    if not uri:
        cure = "set storage.uri in the chart's values, or check a job with its own storage: finetune doctor -f job.yaml"
        return CheckResult(CheckName.STORAGE, CheckState.UNKNOWN, "the operator has no default storage", cure)
    if probe_result.end is ProbeEnd.NOT_CONFIGURED:
        cure = "create the Secret or ConfigMap to which storage refers, in this namespace"
        return CheckResult(CheckName.STORAGE, CheckState.FAILED, f"{uri}: {probe_result.message}", cure)
    if probe_result.storage is None:
        return CheckResult(CheckName.STORAGE, CheckState.UNKNOWN, f"{uri}: not checked, because the pod did not run the check", "correct the image first")
    if not probe_result.storage.ok:
        return CheckResult(CheckName.STORAGE, CheckState.FAILED, f"{probe_result.storage.code}: {probe_result.storage.message}", probe_result.storage.hint)
    limits_text = f" ({probe_result.storage.message})" if probe_result.storage.message else ""
    return CheckResult(CheckName.STORAGE, CheckState.OK, f"a pod can write, read and list in {uri}{limits_text}")


def _list_first(paths: list[str]) -> str:
    """Return a text with the first three paths and the number of further paths.

    If a group is in `paths`, the fields inside this group are neither listed nor counted.
    """
    outermost_paths = [path for path in paths if not any(path.startswith((f"{group}.", f"{group}[")) for group in paths)]
    return ", ".join(outermost_paths[:3]) + (f" and {len(outermost_paths) - 3} more fields" if len(outermost_paths) > 3 else "")


def _to_minor_release(version: str) -> str:
    return ".".join(version.split(".")[:2])
