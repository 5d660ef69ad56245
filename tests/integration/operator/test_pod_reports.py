"""A pod that reports values that the API server would reject does not block suspend, cancel and the deadline."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.integration.operator.rig import Rig

IMPOSSIBLE_VALUES: dict[str, Any] = {
    "progress": {"step": 2**63, "totalSteps": 100, "updateTime": "0001-01-01T00:00:00Z"},
    "metrics": {"trainLoss": float("nan"), "gradNorm": 1.0},
    "detail": "\x1b[2Jcleared",
    "resumedFromStep": -(2**70),
    "checkpoints": [
        {"step": 2**63, "uri": "s3://b/x"},
        {"step": 30, "uri": "s3://b/checkpoints/step-00000030/a1-00000000", "time": "9999-12-31T23:59:59Z"},
    ],
    "latestCheckpoint": "s3://b/\x1b]0;title",
    "health": {"medianStepSeconds": 1e300, "checkpointProblem": "StagingDiskFull: \x1b[31m" + "x" * 5000},
}


@pytest.mark.parametrize(
    ("change", "phase"),
    [({"suspend": True}, "Suspended"), ({"cancel": True}, "Cancelled"), ({"policy": {"activeDeadlineSeconds": 1}}, "Failed")],
    ids=["suspend", "cancel", "deadline"],
)
async def test_a_job_whose_pod_reports_impossible_values_can_still_be_ended(world: Rig, change: dict[str, Any], phase: str) -> None:
    await world.create()
    await world.report_training("run-1", **IMPOSSIBLE_VALUES)
    status = await world.wait_until("the checkpoint", lambda: world.status() if world.status().get("checkpoints") else None)
    assert status["progress"] == {"totalSteps": 100, "display": "-", "eta": "-"}
    assert status["metrics"] == {"gradNorm": 1}
    assert [entry["step"] for entry in status["checkpoints"]] == [30]
    assert "time" not in status["checkpoints"][0]
    assert world.condition("CheckpointsHealthy")["reason"] == "StagingDiskFull"
    assert "\\u001b" not in json.dumps(status)
    await world.patch(change)
    await world.wait_for_phase(phase)
    assert world.condition("Suspended" if phase == "Suspended" else "Finished")["status"] == "True"
