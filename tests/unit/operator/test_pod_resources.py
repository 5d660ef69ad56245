"""Pods with GPUs get CPU, memory and shared memory according to their number of GPUs. Configured values replace these amounts."""

from __future__ import annotations

from typing import Any

import pytest
from finetune_operator.policies.acceptance import AcceptedSpec, FirstAttempt, accept
from finetune_operator.settings import parse_config

from tests.unit.operator.samples import spec

POOL_80_GIB = {"name": "h100", "default": True, "gpusPerNode": 8, "gpuMemory": "80Gi"}
FORMER_DEFAULTS = {"resources.cpu": "1", "resources.memory": "4Gi", "resources.sharedMemory": "1Gi"}


def compute_resources(
    gpus: int, recorded_defaults: dict[str, Any] | None = None, job_resources: dict[str, Any] | None = None, **config: Any
) -> tuple[Any, ...]:
    """Return the CPU, memory, disk and shared memory of a pod."""
    first_attempt = None if recorded_defaults is None else FirstAttempt(recorded_defaults)
    job_spec = spec(resources={"gpusPerNode": gpus, **(job_resources or {})})
    acceptance = accept(job_spec, parse_config(config, "test"), first_attempt)
    assert isinstance(acceptance, AcceptedSpec), acceptance
    resources = acceptance.spec.resources
    return resources.cpu, resources.memory, resources.ephemeral_storage, resources.shared_memory


@pytest.mark.parametrize(
    ("gpus", "expected"),
    [(0, ("1", "4Gi", "20Gi", "1Gi")), (1, ("3", "10Gi", "20Gi", "2Gi")), (8, ("24", "80Gi", "20Gi", "16Gi"))],
)
def test_built_in_values_follow_the_number_of_gpus(gpus: int, expected: tuple[str, ...]) -> None:
    assert compute_resources(gpus) == expected


@pytest.mark.parametrize(
    ("memory", "expected"), [("80Gi", "40Gi"), ("16Gi", "10Gi"), (42949672960, "20Gi"), (80, "10Gi"), ("141G", "65Gi"), ("5m", "10Gi"), ("1e11", "46Gi")]
)
def test_memory_is_half_of_the_pools_gpu_memory_and_at_least_10_gib(memory: str | int, expected: str) -> None:
    assert compute_resources(1, nodePools=[POOL_80_GIB | {"gpuMemory": memory}])[1] == expected


def test_all_gpus_of_a_pool_are_counted() -> None:
    assert compute_resources(8, nodePools=[POOL_80_GIB]) == ("24", "320Gi", "20Gi", "16Gi")


def test_mig_slices_get_the_values_of_a_pod_without_gpus() -> None:
    pool = POOL_80_GIB | {"gpuResource": "nvidia.com/mig-1g.10gb", "gpuMemory": "10Gi"}
    assert compute_resources(1, nodePools=[pool]) == compute_resources(0)
    assert compute_resources(1, job_resources={"gpuResource": "nvidia.com/mig-1g.10gb"}) == compute_resources(0)


def test_resources_come_from_job_then_pool_then_per_gpu_then_general_then_built_in_values() -> None:
    config = {
        "resources": {"cpu": "2", "memory": "6Gi", "ephemeralStorage": "50Gi", "perGpu": {"cpu": "500m", "memory": "1.5Gi", "sharedMemory": "1G"}},
        "nodePools": [POOL_80_GIB | {"resources": {"sharedMemory": "9Gi"}}],
    }
    assert compute_resources(2, **config) == ("1000m", str(3 * 2**30), "50Gi", "9Gi")
    assert compute_resources(2, job_resources={"cpu": 7}, **config)[0] == 7
    assert compute_resources(0, **config) == ("2", "6Gi", "50Gi", "1Gi")
    assert compute_resources(2, resources={"cpu": "2"}) == ("2", "20Gi", "20Gi", "4Gi")


@pytest.mark.parametrize(
    ("recorded_defaults", "expected"),
    [
        (FORMER_DEFAULTS, ("1", "4Gi", "20Gi", "1Gi")),
        (FORMER_DEFAULTS | {"resources.memory": "80Gi", "resources.cpu": "24"}, ("24", "80Gi", "20Gi", "16Gi")),
        ({}, ("24", "80Gi", "20Gi", "16Gi")),
    ],
)
def test_job_that_started_with_the_former_values_keeps_them(recorded_defaults: dict[str, Any], expected: tuple[str, ...]) -> None:
    assert compute_resources(8, recorded_defaults) == expected


def test_configuration_also_replaces_former_values() -> None:
    assert compute_resources(8, FORMER_DEFAULTS, resources={"memory": "64Gi"}) == ("1", "64Gi", "20Gi", "1Gi")
