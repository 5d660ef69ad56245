"""The Job, the Service and run.json of an attempt, compared with golden files.

After an intended change of these objects, run `GOLDEN=write pytest tests/unit/operator/test_builders.py` and review the diff of the golden files.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from finetune_api.names import MAX_RUN_BYTES, Annotation, Env
from finetune_api.pod import RunConfig
from finetune_api.status import Checkpoint
from finetune_operator.builders.job import build_job, build_service
from finetune_operator.builders.run_config import build_run_config
from finetune_operator.objects import Object
from finetune_operator.policies.acceptance import AcceptedSpec, FirstAttempt, accept

from tests.unit.operator.samples import CONFIG, accept_spec, finetunejob, job, spec, status

GOLDEN_FOLDER = Path(__file__).parent / "golden"
FULL_SPEC = spec(
    model={
        "source": "s3://models/base", "tokenSecretRef": {"name": "hub", "key": "token"},
        "storage": {"endpoint": "https://models.example.com", "credentialsSecretRef": {"name": "models"}},
    },
    dataset={
        "train": "configmap://rows/train.jsonl", "validation": "pvc://data/validation.jsonl",
        "chatTemplate": {"configMapRef": {"name": "templates", "key": "chat.jinja"}},
        "storage": {"endpoint": "https://data.example.com", "caBundleRef": {"name": "ca", "key": "data.pem"}},
    },
    storage={
        "uri": "s3://results/team", "endpoint": "https://s3.example.com", "region": "eu-1", "addressingStyle": "path",
        "credentialsSecretRef": {"name": "s3"}, "caBundleRef": {"name": "ca", "key": "s3.pem"},
    },
    resources={"nodes": 2, "gpusPerNode": 4, "cpu": 8, "memory": "64Gi", "sharedMemory": "8Gi"},
    placement={
        "nodeSelector": {"disk": "nvme"}, "tolerations": [{"key": "gpu", "operator": "Exists", "effect": "NoSchedule"}],
        "nodeAffinity": [{"key": "zone", "operator": "In", "values": ["a", "b"]}],
        "priorityClassName": "batch", "schedulerName": "volcano", "queueName": "team-a", "serviceAccountName": "trainer",
        "imagePullSecrets": ["registry"], "image": "registry.example.com/own:2",
        "env": [{"name": "NCCL_DEBUG", "value": "INFO"}, {"name": "KEY", "secretKeyRef": {"name": "s", "key": "k"}}],
        "volumes": [{"name": "cache", "persistentVolumeClaim": "cache"}, {"name": "more", "secret": "more"}],
        "volumeMounts": [{"name": "cache", "mountPath": "/cache", "subPath": "hub", "readOnly": True}, {"name": "more", "mountPath": "/more"}],
        "labels": {"team": "a"}, "annotations": {"note": "x"},
    },
    policy={"terminationGracePeriodSeconds": 120},
)  # fmt: skip


def build_config_and_job(raw_spec: Object, attempt: int = 1, **options: Any) -> tuple[RunConfig, Object]:
    acceptance = accept_spec(raw_spec)
    finetune_job = finetunejob(raw_spec)
    run_options: dict[str, Any] = {"defaults": acceptance.defaults, "committed_step": 0, "max_step": None, **options}
    run = build_run_config(finetune_job, acceptance.spec, attempt, **run_options)
    return run, build_job(finetune_job, run, acceptance.pool, CONFIG)


def assert_matches_golden_file(name: str, built_object: Object) -> None:
    path = GOLDEN_FOLDER / f"{name}.yaml"
    text = yaml.safe_dump(json.loads(json.dumps(built_object)), sort_keys=False, width=120)
    if os.environ.get("GOLDEN") == "write":
        path.write_text(text)
    assert path.read_text() == text


def mask_run_config(body: Object) -> Object:
    masked_job: Object = json.loads(json.dumps(body))
    masked_job["spec"]["template"]["metadata"]["annotations"][Annotation.RUN_CONFIG] = "..."
    masked_job["metadata"]["annotations"][Annotation.RUN_CONFIG_SHA256] = "..."
    for variable in masked_job["spec"]["template"]["spec"]["containers"][0]["env"]:
        if variable["name"] == Env.RUN_SHA256:
            variable["value"] = "..."
    return masked_job


@pytest.mark.parametrize(("name", "raw_spec"), [("small", spec()), ("everything", FULL_SPEC)])
def test_job_matches_its_golden_file(name: str, raw_spec: Object) -> None:
    _, body = build_config_and_job(raw_spec)
    assert_matches_golden_file(f"job-{name}", mask_run_config(body))


def test_run_config_matches_its_golden_file() -> None:
    run, _ = build_config_and_job(FULL_SPEC)
    assert_matches_golden_file("run-everything", run.to_wire())


def test_run_config_lists_the_checkpoint_manifests_of_the_status_as_marks() -> None:
    """Marks are entries of `defaults` that begin with `#`; trainer 0.1.0 ignores them. Checkpoints without a sha256 and checkpoints with a URI in an unknown
    format are left out.
    """
    sha256 = "ab" * 32
    root = "s3://models/test/team/run/uid/checkpoints"
    checkpoints = [
        Checkpoint(step=10, uri=f"{root}/step-00000010/a1-0123abcd", sha256=sha256), Checkpoint(step=20, uri=f"{root}/step-00000020/a1-0123abcd"),
        Checkpoint(step=30, uri=f"{root}/step-00000030", sha256=sha256), Checkpoint(step=40, uri=f"{root}/step-00000040/a2-0123abcd/", sha256="x y"),
    ]  # fmt: skip
    acceptance = accept_spec(spec())
    run_options: dict[str, Any] = {"defaults": acceptance.defaults, "committed_step": 40, "max_step": None}
    run = build_run_config(finetunejob(spec(), status(checkpoints=[checkpoint.to_wire() for checkpoint in checkpoints])), acceptance.spec, 2, **run_options)
    assert run.resume.known_checkpoints == {"step-00000010/a1-0123abcd": sha256}
    wire = run.to_wire()
    assert "knownCheckpoints" not in wire["resume"] and f"#checkpoint step-00000010/a1-0123abcd {sha256}" in wire["defaults"]
    assert RunConfig.model_validate_json(run.to_bytes()) == run


def test_service_matches_its_golden_file() -> None:
    assert_matches_golden_file("service", build_service(job()))


def test_job_contains_its_run_configuration_and_its_hash() -> None:
    run, body = build_config_and_job(FULL_SPEC)
    run_json = body["spec"]["template"]["metadata"]["annotations"][Annotation.RUN_CONFIG]
    assert RunConfig.model_validate(json.loads(run_json)) == run
    digest = RunConfig.sha256(run_json.encode())
    assert body["metadata"]["annotations"][Annotation.RUN_CONFIG_SHA256] == digest
    env = {variable["name"]: variable.get("value") for variable in body["spec"]["template"]["spec"]["containers"][0]["env"]}
    assert env[Env.RUN_SHA256] == digest
    assert len(run_json.encode()) < MAX_RUN_BYTES


def test_platform_chooses_the_user_if_fixed_user_is_false() -> None:
    """OpenShift's security context constraint `restricted-v2` rejects pods whose user id or group id is outside the range of the namespace."""
    acceptance = accept_spec(spec())
    run = build_run_config(finetunejob(spec()), acceptance.spec, 1, defaults=acceptance.defaults, committed_step=0, max_step=None)
    config = CONFIG.model_copy(update={"trainer": CONFIG.trainer.model_copy(update={"fixed_user": False})})
    body = build_job(finetunejob(spec()), run, None, config)
    assert body["spec"]["template"]["spec"]["securityContext"] == {
        "runAsNonRoot": True, "fsGroupChangePolicy": "OnRootMismatch", "seccompProfile": {"type": "RuntimeDefault"},
    }  # fmt: skip


def test_builders_are_deterministic() -> None:
    assert build_config_and_job(FULL_SPEC) == build_config_and_job(FULL_SPEC)


def test_labels_and_annotations_of_placement_reach_the_job_and_its_pods() -> None:
    """Other controllers may read these labels: for example, Kueue reads the name of the WorkloadPriorityClass from a label of the Job."""
    labels, annotations = {"kueue.x-k8s.io/priority-class": "high"}, {"note": "x"}
    _, body = build_config_and_job(spec(placement={"labels": labels, "annotations": annotations}))
    for metadata in (body["metadata"], body["spec"]["template"]["metadata"]):
        assert labels.items() <= metadata["labels"].items()
        assert annotations.items() <= metadata["annotations"].items()
        assert metadata["labels"]["finetune-operator.io/name"] == "run"


def test_queue_label_of_a_job_of_release_0_1_0_does_not_queue_its_next_attempt() -> None:
    acceptance = accept(spec(placement={"labels": {"kueue.x-k8s.io/queue-name": "old"}}), CONFIG, FirstAttempt())
    assert isinstance(acceptance, AcceptedSpec)
    run = build_run_config(finetunejob(), acceptance.spec, 2, defaults={}, committed_step=5, max_step=None)
    assert "kueue.x-k8s.io/queue-name" not in build_job(finetunejob(), run, None, CONFIG)["metadata"]["labels"]


@pytest.mark.parametrize(
    ("requested", "attempt", "committed", "max_step", "mode", "expected"),
    [
        ("auto", 1, 0, None, "auto", 0),
        ("never", 1, 0, None, "never", 0),
        ("never", 2, 0, None, "auto", 0),
        ("s3://old/checkpoints/step-00000010", 1, 0, None, "s3://old/checkpoints/step-00000010", 0),
        ("s3://old/checkpoints/step-00000010", 2, 0, None, "s3://old/checkpoints/step-00000010", 0),
        ("s3://old/checkpoints/step-00000010", 2, 40, None, "auto", 40),
        ("auto", 3, 40, 20, "auto", 20),
        ("auto", 3, 40, 0, "auto", 0),
        ("never", 3, 40, 0, "auto", 0),
        ("s3://old/checkpoints/step-00000010", 3, 40, 0, "s3://old/checkpoints/step-00000010", 0),
        ("s3://old/checkpoints/step-00000010", 3, 40, 20, "auto", 20),
    ],
)
def test_attempt_resumes_from_the_checkpoint_that_the_spec_and_the_status_allow(
    requested: str, attempt: int, committed: int, max_step: int | None, mode: str, expected: int
) -> None:
    run, _ = build_config_and_job(spec(checkpoint={"resume": requested}), attempt, committed_step=committed, max_step=max_step)
    assert (run.resume.mode, run.resume.expect_step, run.resume.max_step) == (mode, expected, max_step)


def test_the_attempt_after_a_rollback_is_a_mark_that_older_trainers_ignore() -> None:
    run, _ = build_config_and_job(spec(), 4, committed_step=40, max_step=20, rolled_back_attempt=3)
    assert run.resume.rolled_back_attempt == 3
    assert "rolledBackAttempt" not in run.to_wire()["resume"] and "#rolledBackAttempt 3" in run.to_wire()["defaults"]
    assert RunConfig.model_validate_json(run.to_bytes()) == run
    run_without_limit, _ = build_config_and_job(spec(), 4, committed_step=40, max_step=None, rolled_back_attempt=3)
    assert run_without_limit.resume.rolled_back_attempt is None


def test_only_attempts_with_several_pods_use_dns_names() -> None:
    single_pod_run, body = build_config_and_job(spec())
    assert (single_pod_run.world.master_address, single_pod_run.world.master_port) == ("127.0.0.1", 0)
    assert "subdomain" not in body["spec"]["template"]["spec"]
    gang_run, body = build_config_and_job(spec(resources={"nodes": 2}), 3)
    assert gang_run.world.master_address == "run-3-0.run-3"
    assert gang_run.world.rendezvous_id.endswith("-3")
    assert body["spec"]["template"]["spec"]["subdomain"] == "run-3"


@pytest.mark.parametrize(
    ("user_grace_seconds", "save_seconds", "grace_seconds"),
    [(None, None, 300), (None, 99.0, 300), (None, 200.5, 602), (None, 1e6, 86400), (120, 200.5, 120)],
)
def test_grace_period_covers_three_saves_unless_the_user_set_it(user_grace_seconds: int | None, save_seconds: float | None, grace_seconds: int) -> None:
    policy = {} if user_grace_seconds is None else {"terminationGracePeriodSeconds": user_grace_seconds}
    old_job = finetunejob(spec(policy=policy))
    newest_checkpoint = Checkpoint(step=40, uri="s3://r/40", save_seconds=save_seconds)
    older_checkpoint = Checkpoint(step=20, uri="s3://r/20", save_seconds=5000.0)
    finetune_job = replace(old_job, status=old_job.status.model_copy(update={"checkpoints": [newest_checkpoint, older_checkpoint] if save_seconds else []}))
    acceptance = accept_spec(spec(policy=policy))
    run = build_run_config(finetune_job, acceptance.spec, 2, defaults=acceptance.defaults, committed_step=40, max_step=None)
    assert run.grace_seconds == grace_seconds
    assert build_job(finetune_job, run, acceptance.pool, CONFIG)["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] == grace_seconds


def test_prompts_and_the_existing_model_are_mounted() -> None:
    raw_spec = spec(
        evaluation={"comparison": {"promptsRef": {"name": "prompts", "key": "prompts.txt"}}},
        phases={"train": False, "from": "pvc://models/job/model"},
    )
    run, body = build_config_and_job(raw_spec)
    container_spec = body["spec"]["template"]["spec"]
    assert {"name": "configmap-0", "configMap": {"name": "prompts"}} in container_spec["volumes"]
    [trainer] = container_spec["containers"]
    mounts = {mount["mountPath"]: mount.get("readOnly") for mount in trainer["volumeMounts"]}
    assert mounts["/etc/finetune-config/prompts"] is True and mounts["/mnt/pvc/models"] is True
    assert (run.spec.phases.train, run.spec.phases.from_) == (False, "pvc://models/job/model")
