"""The lifecycle of jobs on a real API server: suspend, resume, cancel, retries, adapted settings, time limits and refusals."""

from __future__ import annotations

import asyncio
import itertools
import json
from typing import Any

from finetune_api.names import Annotation, ExitCode, FailureClass, Label
from finetune_api.pod import RunConfig, TerminationMessage
from finetune_operator.kube import Invalid, KubeError
from finetune_operator.objects import EVENT, FINETUNEJOB, JOB, POD, SERVICE, Kind

from tests.integration.operator.rig import TIMEOUT_SECONDS, Rig

ADMISSION_POLICY = Kind(
    "admissionregistration.k8s.io/v1", "ValidatingAdmissionPolicy", "validatingadmissionpolicies"
)  # fmt: skip
ADMISSION_POLICY_BINDING = Kind(
    "admissionregistration.k8s.io/v1", "ValidatingAdmissionPolicyBinding", "validatingadmissionpolicybindings"
)  # fmt: skip


def read_run_config(job: dict[str, Any]) -> RunConfig:
    return RunConfig.model_validate(
        json.loads(job["spec"]["template"]["metadata"]["annotations"][Annotation.RUN_CONFIG])
    )


def make_checkpoint_entry(step: int, attempt: int = 1) -> dict[str, Any]:
    uri = f"s3://models/test/checkpoints/step-{step:08d}/a{attempt}-00000000"
    return {"step": step, "uri": uri, "healthy": True}


async def list_event_reasons(world: Rig, name: str = "run") -> list[str]:
    events = (await world.kube.list(EVENT, world.namespace)).items
    job_events = [e for e in events if e["regarding"]["kind"] == "FineTuneJob" and e["regarding"]["name"] == name]
    return [e["reason"] for e in sorted(job_events, key=lambda e: e["eventTime"])]


async def wait_for_event(world: Rig, reason: str) -> None:
    async with asyncio.timeout(TIMEOUT_SECONDS):
        while reason not in await list_event_reasons(world):  # noqa: ASYNC110 -- events are not watched
            await asyncio.sleep(0.05)


async def test_a_suspended_job_saves_and_resumes_from_the_saved_step(world: Rig) -> None:
    await world.create()
    await world.report_training("run-1", step=40, checkpoints=[make_checkpoint_entry(30)], latestCheckpoint=make_checkpoint_entry(30)["uri"])
    await world.wait_until("a checkpoint in the status", lambda: world.status().get("checkpoints"))
    world.kubelet.stop_message = TerminationMessage(code="Stopped", message="saved", step=42, committed_step=42)
    await world.patch({"suspend": True})
    status = await world.wait_for_phase("Suspended")
    assert world.condition("Suspended")["status"] == "True"
    assert world.condition("Reconciling") == {}
    assert status["attempts"][0]["reason"] == "Suspended"
    assert status["attempts"][0]["committedStep"] == 42
    assert status["attempts"][0]["exitCode"] == 75
    assert "failure" not in status
    assert status["attempts"][0].get("counted") is False
    await world.wait_for_no_jobs_and_pods()
    await world.patch({"suspend": False})
    job = await world.wait_for_job("run-2")
    run = read_run_config(job)
    assert (run.attempt, run.resume.mode, run.resume.expect_step) == (2, "auto", 42)
    await world.report_training("run-2", step=43, resumedFromStep=42)
    await world.wait_for_phase("Running")
    await world.kubelet.succeed(await world.wait_for_pod("run-2"))
    status = await world.wait_for_phase("Succeeded")
    assert [(a["number"], a["reason"]) for a in status["attempts"]] == [(1, "Suspended"), (2, "Succeeded")]
    assert status["attempts"][0]["stepsLost"] == 0
    assert status["restarts"] == 1
    await wait_for_event(world, "Succeeded")
    event_reasons = await list_event_reasons(world)
    assert [r for r in event_reasons if r in ("Suspended", "Resumed", "ResumedFromCheckpoint", "Succeeded")] == [
        "Suspended", "Resumed", "ResumedFromCheckpoint", "Succeeded",
    ]  # fmt: skip


async def test_a_job_that_is_created_suspended_starts_when_it_is_resumed(world: Rig) -> None:
    await world.create(suspend=True)
    await world.wait_for_phase("Suspended")
    assert world.jobs.items == {}
    await world.patch({"suspend": False})
    await world.wait_for_job("run-1")


async def test_a_cancelled_job_is_finished_and_has_no_failure(world: Rig) -> None:
    await world.create()
    await world.report_training("run-1")
    await world.wait_for_phase("Running")
    await world.patch({"cancel": True})
    status = await world.wait_for_phase("Cancelled")
    assert world.condition("Finished")["status"] == "True"
    assert world.condition("Succeeded")["reason"] == "Cancelled"
    assert world.condition("Stalled") == {}
    assert "failure" not in status
    await world.wait_for_no_jobs_and_pods()


async def test_a_data_error_fails_the_job_with_the_trainers_message(world: Rig) -> None:
    await world.create()
    pod = await world.wait_for_pod("run-1", 0, "Running")
    message = TerminationMessage(class_=FailureClass.DATA, code="RowMalformed", message="row 17: not JSON", hint="fix it", rank=0)
    await world.kubelet.end(pod, ExitCode.DATA_INVALID, message)
    status = await world.wait_for_phase("Failed")
    assert status["failure"] == {
        "class": "Data", "code": "RowMalformed", "message": "row 17: not JSON", "hint": "fix it", "rank": 0,
        "exitCode": 65, "node": "test-node",
    }  # fmt: skip
    assert world.condition("Stalled")["status"] == "True"
    assert world.condition("Stalled")["reason"] == "DataError"
    assert list(world.jobs.items) == ["run-1"]
    await wait_for_event(world, "Failed")


async def test_a_preempted_attempt_does_not_count_as_a_retry(world: Rig) -> None:
    await world.create(policy={"retries": 0})
    pod = await world.report_training("run-1")
    await world.wait_for_phase("Running")
    await world.kube.delete(POD, world.namespace, pod["metadata"]["name"], uid=pod["metadata"]["uid"], grace_seconds=30)
    await world.wait_for_job("run-2")
    attempt = await world.wait_for_ended_attempt(1)
    assert (attempt["reason"], attempt["counted"], attempt["exitCode"]) == ("Preempted", False, 75)
    assert (await world.wait_for_phase("Recovering"))["retriesUsed"] == 0


async def test_unknown_errors_count_as_retries_until_none_is_left(world: Rig) -> None:
    await world.create(policy={"retries": 2})
    for number in (1, 2, 3):
        pod = await world.wait_for_pod(f"run-{number}", 0, "Running")
        await world.kubelet.end(pod, 1, raw="Traceback\nKeyError: 'token=hf_abcdefghijklmnopqrstu'\n")
    status = await world.wait_for_phase("Failed")
    assert [a["counted"] for a in status["attempts"]] == [True, True, False]
    assert status["failure"]["code"] == "ExitCode1"
    assert "[redacted]" in status["failure"]["message"]
    assert "hf_abc" not in json.dumps(status)
    assert world.condition("Succeeded")["reason"] == "RetriesExhausted"
    await world.wait_until("the two newest Jobs", lambda: sorted(world.jobs.items) == ["run-2", "run-3"])


async def test_the_retry_counter_is_reset_after_progress(world: Rig) -> None:
    await world.create(policy={"retries": 1})
    for number, step in ((1, 0), (2, 20), (3, 0)):
        pod = await world.wait_for_pod(f"run-{number}", 0, "Running")
        message = TerminationMessage(code="Odd", message="odd", committed_step=step or None)
        await world.kubelet.end(pod, ExitCode.INTERNAL_ERROR, message)
        await world.wait_for_job(f"run-{number + 1}")
    await world.wait_for_ended_attempt(3)
    status = world.status()
    assert [a["counted"] for a in status["attempts"][:3]] == [True, False, True]
    assert status["retriesUsed"] == 1
    assert read_run_config(world.jobs.items["run-4"]).resume.expect_step == 20


async def test_out_of_memory_halves_the_batch_and_keeps_the_effective_batch(world: Rig) -> None:
    await world.create(training={"batchSizePerDevice": 4, "gradientAccumulationSteps": 2})
    pod = await world.wait_for_pod("run-1", 0, "Running")
    await world.kubelet.end(pod, ExitCode.OUT_OF_MEMORY, TerminationMessage(code="GpuOutOfMemory", message="no memory"))
    run = read_run_config(await world.wait_for_job("run-2"))
    assert (run.spec.training.batch_size_per_device, run.spec.training.gradient_accumulation_steps) == (2, 4)
    pod = await world.wait_for_pod("run-2", 0, "Running")
    await world.kubelet.end(pod, ExitCode.SIGKILL, reason="OOMKilled")
    run = read_run_config(await world.wait_for_job("run-3"))
    assert (run.spec.training.batch_size_per_device, run.spec.training.gradient_accumulation_steps) == (1, 8)
    assert run.before_adaptation == {"training.batchSizePerDevice": 4, "training.gradientAccumulationSteps": 2}
    await world.wait_for_ended_attempt(2)
    status = world.status()
    assert [a["reason"] for a in status["adaptations"]] == ["OutOfMemory", "OutOfMemory"]
    assert status["resolved"]["effectiveBatch"] == 8
    assert status["retriesUsed"] == 0


async def test_a_diverged_run_is_first_replayed_then_rolled_back_then_fails(world: Rig) -> None:
    await world.create(training={"learningRate": 0.001})
    checkpoints = [make_checkpoint_entry(step) for step in (10, 20, 30)]
    learning_rates, max_steps = [], []
    for number in (1, 2, 3, 4):
        job = await world.wait_for_job(f"run-{number}")
        run = read_run_config(job)
        learning_rates.append(run.spec.training.learning_rate)
        max_steps.append(run.resume.max_step)
        pod = await world.wait_for_pod(f"run-{number}", 0, "Running")
        message = TerminationMessage.model_validate({"code": "LossNotFinite", "message": "nan", "checkpoints": checkpoints, "step": 33})
        await world.kubelet.end(pod, ExitCode.TRAINING_DIVERGED, message)
    status = await world.wait_for_phase("Failed")
    assert learning_rates == [0.001, 0.001, 0.0005, 0.00025]
    assert max_steps == [None, None, 20, 10]
    assert status["failure"]["class"] == "Diverged"


async def test_the_attempt_after_a_rollback_starts_from_the_newest_checkpoint(world: Rig) -> None:
    """A rollback to an older checkpoint applies to one attempt only. If this attempt is preempted, the next attempt does not repeat the rollback."""
    await world.create(training={"learningRate": 0.001})
    checkpoints = [make_checkpoint_entry(step) for step in (10, 20, 30)]
    for number in (1, 2):
        pod = await world.wait_for_pod(f"run-{number}", 0, "Running")
        message = TerminationMessage.model_validate({"code": "LossNotFinite", "message": "nan", "checkpoints": checkpoints, "step": 33})
        await world.kubelet.end(pod, ExitCode.TRAINING_DIVERGED, message)
    assert read_run_config(await world.wait_for_job("run-3")).resume.max_step == 20
    later_checkpoints = [*checkpoints, make_checkpoint_entry(60, attempt=3)]
    saved_fields = {"code": "StoppedSaved", "checkpoints": later_checkpoints, "committedStep": 60, "checkpoint": later_checkpoints[-1]["uri"], "step": 60}
    stop_message = TerminationMessage.model_validate({**saved_fields, "resumedFromStep": 20})
    await world.kubelet.end(await world.wait_for_pod("run-3", 0, "Running"), ExitCode.PREEMPTED_SAVED, stop_message)
    resume = read_run_config(await world.wait_for_job("run-4")).resume
    assert (resume.max_step, resume.expect_step) == (None, 60)
    assert read_run_config(await world.wait_for_job("run-4")).spec.training.learning_rate == 0.0005


async def test_the_deadline_ends_a_running_job(world: Rig) -> None:
    await world.create(policy={"activeDeadlineSeconds": 1})
    await world.wait_for_job("run-1")
    status = await world.wait_for_phase("Failed")
    assert status["failure"]["code"] == "DeadlineExceeded"
    assert status["activeSeconds"] >= 1
    assert world.condition("Succeeded")["reason"] == "DeadlineExceeded"


async def test_the_ttl_deletes_jobs_and_pods_but_keeps_the_finetunejob(world: Rig) -> None:
    await world.create(policy={"ttlSecondsAfterFinished": 1})
    await world.kubelet.succeed(await world.wait_for_pod("run-1", 0, "Running"))
    await world.wait_for_phase("Succeeded")
    await world.wait_until("deletion of the Job", lambda: not world.jobs.items and not world.pods.items)
    await world.patch({"policy": {"ttlSecondsAfterFinished": 5}})
    await world.wait_until("observedGeneration 2", lambda: world.status()["observedGeneration"] == 2)
    assert {c["observedGeneration"] for c in world.status()["conditions"]} == {2}
    assert world.status()["phase"] == "Succeeded"


async def test_the_pod_of_a_lost_node_is_removed_and_replaced(world: Rig) -> None:
    await world.create(policy={"terminationGracePeriodSeconds": 1})
    pod = await world.report_training("run-1")
    await world.wait_for_phase("Running")
    world.kubelet.ends_deleted_pods = False
    await world.kube.delete(POD, world.namespace, pod["metadata"]["name"], uid=pod["metadata"]["uid"])
    await world.wait_for_job("run-2")
    attempt = await world.wait_for_ended_attempt(1)
    assert (attempt["reason"], attempt["counted"]) == ("NodeLost", False)
    await world.wait_until("the pod's removal", lambda: pod["metadata"]["name"] not in world.pods.items)
    assert {p["metadata"]["labels"][Label.ATTEMPT] for p in world.pods.items.values()} <= {"2"}


async def test_a_stalled_attempt_is_ended_and_counts_as_a_retry(world: Rig) -> None:
    await world.create(policy={"stallTimeoutSeconds": 30})
    await world.report_training("run-1", step=7, health={"secondsSinceStep": 31.0, "medianStepSeconds": 0.1})
    await world.wait_for_job("run-2")
    attempt = await world.wait_for_ended_attempt(1)
    assert (attempt["reason"], attempt["exitCode"], attempt["counted"]) == ("Stalled", 74, True)


async def test_a_job_with_an_unknown_pool_waits_and_lists_the_pools(world: Rig) -> None:
    await world.create(resources={"nodePool": "a100", "gpusPerNode": 1})
    await world.wait_for_phase("Pending")
    accepted_condition = world.condition("Accepted")
    assert (accepted_condition["status"], accepted_condition["reason"]) == ("False", "UnknownNodePool")
    assert "h100 (8 x nvidia.com/gpu), mig (7 x nvidia.com/mig-1g.10gb)" in accepted_condition["message"]
    assert world.condition("Reconciling")["status"] == "True"
    assert world.condition("Stalled") == {}
    assert world.jobs.items == {}


async def test_a_job_with_a_rejected_spec_fails_and_names_the_field(world: Rig) -> None:
    await world.create(method={"type": "spectrum"}, model={"source": "./local"})
    status = await world.wait_for_phase("Failed")
    accepted_condition = world.condition("Accepted")
    assert accepted_condition["status"] == "False"
    assert "spec.model.source" in accepted_condition["message"]
    assert status["failure"]["class"] == "User"
    assert world.condition("Stalled")["status"] == "True"


async def test_pods_get_the_node_selector_and_gpus_of_their_pool(world: Rig) -> None:
    await world.create(resources={"gpusPerNode": 2, "nodes": 2})
    job = await world.wait_for_job("run-1")
    pod = job["spec"]["template"]["spec"]
    assert pod["nodeSelector"] == {"gpu": "h100"}
    assert pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "2"
    status = await world.wait_until("a status", lambda: world.status().get("resolved"))
    assert status["nodePool"] == "h100"
    services = (await world.kube.list(SERVICE, world.namespace)).items
    assert [(s["metadata"]["name"], s["spec"]["clusterIP"]) for s in services] == [("run-1", "None")]
    run = read_run_config(job)
    assert (run.world.master_address, run.world.size) == ("run-1-0.run-1", 4)


async def test_one_failed_rank_ends_the_attempt_for_all_ranks(world: Rig) -> None:
    await world.create(resources={"nodes": 2})
    first_pod, second_pod = await world.wait_for_pod("run-1", 0, "Running"), await world.wait_for_pod("run-1", 1, "Running")
    message = TerminationMessage(code="Boom", message="boom", rank=1, origin=True)
    await world.kubelet.end(second_pod, ExitCode.INTERNAL_ERROR, message)
    await world.wait_for_job("run-2")
    attempt = await world.wait_for_ended_attempt(1)
    assert (attempt["reason"], attempt["exitCode"]) == ("InternalError", 70)
    assert first_pod["metadata"]["name"] != second_pod["metadata"]["name"]


async def test_two_gangs_share_neither_service_nor_rendezvous(world: Rig) -> None:
    worlds = {}
    for name in ("one", "two"):
        await world.create(name, resources={"nodes": 2})
        job = await world.wait_for_job(f"{name}-1")
        text = job["spec"]["template"]["metadata"]["annotations"][Annotation.RUN_CONFIG]
        worlds[name] = json.loads(text)["world"]
        assert job["spec"]["template"]["spec"]["subdomain"] == f"{name}-1"
        await world.wait_until(f"a status of {name}", lambda name=name: world.status(name).get("attempts"))
    assert worlds["one"]["masterAddress"] == "one-1-0.one-1"
    assert worlds["two"]["masterAddress"] == "two-1-0.two-1"
    assert worlds["one"]["rendezvousId"] != worlds["two"]["rendezvousId"]
    services = {s["metadata"]["name"]: s for s in (await world.kube.list(SERVICE, world.namespace)).items}
    assert {name: s["spec"]["selector"] for name, s in services.items()} == {
        "one-1": {"batch.kubernetes.io/job-name": "one-1"}, "two-1": {"batch.kubernetes.io/job-name": "two-1"},
    }  # fmt: skip
    for name in ("one", "two"):
        for index in range(2):
            await world.wait_for_pod(f"{name}-1", index, "Running")
    await world.kubelet.end(await world.wait_for_pod("one-1", 1), 65)
    await world.wait_for_phase("Failed", "one")
    for index in range(2):
        await world.kubelet.succeed(await world.wait_for_pod("two-1", index))
    assert (await world.wait_for_phase("Succeeded", "two"))["workers"]["total"] == 2


async def test_a_job_deleted_by_another_client_counts_as_a_retry(world: Rig) -> None:
    await world.create()
    await world.report_training("run-1")
    await world.wait_for_phase("Running")
    job = world.jobs.items["run-1"]
    await world.kube.delete(JOB, world.namespace, "run-1", uid=job["metadata"]["uid"])
    await world.wait_for_job("run-2")
    attempt = await world.wait_for_ended_attempt(1)
    assert (attempt["reason"], attempt["counted"]) == ("Preempted", True)
    assert "was deleted by another client" in attempt["message"]


async def test_a_job_of_another_owner_with_the_same_name_blocks_the_attempt(world: Rig) -> None:
    foreign_job = {
        "apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "run-1", "namespace": world.namespace},
        "spec": {"suspend": True, "template": {"spec": {"restartPolicy": "Never", "containers": [{"name": "x", "image": "x"}]}}},
    }  # fmt: skip
    created_job = (await world.kube.create(JOB, world.namespace, foreign_job)).body
    await world.create()
    await world.wait_until("conflict", lambda: world.condition("Reconciling").get("reason") == "ChildrenConflict")
    assert world.status()["phase"] == "Pending"
    assert world.jobs.items["run-1"]["metadata"]["uid"] == created_job["metadata"]["uid"]


async def test_the_status_of_an_unschedulable_job_quotes_the_scheduler(world: Rig) -> None:
    world.kubelet.starts_new_pods = False
    await world.create()
    pod = await world.wait_for_pod("run-1")
    message = "0/3 nodes are available: 3 Insufficient cpu."
    condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": message}
    await world.kubelet.write(pod, {"conditions": [condition]})
    await world.wait_until("the message", lambda: message in world.condition("PodsReady").get("message", ""))
    assert world.condition("PodsReady")["reason"] == "Unschedulable"
    await wait_for_event(world, "Unschedulable")


async def test_the_status_of_a_job_without_quota_quotes_the_api_server(world: Rig) -> None:
    quota = {
        "apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "none", "namespace": world.namespace},
        "spec": {"hard": {"pods": "0"}},
    }  # fmt: skip
    await world.kube.create(Kind("v1", "ResourceQuota", "resourcequotas"), world.namespace, quota)
    await world.create()
    await world.wait_until("quota", lambda: world.condition("PodsReady").get("reason") == "QuotaExceeded")
    assert "exceeded quota: none" in world.condition("PodsReady")["message"]
    assert world.status()["phase"] == "Starting"


async def wait_for_refusal(world: Rig) -> KubeError:
    """Create Jobs until the API server applies the new policy and refuses one. Return its error."""
    template = {"spec": {"restartPolicy": "Never", "containers": [{"name": "c", "image": "i"}]}}
    for number in itertools.count():
        body = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": f"probe-{number}"}}
        try:
            await world.kube.create(JOB, world.namespace, {**body, "spec": {"suspend": True, "template": template}})
        except KubeError as error:
            return error
        await asyncio.sleep(0.1)
    raise AssertionError("unreachable")


async def test_a_job_that_an_admission_policy_refuses_waits_and_quotes_the_policy(world: Rig) -> None:
    """The API server answers with status 422 in both cases: if an admission policy refuses a valid Job, and if the Job is invalid."""
    name = f"costs-{world.namespace}"
    namespace_match = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": world.namespace}}}
    rules = [{"apiGroups": ["batch"], "apiVersions": ["v1"], "operations": ["CREATE"], "resources": ["jobs"]}]
    policy = {"failurePolicy": "Fail", "matchConstraints": {**namespace_match, "resourceRules": rules}}
    policy["validations"] = [{"expression": "false", "message": "every Job names its cost centre"}]
    binding = {"policyName": name, "validationActions": ["Deny"]}
    created_objects = []
    for kind, spec in ((ADMISSION_POLICY, policy), (ADMISSION_POLICY_BINDING, binding)):
        body = {"apiVersion": kind.api_version, "kind": kind.kind, "metadata": {"name": name}, "spec": spec}
        created_objects.append((kind, (await world.kube.create(kind, "", body)).body["metadata"]["uid"]))
    try:
        assert isinstance(await wait_for_refusal(world), Invalid)
        await world.create()
        await world.wait_until("refused", lambda: world.condition("PodsReady").get("reason") == "ForbiddenByPolicy")
        assert "every Job names its cost centre" in world.condition("PodsReady")["message"]
        assert world.condition("Accepted")["status"] == "True"
    finally:
        for kind, uid in created_objects:
            await world.kube.delete(kind, "", name, uid=uid)
    await world.wait_for_job("run-1")


async def test_deleting_the_finetunejob_deletes_its_jobs_and_pods(world: Rig) -> None:
    created_object = await world.create()
    await world.wait_for_pod("run-1", 0, "Running")
    await world.kube.delete(FINETUNEJOB, world.namespace, "run", uid=created_object["metadata"]["uid"], foreground=False)
    await world.wait_until("nothing left", lambda: not world.jobs.items and not world.pods.items and not world.ftjs.items)
