"""`finetune pools`: lists the node pools with their defaults and their free GPUs."""

from __future__ import annotations

from http import HTTPStatus
from typing import TYPE_CHECKING, Annotated, Any

import typer

from finetune_cli import output
from finetune_cli.commands.shared import (
    ContextOption,
    DataFormatOption,
    KubeconfigOption,
    NamespaceOption,
    format_rows,
    require_format,
    write_data,
)

if TYPE_CHECKING:
    from finetune_cli.cluster import Cluster
    from finetune_cli.installation import InstalledConfig, Pool, PoolUsage

OperatorNamespaceOption = Annotated[
    str | None,
    typer.Option(
        "--operator-namespace", metavar="NAMESPACE",
        help="Namespace of the operator. Default: any namespace, or finetune-operator if you may not read all namespaces.",
    ),
]
COLUMN_NAMES = ["NAME", "DEFAULT", "GPUS/NODE", "GPU MEMORY", "NODES", "FREE GPUS", "POD DEFAULTS", "DESCRIPTION"]


def pools(
    operator_namespace: OperatorNamespaceOption = None,
    output_format: DataFormatOption = None,
    namespace: NamespaceOption = None,
    context: ContextOption = None,
    kubeconfig: KubeconfigOption = None,
) -> None:
    """List the node pools: their GPUs, the resources that a pod gets by default, and the GPUs that are free now.

    Write the name of a pool into resources.nodePool. Nodes and free GPUs are shown if you may list the nodes and pods of the cluster.

    Example: finetune pools
    """
    from finetune_cli.cluster import connect
    from finetune_cli.installation import DEFAULT_GPU_RESOURCE, Pool, find_installation

    require_format(output_format, "yaml", "json")
    cluster = connect(namespace, context, kubeconfig)
    config = find_installation(cluster, operator_namespace).config
    listed_pools = config.node_pools or [Pool(name="-", description=f"no pools are configured: every node with {DEFAULT_GPU_RESOURCE}", gpus_per_node=1)]
    usage_by_pool = _read_usages(cluster, listed_pools)
    if output_format is not None:
        write_data([to_dict(config, pool, usage_by_pool.get(pool.name)) for pool in config.node_pools], output_format)
        return
    output.write(format_rows([COLUMN_NAMES, *(_format_row(config, pool, usage_by_pool.get(pool.name)) for pool in listed_pools)]))


def _read_usages(cluster: Cluster, listed_pools: list[Pool]) -> dict[str, PoolUsage]:
    """Return the usage of each pool by name. If the user may not list nodes and pods, print a note and return an empty dict."""
    from finetune_cli.cluster import ClusterError
    from finetune_cli.installation import compute_pool_usage, list_active_pods, list_nodes

    try:
        nodes, active_pods = list_nodes(cluster), list_active_pods(cluster)
    except ClusterError as error:
        if error.code != HTTPStatus.FORBIDDEN:
            raise
        output.print_notes(["nodes and free GPUs are unknown: you may not list the nodes and pods of the cluster"])
        return {}
    return {pool.name: compute_pool_usage(pool, nodes, active_pods) for pool in listed_pools}


def _format_row(config: InstalledConfig, pool: Pool, usage: PoolUsage | None) -> list[str]:
    nodes_text = "-" if usage is None else str(usage.nodes) if usage.nodes == usage.usable_nodes else f"{usage.usable_nodes} of {usage.nodes}"
    free_gpus_text = "-" if usage is None or not pool.gpus_per_node else f"{usage.free_gpus} of {usage.gpus}"
    quantities_text = ("cpu {cpu}, memory {memory}, disk {ephemeral_storage}, shm {shared_memory}").format(**config.compute_pod_defaults(pool))
    is_placeholder = pool.name == "-"
    return [
        pool.name, "yes" if pool.default else "-", "-" if is_placeholder else str(pool.gpus_per_node), str(pool.gpu_memory or "-"), nodes_text, free_gpus_text,
        "-" if is_placeholder else quantities_text, pool.description or "-",
    ]  # fmt: skip


def to_dict(config: InstalledConfig, pool: Pool, usage: PoolUsage | None) -> dict[str, Any]:
    """Return a pool as a dict, for `-o json` and `-o yaml`. The usage is null if the user may not list nodes and pods."""
    from pydantic.alias_generators import to_camel

    defaults = {to_camel(name): value for name, value in config.compute_pod_defaults(pool).items()}
    usage_values = None
    if usage is not None:
        usage_values = {
            "nodes": usage.nodes, "usableNodes": usage.usable_nodes, "freeNodes": usage.free_nodes, "gpus": usage.gpus, "freeGpus": usage.free_gpus,
        }  # fmt: skip
    return {
        "name": pool.name, "description": pool.description, "default": pool.default, "gpusPerNode": pool.gpus_per_node, "gpuMemory": pool.gpu_memory,
        "gpuResource": pool.gpu_resource, "maxNodes": pool.max_nodes, "nodeSelector": pool.node_selector, "podDefaults": defaults, "usage": usage_values,
    }  # fmt: skip
