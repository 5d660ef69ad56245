"""The input of a status: the facts, the plan, and the result of the plan's actions."""

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
    """Facts, plan and result, and values that several status fields are computed from."""

    facts: Facts
    plan: Plan
    result: ActionResult

    @property
    def old(self) -> FineTuneJobStatus:
        """The stored status."""
        return self.facts.job.status

    @property
    def current_job(self) -> JobView | None:
        """The Job of the current attempt, also if this reconcile created it."""
        return self.result.created_job or self.facts.current_job

    @property
    def is_queued(self) -> bool:
        """Whether a queue holds the Job."""
        job = self.current_job
        return job is not None and job.is_suspended and not job.is_finished

    @property
    def is_suspended(self) -> bool:
        """Whether the user suspended the job and no pod is left."""
        between_attempts = self.plan.situation is Situation.ENDED and self.plan.finish is None
        return self.facts.suspend_requested and (self.plan.situation is Situation.SUSPENDED or between_attempts)

    @property
    def ready_pods(self) -> int:
        """Number of pods that are ready."""
        return sum(pod.is_ready for pod in self.facts.active_pods)

    @property
    def blocking_condition(self) -> BlockingCondition | None:
        """Why pods are missing."""
        return self.result.blocking_condition or self.plan.blocking_condition

    @property
    def termination_reason(self) -> Reason | None:
        """Why the operator is ending the attempt; None: the attempt continues."""
        return self.plan.termination.reason if self.plan.termination else self.facts.termination_reason

    @property
    def last_report(self) -> ProgressReport | None:
        """The last progress report of the attempt, also of a pod that a queue has replaced."""
        return self.facts.last_report.report if self.facts.last_report else None

    @property
    def termination_message(self) -> TerminationMessage | None:
        """Rank 0's termination message, once the attempt has ended."""
        return self.plan.attempt_end.termination_message if self.plan.attempt_end else None
