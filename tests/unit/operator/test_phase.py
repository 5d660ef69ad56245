"""The phase of a job and the reason that `kubectl get` prints next to the phase."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from finetune_api.names import Phase, Reason
from finetune_api.pod import TerminationMessage
from finetune_api.status import FineTuneJobStatus
from finetune_operator.decide import decide
from finetune_operator.facts import Facts
from finetune_operator.plan import ActionResult
from finetune_operator.policies.blocking import BlockingCondition
from finetune_operator.report import compute_status

from tests.unit.operator.samples import at, end_pod, facts, job, pod, report, spec, status

STARTED_ATTEMPT = {"number": 1, "startTime": "2026-11-21T12:00:00Z"}
RUNNING_STATUS = {"attempt": 1, "startTime": "2026-11-21T12:00:00Z", "attempts": [STARTED_ATTEMPT]}
PREEMPTED_ATTEMPT = {**STARTED_ATTEMPT, "endTime": "2026-11-21T12:01:00Z", "reason": "Preempted"}


def compute_status_of(job_facts: Facts, result: ActionResult | None = None) -> FineTuneJobStatus:
    return compute_status(job_facts, decide(job_facts), result or ActionResult())


@pytest.mark.parametrize(
    ("stage", "step", "attempt", "phase"),
    [
        ("starting", 0, 1, Phase.STARTING),
        ("downloading", 0, 1, Phase.STARTING),
        ("checking", 0, 1, Phase.VALIDATING),
        ("training", 3, 1, Phase.RUNNING),
        ("saving", 3, 1, Phase.RUNNING),
        ("evaluating", 3, 1, Phase.RUNNING),
        ("evaluating", 10, 1, Phase.EVALUATING),
        ("merging", 10, 1, Phase.UPLOADING),
        ("comparing", 10, 1, Phase.EVALUATING),
        ("benchmarking", 10, 1, Phase.EVALUATING),
        ("verifying", 10, 1, Phase.EVALUATING),
        ("uploading", 10, 1, Phase.UPLOADING),
        ("reporting", 10, 1, Phase.UPLOADING),
        ("downloading", 0, 2, Phase.RECOVERING),
        ("training", 4, 2, Phase.RUNNING),
    ],
)
def test_phase_follows_the_stage_that_the_pod_reports(stage: str, step: int, attempt: int, phase: Phase) -> None:
    status_fields: dict[str, Any] = {**RUNNING_STATUS, "attempt": attempt}
    if attempt == 2:
        status_fields["attempts"] = [PREEMPTED_ATTEMPT, {"number": 2, "startTime": "2026-11-21T12:02:00Z"}]
    received_report = report(stage=stage, attempt=attempt, progress={"step": step, "totalSteps": 10})
    pods = [pod(attempt, uid="pod-1-0")]
    new_status = compute_status_of(facts(status=status(**status_fields), jobs=[job(attempt)], pods=pods, last_report=received_report))
    assert new_status.phase == phase


@pytest.mark.parametrize("stage", ["evaluating", "comparing"])
def test_job_without_training_is_evaluating(stage: str) -> None:
    job_facts = facts(status=status(**RUNNING_STATUS), jobs=[job()], pods=[pod()], last_report=report(stage=stage, progress={}))
    assert compute_status_of(job_facts).phase is Phase.EVALUATING


def test_phase_stays_running_after_a_restart_of_the_operator() -> None:
    status_fields = {**RUNNING_STATUS, "attempts": [{**STARTED_ATTEMPT, "lastStep": 4}]}
    new_status = compute_status_of(facts(status=status(**status_fields), jobs=[job()], pods=[pod()]))
    assert new_status.phase is Phase.RUNNING


PULLING_POD = pod(phase="Pending", is_ready=False, waiting_reason="ImagePullBackOff", waiting_message="no")
UNSCHEDULABLE_POD = pod(phase="Pending", is_ready=False, node="", unschedulable_message="0/3 nodes")
DEADLINE_SPEC = spec(policy={"activeDeadlineSeconds": 9})
QUEUED_SPEC = spec(placement={"queueName": "q"})
FAILED_JOB = job(failed_at=at(60), failed_reason="BackoffLimitExceeded")
RETRIED_STATUS = status(
    attempt=2, startTime="2026-11-21T12:00:00Z", attempts=[PREEMPTED_ATTEMPT, {"number": 2, "startTime": "2026-11-21T12:02:00Z"}]
)
TRAINING_REPORT = report(stage="training", progress={"step": 3, "totalSteps": 10})
DISK_FULL_REPORT = report(health={"checkpointProblem": "StagingDiskFull: the checkpoint of step 5 was skipped"})


def make_failed_facts(code: str) -> Facts:
    message = TerminationMessage.model_validate({"class": "Data", "code": code, "message": "row 17"})
    return facts(status=status(**RUNNING_STATUS), jobs=[FAILED_JOB], pods=[end_pod(pod(), 65, message)], now=at(61))


REASON_CASES: dict[str, tuple[Facts, ActionResult | None, str]] = {
    "running": (facts(status=status(**RUNNING_STATUS), jobs=[job()], pods=[pod()], last_report=TRAINING_REPORT), None, "-"),
    "starting": (facts(status=status(**RUNNING_STATUS), jobs=[job()], pods=[pod(is_ready=False)]), None, "PodsNotReady"),
    "starting with ready pods": (facts(status=status(**RUNNING_STATUS), jobs=[job()], pods=[pod()]), None, "-"),
    "created": (facts(), ActionResult(created_job=job()), "PodsNotReady"),
    "queued": (facts(spec=QUEUED_SPEC, jobs=[job(is_suspended=True, started_at=None, queue="q")]), None, "Queued"),
    "image": (facts(status=status(**RUNNING_STATUS), jobs=[job()], pods=[PULLING_POD]), None, "ImagePullFailed"),
    "no node": (facts(status=status(**RUNNING_STATUS), jobs=[job()], pods=[UNSCHEDULABLE_POD]), None, "Unschedulable"),
    "quota": (facts(), ActionResult(blocking_condition=BlockingCondition(Reason.QUOTA_EXCEEDED, "no")), "QuotaExceeded"),
    "unknown pool": (facts(spec=spec(resources={"nodePool": "x", "gpusPerNode": 1})), None, "UnknownNodePool"),
    "being suspended": (facts(spec=spec(suspend=True), status=status(**RUNNING_STATUS), jobs=[job()], pods=[pod()]), None, "-"),
    "deadline": (facts(spec=DEADLINE_SPEC, status=status(**RUNNING_STATUS), jobs=[job()], pods=[pod()], now=at(10)), None, "DeadlineExceeded"),
    "suspended": (facts(spec=spec(suspend=True)), None, "-"),
    "attempt failed": (facts(status=status(**RUNNING_STATUS), jobs=[FAILED_JOB], pods=[end_pod(pod(), 71)], now=at(61)), None, "OutOfMemory"),
    "recovering": (facts(status=RETRIED_STATUS, jobs=[job(2)], pods=[pod(2, is_ready=False)]), None, "Preempted"),
    "recovering without a node": (facts(status=RETRIED_STATUS, jobs=[job(2)], pods=[replace(UNSCHEDULABLE_POD, attempt=2)]), None, "Unschedulable"),
    "disk full": (facts(status=status(**RUNNING_STATUS), jobs=[job()], pods=[pod()], last_report=DISK_FULL_REPORT), None, "StagingDiskFull"),
    "start timeout": (facts(status=status(**RUNNING_STATUS), jobs=[job()], pods=[pod(is_ready=False)], now=at(2000)), None, "StartTimeout"),
    "failed": (make_failed_facts("RowMalformed"), None, "RowMalformed"),
    "failed with an odd code": (make_failed_facts("a code with spaces"), None, "DataError"),
    "succeeded": (facts(status=status(**RUNNING_STATUS), jobs=[job(completed_at=at(60))], pods=[end_pod(pod(), 0)]), None, "-"),
    "cancelled": (facts(spec=spec(cancel=True)), None, "-"),
}  # fmt: skip


@pytest.mark.parametrize("case", REASON_CASES)
def test_reason_shows_why_a_job_waits_or_failed(case: str) -> None:
    job_facts, result, reason = REASON_CASES[case]
    assert compute_status_of(job_facts, result).reason == reason
