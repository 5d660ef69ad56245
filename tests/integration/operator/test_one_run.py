"""A complete job: the operator creates a Job, its pod trains, and the status shows progress and success."""

from __future__ import annotations

import json

from finetune_api.names import Annotation
from finetune_api.pod import RunConfig, TerminationMessage
from finetune_operator.objects import FINETUNEJOB

from tests.integration.operator.rig import Rig


async def test_a_job_runs_from_its_creation_to_success(world: Rig) -> None:
    created_object = await world.create()
    job = await world.wait_for_job("run-1")
    assert job["metadata"]["ownerReferences"][0]["uid"] == created_object["metadata"]["uid"]
    text = job["spec"]["template"]["metadata"]["annotations"][Annotation.RUN_CONFIG]
    run = RunConfig.model_validate(json.loads(text))
    assert run.storage.uri == f"s3://models/test/{world.namespace}/run/{created_object['metadata']['uid']}"
    await world.report_training("run-1", step=40)
    await world.wait_until("progress", lambda: (world.status().get("progress") or {}).get("display") == "40/100 (40%)")
    status = await world.wait_for_phase("Running")
    assert status["workers"] == {"ready": 1, "total": 1, "display": "1/1"}
    pod = await world.wait_for_pod("run-1")
    await world.kubelet.succeed(pod)
    status = await world.wait_for_phase("Succeeded")
    assert status["output"]["uri"].startswith("s3://models/test/model/")
    assert status["progress"]["display"] == "100/100 (100%)"
    statuses = {c["type"]: c["status"] for c in status["conditions"]}
    assert statuses == {
        "Accepted": "True", "PodsReady": "False", "Suspended": "False", "CheckpointsHealthy": "Unknown",
        "Succeeded": "True", "Finished": "True",
    }  # fmt: skip
    assert status["observedGeneration"] == 1
    assert [a["reason"] for a in status["attempts"]] == ["Succeeded"]


async def test_a_job_that_is_created_again_adopts_the_result_of_its_preparation(world: Rig) -> None:
    """The trainer decides whether a result can be adopted (tests/pod/test_existing_result.py). In this test, the operator acts on the trainer's termination
    message.
    """
    policy = {"onExistingResult": "adopt"}
    first_object = await world.create(policy=policy)
    await world.kubelet.end(await world.wait_for_pod("run-prepare1", 0, "Running"), 0, TerminationMessage(exit_code=0))
    await world.kubelet.succeed(await world.wait_for_pod("run-1", 0, "Running"))
    trained_status = await world.wait_for_phase("Succeeded")
    await world.kube.delete(FINETUNEJOB, world.namespace, "run", uid=first_object["metadata"]["uid"], foreground=False)
    await world.wait_until("the deletion of all Jobs", lambda: not world.jobs.items and not world.ftjs.items)
    await world.wait_for_no_jobs_and_pods()

    second_object = await world.create(policy=policy)
    output = trained_status["output"] | {"adoptedUid": first_object["metadata"]["uid"]}
    message = TerminationMessage.model_validate({"exitCode": 0, "output": output, "metrics": trained_status["metrics"], "step": 100})
    await world.kubelet.end(await world.wait_for_pod("run-prepare1", 0, "Running"), 0, message)
    adopted_status = await world.wait_for_phase("Succeeded")
    assert (adopted_status["output"], adopted_status["metrics"], adopted_status["reason"]) == (output, trained_status["metrics"], "ExistingResultAdopted")
    assert (adopted_status["attempts"], adopted_status.get("attempt"), adopted_status["preparation"]["reason"]) == ([], None, "ExistingResultAdopted")
    owner_uids = {name: body["metadata"]["ownerReferences"][0]["uid"] for name, body in world.jobs.items.items()}
    assert owner_uids == {"run-prepare1": second_object["metadata"]["uid"]}
