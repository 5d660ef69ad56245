"""Random input for the operator: random specs that the API accepts, malformed Jobs and pods, and damaged statuses."""

from __future__ import annotations

import random
from typing import Any

import pytest
from finetune_api import names
from finetune_api.names import Annotation, Condition, Label, Phase
from finetune_operator.builders.job import build_job
from finetune_operator.builders.run_config import build_run_config
from finetune_operator.policies.acceptance import AcceptedSpec, accept
from finetune_operator.settings import OperatorConfig
from finetune_operator.views import read_finetunejob

from tests.support.kubeapi import ApiError, resource_path
from tests.support.kubelet import success_exit
from tests.support.operator_process import merge_mappings
from tests.support.rig import FINETUNEJOBS, MINIMAL_SPEC, Rig, attempt_reasons, condition_is_true

pytestmark = pytest.mark.faults
CONFIG = OperatorConfig.model_validate({"storage": {"uri": "s3://bucket/prefix"}, "policy": {"serviceAccounts": ["robot"]}})
VALUES_BY_FIELD: dict[str, list[Any]] = {
    "resources": [
        {"nodes": 3, "gpusPerNode": 2}, {"gpusPerNode": 0, "cpu": 4}, {"cpu": "500m", "memory": "1.5Gi"},
        {"gpuResource": "nvidia.com/mig-1g.10gb"}, {"nodes": 2, "processesPerNode": 4, "gpusPerNode": 4},
        {"sharedMemory": "64Mi", "ephemeralStorage": "100Gi"},
    ],
    "placement": [
        {"nodeSelector": {"zone": "a"}, "priorityClassName": "high"}, {"queueName": "team"},
        {"tolerations": [{"key": "gpu", "operator": "Exists"}, {"key": "a", "value": "b", "effect": "NoSchedule"}]},
        {"env": [{"name": "A", "value": "b"}, {"name": "B", "secretKeyRef": {"name": "s", "key": "k"}}]},
        {"labels": {"team": "x"}, "annotations": {"note": "y" * 200}, "serviceAccountName": "robot"},
        {"volumes": [{"name": "v", "persistentVolumeClaim": {"claimName": "c"}}],
         "volumeMounts": [{"name": "v", "mountPath": "/v"}]},
        {"image": "registry.example.org:5000/a/b@sha256:" + "0" * 64, "imagePullSecrets": ["pull"]},
        {"nodeAffinity": [{"key": "gpu", "operator": "In", "values": ["a", "b"]}], "schedulerName": "other"},
    ],
    "policy": [
        {"retries": 0}, {"activeDeadlineSeconds": 60, "ttlSecondsAfterFinished": 0}, {"onOutOfMemory": "Fail"},
        {"terminationGracePeriodSeconds": 1}, {"stallTimeoutSeconds": 30, "startTimeoutSeconds": 30},
    ],
    "storage": [
        {"uri": "s3://other/a/b", "endpoint": "http://s3:9000", "addressingStyle": "path", "region": "eu-1"},
        {"uri": "s3://other", "credentialsSecretRef": {"name": "keys"}},
        {"uri": "s3://other", "caBundleRef": {"name": "ca", "key": "ca.crt"}},
    ],
    "dataset": [
        {"train": "pvc://claim/a/b.jsonl"}, {"train": "configmap://data/rows.jsonl"}, {"train": "hf://org/data@main"},
        {"train": "https://example.org/x.jsonl", "validation": "s3://bucket/v.jsonl"},
    ],
    "model": [{"source": "pvc://models/llama"}, {"source": "s3://bucket/model", "dtype": "bfloat16"}, {"source": "a/b@v1"}],
    "method": [{"type": "full"}, {"type": "lora", "lora": {"rank": 64, "alpha": 1}}, {"type": "qlora"}],
    "training": [{"learningRate": 5e-6, "maxSteps": 3}, {"batchSizePerDevice": 1, "gradientAccumulationSteps": 128}],
}  # fmt: skip
SPEC_COUNT = 120


def make_random_spec(rng: random.Random) -> dict[str, Any]:
    spec = dict(MINIMAL_SPEC)
    for group, options in VALUES_BY_FIELD.items():
        if rng.random() < 0.5:
            spec = merge_mappings(spec, {group: rng.choice(options)})
    return spec


@pytest.mark.row(48)
def test_every_accepted_spec_leads_to_a_valid_job(rig: Rig) -> None:
    accepted_count, refusal_messages = 0, set()
    for seed in range(SPEC_COUNT):
        spec = make_random_spec(random.Random(seed))
        body = {"apiVersion": names.API_VERSION, "kind": names.KIND, "metadata": {"name": f"job-{seed}"}, "spec": spec}
        try:
            created_job = rig.api.create(FINETUNEJOBS, rig.namespace, body, dryRun="All", fieldValidation="Strict")
        except ApiError as error:
            refusal_messages.add(error.message)
            continue
        job = read_finetunejob(created_job)
        verdict = accept(job.spec, CONFIG)
        if not isinstance(verdict, AcceptedSpec):
            refusal_messages.add(verdict.message)
            continue
        run = build_run_config(job, verdict.spec, 1, defaults=verdict.defaults, committed_step=0, max_step=None)
        child_job = build_job(job, run, verdict.pool, CONFIG)
        path = resource_path("jobs", rig.namespace)
        answer = rig.api.request("POST", path, child_job, dryRun="All", fieldValidation="Strict")
        assert answer.warnings == (), (seed, spec)
        accepted_count += 1
    assert accepted_count > SPEC_COUNT / 3, sorted(refusal_messages)


@pytest.mark.row(49)
def test_malformed_jobs_and_pods_are_ignored(rig: Rig) -> None:
    labels = {Label.MANAGED_BY.value: names.MANAGER_NAME, Label.JOB_NAME.value: "job", Label.JOB_UID.value: "x", Label.ATTEMPT.value: "1"}
    template = {"spec": {"restartPolicy": "Never", "containers": [{"name": "c", "image": "x"}]}}
    rng = random.Random(49)
    foreign_objects = []
    for number in range(12):
        random_labels = {k: rng.choice([v, "", "9", "99999999999999999999", "a.b-c"]) for k, v in labels.items()}
        random_labels[Label.MANAGED_BY.value] = names.MANAGER_NAME
        metadata = {
            "name": f"job-{number + 100}", "labels": random_labels, "annotations": {Annotation.RUN_CONFIG_SHA256.value: "?" * number},
            "ownerReferences": [
                {"apiVersion": names.API_VERSION, "kind": names.KIND, "name": "job", "uid": f"none-{number}",
                 "controller": rng.choice([True, False])}
            ] if number % 3 == 0 else [],
        }  # fmt: skip
        created_object = rig.api.create("jobs", rig.namespace, {"metadata": metadata, "spec": {"suspend": True, "template": template}})
        foreign_objects.append((created_object["metadata"]["name"], created_object["metadata"]["uid"]))
        pod = {"metadata": {"name": f"pod-{number}", "labels": random_labels}}
        rig.api.create("pods", rig.namespace, pod | {"spec": template["spec"]})
    foreign_pod_uids = {p["metadata"]["uid"] for p in rig.api.list("pods", rig.namespace)}
    proxy = rig.start_proxy()
    rig.start_operator(proxy=proxy)
    rig.submit()
    rig.wait_attempt(1)
    own_pod = next(p for p in rig.kubelet.wait_running(rig.namespace, "job", count=1) if p.name.startswith("job-1-"))
    rig.kubelet.end_pod(own_pod, success_exit())
    assert condition_is_true(rig.wait_finished(), Condition.SUCCEEDED)
    assert attempt_reasons(rig.get())[0][0] == 1
    assert [e for e in proxy.exchanges if e.method == "DELETE"] == []
    assert foreign_pod_uids <= {p["metadata"]["uid"] for p in rig.api.list("pods", rig.namespace)}


@pytest.mark.row(49)
@pytest.mark.parametrize("damage", [{"attempts": [{"number": "x"}]}, {"phase": "Odd"}, {"attempt": -5, "conditions": []}])
def test_a_damaged_status_is_repaired(rig: Rig, damage: dict[str, Any]) -> None:
    operator = rig.start_operator()
    rig.submit()
    rig.kubelet.wait_running(rig.namespace, "job")
    rig.wait_attempt(1)
    operator.stop()
    path = resource_path(f"{FINETUNEJOBS}/status", rig.namespace, "job")
    try:
        rig.api.request("PATCH", path, {"status": damage})
    except ApiError as error:
        assert error.code == 422, "only the CRD schema may refuse the damaged status"
    rig.start_operator()
    rig.kubelet.end_pod(rig.kubelet.wait_running(rig.namespace, "job")[0], success_exit())
    assert rig.wait_finished()["status"]["phase"] == Phase.SUCCEEDED
    assert rig.list_job_names() == ["job-1"]
