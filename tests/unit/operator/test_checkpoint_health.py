"""What a pod says about its checkpoints, as a condition: which of three things is wrong, in the pod's words."""

from __future__ import annotations

import pytest
from finetune_api.names import Condition
from finetune_operator.decide import decide
from finetune_operator.plan import ActionResult
from finetune_operator.report import report as compute

from tests.unit.operator.samples import facts, job, pod, report, status
from tests.unit.operator.test_report import RUNNING


@pytest.mark.parametrize(
    ("problem", "truth", "reason"),
    [
        ("CheckpointDamaged: s3://b/x/optimizer.pt is damaged", "False", "CheckpointDamaged"),
        ("StagingDiskFull: the checkpoint of step 5 was skipped", "False", "StagingDiskFull"),
        ("StorageFailed: step 5 was not stored: it answered with 503", "False", "CheckpointNotStored"),
        ("StagingFailed: step 5: Not a directory", "False", "CheckpointNotStored"),
        (None, "True", "CheckpointCommitted"),
    ],
)
def test_a_problem_is_a_condition_in_the_pods_words(problem: str | None, truth: str, reason: str) -> None:
    health = {"healthy": problem is None, "checkpointProblem": problem}
    marks = [{"step": 5, "uri": "s3://b/5"}]
    said = report(health=health, checkpoints=marks, latestCheckpoint="s3://b/5")
    found = facts(known=status(**RUNNING), jobs=[job()], pods=[pod()], last_report=said)
    conditions = {one.type: one for one in compute(found, decide(found), ActionResult()).conditions}
    one = conditions[Condition.CHECKPOINTS_HEALTHY]
    assert (one.status, one.reason) == (truth, reason)
    assert problem is None or one.message == problem
