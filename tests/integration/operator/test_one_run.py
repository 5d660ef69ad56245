"""A whole run: the operator creates a Job, its pod trains, and the status shows progress and success."""

from __future__ import annotations

import json

from finetune_api.names import Annotation
from finetune_api.pod import RunConfig

from tests.integration.operator.rig import Rig


async def test_job_runs_from_apply_to_success(world: Rig) -> None:
    created = await world.create()
    job = await world.job("run-1")
    assert job["metadata"]["ownerReferences"][0]["uid"] == created["metadata"]["uid"]
    text = job["spec"]["template"]["metadata"]["annotations"][Annotation.RUN_CONFIG]
    run = RunConfig.model_validate(json.loads(text))
    assert run.storage.uri == f"s3://models/test/{world.namespace}/run/{created['metadata']['uid']}"
    await world.report_training("run-1", step=40)
    await world.wait_until("progress", lambda: (world.status().get("progress") or {}).get("display") == "40/100 (40%)")
    status = await world.wait_for_phase("Running")
    assert status["workers"] == {"ready": 1, "total": 1, "display": "1/1"}
    pod = await world.pod("run-1")
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
