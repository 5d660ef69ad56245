"""Reads the operator's installation from the cluster: its configuration, its Deployment, and the nodes and GPUs of its node pools."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from finetune_api.base import LenientModel
from finetune_api.pod_resources import POD_DEFAULTS, ConfiguredResources, choose_pod_resources, count_whole_gpus
from finetune_api.spec.cluster import StorageRoot
from pydantic import ValidationError
from pydantic.alias_generators import to_camel

from finetune_cli.cluster import CORE_API_PATH, Cluster, ClusterError, KubeObject
from finetune_cli.output import CommandError

DEFAULT_NAMESPACE = "finetune-operator"
"""The namespace that the installation guide uses. If the user may not list objects in all namespaces, only this namespace is searched for the operator."""
CHART_SELECTOR = "app.kubernetes.io/part-of=finetune-operator"
"""Label selector that matches all objects of the chart."""
CONFIG_KEY = "config.yaml"
DEFAULT_GPU_RESOURCE = "nvidia.com/gpu"


class InstallationMissing(CommandError):
    """No operator with a valid configuration was found in the namespaces that the user may read."""


class Pool(LenientModel):
    """A node pool of the operator's configuration."""

    name: str
    description: str = ""
    default: bool = False
    node_selector: dict[str, str] = {}
    tolerations: list[dict[str, Any]] = []
    gpu_resource: str = DEFAULT_GPU_RESOURCE
    gpus_per_node: int = 0
    gpu_memory: str | int | None = None
    max_nodes: int | None = None
    resources: dict[str, Any] = {}


class TrainerImage(LenientModel):
    """The trainer settings in the operator's configuration: the image, how nodes pull it, and the user and the ServiceAccount of the pods."""

    image: str = ""
    image_pull_policy: str = "IfNotPresent"
    image_pull_secrets: list[str] = []
    service_account_name: str | None = None
    fixed_user: bool = True


class InstalledConfig(LenientModel):
    """The fields of the operator's configuration that the commands use."""

    trainer: TrainerImage = TrainerImage()
    storage: StorageRoot = StorageRoot()
    resources: dict[str, Any] = {}
    node_pools: list[Pool] = []
    namespaces: list[str] | None = None

    def compute_pod_defaults(self, pool: Pool) -> dict[str, str]:
        """Return the default CPU, memory, disk and shared memory of a pod that uses all GPUs of one node of this pool."""
        resources_per_gpu = self.resources.get("perGpu") or {}
        configured_resources = ConfiguredResources(
            _select_quantities(pool.resources), _select_quantities(resources_per_gpu), _select_quantities(self.resources)
        )
        return choose_pod_resources(count_whole_gpus(pool.gpu_resource, pool.gpus_per_node), pool.gpu_memory, configured_resources)


@dataclass(frozen=True)
class Installation:
    """An operator in the cluster: the namespace and name of its objects, and its configuration."""

    namespace: str
    name: str
    config: InstalledConfig


@dataclass(frozen=True)
class PoolUsage:
    """The nodes and GPUs of a pool at one moment. `gpus` and `free_gpus` count only usable nodes, which accept pods of this pool."""

    nodes: int
    usable_nodes: int
    gpus: int
    free_gpus: int
    free_nodes: int
    """Number of usable nodes that have enough free GPUs for a pod that needs all GPUs of a node."""


def list_chart_objects(cluster: Cluster, plural: str, api_path: str, namespace: str | None) -> list[KubeObject]:
    """Return the chart's objects of one kind in `namespace`.

    If `namespace` is None, search all namespaces, or DEFAULT_NAMESPACE if the user may not list objects in all namespaces. Raises ClusterError.
    """
    query = {"labelSelector": CHART_SELECTOR}
    if namespace is None:
        try:
            return list(cluster.call_api("GET", f"{api_path}/{plural}", query).get("items") or [])
        except ClusterError as error:
            if error.code != HTTPStatus.FORBIDDEN:
                raise
    return list(cluster.call_api("GET", f"{api_path}/namespaces/{namespace or DEFAULT_NAMESPACE}/{plural}", query).get("items") or [])


def find_installation(cluster: Cluster, namespace: str | None = None) -> Installation:
    """Read the operator's configuration from its ConfigMap. Raises InstallationMissing, or ClusterError if the user may not read the ConfigMap."""
    config_maps = [
        config_map for config_map in list_chart_objects(cluster, "configmaps", CORE_API_PATH, namespace) if CONFIG_KEY in (config_map.get("data") or {})
    ]
    installations = [
        Installation(config_map["metadata"]["namespace"], config_map["metadata"]["name"], _parse_config(config_map)) for config_map in config_maps
    ]
    suitable_installations = [
        installation for installation in installations
        if installation.config.namespaces is None or cluster.namespace in installation.config.namespaces
    ]  # fmt: skip
    if not suitable_installations:
        searched_location = f"namespace {namespace}" if namespace else "the namespaces that you may read"
        hint = "install the chart, or name its namespace with --operator-namespace"
        if installations:
            hint = f"the operator found manages only {', '.join(installations[0].config.namespaces or [])}"
        raise InstallationMissing(f"there is no operator for namespace {cluster.namespace} in {searched_location}; {hint}")
    # An operator that manages only some namespaces has precedence, in these namespaces, over an operator that manages all namespaces.
    return sorted(suitable_installations, key=lambda installation: installation.config.namespaces is None)[0]


def _parse_config(config_map: KubeObject) -> InstalledConfig:
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    location = f"ConfigMap {config_map['metadata']['namespace']}/{config_map['metadata']['name']}"
    try:
        return InstalledConfig.model_validate(YAML(typ="safe", pure=True).load(config_map["data"][CONFIG_KEY]) or {})
    except (YAMLError, ValidationError) as error:
        raise InstallationMissing(f"{location}: {CONFIG_KEY} is not a configuration of this operator ({type(error).__name__})") from None


def _select_quantities(resources: dict[str, Any]) -> dict[str, Any]:
    return {name: resources.get(to_camel(name)) for name in POD_DEFAULTS}


# --- nodes ------------------------------------------------------------------------------------------------------------


def list_nodes(cluster: Cluster) -> list[KubeObject]:
    """Return all nodes. Raises ClusterError."""
    return list(cluster.call_api("GET", f"{CORE_API_PATH}/nodes").get("items") or [])


def list_active_pods(cluster: Cluster) -> list[KubeObject]:
    """Return the pods of all namespaces that have not ended, because these pods use or will use the resources of a node. Raises ClusterError."""
    query = {"fieldSelector": "status.phase!=Succeeded,status.phase!=Failed"}
    return list(cluster.call_api("GET", f"{CORE_API_PATH}/pods", query).get("items") or [])


def select_nodes_of_pool(pool: Pool, nodes: Iterable[KubeObject]) -> list[KubeObject]:
    """Return the nodes that have the labels of a pool."""
    return [node for node in nodes if pool.node_selector.items() <= (node["metadata"].get("labels") or {}).items()]


def compute_pool_usage(pool: Pool, nodes: list[KubeObject], pods: list[KubeObject]) -> PoolUsage:
    """Return how many nodes and GPUs of a pool exist, are usable and are free. `is_usable` says which nodes are usable."""
    pool_nodes = select_nodes_of_pool(pool, nodes)
    usable_gpus_by_node = {node["metadata"]["name"]: count_gpus_of_node(node, pool.gpu_resource) for node in pool_nodes if is_usable(node, pool)}
    used_gpus_by_node = dict.fromkeys(usable_gpus_by_node, 0)
    for pod in pods:
        node_name = (pod.get("spec") or {}).get("nodeName")
        if node_name in used_gpus_by_node:
            used_gpus_by_node[node_name] += count_requested_gpus(pod, pool.gpu_resource)
    free_gpus_by_node = {name: max(0, usable_gpus_by_node[name] - used_gpus_by_node[name]) for name in usable_gpus_by_node}
    free_nodes = len(usable_gpus_by_node)
    if pool.gpus_per_node:
        free_nodes = sum(1 for free_gpus in free_gpus_by_node.values() if free_gpus >= max(1, pool.gpus_per_node))
    return PoolUsage(len(pool_nodes), len(usable_gpus_by_node), sum(usable_gpus_by_node.values()), sum(free_gpus_by_node.values()), free_nodes)


def count_gpus_of_node(node: KubeObject, resource: str) -> int:
    """Return the number of GPUs that pods can use on a node."""
    return int(((node.get("status") or {}).get("allocatable") or {}).get(resource, 0))


def is_usable(node: KubeObject, pool: Pool) -> bool:
    """Whether a node is ready, is not cordoned, and has only taints that the pool tolerates."""
    conditions = (node.get("status") or {}).get("conditions") or []
    is_ready = any(condition["type"] == "Ready" and condition["status"] == "True" for condition in conditions)
    spec = node.get("spec") or {}
    taints = [taint for taint in spec.get("taints") or [] if taint.get("effect") != "PreferNoSchedule"]
    has_only_tolerated_taints = all(any(_tolerates(toleration, taint) for toleration in pool.tolerations) for taint in taints)
    return is_ready and not spec.get("unschedulable") and has_only_tolerated_taints


def _tolerates(toleration: dict[str, Any], taint: dict[str, Any]) -> bool:
    matches_key = toleration.get("key") in (None, "", taint.get("key"))
    matches_value = toleration.get("operator") == "Exists" or toleration.get("value", "") == taint.get("value", "")
    return matches_key and matches_value and toleration.get("effect") in (None, "", taint.get("effect"))


def count_requested_gpus(pod: KubeObject, resource: str) -> int:
    """Return the number of GPUs that a pod requests.

    This is the sum of the requests of its containers, or the largest request of an init container, whichever is higher.
    """
    spec = pod.get("spec") or {}
    container_gpus = sum(_iterate_requested_amounts(spec.get("containers") or [], resource))
    return max([container_gpus, *_iterate_requested_amounts(spec.get("initContainers") or [], resource)])


def _iterate_requested_amounts(containers: list[dict[str, Any]], resource: str) -> Iterator[int]:
    """Yield the amount of a resource that each container requests."""
    for container in containers:
        resources = container.get("resources") or {}
        yield int((resources.get("requests") or resources.get("limits") or {}).get(resource, 0))
