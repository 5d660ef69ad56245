"""Plans of jobs on a real API server: every attempt uses the settings that the plan has chosen, and a job that fits on no pool requests no GPU."""

from __future__ import annotations

import json
from typing import Any

import pytest
from finetune_api.names import Annotation, ExitCode, Origin
from finetune_api.pod import RunConfig, TerminationMessage

from tests.integration.operator.rig import Operator, Rig

POOLS = [
    {"name": "l4", "default": True, "gpusPerNode": 4, "gpuType": "l4-24gb", "nodeSelector": {"gpu": "l4"}},
    {"name": "h100", "gpusPerNode": 8, "gpuType": "h100-80gb", "nodeSelector": {"gpu": "h100"}},
]
CHOICES = [
    {"field": "resources.nodePool", "value": "h100", "reason": "the only one of 2 pools on which the job fits"},
    {"field": "training.batchSizePerDevice", "value": 2, "reason": "fits"},
    {"field": "training.gradientAccumulationSteps", "value": 8, "reason": "keeps the effective batch of 16 rows"},
    {"field": "training.gradientCheckpointing", "value": "disabled", "reason": "fits"},
]
PREPARED = {"resources": {"gpusPerNode": 1}, "prepare": {"strategy": "always"}}


@pytest.fixture(scope="session")
def config(config: dict[str, Any]) -> dict[str, Any]:
    return {**config, "nodePools": POOLS}


async def read_run_and_pod_spec(world: Rig, job: str) -> tuple[RunConfig, dict[str, Any]]:
    """Return the run configuration of a Job, and the spec of its pods."""
    template = (await world.wait_for_job(job))["spec"]["template"]
    return RunConfig.model_validate(json.loads(template["metadata"]["annotations"][Annotation.RUN_CONFIG])), template["spec"]


async def test_attempts_keep_the_choices_after_a_restart_of_the_operator_with_other_configuration(world: Rig, operator: Operator) -> None:
    await world.create(**PREPARED)
    pod = await world.wait_for_pod("run-prepare1", 0, "Running")
    assert [pool.name for pool in (await read_run_and_pod_spec(world, "run-prepare1"))[0].pools] == ["h100", "l4"]
    operator.kill()
    await world.kubelet.end(pod, 0, TerminationMessage.model_validate({"plan": {"choices": CHOICES}}))
    operator.start()
    first_run, _ = await read_run_and_pod_spec(world, "run-1")
    await world.wait_for_pod("run-1", 0, "Running")
    operator.kill()
    operator.config = {**operator.config, "nodePools": [POOLS[0] | {"pricePerGpuHour": 1}, POOLS[1] | {"pricePerGpuHour": 99}]}
    operator.start()
    await world.kubelet.end(await world.wait_for_pod("run-1", 0, "Running"), ExitCode.SIGKILL)
    second_run, pod_spec = await read_run_and_pod_spec(world, "run-2")
    for run in (first_run, second_run):
        assert {path: (run.spec.value(path), run.origin(path)) for path in (choice["field"] for choice in CHOICES)} == {
            str(choice["field"]): (choice["value"], Origin.PLAN) for choice in CHOICES
        }
    assert pod_spec["nodeSelector"]["gpu"] == "h100"
    status = world.status()
    assert (status["plan"]["choices"], status["resolved"]["nodePool"], status["resolved"]["effectiveBatch"]) == (CHOICES, "h100", 16)


async def test_a_job_that_fits_on_no_pool_creates_no_pod_with_a_gpu(world: Rig) -> None:
    await world.create(**PREPARED)
    message = TerminationMessage.model_validate({"class": "User", "code": "DoesNotFit", "message": "too large", "hint": "write method.type: qlora"})
    await world.kubelet.end(await world.wait_for_pod("run-prepare1", 0, "Running"), ExitCode.CONFIG_INVALID, message)
    status = await world.wait_for_phase("Failed")
    assert (status["failure"]["code"], status["failure"]["hint"], status["failure"]["exitCode"]) == ("DoesNotFit", "write method.type: qlora", 64)
    containers = [pod["spec"]["containers"][0] for pod in world.pods.items.values()]
    assert list(world.jobs.items) == ["run-prepare1"]
    assert len(containers) == 1 and not any("gpu" in name for name in containers[0]["resources"]["limits"])
