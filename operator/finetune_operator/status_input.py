"""Data type: all values from which a new status is computed."""

from __future__ import annotations

from dataclasses import dataclass

from finetune_api.names import Reason
from finetune_api.pod import ProgressReport, TerminationMessage
from finetune_api.status import FineTuneJobStatus

from finetune_operator.facts import Facts
from finetune_operator.plan import ActionResult, Plan, Situation
from finetune_operator.policies.blocking import BlockingCondition
from finetune_operator.views import JobView


@dataclass(frozen=True)
class StatusInput:
    """The facts, the plan and the result of the plan's actions. The properties are values that several fields of the status need."""

    facts: Facts
    plan: Plan
    result: ActionResult

    @property
    def old_status(self) -> FineTuneJobStatus:
        """The stored status."""
        return self.facts.job.status

    @property
    def current_job(self) -> JobView | None:
        """The Job of the current attempt, even if this reconcile has just created it."""
        return self.result.created_job or self.facts.current_job

    @property
    def is_queued(self) -> bool:
        """Whether the Job waits in a queue. While the Job waits, a queue such as Kueue sets the Job's `spec.suspend` to true."""
        job = self.current_job
        return job is not None and job.is_suspended and not job.is_finished

    @property
    def is_suspended(self) -> bool:
        """Whether the user suspended the job and all pods have ended."""
        is_between_attempts = self.plan.situation is Situation.ENDED and self.plan.job_end is None
        return self.facts.is_suspend_requested and (self.plan.situation is Situation.SUSPENDED or is_between_attempts)

    @property
    def ready_pod_count(self) -> int:
        """Number of ready pods of the current attempt."""
        return sum(pod.is_ready for pod in self.facts.active_pods)

    @property
    def blocking_condition(self) -> BlockingCondition | None:
        """Why pods cannot be created or do not start, or None if nothing blocks them."""
        return self.result.blocking_condition or self.plan.blocking_condition

    @property
    def termination_reason(self) -> Reason | None:
        """Why the operator is ending the attempt, or None if the attempt continues."""
        return self.plan.termination.reason if self.plan.termination else self.facts.termination_reason

    @property
    def last_report(self) -> ProgressReport | None:
        """The last progress report of the attempt. A queue may have replaced the pod that sent the report."""
        return self.facts.last_report.report if self.facts.last_report else None

    @property
    def termination_message(self) -> TerminationMessage | None:
        """Rank 0's termination message if the attempt has ended, or the preparation's message if the job adopts an earlier result. Otherwise None."""
        if self.plan.attempt_end is None:
            return self.plan.preparation_message if self.adopts_result else None
        return self.plan.attempt_end.termination_message

    @property
    def adopts_result(self) -> bool:
        """Whether the job ends with the result of an earlier job, without training."""
        return self.plan.job_end is not None and self.plan.job_end.reason is Reason.EXISTING_RESULT_ADOPTED
