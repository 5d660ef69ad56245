"""Jobs in which a vLLM server generates the completions: the container, GPUs and image of the server, and the messages about the server."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from finetune_api import names
from finetune_api.names import FailureClass, Reason
from finetune_api.pod import RunConfig, TerminationMessage
from finetune_operator.builders.job import build_job, build_preparation_job
from finetune_operator.builders.run_config import build_run_config
from finetune_operator.costs import compute_cost
from finetune_operator.objects import Object
from finetune_operator.policies.acceptance import RefusedSpec, accept
from finetune_operator.policies.blocking import find_blocking_condition_in_pods
from finetune_operator.policies.cause import find_pod_cause
from finetune_operator.settings import OperatorConfig, parse_config

from tests.unit.operator.samples import (
    accept_spec,
    at,
    end_pod,
    facts,
    finetunejob,
    iso_time,
    job,
    parse_pod,
    pod,
    report,
    spec,
    status,
)

CONFIG = parse_config({
    "trainer": {"image": "trainer:1", "generationImage": "vllm:1", "imagePullPolicy": "Always"},
    "storage": {"uri": "s3://results"},
    "nodePools": [{"name": "h100", "default": True, "gpusPerNode": 8, "pricePerGpuHour": 3.6}],
}, "test")  # fmt: skip
SERVER_SPEC = {"backend": "vllm", "gpus": 2}


def make_server_spec(gpus: int = 6, generation: dict[str, Any] | None = None, **groups: Any) -> Object:
    generation_options = SERVER_SPEC if generation is None else generation
    trainer = {"type": "grpo", "rewards": [{"builtin": "thinkFormat"}], "grpo": {"generation": generation_options, "numGenerations": 2}}
    return spec(trainer=trainer, resources={"gpusPerNode": gpus}, **groups)


def build_run_and_job(raw_spec: Object, config: OperatorConfig = CONFIG) -> tuple[RunConfig, Object]:
    acceptance, finetune_job = accept_spec(raw_spec, config), finetunejob(raw_spec)
    run = build_run_config(finetune_job, acceptance.spec, 1, defaults=acceptance.defaults, committed_step=0, max_step=None)
    return run, build_job(finetune_job, run, acceptance.pool, config, "attempt-secret")


def test_the_server_and_the_model_cache_are_both_in_the_pod() -> None:
    acceptance, finetune_job = accept_spec(make_server_spec(), CONFIG), finetunejob(make_server_spec())
    run = build_run_config(finetune_job, acceptance.spec, 1, defaults=acceptance.defaults, committed_step=0, max_step=None)
    pod_spec = build_job(finetune_job, run, acceptance.pool, CONFIG, model_cache="pvc://models/hub")["spec"]["template"]["spec"]
    assert [container["name"] for container in pod_spec["initContainers"]] == ["model-cache", "generation"]


def test_the_server_is_a_sidecar_with_its_own_gpus_and_without_secrets() -> None:
    pod_spec = build_run_and_job(make_server_spec())[1]["spec"]["template"]["spec"]
    (server_container,) = pod_spec["initContainers"]
    assert server_container == {
        "name": "generation",
        "image": "vllm:1",
        "imagePullPolicy": "Always",
        "restartPolicy": "Always",
        "resources": {
            "requests": {"cpu": "2", "memory": "16Gi", "nvidia.com/gpu": "2"}, "limits": {"memory": "16Gi", "nvidia.com/gpu": "2"},
        },
        "securityContext": {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}},
        "volumeMounts": [
            {"name": "generation", "mountPath": "/work/generation"}, {"name": "generation-tmp", "mountPath": "/tmp"},
            {"name": "generation-shm", "mountPath": "/dev/shm"},
        ],
    }  # fmt: skip
    (trainer_container,) = pod_spec["containers"]
    assert trainer_container["resources"]["limits"]["nvidia.com/gpu"] == "6"
    assert {"name": "generation", "mountPath": "/work/generation"} in trainer_container["volumeMounts"]
    volumes = {volume["name"]: volume for volume in pod_spec["volumes"]}
    assert volumes["generation"] == {"name": "generation", "emptyDir": {}}
    assert volumes["generation-shm"] == {"name": "generation-shm", "emptyDir": {"medium": "Memory"}}


def test_a_job_with_a_model_cache_has_both_init_containers() -> None:
    acceptance, finetune_job = accept_spec(make_server_spec(), CONFIG), finetunejob(make_server_spec())
    run = build_run_config(finetune_job, acceptance.spec, 1, defaults=acceptance.defaults, committed_step=0, max_step=None)
    body = build_job(finetune_job, run, acceptance.pool, CONFIG, "attempt-secret", model_cache="pvc://models/base")
    pod_spec = body["spec"]["template"]["spec"]
    cache_container, server_container = pod_spec["initContainers"]
    assert (cache_container["name"], server_container["name"]) == (names.MODEL_CACHE_CONTAINER, names.GENERATION_CONTAINER)
    assert "generation" not in {mount["name"] for mount in cache_container["volumeMounts"]}


def test_server_options_in_the_spec_replace_the_defaults() -> None:
    generation = {"backend": "vllm", "image": "own/vllm:2", "gpus": 0, "cpu": "8", "memory": "3Gi"}
    server = build_run_and_job(make_server_spec(gpus=0, generation=generation))[1]["spec"]["template"]["spec"]["initContainers"][0]
    assert (server["image"], server["resources"]) == ("own/vllm:2", {"requests": {"cpu": "8", "memory": "3Gi"}, "limits": {"memory": "3Gi"}})


@pytest.mark.parametrize("raw_spec", [make_server_spec(generation={"backend": "transformers"}), make_server_spec(generation={}), spec()])
def test_pod_of_a_job_without_vllm_has_no_server(raw_spec: Object) -> None:
    run, body = build_run_and_job(raw_spec)
    assert "initContainers" not in body["spec"]["template"]["spec"]
    assert run.generation_url is None and "generationUrl" not in run.to_bytes().decode()


def test_a_preparation_has_no_server() -> None:
    run, _ = build_run_and_job(make_server_spec())
    body = build_preparation_job(finetunejob(make_server_spec()), run, 1, run.spec.prepare.resources.model_copy(update={"cpu": "1"}), None, CONFIG)
    pod_spec = body["spec"]["template"]["spec"]
    assert "initContainers" not in pod_spec and "generation" not in json.dumps(pod_spec)


def test_run_json_contains_the_address_of_the_server_as_a_mark() -> None:
    run, _ = build_run_and_job(make_server_spec())
    wire = json.loads(run.to_bytes())
    assert "#generationUrl http://127.0.0.1:8100" in wire["defaults"] and "generationUrl" not in wire
    assert wire["spec"]["trainer"]["grpo"]["generation"] == {"backend": "vllm", "gpus": 2, "image": "vllm:1"}
    assert "#platform trainer.grpo.generation.image" in wire["defaults"] and "#minTrainerVersion 0.2.0" in wire["defaults"]
    assert RunConfig.model_validate(wire).generation_url == "http://127.0.0.1:8100"


def test_job_waits_if_neither_spec_nor_configuration_names_the_server_image() -> None:
    config_without_image = CONFIG.model_copy(update={"trainer": CONFIG.trainer.model_copy(update={"generation_image": None})})
    refusal = accept(make_server_spec(), config_without_image)
    assert isinstance(refusal, RefusedSpec)
    assert (refusal.reason, refusal.is_final) == (Reason.GENERATION_IMAGE_NOT_CONFIGURED, False)
    assert refusal.message == "spec.trainer.grpo.generation.image is absent, and the operator's configuration has no trainer.generationImage"
    accept_spec(make_server_spec(generation={**SERVER_SPEC, "image": "own/vllm:2"}), config_without_image)


def test_gpus_of_trainer_and_server_must_fit_on_one_node() -> None:
    accept_spec(make_server_spec(gpus=6), CONFIG)
    refusal = accept(make_server_spec(gpus=7), CONFIG)
    assert isinstance(refusal, RefusedSpec) and refusal.reason is Reason.POOL_TOO_SMALL
    assert refusal.message.startswith("spec.resources.gpusPerNode is 7 and the vLLM server needs 2, but a node of pool h100 has 8")


def test_cost_of_a_job_includes_the_gpus_of_its_server() -> None:
    running_status = status(attempt=1, attempts=[{"number": 1, "startTime": iso_time(0)}])
    job_facts = facts(
        spec=make_server_spec(), status=running_status, jobs=[job()], pods=[pod(scheduled_at=at(0))], now=at(3600), last_report=report(), reported_at=at(3600),
        config=CONFIG,
    )  # fmt: skip
    cost = compute_cost(job_facts, None)
    assert cost is not None and (cost.gpu_hours, cost.amount) == (8.0, 28.8)


def test_server_image_that_cannot_be_pulled_is_a_blocking_condition() -> None:
    waiting_state = {"waiting": {"reason": "ImagePullBackOff", "message": "no such image"}}
    condition = find_blocking_condition_in_pods([parse_pod("Pending", {"waiting": {"reason": "PodInitializing"}}, init=waiting_state)])
    assert condition is not None and (condition.reason, condition.message) == (Reason.IMAGE_PULL_FAILED, "ImagePullBackOff: no such image")


def test_trainers_message_is_the_cause_if_the_vllm_server_ends() -> None:
    """The operator must report the trainer's termination message as the cause, not the state of the server's container."""
    message = TerminationMessage(class_=FailureClass.INFRASTRUCTURE, code="GenerationServerEnded", message="the vLLM server ended: exit code 1")
    failed_pod = replace(end_pod(pod(), 74, message), init_failure_message="init container generation ended with exit code 1")
    cause = find_pod_cause(failed_pod)
    assert cause is not None
    assert (cause.failure.code, cause.failure.class_, cause.reason) == ("GenerationServerEnded", FailureClass.INFRASTRUCTURE, Reason.PEER_FAILED)
